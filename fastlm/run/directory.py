"""A run's directories: made, locked, checked, and taken back when the run does not start."""

import contextlib
import os
import re
import secrets
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from fastlm.checkpoint import (
    CheckpointFile,
    checkpoint_files,
    list_checkpoints,
    remove_stale_temporaries,
)
from fastlm.config import TrainingConfig
from fastlm.data.staging import sync
from fastlm.errors import OutputError, UserError
from fastlm.parallel.commit import is_sharded, remove_sharded
from fastlm.parallel.world import ALONE, World
from fastlm.run.commands import resume_flags
from fastlm.run.lock import DirectoryLock
from fastlm.run.log import metrics_path
from fastlm.run.resume import Resumed, belongs

_KEPT = r"\d+|final|model"  # behind the prefix: what a run leaves for good


class RunDirectory:
    """Makes, locks and checks where a run writes; takes back empty directories when it fails.
    Rank 0 does it for all.

    cfg: its directories are final inside the `with`: with `new_name` a target_dir that is there
        already gets a counter, so that runs started in one second have a directory each.
    resumed: the checkpoint that the run goes on from.
    """

    def __init__(
        self,
        cfg: TrainingConfig,
        resumed: Resumed | None = None,
        *,
        new_name: bool = False,
        world: World = ALONE,
    ):
        self.cfg, self.resumed, self.new_name, self.world = cfg, resumed, new_name, world
        # A resumed run stays itself.
        self.run_id = (resumed and resumed.run_id) or secrets.token_hex(8)
        self._made: list[Path] = []
        self._locks: list[DirectoryLock] = []
        self._begun = False

    def __enter__(self) -> "RunDirectory":
        """Raises OutputError if the place cannot be written, holds another run, or has a writer."""
        self.cfg, self.run_id = self.world.decide(self._take)
        return self

    def _take(self) -> tuple[TrainingConfig, str]:
        try:
            if self.new_name:
                self._claim_name()
            # Before anything is made: a run that may not write there leaves nothing.
            self.check_owner()
            for name in ("target_dir", "ckpt_dir", "log_dir"):
                self._make(name)
            self._lock()
            self.check_owner()  # again: until it was locked, another run may have written
            self._check_nothing_new()
            remove_stale_temporaries(self.cfg.ckpt_dir)
        except BaseException:
            self._take_back()
            raise
        return self.cfg, self.run_id

    def begin(self) -> None:
        """The run starts: from now on its files stay. With --overwrite the old run's go now; those
        of later steps than a resumed run's are renamed."""
        self._begun = True
        self.world.decide(self._begin)

    def _begin(self) -> None:
        if self.resumed is not None:
            resumed, directory = self.resumed, self.cfg.ckpt_dir
            self._retire(resumed.step, lambda file: belongs(file, resumed, directory))
        elif self.cfg.overwrite:
            self._remove_old_run()

    def checkpoint_path(self, name: str) -> Path:
        """{ckpt_dir}/{prefix}_{name}.pt, or .dcp, a directory, where each process has a part.

        name: a step, "final" or "model"."""
        is_sharded = self.cfg.parallel == "fsdp" and self.world.size > 1 and name != "model"
        suffix = "dcp" if is_sharded else "pt"
        return Path(self.cfg.ckpt_dir) / f"{self.cfg.ckpt_save_prefix}_{name}.{suffix}"

    def __exit__(self, *exception) -> None:
        if self._begun:
            self._unlock()
        else:
            self._take_back()

    def _claim_name(self) -> None:
        """Makes the first of target_dir, target_dir-2, target_dir-3, … that is not there."""
        wanted, count = self.cfg.target_dir, 1
        try:
            self._make_parents(Path(wanted).parent)
            while True:
                target_dir = Path(wanted if count == 1 else f"{wanted}-{count}")
                try:
                    target_dir.mkdir()  # by one run only, however many try
                    break
                except FileExistsError:
                    count += 1
                except FileNotFoundError:  # a run that did not start has taken the parent back
                    self._make_parents(target_dir.parent)
        except OSError as error:
            raise _unusable("target_dir", wanted, error) from error
        self._made.append(target_dir)
        moved = {"target_dir": str(target_dir)}
        for name in ("ckpt_dir", "log_dir"):
            below = os.path.relpath(getattr(self.cfg, name), wanted)
            if not below.startswith(os.pardir):  # not one of its own
                moved[name] = os.path.join(str(target_dir), below)
        self.cfg = replace(self.cfg, **moved)

    def _make_parents(self, path: Path) -> None:
        # Noted first: mkdir may fail when it has made some of them.
        missing = [p for p in (path, *path.parents) if not p.exists()]
        self._made += [p for p in reversed(missing) if p not in self._made]
        path.mkdir(parents=True, exist_ok=True)

    def _make(self, name: str) -> None:
        path = Path(getattr(self.cfg, name))
        try:
            self._make_parents(path)
            with tempfile.TemporaryFile(dir=path):  # permissions alone do not tell
                pass
        except OSError as error:
            raise _unusable(name, path, error) from error

    def _lock(self) -> None:
        """One writer: target_dir itself holds no files, and may be another run's too."""
        paths = {os.path.realpath(path): path for path in (self.cfg.ckpt_dir, self.cfg.log_dir)}
        for path in paths.values():
            lock = DirectoryLock(Path(path))
            try:
                lock.acquire()
            except OSError as error:
                if isinstance(error, UserError):
                    raise
                raise _unusable("target_dir", path, error) from error
            self._locks.append(lock)

    def check_owner(self) -> None:
        """Raises OutputError if the checkpoints in ckpt_dir are another run's."""
        cfg, resumed = self.cfg, self.resumed
        try:
            found = list_checkpoints(cfg.ckpt_dir, cfg.ckpt_save_prefix, _KEPT)
        except OSError as error:
            raise _unusable("ckpt_dir", cfg.ckpt_dir, error) from error
        if resumed is None:
            if found and not cfg.overwrite:
                raise OutputError(
                    f"{cfg.ckpt_dir} holds the checkpoints of another run ({found[0].path.name}); "
                    f"{resume_flags(cfg)} continues it, --overwrite starts anew in its place"
                )
            return
        others = [file for file in found if not belongs(file, resumed, cfg.ckpt_dir)]
        if others:
            raise OutputError(
                f"{cfg.ckpt_dir} holds the checkpoints of another run ({others[0].path.name}) than "
                f"{resumed.path}; resume that run, or choose another --target-dir"
            )

    def _check_nothing_new(self) -> None:
        """Raises OutputError if another process, now ended, saved what this would replace."""
        directory, resumed = self.cfg.ckpt_dir, self.resumed
        if resumed and os.path.realpath(directory) == os.path.realpath(resumed.path.parent):
            names = {path.name for path in checkpoint_files(directory)}
            if appeared := sorted(names - resumed.beside):
                raise OutputError(
                    f"{directory}: another process has saved {appeared[0]} while this one "
                    f"started; give the command again"
                )

    def retire_after(self, step: int) -> None:
        """The run goes back to `step`: renames its checkpoints of later ones."""
        self.world.decide(lambda: self._retire(step, lambda file: file.run_id == self.run_id))

    def _retire(self, step: int, is_ours: Callable[[CheckpointFile], bool]) -> None:
        """A bare --resume takes the branch that now begins."""
        directory, renamed = Path(self.cfg.ckpt_dir), []
        for file in list_checkpoints(directory, self.cfg.ckpt_save_prefix, _KEPT):
            if file.step <= step or not is_ours(file):
                continue
            retired = file.path.with_name(f"{file.path.name}_abandoned")
            count = 1
            while os.path.lexists(retired):
                count += 1
                retired = file.path.with_name(f"{file.path.name}_abandoned{count}")
            try:
                file.path.rename(retired)
            except OSError as error:
                raise OutputError(
                    f"{file.path}: cannot be renamed to {retired.name} ({error.strerror})"
                ) from error
            renamed.append(file.path.name)
        if renamed:
            sync(directory)
            print(
                f"[resume] {directory}: {', '.join(reversed(renamed))} went on from step "
                f"{step} another way; renamed to …_abandoned"
            )

    def _remove_old_run(self) -> None:
        directory, logs = Path(self.cfg.ckpt_dir), Path(self.cfg.log_dir)
        form = (
            rf"{re.escape(self.cfg.ckpt_save_prefix)}_({_KEPT}|emergency)\.(pt|dcp)(_abandoned\d*)?"
        )
        old = [path for path in directory.iterdir() if re.fullmatch(form, path.name)]
        for path in filter(is_sharded, old):
            remove_sharded(path)
        for path in (
            *(path for path in old if path.is_symlink() or not path.is_dir()),
            metrics_path(logs, self.cfg.log_save_prefix),
            logs / f"{self.cfg.log_save_prefix}.log",
        ):
            path.unlink(missing_ok=True)

    def _unlock(self) -> None:
        while self._locks:
            self._locks.pop().release()

    def _take_back(self) -> None:
        self._unlock()
        for path in reversed(self._made):
            with contextlib.suppress(OSError):  # not empty: somebody else's files
                path.rmdir()


def _unusable(name: str, path: str | Path, error: OSError) -> OutputError:
    return OutputError(
        f"{name}={path}: cannot be written ({error.strerror}); choose another with "
        f"--{name.replace('_', '-')}"
    )
