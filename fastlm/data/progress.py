"""Progress of work that may take minutes: a bar on a terminal, else a line every 10 s."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress(
    what: str,
    total: int,
    say: Callable[[str], object],
    *,
    unit: str = "B",
    silent_seconds: float = 0.0,
) -> Iterator[Callable[[int], object]]:
    """A function that takes how much more is done.

    say: takes each line. At the end one line says what was done and in how long, unless it took
    less than `silent_seconds`.
    """
    units = "MB" if unit == "B" else unit
    started = time.monotonic()
    done, said = 0, started

    def amount(number: int) -> str:
        return f"{number / 1e6:,.1f}" if unit == "B" else f"{number:,}"

    def count(size: int) -> None:
        nonlocal done, said
        done = min(done + size, total)  # the last batch may be padded
        if (now := time.monotonic()) - said >= 10:
            said = now
            say(f"{what}: {amount(done)} of {amount(total)} {units}")

    if sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(
            desc=what,
            total=total,
            unit=unit,
            unit_scale=True,
            leave=False,
            delay=min(1.0, silent_seconds),
        ) as bar:
            yield bar.update
            done = min(bar.n, total)
    else:
        yield count
    if (seconds := time.monotonic() - started) >= silent_seconds:
        say(f"{what}: {amount(done)} {units} ({seconds:.1f} s)")
