"""The Triton kernels in Triton's interpreter, on CPU tensors, against the reference in float64.

The interpreter must be chosen before Triton is imported, so `test_triton.py` runs this file in separate processes. By
hand: `TRITON_INTERPRET=1 pytest tests/interpreted.py`, with `-m full` for the whole product. The suite that all backends
share runs in the interpreter too: `TRITON_INTERPRET=1 pytest tests/test_backends.py -k triton`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import cycle, product

import pytest
import torch
import triton
import triton.language as tl
from cases import EVERY_PLAN, SIZES, TYPICAL, feature_sets

from festina import backends, functional, norms, reference
from festina.backends.triton import TRITON, cells, direction, is_interpreting, loop_tier, norm, step
from festina.spec import CELLS
from festina.testing import TOLERANCES, Case, assert_close, evaluate, widened, worst

if not is_interpreting():
    pytest.skip("set TRITON_INTERPRET=1 before Triton is imported", allow_module_level=True)
TIERS = ("loop", "step")


def in_dtype(case: Case, dtype: torch.dtype) -> Case:
    return Case(**{**vars(case), "dtype": dtype})


def listed() -> Iterator[tuple[str, Case]]:
    """Each plan once and each set of features once, with alternating tiers; then sizes, and float16."""
    tiers = cycle(TIERS)
    for cell in CELLS.values():
        sets = [(), *feature_sets(cell)]
        for (name, plan), features in zip(EVERY_PLAN, cycle(sets)):
            if name == cell.name:
                yield next(tiers), Case(name, plan, T=2, B=3, I=4, H=9, features=features)
        for features, plan in zip(sets, cycle(reversed(TYPICAL[cell.name]))):
            yield next(tiers), Case(cell.name, plan, T=3, B=4, I=4, H=9, P=5 * cell.projects, features=features)
    for (T, B, I, H), tier in zip(SIZES, cycle(TIERS)):
        yield tier, Case("lstm", norms.HASTE, T, B, I, H)
    for (name, plans), tier in product(TYPICAL.items(), TIERS):
        for plan in plans:
            yield tier, Case(name, plan, T=2, H=9, dtype=torch.float16, features=("resets", "bidirectional"))


def whole_product() -> Iterator[tuple[str, Case]]:
    for tier, (name, plans) in product(TIERS, TYPICAL.items()):
        for plan, features in product(plans, ((), *feature_sets(CELLS[name]))):
            yield tier, Case(name, plan, T=4, B=4, H=9, features=features)
    for tier, (name, plan) in product(TIERS, EVERY_PLAN):
        yield tier, Case(name, plan, T=4, B=5, H=17, features=("ragged", "bidirectional"))


def part(tried: Iterator[tuple[str, Case]]) -> list[tuple[str, Case]]:
    """The pairs for which the backend has kernels; of several processes, this one's share."""
    index, processes = map(int, os.environ.get("FESTINA_PART", "0/1").split("/"))
    served = [(tier, case) for tier, case in dict.fromkeys(tried) if TRITON.can_run(case.on("cpu")) is None]
    return served[index::processes]


@pytest.fixture(autouse=True)
def poisoned_memory():
    """New memory holds NaN, so that an element never written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    with backends.use("triton"):
        yield
    torch.use_deterministic_algorithms(False)


def take(monkeypatch: pytest.MonkeyPatch, tier: str) -> None:
    monkeypatch.setattr(direction, "LOOP_BYTES", 1 << 20 if tier == "loop" else 0)


def check(case: Case) -> None:
    """In float32 as the suite of all backends does; in float16 against the error of the reference in float16."""
    call, cotangents = case.build()
    want = evaluate(reference.run, widened(call), cotangents)
    got = evaluate(functional.recurrence, call, cotangents)
    assert got.keys() == want.keys()
    assert all(tensor.dtype == case.dtype for tensor in got.values())
    found, name = worst(got, want)
    if found > TOLERANCES.get(case.dtype, 0.0):
        eager, _ = worst(evaluate(reference.run, call, cotangents), want)
        assert found <= 3 * eager, f"{name} differs by {found:.2e} of its rms, eager by {eager:.2e}"
    with torch.no_grad():
        output = functional.recurrence(call)[0]
    assert torch.equal(output, got["output"]), "inference and training differ"


@pytest.mark.parametrize(("tier", "case"), part(listed()), ids=str)
def test_parity(tier, case, monkeypatch):
    take(monkeypatch, tier)
    check(case)


@pytest.mark.full
@pytest.mark.parametrize(("tier", "case"), part(whole_product()), ids=str)
def test_parity_of_the_whole_product(tier, case, monkeypatch):
    take(monkeypatch, tier)
    check(case)


EVERYTHING = ("expectation", "resets", "ragged", "idle", "bidirectional")
CHUNKED = [Case("lstm", norms.HASTE, T=5, B=4, H=9, features=EVERYTHING), Case("gru", norms.DREAMER, T=4, B=3, H=9)]


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("case", CHUNKED, ids=str)
@pytest.mark.parametrize("rows", [1, 6])
def test_chunks_do_not_matter(case, tier, rows, monkeypatch):
    take(monkeypatch, tier)
    gates = len(CELLS[case.cell].gates)
    monkeypatch.setattr(direction, "CHUNK_BYTES", rows * 16 * gates * case.H)
    check(case)


@pytest.mark.parametrize("tier", TIERS)
def test_runs_are_the_same_bit_for_bit(tier, monkeypatch):
    take(monkeypatch, tier)
    call, cotangents = CHUNKED[0].build()
    one, two = (evaluate(functional.recurrence, call, cotangents) for _ in range(2))
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


# Deliberately wrong kernels: the comparison must fail for each


@triton.jit
def wide_normalize(v, mask, plan: tl.constexpr, spans: tl.constexpr):
    """The deviation is 1 % too large, about as the unbiased variance of 36 values makes it."""
    normed, reciprocals = norm.normalize(v, mask, plan, spans)
    less = ()
    for g in tl.static_range(len(v)):
        less += (normed[g] * 0.99,)
    return less, reciprocals


@triton.jit
def half_normalize_backward(d, normed, reciprocals, mask, plan: tl.constexpr, spans: tl.constexpr):
    """The mean and the variance are taken for constants."""
    d_v = ()
    for g in tl.static_range(len(d)):
        d_v += (d[g] * reciprocals[g],)
    return d_v


@triton.jit
def no_flags(ptr, tile):
    return (tile.is_row & False)[:, None]


original_zoneout = step.zoneout


@triton.jit
def crossed_zoneout(old, new, keep, rate, tile, width: tl.constexpr):
    return original_zoneout(new, old, keep, rate, tile, width)


@triton.jit
def unkept_zoneout_backward(d, keep, rate, tile, width: tl.constexpr):
    return tl.zeros_like(d), d


@triton.jit
def lstm_update_crossed(x, h, s):
    f, i, g = tl.sigmoid(x[0] + h[0]), tl.sigmoid(x[1] + h[1]), cells.tanh(x[2] + h[2])
    return f * s + i * g


@triton.jit
def lstm_update_backward_short(x, h, s, d, d_late):
    d_x, d_h, d_s = cells.lstm_update_backward(x, h, s, d, d_late)
    return d_x, d_h, d_s * 0.999


@triton.jit
def gru_update_early_reset(x, h, s):
    r, z = tl.sigmoid(x[0] + h[0]), tl.sigmoid(x[1] + h[1])
    return z * s + (1 - z) * cells.tanh(r * (x[2] + h[2]))


@triton.jit
def gru_update_backward_shared(x, h, s, d, d_late):
    d_x, _, d_s = cells.gru_update_backward(x, h, s, d, d_late)
    return d_x, d_x, d_s


@triton.jit
def gru_joint_unshifted(x, h, s):
    r, z = tl.sigmoid(x[0]), tl.sigmoid(x[1])
    return z * cells.tanh(r * x[2]) + (1 - z) * s


@triton.jit
def emit_without_output_gate(x, h, c):
    return cells.tanh(c)


@triton.jit
def stateless_relu(x, h, s):
    return tl.where(x[0] < 0, 0.0, x[0])


LSTM, GRU = Case("lstm", norms.HASTE, H=9), Case("gru", norms.HASTE, H=9)
AROUND = Case("lstm", norms.HASTE, T=4, B=3, H=9, features=("zoneout", "zoneout_cell", "resets", "bidirectional"))
KERNEL_MUTANTS = [
    (LSTM, [(step, "normalize")], wide_normalize),
    (LSTM, [(step, "normalize_backward")], half_normalize_backward),
    (AROUND, [(loop_tier, "load_flags")], no_flags),
    (AROUND, [(loop_tier, "zoneout"), (step, "zoneout")], crossed_zoneout),
    (AROUND, [(loop_tier, "zoneout_backward")], unkept_zoneout_backward),
    (AROUND, [(step, "zoneout_backward")], unkept_zoneout_backward),
]
CELL_MUTANTS = [
    (LSTM, "lstm", {"update": lstm_update_crossed}),
    (LSTM, "lstm", {"update_backward": lstm_update_backward_short}),
    (LSTM, "lstm", {"emit": emit_without_output_gate}),
    (GRU, "gru", {"update": gru_update_early_reset}),
    (GRU, "gru", {"update_backward": gru_update_backward_shared}),
    (Case("gru", norms.DREAMER, H=9), "gru_joint", {"update": gru_joint_unshifted}),
    (Case("indrnn_relu", norms.HASTE, H=9), "indrnn_relu", {"update": stateless_relu}),
]


def must_fail(case: Case) -> None:
    call, cotangents = case.build()
    want = evaluate(reference.run, widened(call), cotangents)
    got = evaluate(functional.recurrence, call, cotangents)
    with pytest.raises(AssertionError, match="differs by"):
        assert_close(got, want, 10 * TOLERANCES[torch.float32])


@pytest.mark.parametrize(("case", "places", "mutant"), KERNEL_MUTANTS, ids=str)
def test_a_wrong_kernel_is_found_out(case, places, mutant, monkeypatch):
    for module, name in places:
        monkeypatch.setattr(module, name, mutant)
    must_fail(case)


@pytest.mark.parametrize(("case", "name", "wrong"), CELL_MUTANTS, ids=str)
def test_a_wrong_cell_is_found_out(case, name, wrong, monkeypatch):
    monkeypatch.setitem(cells.CELLS, name, cells.CELLS[name]._replace(**wrong))
    must_fail(case)


def test_steps_that_start_elsewhere_are_found_out(monkeypatch):
    """The host's side can be wrong too: the state before a step."""
    monkeypatch.setattr(direction.Direction, "states_before", lambda self, chunk, states, initial, out: out.zero_())
    must_fail(LSTM)
