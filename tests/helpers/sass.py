"""NVIDIA's machine code as cuobjdump prints it: what one thread issues on its way through a kernel.

Counted along the shortest way, so that a branch for what is rare (a block that holds the label, a
quotient out of range) counts only where it is part of every way.
"""

import re
from collections import deque

_SIZES = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}  # else 4 bytes


class Sass:
    """A kernel's instructions and which can follow which."""

    def __init__(self, text: str):
        lines = re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s+([^;]*);", text, re.MULTILINE)
        self.code = [line.strip() for _, line in lines]
        self.at = {int(address, 16): i for i, (address, _) in enumerate(lines)}
        self.next = [self._next(i) for i in range(len(self.code))]

    def _next(self, i: int) -> list[int]:
        line, following = self.code[i], [i + 1] if i + 1 < len(self.code) else []
        # "@P0 BRA 0x1d0" and "BRA.U !UP0, 0x1d0" may fall through, "BRA 0x1d0" does not.
        if jump := re.search(r"\bBRA(\S*) (.*?)0x([0-9a-f]+)", line):
            target = self.at.get(int(jump[3], 16))
            conditional = line.startswith("@") or "P" in jump[2] or ".DIV" in jump[1]
            return [*(following if conditional else []), *([] if target is None else [target])]
        return [] if re.match(r"(EXIT|RET|BRX|JMP)\b", line) else following

    def distances(self, start: int, last: int | None = None) -> dict[int, int]:
        """How many instructions are issued up to and with each that can be reached from `start`,
        without leaving the code from start to `last`."""
        found, queue = {start: 1}, deque([start])
        while queue:
            i = queue.popleft()
            for j in self.next[i]:
                if j not in found and (last is None or start <= j <= last):
                    found[j] = found[i] + 1
                    queue.append(j)
        return found

    def issued(self) -> int:
        """Instructions from the start to the store that is farthest away: loops once."""
        found = self.distances(0)
        return max(found.get(i, 0) for i, line in enumerate(self.code) if re.search(r"\bST", line))

    def loops(self) -> list[dict[str, int]]:
        """Of each loop, from the target of a jump back to the jump: instructions of an iteration,
        how many bytes a thread loads and stores in it, and how many loads are of 16 bytes."""
        found = []
        for end in range(len(self.code)):
            for start in (i for i in self.next[end] if i < end):
                # A rare branch that stands after the code may jump back to it: no loop.
                if end in (issued := self.distances(start, end)):
                    loads, stores = (self._moved(start, end, kind) for kind in ("LDG", "STG"))
                    found.append({
                        "instructions": issued[end], "loaded": sum(loads), "stored": sum(stores),
                        "wide_loads": loads.count(16),
                    })  # fmt: skip
        return found

    def _moved(self, start: int, end: int, kind: str) -> list[int]:
        accesses = [re.search(rf"\b{kind}\.E(\S*)", line) for line in self.code[start : end + 1]]
        parts = [access[1].split(".") for access in accesses if access]
        return [next((_SIZES[x] for x in of_one if x in _SIZES), 4) for of_one in parts]

    def spills(self) -> int:
        """Instructions that store to the stack."""
        return sum(bool(re.search(r"\bSTL\b", line)) for line in self.code)
