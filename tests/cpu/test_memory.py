"""The pool: buffers come back, are used again, are bounded; threads, garbage collection, fork."""

from __future__ import annotations

import gc
import os
import subprocess
import sys

import pytest
import torch
from on_core import needs_core

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


def test_a_buffer_comes_back_while_its_thread_takes_another():
    """As when the garbage collector frees a graph inside of `take`."""
    pool = Pool(limit=2**20)
    tensor = pool.tensor(100_000)
    with pool._lock:
        del tensor
    assert pool.idle == 0
    pool.give(*pool.take(10))
    assert pool.idle > 100_000


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
    with POOL._lock:
        child = os.fork()
        if child == 0:
            os._exit(0 if POOL.idle == 0 and POOL.take(100_000)[0] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


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
    left = list(pool._free.items())
    assert left == taken[-len(left) :]
    assert pool.idle == sum(size for _, size in left) <= pool.limit
    assert sorted(left) == sorted((address, size) for size, addresses in pool._of_size.items() for address in addresses)


def test_small_tensors_take_no_buffer():
    pool = Pool(limit=2**20)
    tensor = pool.tensor(SMALL)
    with torch.device("meta"):
        assert not pool.tensor(100).is_meta, "a default device counts elsewhere"
    del tensor
    assert pool.idle == 0
