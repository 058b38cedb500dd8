"""Checkpoints from one kind to the other: python -m fastlm.convert SRC DST"""

import argparse
import sys
from pathlib import Path

from fastlm.checkpoint_file import write_checkpoint
from fastlm.checkpoint_reading import mapped_checkpoint, read_checkpoint
from fastlm.errors import CheckpointError, OutputError, run_command
from fastlm.parallel.commit import SUFFIX, is_sharded


def convert(src: Path, dst: Path) -> None:
    """Writes the checkpoint `src`, a file or a directory ....dcp, to `dst` as the other kind.

    `dst` appears when all of it is written and, read from the disk again, found whole. Raises
    CheckpointError for a `src` that cannot be read and OutputError for a `dst` that cannot be
    written, is there already, or has the wrong ending.
    """
    if not src.exists():
        raise CheckpointError(f"{src}: no such checkpoint")
    if dst.exists():
        raise OutputError(f"{dst}: is there already; remove it, or choose another name")
    if is_sharded(src):
        if dst.suffix == SUFFIX:
            raise OutputError(f"{dst}: it will be a file; give a name that ends with .pt")
        write_checkpoint(read_checkpoint(src), dst, read_back=True)
        return
    if src.is_dir():
        raise CheckpointError(f"{src}: is no checkpoint but a directory; name a checkpoint in it")
    if dst.suffix != SUFFIX:
        raise OutputError(f"{dst}: it will be a directory; give a name that ends with {SUFFIX}")
    from fastlm.parallel.sharded import write_sharded  # takes a second

    payload = mapped_checkpoint(src, None)
    try:
        write_sharded(payload, dst, read_back=True)
    except TypeError as error:  # of a value that only other programs store
        raise CheckpointError(f"{src}: cannot be converted ({error})") from error


def main(argv: list[str] | None = None) -> int:
    """The command. Returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m fastlm.convert",
        description=f"Turn a sharded checkpoint (a directory NAME{SUFFIX}) into a single file, or "
        f"a file into one.",
        epilog="Runs with --parallel fsdp save directories. --resume, --init-from and "
        "fastlm.generate take both kinds; programs that know neither take a file. This is one "
        "process: what becomes a file must fit into its memory.",
    )
    parser.add_argument("src", metavar="SRC", type=Path, help="the checkpoint, which stays")
    parser.add_argument(
        "dst",
        metavar="DST",
        type=Path,
        help=f"what to write: NAME.pt or NAME{SUFFIX}",
    )
    arguments = parser.parse_args(argv)
    code = run_command(lambda: convert(arguments.src, arguments.dst))
    if code == 0:
        print(f"wrote {arguments.dst}")
    return code


if __name__ == "__main__":
    sys.exit(main())
