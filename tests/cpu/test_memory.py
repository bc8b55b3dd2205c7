"""The pool: buffers come back, are used again, are bounded; threads, garbage collection, fork."""

from __future__ import annotations

import ctypes
import gc
import itertools
import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from on_core import disturbed_at, interrupt, needs_core

from festina.backends.cpu import abi, memory
from festina.backends.cpu.memory import POOL, SMALL, Pool, fitting

pytestmark = needs_core


def test_buffers_are_used_again_and_bounded():
    pool = Pool(limit=3 * 2**20)
    one, two = pool.tensor(2**20), pool.tensor(2**20)
    address = one.data_ptr()
    assert address % 64 == 0
    view = one[5:]
    del one
    assert pool.idle == 0, "a view keeps the buffer"
    del view
    assert pool.tensor(2**20).data_ptr() == address
    large = [pool.tensor(2 * 2**20) for _ in range(3)]
    del large, two
    gc.collect()
    assert 0 < pool.idle <= pool.limit


def test_no_buffer_is_kept_when_the_pool_is_off():
    pool = Pool(limit=0)
    tensor = pool.tensor(100_000)
    tensor.fill_(1)
    del tensor
    assert pool.idle == 0


def test_a_process_ends_without_a_word_while_buffers_are_in_use():
    code = (
        "import torch, festina\n"
        "cell = festina.LayerNormLSTMCell(3, 5)\n"
        "with torch.inference_mode(): cell(torch.zeros(1, 3))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stderr == ""


def test_idle_buffers_can_be_released():
    pool = Pool(limit=2**20)
    kept, idle = pool.tensor(100_000), pool.tensor(100_000)
    kept.fill_(7)
    del idle
    assert pool.idle > 0
    pool.release()
    assert pool.idle == 0
    pool.tensor(100_000).fill_(1)
    assert (kept == 7).all()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_has_a_pool_of_its_own():
    POOL.give(*POOL.take(100_000))
    idle = POOL.idle
    child = os.fork()
    if child == 0:
        address, _ = POOL.take(100_000)
        ctypes.memset(address, 1, 100_000)
        os._exit(0 if POOL.idle < idle else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert POOL.idle == idle


def test_a_buffer_serves_requests_of_half_its_size_and_more():
    pool = Pool(limit=2**20)
    pool.give(*pool.take(100_000))
    assert pool.idle == fitting(100_000)[0]
    pool.give(*pool.take(100_000 // 3))
    assert pool.idle == fitting(100_000)[0] + fitting(100_000 // 3)[0], "too large a buffer is left for others"
    address, size = pool.take(60_000)
    assert size == fitting(100_000)[0]
    assert pool.idle == fitting(100_000 // 3)[0]
    pool.give(address, size)


def test_the_buffers_unused_for_longest_are_freed():
    pool = Pool(limit=3 * fitting(100_000)[0])
    taken = [pool.take(size) for size in (100_000, 50_000, 100_000, 50_000, 100_000)]
    for buffer in taken:
        pool.give(*buffer)
    left = sorted((turn, (address, size)) for size, buffers in pool._free.items() for turn, address in buffers)
    assert [buffer for _, buffer in left] == taken[-len(left) :]
    assert pool.idle == sum(size for _, (_, size) in left) <= pool.limit


def test_small_tensors_take_no_buffer():
    pool = Pool(limit=2**20)
    tensor = pool.tensor(SMALL)
    with torch.device("meta"):
        assert not pool.tensor(100).is_meta, "a default device counts elsewhere"
    del tensor
    assert pool.idle == 0


class Memory:
    """In place of the core's: addresses without memory, and what is in use."""

    def __init__(self, monkeypatch):
        self.addresses, self.allocated, self.in_use = itertools.count(1), set(), set()
        monkeypatch.setattr(abi.core(), "allocate", self.allocate)
        monkeypatch.setattr(abi.core(), "free", self.free)

    def allocate(self, size):
        address = next(self.addresses)
        self.allocated.add(address)
        return address

    def free(self, address):
        assert address not in self.in_use
        self.allocated.remove(address)

    def use(self, pool, wanted):
        address, size = pool.take(wanted)
        assert address in self.allocated
        assert address not in self.in_use, "handed out twice"
        self.in_use.add(address)
        return address, size

    def end(self, pool, buffer):
        self.in_use.remove(buffer[0])
        pool.give(*buffer)


def idle_buffers(pool):
    return [address for buffers in pool._free.values() for _, address in buffers]


@pytest.mark.parametrize("disturbed", ["take", "take anew", "give", "give too much", "release"])
@pytest.mark.parametrize("limit", [0, 3])
def test_the_pool_survives_an_exception_and_a_collection_anywhere(disturbed, limit, monkeypatch):
    """Ctrl-C between any two instructions; the garbage collector giving a buffer back there, as a graph is freed."""
    fake, size = Memory(monkeypatch), fitting(100_000)[0]

    def disturb(by_collector, instruction):
        pool = Pool(limit * size)
        one, two, three, four, spare = (fake.use(pool, 100_000) for _ in range(5))
        for buffer in {"give": (one,), "give too much": (one, two, three)}.get(disturbed, (one, two)):
            fake.end(pool, buffer)
        if disturbed.startswith("give"):
            fake.in_use.remove(four[0])  # it is no longer used, whether it comes back or not
        work = {
            "take": lambda: pool.take(60_000),
            "take anew": lambda: pool.take(200_000),
            "give": lambda: pool.give(*four),
            "give too much": lambda: pool.give(*four),
            "release": pool.release,
        }[disturbed]
        is_reached = disturbed_at(
            work, memory, instruction, partial(fake.end, pool, spare) if by_collector else interrupt
        )
        buffers = idle_buffers(pool)
        assert len(set(buffers)) == len(buffers)
        assert pool.idle == size * len(buffers)
        for wanted in (60_000, 100_000, 100_000, 100_000, 200_000):  # none is in use
            fake.end(pool, (fake.use(pool, wanted)))
        assert pool.idle <= pool.limit
        pool.release()
        assert not idle_buffers(pool)
        fake.in_use.clear()
        return is_reached

    for by_collector in (False, True):
        reached = next(n for n in itertools.count(1) if not disturb(by_collector, n))
        assert reached > 10


def test_threads_share_the_pool(monkeypatch):
    fake, pool = Memory(monkeypatch), Pool(4 * fitting(100_000)[0])

    def work(seed):
        draw, held = random.Random(seed), []
        for _ in range(1500):
            if held and draw.random() < 0.5:
                fake.end(pool, held.pop(draw.randrange(len(held))))
            else:
                held.append(fake.use(pool, draw.choice([60_000, 100_000, 150_000])))
        for buffer in held:
            fake.end(pool, buffer)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(work, range(4)))
    finally:
        sys.setswitchinterval(interval)
    assert 0 < pool.idle <= pool.limit
    assert sorted(idle_buffers(pool)) == sorted(fake.allocated)
