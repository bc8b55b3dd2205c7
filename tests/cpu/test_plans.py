"""Plans: what is kept between calls of one kind, and on how many threads they run."""

from __future__ import annotations

import math
import os
from dataclasses import replace

import pytest
import torch
from on_core import disturbed_at, interrupt, needs_core, run

from festina import norms, reference
from festina.backends import cpu
from festina.backends.cpu import CPU, abi, cores, memory, plans
from festina.spec import CELLS, LayerSpec
from festina.testing import TOLERANCES, Case, assert_close, evaluate, widened

pytestmark = needs_core


def test_a_struct_forgets_the_tensors_of_the_call_before():
    """Resets, and gradients of outputs, that were there and no longer are; with the same plans throughout."""
    call, cotangents = Case("lstm", norms.HASTE, T=4, B=3, H=9, features=("resets",)).build()
    plain = replace(call, resets=None)
    made = plans.make_plan.cache_info().misses
    for same in (call, plain, call, plain):
        want = evaluate(reference.run, widened(same), cotangents)
        assert_close(evaluate(run, same, cotangents), want, TOLERANCES[torch.float32])
        torch.testing.assert_close(CPU.forward(same)[0].double(), want["output"], atol=1e-5, rtol=1e-5)
    assert plans.make_plan.cache_info().misses <= made + 3, "one plan for each pass"
    outputs, saved = CPU.forward_train(plain)
    wanted = [True] * len(plain.tensors())
    for given in (cotangents, [cotangents[0], None, None]):
        got = CPU.backward(plain, outputs.output, saved, given, wanted)
        zeros = [torch.zeros_like(c) if g is None else c for c, g in zip(cotangents, given)]
        want = CPU.backward(plain, outputs.output, saved, zeros, wanted)
        torch.testing.assert_close(got, want)


def test_a_plan_keeps_little_memory(monkeypatch):
    small, _ = Case("lstm", norms.HASTE, T=1, B=1, H=9).build()
    large, _ = Case("lstm", norms.HASTE, T=plans.FEW_STEPS, B=4, H=256).build()
    for call, kept in ((small, 1), (large, 0)):
        for _ in range(3):
            CPU.forward_train(call)
        plan = plans.plan_for(call, abi.TRAINING)
        assert len(plan.idle) == kept
        assert sum(buffer.nbytes for _, buffer in plan.idle) <= plans.MOST_IDLE_BYTES
    CPU.release_memory()
    assert not plans.plan_for(small, abi.TRAINING).idle
    monkeypatch.setattr(memory.POOL, "limit", 0)
    CPU.forward_train(small)
    assert not plans.plan_for(small, abi.TRAINING).idle, "a pool that is off keeps nothing"


def test_a_call_inside_a_call_has_a_struct_of_its_own():
    """As when the garbage collector runs a layer in the middle of another call."""
    call, _ = Case("gru", norms.HASTE, T=1, B=1, H=9).build()
    plan = plans.plan_for(call, abi.TRAINING)
    (first, one), (second, two) = plans.take(plan), plans.take(plan)
    assert first is not second
    assert one.data_ptr() != two.data_ptr()
    plans.give(plan, first, one)
    assert plans.take(plan) == (first, one)


def test_an_error_of_the_core_is_raised_and_leaves_nothing_half_done(monkeypatch):
    call, _ = Case("gru", norms.HASTE, T=2, B=1, H=11).build()
    good = CPU.forward_train(call)[0]
    right = plans.constants(call.layer)
    monkeypatch.setattr(plans, "constants", lambda _: {**right, "cell": 99})
    plans.make_plan.cache_clear()
    with pytest.raises(RuntimeError, match=r"cell must be one of 0 .*, got 99"):
        CPU.forward_train(call)
    monkeypatch.undo()
    plans.make_plan.cache_clear()
    torch.testing.assert_close(CPU.forward_train(call)[0], good, rtol=0, atol=0)


@pytest.mark.parametrize(("cell", "products"), [("lstm", 4 * 8 * 24), ("gru", 3 * 8 * 24), ("indrnn", 8 * 17)])
def test_threads_are_as_many_as_the_products_are_worth(cell, products, monkeypatch):
    """I = 16, H = P = 8, so the fewest steps that are worth two threads."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(plans, "usable_cores", lambda: 64)
    N = -(-2 * plans.WORK_A_THREAD // products)
    layer = LayerSpec(CELLS[cell])
    assert [plans.threads_for(layer, n, 16, 8, 8) for n in (1, N - 1, N, 100 * N)] == [1, 1, 2, 4]
    monkeypatch.setattr(plans, "usable_cores", lambda: 3)
    assert plans.threads_for(layer, 100 * N, 16, 8, 8) == 3


LIMITS = {
    "no group": ("", {}, math.inf),
    "version 2": ("0::/pod/own", {"pod/own/cpu.max": "150000 100000"}, 1.5),
    "version 2, of the parent": ("0::/pod/own", {"pod/own/cpu.max": "max 100000", "pod/cpu.max": "200000 100000"}, 2.0),
    "version 2, another's path": ("0::/../host/pod", {"cpu.max": "300000 100000"}, 3.0),
    "version 1": (
        "3:cpuset:/\n2:cpu,cpuacct:/docker/x",
        {"cpu/docker/x/cpu.cfs_quota_us": "50000", "cpu/docker/x/cpu.cfs_period_us": "100000"},
        0.5,
    ),
    "version 1, no limit": ("1:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, math.inf),
    "hostile": ("0::/", {"cpu.max": "many 0"}, math.inf),
}


@pytest.mark.parametrize("what", LIMITS)
def test_a_quota_of_the_control_group_is_found(what, tmp_path, monkeypatch):
    own, files, want = LIMITS[what]
    (tmp_path / "own").write_text(own)
    for name, text in files.items():
        (tmp_path / "groups" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "groups" / name).write_text(text + "\n")
    monkeypatch.setattr(cores, "OWN", tmp_path / "own")
    monkeypatch.setattr(cores, "GROUPS", tmp_path / "groups")
    assert cores.quota.__wrapped__() == want
    monkeypatch.setattr(cores, "quota", lambda: want)
    assert cores.usable_cores() == max(1, min(len(os.sched_getaffinity(0)), math.ceil(min(want, 99))))


@pytest.mark.parametrize("kind", ["forward", "step", "training"])
def test_a_call_that_is_interrupted_anywhere_leaves_nothing_behind(kind):
    """Ctrl-C between any two instructions of the backend: the next call has its own numbers, with the next weights too."""
    call, cotangents = Case("lstm", norms.HASTE, T=1, B=2, H=9).build()
    state = call.h_0[0], call.c_0[0]

    def work():
        if kind == "forward":
            return CPU.forward(call)
        if kind == "training":
            return evaluate(run, call, cotangents)
        step = CPU.step(
            layer=call.layer,
            parameters=call.parameters,
            input=call.input,
            state=state,
            rates=(call.zoneout, call.zoneout_cell),
            is_training=False,
        )
        return step or CPU.forward(call)

    instruction = 1
    while disturbed_at(work, cpu, instruction, interrupt):
        if instruction % 16 == 0:
            call.parameters[1].data[0, 0] += 1
        h = CPU.forward(call)[1]
        torch.testing.assert_close(h, CPU.forward_train(call)[0].h_n, rtol=1e-5, atol=1e-6)
        instruction += 1
    assert instruction > 100
    want = evaluate(reference.run, widened(call), cotangents)
    assert_close(evaluate(run, call, cotangents), want, TOLERANCES[torch.float32])
