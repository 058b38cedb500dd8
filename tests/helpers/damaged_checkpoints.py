"""The newest checkpoint of a run, damaged: found, or without an effect."""

import random
from pathlib import Path

from training_runs import same

from fastlm.checkpoint import checkpoint_files, newest_readable


def damage_newest(directory: Path, rng: random.Random, flips: int, truncations: int) -> int:
    """Flips a bit of the newest checkpoint in `directory`, or cuts it, one damage at a time.

    Returns how often it was found and the one before taken. The other times what was loaded is
    equal.
    """
    newest, before = checkpoint_files(directory)[:2]
    content = newest.read_bytes()
    expected = newest_readable(directory)
    assert expected[0] == newest
    found = 0
    try:
        for number in range(flips + truncations):
            damaged = bytearray(content)
            if number < flips:
                damaged[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            else:
                del damaged[rng.randrange(len(content)) :]
            newest.write_bytes(damaged)
            path, payload = newest_readable(directory)
            assert path in (newest, before)
            assert path == before or same(payload, expected[1]), "loaded as another"
            found += path == before
    finally:
        newest.write_bytes(content)
    return found
