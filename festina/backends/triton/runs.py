"""The steps of a call, grouped: runs of steps with equally many rows, and chunks of runs that fit the memory for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive steps with the same number of rows.

    Args:
        start: packed row at which the run begins.
        rows: of each step.
        steps: how many.
        rows_before, rows_after: of the step before the run and of the one after it; 0 if there is none.
    """

    start: int
    rows: int
    steps: int
    rows_before: int
    rows_after: int

    @property
    def end(self) -> int:
        """Packed row at which the run ends."""
        return self.start + self.rows * self.steps

    def mirrored(self, N: int) -> Run:
        """The run in a sequence of N packed rows that is read from its end."""
        return Run(N - self.end, self.rows, self.steps, self.rows_after, self.rows_before)


def chunked(sizes: Sequence[int] | int, B: int, max_rows: int) -> list[list[Run]]:
    """All steps as runs, grouped into chunks of at most `max_rows` packed rows, or of one step if that has more.

    `sizes` are the rows of each step, or the number of steps if all have B rows.

    >>> [[(run.start, run.rows, run.steps) for run in chunk] for chunk in chunked([3, 3, 2, 1], 3, 8)]
    [[(0, 3, 2), (6, 2, 1)], [(8, 1, 1)]]
    """
    if isinstance(sizes, int):
        steps = max(1, max_rows // max(1, B))
        firsts = range(0, sizes if B else 0, steps)
        return [[Run(t * B, B, min(steps, sizes - t), B if t else 0, B if t + steps < sizes else 0)] for t in firsts]
    chunks: list[list[Run]] = []
    start, t, room = 0, 0, 0
    while t < len(sizes):
        rows = sizes[t]
        if rows > room:
            chunks.append([])
            room = max(max_rows, rows)
        end = t + 1
        while end < len(sizes) and sizes[end] == rows and rows * (end + 1 - t) <= room:
            end += 1
        rows_before, rows_after = sizes[t - 1] if t else 0, sizes[end] if end < len(sizes) else 0
        chunks[-1].append(Run(start, rows, end - t, rows_before, rows_after))
        start, t, room = start + rows * (end - t), end, room - rows * (end - t)
    return chunks
