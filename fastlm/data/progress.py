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

    total: in `unit`, of which lines give millions. say: takes each line. At the end one line says
    what was done and in how long, unless it took less than `silent_seconds`.
    """
    started = time.monotonic()
    done, said = 0, started

    def count(size: int) -> None:
        nonlocal done, said
        done = min(done + size, total)  # the last batch may be padded
        if (now := time.monotonic()) - said >= 10:
            said = now
            say(f"{what}: {done / 1e6:,.0f} of {total / 1e6:,.0f} M{unit}")

    if sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(
            desc=what, total=total, unit=unit, unit_scale=True, leave=False, delay=silent_seconds
        ) as bar:
            yield bar.update
            done = min(bar.n, total)
    else:
        yield count
    if (seconds := time.monotonic() - started) >= silent_seconds:
        say(f"{what}: {done / 1e6:,.1f} M{unit} ({seconds:.1f} s)")
