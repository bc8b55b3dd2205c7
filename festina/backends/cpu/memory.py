"""Memory for saved activations and workspaces, used again and again.

Fresh pages cost more than the norm does: the system clears each page at its first touch. So buffers go back to a free
list when autograd, or the call that borrowed them, lets go of them. The list holds at most `FESTINA_POOL_MB` megabytes
(512 unless set; 0 keeps nothing); what is in use does not count. Past that the buffers unused for longest are freed. Calls
that work in little memory keep theirs in their plan (`festina/backends/cpu/plans.py`), which takes no time to find.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from functools import cache, lru_cache
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
    """A bounded list of free buffers, for any number of threads. A child process starts with a list of its own.

    Args:
        limit: bytes that may lie idle.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.forget()

    def forget(self) -> None:
        """Start empty without freeing anything: after a fork, a thread that no longer exists may hold the lock."""
        self._lock = threading.Lock()
        self._free: OrderedDict[int, int] = OrderedDict()  # address: size, the one unused for longest first
        self._of_size: defaultdict[int, deque[int]] = defaultdict(deque)  # the same addresses, in the same order
        self._returned: deque[tuple[int, int]] = deque()  # on their way into `_free`
        self.idle = 0

    def take(self, wanted: int) -> tuple[int, int]:
        """A buffer of at least `wanted` bytes: its address, and the size to give it back with."""
        sizes = fitting(wanted)
        with self._lock:
            if self._returned:
                self._sort_in()
            for size in sizes:
                if addresses := self._of_size.get(size):
                    address = addresses.pop()
                    del self._free[address]
                    self.idle -= size
                    return address, size
        fresh = abi.core().allocate(sizes[0])
        if not fresh:
            raise MemoryError(f"festina needs a buffer of {sizes[0]} bytes and the system has none left")
        return fresh, sizes[0]

    def give(self, address: int, size: int) -> None:
        """Take back what `take` handed out. Without waiting: the garbage collector may call it in the middle of `take`."""
        self._returned.append((address, size))
        if self._lock.acquire(blocking=False):
            try:
                self._sort_in()
            finally:
                self._lock.release()

    def _sort_in(self) -> None:
        """Make what was returned available, and free what is too much; under the lock."""
        while self._returned:
            address, size = self._returned.popleft()
            self._free[address] = size
            self._of_size[size].append(address)
            self.idle += size
        if self.idle > self.limit:
            self._shrink(self.limit)

    def _shrink(self, most: int) -> None:
        """Free what was unused for longest until no more than `most` bytes lie idle; under the lock."""
        while self.idle > most:
            address, size = self._free.popitem(last=False)
            self._of_size[size].popleft()  # the oldest of all is the oldest of its size
            self.idle -= size
            abi.core().free(address)

    def release(self) -> None:
        """Free every idle buffer."""
        with self._lock:
            self._sort_in()
            self._shrink(0)

    def tensor(self, wanted: int) -> Tensor:
        """A `uint8` tensor on a buffer, which goes back when the last tensor on it is dropped; a small one is torch's own."""
        if wanted <= SMALL:
            return torch.empty(wanted, dtype=torch.uint8, device=_CPU)
        address, size = self.take(wanted)
        lease = _lease_type(size).from_address(address)
        lease.pool, lease.address = self, address
        return torch.frombuffer(lease, dtype=torch.uint8, count=wanted)


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


def _give_back(lease: Any, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
    if not is_finalizing():  # then this module's own names may be gone, and the system takes everything back
        lease.pool.give(lease.address, ctypes.sizeof(lease))


@cache
def _lease_type(size: int) -> Any:
    """An owner of `size` bytes for `torch.frombuffer` to hold on to. There are eight sizes to a power of two."""
    return type("Lease", (ctypes.c_char * size,), {"__del__": _give_back})


POOL = Pool(environment.pool_limit()[0])  # a wrong value ends in `abi.library`, before anything is taken
os.register_at_fork(after_in_child=POOL.forget)
