"""Calls of the C functions that nobody should make: each is refused by name, and none ends the process."""

from __future__ import annotations

import ctypes
import math
import random
from ctypes import byref

import pytest
import torch
from on_core import needs_core
from wrong_calls import NEEDED, PASSES, Right, fields_of, run_spoilt

from festina import backends, functional, norms
from festina.backends.cpu import abi, plans
from festina.testing import Case

pytestmark = needs_core


@pytest.mark.parametrize("cell", ["lstm", "gru", "indrnn"])
@pytest.mark.parametrize("which", PASSES)
def test_a_wrong_call_is_near_a_right_one(which, cell):
    """Else what follows would be refused for another reason."""
    for right in (Right(which, cell), Right(which, cell, ragged=True)):
        assert abi.core().run(byref(right.call)) == 0, abi.core().error()


@pytest.mark.parametrize("which", PASSES)
def test_a_wrong_call_is_refused_by_the_name_of_the_field(which):
    """Every number out of range, one at a time."""
    wrong = [(name, value) for name in fields_of(ctypes.c_int64) for value in (-1, 2**61 - 1, 2**63 - 1, -(2**63))]
    wrong += [(name, value) for name in fields_of(ctypes.c_double) for value in (-0.5, math.inf, -math.inf, math.nan)]
    wrong += [
        ("zoneout", 1.5),
        ("directions", 0),
        ("directions", 3),
        ("threads", 0),
        ("threads", 257),
        ("H", 0),
        ("P", 0),
    ]
    right = Right(which)
    for name, value in wrong:
        before = getattr(right.call, name)
        setattr(right.call, name, value)
        assert f" {name} must " in right.refusal(), f"{name} = {value}"
        setattr(right.call, name, before)
    assert abi.core().run(byref(right.call)) == 0


@pytest.mark.parametrize("which", PASSES)
def test_a_wrong_call_lacks_a_tensor(which):
    """Every pointer made null, one at a time: what the pass needs is missed by name, and the rest is not."""
    right, core = Right(which), abi.core()
    for name in fields_of(ctypes.c_void_p):
        before = getattr(right.call, name)
        setattr(right.call, name, None)
        if name in NEEDED[which]:
            assert f" {name} must not be null in {which}" in right.refusal()
        else:
            assert core.run(byref(right.call)) == 0, core.error()
        setattr(right.call, name, before)
    needed = {name for name in core.layout.parameters if name in ("weight_ih", "weight_hh")}
    for d in range(2):
        for name, at in core.layout.parameters.items():
            slot = d * len(core.layout.parameters) + at
            before, gradient = right.call.parameters[slot], right.call.d_parameters[slot]
            if before is None:
                continue
            right.call.parameters[slot] = None
            if name in needed:
                assert f"{name} of direction {d} must not be null" in right.refusal()
            elif gradient:
                assert f"d_parameters: {name} of direction {d} must be null" in right.refusal()
            right.call.d_parameters[slot] = None
            if name not in needed:
                assert core.run(byref(right.call)) == 0, core.error()
            right.call.parameters[slot], right.call.d_parameters[slot] = before, gradient


DISAGREE = {
    "rows of steps": ({"N": 8}, "N must be T * B without batch_sizes, with T = 3 and B = 3, got 8"),
    "more rows than steps": ({"N": 10}, "N must be at most T * B, with T = 3 and B = 3, got 10"),
    "h of another width": ({"P": 8}, "P must be H = 9 without weight_hr, got 8"),
    "a rate without its flag": ({"zoneout": 0.5}, "has_zoneout must be 1 with zoneout = 0.5, got 0"),
    "no such kernel": ({"placement": 2, "cell": 1}, "there is no kernel for cell gru with placement joint"),
    "a clip without c": ({"clip": 1.0, "cell": 1, "cell_norm": 0}, "clip must be 0, since cell gru has no c, got 1"),
    "more than memory": (
        {"H": 2**40, "P": 2**40},
        "must make at most 4.61169e+18 bytes of tensors and buffers, got up to",
    ),
    "long and wide": ({"T": 2**40, "B": 1, "I": 2**40, "N": 2**40}, "must make at most 4.61169e+18 bytes"),
}


@pytest.mark.parametrize("what", DISAGREE)
def test_a_wrong_call_has_fields_that_disagree(what):
    fields, message = DISAGREE[what]
    right = Right(abi.INFERENCE)
    for name, value in fields.items():
        setattr(right.call, name, value)
    assert message in right.refusal()


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ([3, 4, 2], "batch_sizes must not rise, from at most B = 4 down to at least 1, got 4 after 3 at step 1"),
        ([5, 3, 1], "got 5 after 4 at step 0"),
        ([4, 4, 0], "got 0 after 4 at step 2"),
        ([4, 3, -(2**62)], "got -4611686018427387904 after 3 at step 2"),
        ([4, 3, 1], "N must be the sum of batch_sizes, which is 8, got 9"),
        ([4, 4, 4], "N must be the sum of batch_sizes, at least 12, got 9"),
    ],
)
@pytest.mark.parametrize("which", PASSES)
def test_a_wrong_call_has_batch_sizes_that_do_not_fit(which, sizes, message):
    right = Right(which, ragged=True)
    right.sizes[:] = torch.tensor(sizes)
    assert message in right.refusal()


def test_a_wrong_call_has_a_weight_or_a_mask_too_many():
    at = abi.core().layout.parameters["weight_hr"]
    for cell, slots, message in [
        ("gru", [at], "weight_hr must be null, since cell gru has no projection"),
        ("lstm", [at], "weight_hr must be null in both directions or in none, got null in direction 1"),
        ("lstm", [len(abi.core().layout.parameters) + at], "got null in direction 0"),
    ]:
        right = Right(abi.TRAINING, cell)
        for slot in slots:
            right.call.parameters[slot] = right.address("projection")
        assert message in right.refusal()
    for name in ("zoneout_mask", "zoneout_cell_mask"):
        right = Right(abi.TRAINING)
        setattr(right.call, name, right.address(name))
        assert f"has_{name.removesuffix('_mask')} must be 1 with a {name}, got 0" in right.refusal()


def test_a_wrong_call_is_no_call():
    core, right = abi.core(), Right(abi.INFERENCE)
    statuses = core.layout.values["status"]
    need = core.need()
    assert core.run(None) == core.run_panels(None, 0, 0) == core.bytes(None, byref(need)) == statuses["error"]
    assert "call must not be null" in str(core.error())
    assert core.bytes(byref(right.call), None) == statuses["error"]
    assert "bytes must not be null" in str(core.error())
    assert core.fingerprint(None, 1) == 0
    few, whole = (core.fingerprint(byref(right.call), is_whole) for is_whole in (0, 1))
    assert 0 not in (few, whole)
    assert core.run_panels(byref(right.call), 1, whole) == statuses["ok"]
    assert core.run_panels(byref(right.call), 1, whole ^ 1) == statuses["stale"]
    right.call.threads = -1
    assert core.fingerprint(byref(right.call), 1) == 0
    assert core.run_panels(byref(right.call), 1, 0) == statuses["error"]


def test_a_wrong_call_asks_for_all_memory():
    for wanted in (2**64 - 1, 2**64 - 2**21, 2**63, 2**62 + 1):
        assert abi.core().allocate(wanted) is None, f"{wanted} bytes"


def test_a_wrong_call_does_not_overflow():
    """What the core counts for sizes of any magnitude is as much as one buffer that it must hold, or is refused."""
    draw, core = random.Random(0), abi.core()
    need, refused, counted = core.need(), 0, 0
    for _ in range(3000):
        T, B, I, H = (int(2 ** draw.uniform(0, 41)) for _ in range(4))
        threads, dtype = draw.choice([1, 7, 256]), draw.choice([0, 1])
        N = T * B if draw.random() < 0.5 else min(T * B, 2 ** draw.randrange(40))
        right = {"T": T, "B": B, "I": I, "H": H, "P": H, "N": N, "threads": threads, "type": dtype}
        for which in (0, 1, 2):
            call = core.call(**plans.constants(Case("lstm", norms.HASTE).layer), **right, **{"pass": which})
            for at in (core.layout.parameters["weight_ih"], core.layout.parameters["weight_hh"]):
                call.parameters[at] = call.d_parameters[at] = 64
            if core.bytes(byref(call), byref(need)):
                refused += 1
                continue
            counted += 1
            of_type = (4, 8)[dtype]
            assert 2**62 > need.panels >= 4 * H * (I + H) * of_type, right
            assert 2**62 > need.saved_per_row >= 4 * H * of_type, right
            assert 2**62 > need.workspace >= T * 8 + 2 * B * H * of_type + threads * B * of_type, right
            if which == 1:
                assert need.saved_fixed + N * need.saved_per_row < 2**62, right
    assert refused > 500 < counted


@pytest.mark.parametrize("which", PASSES)
def test_a_wrong_call_by_chance_ends_in_an_error_or_not_at_all(which):
    """Numbers and nulls at random places; what the core accepts it carries out, if the buffers are large enough."""
    draw, right = random.Random(which), Right(which, ragged=True)
    statuses = [run_spoilt(right, draw) for _ in range(6000)]
    assert statuses.count(0) > 100 < statuses.count(1)


def test_a_layer_without_units_meets_no_kernel():
    """None divides by its size: the reference has it, whatever backend is forced."""
    parameters = {"weight_ih": torch.zeros(0, 3), "weight_hh": torch.zeros(0, 0)}
    with backends.use("cpu"):
        output, (h_n, c_n) = functional.layer("lstm", torch.zeros(2, 1, 3), parameters)
    assert (output.shape, h_n.shape, c_n.shape) == ((2, 1, 0), (1, 1, 0), (1, 1, 0))
