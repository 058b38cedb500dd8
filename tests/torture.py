"""Tortures the trainer by the hundred, where `make test` has a sample: make torture

Every random choice follows from the seed, which is printed first. What does not hold ends the
program with a traceback. ARGS="--seed 1 --only kills" chooses.
"""

import argparse
import collections
import contextlib
import io
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "helpers"))


def kills(directory: Path, rng: random.Random, count: int) -> str:
    from killed_runs import VARIANTS, Undisturbed, assert_equal_runs, killed_run

    told: collections.Counter[str] = collections.Counter()
    runs = 0
    for index, variant in enumerate(VARIANTS):
        place = directory / f"undisturbed-{variant}"
        place.mkdir()
        undisturbed = Undisturbed(place, variant)
        wanted = sum(told.values()) + (count - sum(told.values())) // (len(VARIANTS) - index)
        while sum(told.values()) < wanted:
            place = directory / f"killed-{variant}-{runs}"
            place.mkdir()
            told += killed_run(undisturbed, place, rng, min(8, wanted - sum(told.values())))
            assert_equal_runs(place, undisturbed)
            runs += 1
    kinds = ", ".join(f"{number} {kind}" for kind, number in sorted(told.items()))
    return (
        f"{sum(told.values())} SIGKILLs ({kinds}) over {runs} runs ({', '.join(VARIANTS)}): "
        f"tensors and loss log bit-equal, no file left over"
    )


def ranks(directory: Path, rng: random.Random, count: int) -> str:
    from killed_ranks import PARALLEL, assert_equal_runs, killed_run, random_faults, undisturbed_run

    told = {}
    for parallel in PARALLEL:
        expected = undisturbed_run(directory, parallel)
        faults = random_faults(rng, count, parallel)
        told[parallel], place = killed_run(directory, parallel, faults)
        assert told[parallel] >= count // 2, faults
        assert_equal_runs(place, expected)
    kills = ", ".join(f"{number} of {parallel}" for parallel, number in told.items())
    return (
        f"ranks killed under torchrun --max-restarts {count} ({kills}): tensors and loss log "
        f"bit-equal, no file left over"
    )


def damage(directory: Path, rng: random.Random, count: int) -> str:
    from damaged_checkpoints import damage_newest
    from in_process import run_tiny

    flips, truncations = count, count // 4
    with contextlib.redirect_stdout(io.StringIO()):  # hundreds of lines that say it is damaged
        run_tiny(directory / "run", total_steps=9, ckpt_every=3)
        found = damage_newest(directory / "run" / "checkpoints", rng, flips, truncations)
    return (
        f"{flips} flipped bits and {truncations} truncations of the newest checkpoint: {found} "
        f"found and the one before taken, {flips + truncations - found} loaded, equal"
    )


def full_disks(directory: Path, rng: random.Random, count: int) -> str:
    from full_disks import PLACES, run_on_full_disk

    for what in PLACES:
        (directory / what).mkdir()
        print(f"  {what}: {run_on_full_disk(directory / what, what)}")
    return f"full disks ({', '.join(PLACES)}): trained to the end, said so, resumed"


def fuzz(directory: Path, rng: random.Random, count: int) -> str:
    """Two cases in a hundred take 30 ms and more: those of checkpoints and of settings."""
    import fuzz_checkpoints
    import fuzz_data

    slow, seed = count // 50, rng.randrange(1 << 32)
    helpers = Path(__file__).parent / "helpers"
    command = [sys.executable, helpers / "fuzz_settings.py", str(slow), str(seed)]
    subprocess.run(command, check=True, cwd=directory, stdout=subprocess.DEVNULL)
    fuzz_checkpoints.fuzz(slow, seed, directory)
    cheap = (count - 2 * slow) // len(fuzz_data.CHECKS)
    for what in fuzz_data.CHECKS:
        fuzz_data.fuzz(what, directory / what, cheap, seed)
    return (
        f"{2 * slow + cheap * len(fuzz_data.CHECKS):,} fuzz cases ({slow:,} settings, {slow:,} "
        f"checkpoints, {cheap:,} each of {', '.join(fuzz_data.CHECKS)}): documented errors only"
    )


PARTS: dict[str, tuple[Callable[[Path, random.Random, int], str], int]] = {
    "kills": (kills, 100),
    "ranks": (ranks, 10),
    "damage": (damage, 200),
    "disks": (full_disks, 3),
    "fuzz": (fuzz, 100_000),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--only", choices=PARTS, action="append", help="a part alone")
    parser.add_argument("--kills", type=int, default=PARTS["kills"][1])
    parser.add_argument("--fuzz", type=int, default=PARTS["fuzz"][1])
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", flush=True)
    for name, (part, count) in PARTS.items():
        if arguments.only and name not in arguments.only:
            continue
        begin = time.monotonic()
        with tempfile.TemporaryDirectory() as directory:
            rng = random.Random(f"{arguments.seed} {name}")
            line = part(Path(directory), rng, getattr(arguments, name, count))
        print(f"{line} ({time.monotonic() - begin:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
