"""Memory for saved activations and workspaces, used again and again.

Fresh pages cost more than the norm does: the system clears each page at its first touch. So buffers go back to a free
list when autograd, or the call that borrowed them, lets go of them. The list holds at most `FESTINA_POOL_MB` megabytes
(512 unless set; 0 keeps nothing); what is in use does not count. Past that the buffers unused for longest are freed. Calls
that work in little memory keep theirs in their plan (`festina/backends/cpu/plans.py`), which takes no time to find.
"""

from __future__ import annotations

import ctypes
import sys
from collections import deque
from collections.abc import Callable
from functools import cache, lru_cache
from itertools import count
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from festina import environment
from festina.backends.cpu import abi

ALIGNMENT = 4096
SMALL = 64 << 10
"""Bytes of a tensor that torch's own allocator serves faster: it finds memory that has been touched before."""
_CPU = torch.device("cpu")  # a default device does not count here


class Pool:
    """A bounded list of free buffers, for any number of threads.

    There is no lock: the garbage collector may call `give` in the middle of `take`, and a signal handler may raise between
    any two instructions. Each change is one call of a deque's or dict's method, which either happens or does not, and
    nothing is kept that would have to agree with the deques. What an exception can cost is the buffer that was on its way:
    it is not used again.

    Args:
        limit: bytes that may lie idle.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._free: dict[
            int, deque[tuple[int, int]]
        ] = {}  # by size: when each buffer came, and its address; newest last
        self._turns = count()

    @property
    def idle(self) -> int:
        """Bytes of the buffers that wait for a call."""
        return sum(size * len(buffers) for size, buffers in self._free.copy().items())

    def take(self, wanted: int) -> tuple[int, int]:
        """A buffer of at least `wanted` bytes: its address, and the size to give it back with.

        Raises:
            MemoryError: the system has none left.
        """
        sizes = fitting(wanted)
        for size in sizes:
            if buffers := self._free.get(size):
                try:
                    return buffers.pop()[1], size
                except IndexError:  # another thread was faster
                    pass
        fresh = abi.core().allocate(sizes[0])
        if not fresh:
            raise MemoryError(f"festina needs a buffer of {sizes[0]} bytes and the system has none left")
        return fresh, sizes[0]

    def give(self, address: int, size: int) -> None:
        """Take back what `take` handed out."""
        buffers = self._free.get(size)
        if buffers is None:
            buffers = self._free.setdefault(size, deque())
        buffers.append((next(self._turns), address))
        self._shrink(self.limit)

    def _shrink(self, most: int) -> None:
        """Free what was unused for longest until no more than `most` bytes lie idle."""
        while self.idle > most:
            try:
                oldest = min((buffers for buffers in self._free.copy().values() if buffers), key=itemgetter(0))
                _, address = oldest.popleft()
            except (ValueError, IndexError):  # other threads have taken what there was
                continue
            abi.core().free(address)

    def release(self) -> None:
        """Free every idle buffer."""
        self._shrink(0)

    def tensor(self, wanted: int) -> Tensor:
        """A `uint8` tensor on a buffer, which goes back when the last tensor on it is dropped; a small one is torch's own."""
        if wanted <= SMALL:
            return torch.empty(wanted, dtype=torch.uint8, device=_CPU)
        address, size = self.take(wanted)
        return torch.frombuffer(_lease_type(self, size).from_address(address), dtype=torch.uint8, count=wanted)


def rounded(size: int) -> int:
    """`size` rounded up by at most an eighth, so that similar requests share buffers."""
    unit = max(ALIGNMENT, 1 << max(size - 1, ALIGNMENT).bit_length() - 4)
    return -(-size // unit) * unit


@lru_cache(maxsize=4096)
def fitting(wanted: int) -> tuple[int, ...]:
    """The sizes of buffers that serve a request, the best first: `wanted` rounded, up to twice as much.

    >>> fitting(5000)
    (8192, 12288, 16384)
    """
    sizes = [rounded(max(wanted, 1))]
    while (larger := rounded(sizes[-1] + 1)) <= 2 * sizes[0]:
        sizes.append(larger)
    return tuple(sizes)


@cache
def _lease_type(pool: Pool, size: int) -> Any:
    """An owner of `size` bytes for `torch.frombuffer` to hold on to. There are eight sizes to a power of two."""

    def give_back(lease: Any, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        if not is_finalizing():  # then this module's own names may be gone, and the system takes everything back
            pool.give(ctypes.addressof(lease), size)

    return type("Lease", (ctypes.c_char * size,), {"__del__": give_back})


POOL = Pool(environment.pool_limit()[0])  # a wrong value ends in `abi.library`, before anything is taken
