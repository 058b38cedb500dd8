"""A run's directories."""

import contextlib
import tempfile
from pathlib import Path

from fastlm.checkpoint import checkpoint_files
from fastlm.config import TrainingConfig
from fastlm.errors import OutputError
from fastlm.run.log import metrics_path


class RunDirectory:
    """Makes and checks where a run writes; takes back empty directories when its start fails."""

    def __init__(self, cfg: TrainingConfig, *, resuming: bool):
        self.cfg, self.resuming = cfg, resuming
        self._made: list[Path] = []
        self._begun = False

    def __enter__(self) -> "RunDirectory":
        """Raises OutputError if the place cannot be written or holds another run."""
        cfg = self.cfg
        try:
            found = checkpoint_files(cfg.ckpt_dir, cfg.ckpt_save_prefix)
        except OSError as error:
            raise _unusable("ckpt_dir", cfg.ckpt_dir, error) from error
        if found and not (self.resuming or cfg.overwrite):
            raise OutputError(
                f"{cfg.ckpt_dir} holds the checkpoints of another run ({found[0].name}); "
                f"--resume {cfg.target_dir} continues it, --overwrite starts anew in its place"
            )
        for name in ("target_dir", "ckpt_dir", "log_dir"):
            path = Path(getattr(cfg, name))
            try:
                # Noted first: mkdir may fail when it has made some of them.
                self._made += reversed([p for p in (path, *path.parents) if not p.exists()])
                path.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=path):  # permissions alone do not tell
                    pass
            except OSError as error:
                self._take_back()
                raise _unusable(name, path, error) from error
        return self

    def begin(self) -> None:
        """The run starts: from now on its files stay. With --overwrite the old run's go now."""
        self._begun = True
        if self.cfg.overwrite and not self.resuming:
            prefix = self.cfg.ckpt_save_prefix
            old = checkpoint_files(self.cfg.ckpt_dir, prefix)
            logs = Path(self.cfg.log_dir)
            for path in (
                *old,
                self.checkpoint_path("model"),
                metrics_path(logs, self.cfg.log_save_prefix),
                logs / f"{self.cfg.log_save_prefix}.log",
            ):
                path.unlink(missing_ok=True)

    def checkpoint_path(self, name: str) -> Path:
        """{ckpt_dir}/{prefix}_{name}.pt; name: a step, "final" or "model"."""
        return Path(self.cfg.ckpt_dir) / f"{self.cfg.ckpt_save_prefix}_{name}.pt"

    def __exit__(self, *exception) -> None:
        if not self._begun:
            self._take_back()

    def _take_back(self) -> None:
        for path in reversed(self._made):
            with contextlib.suppress(OSError):  # not empty: somebody else's files
                path.rmdir()


def _unusable(name: str, path: str | Path, error: OSError) -> OutputError:
    return OutputError(
        f"{name}={path}: cannot be written ({error.strerror}); choose another with "
        f"--{name.replace('_', '-')}"
    )
