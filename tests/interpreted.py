"""The Triton kernels in Triton's interpreter, on CPU tensors, against the reference in float64.

The interpreter must be chosen before Triton is imported, so `test_triton.py` runs this file in separate processes. By
hand: `TRITON_INTERPRET=1 pytest tests/interpreted.py`, with `-m full` for the whole product. The suite that all backends
share runs in the interpreter too: `TRITON_INTERPRET=1 pytest tests/test_backends.py -k triton`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import cycle, product
from typing import NamedTuple

import pytest
import torch
import triton
import triton.language as tl
from cases import EVERY_PLAN, SIZES, TYPICAL, feature_sets
from offline import Threads

from festina import backends, functional, norms, reference
from festina.backends.triton import TRITON, cells, is_interpreting, norm, one_launch, setup, step, team, tiers
from festina.backends.triton import product as products
from festina.backends.triton.direction import Direction
from festina.call import Call
from festina.spec import CELLS
from festina.testing import TOLERANCES, Case, assert_close, evaluate, widened, worst

if not is_interpreting():
    pytest.skip("set TRITON_INTERPRET=1 before Triton is imported", allow_module_level=True)


class Way(NamedTuple):
    """A tier; of a team, the units of a member, and how many teams share the blocks of rows."""

    tier: str
    HS: int = 0
    teams: int = 0

    def __str__(self) -> str:
        return f"{self.teams}teams-of{self.HS}" if self.teams else self.tier


LOOP, STEP = Way("loop"), Way("step")
TIERS = (LOOP, STEP)
TEAM = Way("team", 16, 1)


def in_dtype(case: Case, dtype: torch.dtype) -> Case:
    return Case(**{**vars(case), "dtype": dtype})


def listed() -> Iterator[tuple[Way, Case]]:
    """Each plan once and each set of features once, with alternating tiers; then sizes, and float16. Then teams."""
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
    yield from of_teams()


SETS = [(), ("resets",), ("ragged",), ("zoneout", "resets"), ("expectation", "idle"), ("nobias",)]


def by_plan() -> list[tuple[Way, Case]]:
    """Each plan once in a team, with a feature or two."""
    ways, sets = cycle([TEAM, Way("team", 16, 2), Way("team", 16, 2), TEAM]), cycle(SETS)
    return [
        (next(ways), Case(name, plan, T=2, B=3, I=4, H=19, features=next(sets)))
        for name, plan in EVERY_PLAN
        if name in ("lstm", "gru")
    ]


def of_teams() -> Iterator[tuple[Way, Case]]:
    """Every second plan; then every set of features; then sizes beyond each constant of the kernels."""
    yield from by_plan()[::2]
    for name in ("lstm", "gru"):
        for features, plan in zip(feature_sets(CELLS[name]), cycle(TYPICAL[name])):
            yield Way("team", 8, 1), Case(name, plan, T=2, B=4, I=4, H=19, features=features)
        for plan in TYPICAL[name]:
            features = ("resets", "bidirectional")
            yield TEAM, Case(name, plan, T=2, H=19, dtype=torch.float16, features=features)
    lstm, gru = Case("lstm", norms.HASTE, T=2), Case("gru", norms.HASTE, T=2)
    yield Way("team", 16, 1), replace(lstm, T=3, B=35, H=17)  # three blocks for one team
    yield Way("team", 16, 2), replace(gru, T=3, B=35, H=17)  # three blocks for two
    yield Way("team", 8, 1), replace(lstm, H=137)  # members beyond one tile of numbers, units beyond one of a gradient
    yield Way("team", 32, 1), replace(gru, H=269, features=("bidirectional",))  # units of h beyond one wait


def wide_teams() -> Iterator[tuple[Way, Case]]:
    """More members, and waits beyond the first in 16 bits."""
    yield Way("team", 8, 1), Case("lstm", norms.FASTRNNS, T=3, H=281)
    yield Way("team", 32, 1), Case("lstm", norms.HASTE, T=2, H=525, dtype=torch.float16)
    yield Way("team", 8, 1), Case("gru", norms.HASTE, T=2, H=530, dtype=torch.float16)


def whole_product() -> Iterator[tuple[Way, Case]]:
    yield from wide_teams()
    yield from by_plan()
    for name, plans in TYPICAL.items():
        if name in ("lstm", "gru"):
            for plan, features in product(plans, ((), *feature_sets(CELLS[name]))):
                yield Way("team", 8, 1), Case(name, plan, T=3, B=4, H=19, features=features)
    for tier, (name, plans) in product(TIERS, TYPICAL.items()):
        for plan, features in product(plans, ((), *feature_sets(CELLS[name]))):
            yield tier, Case(name, plan, T=4, B=4, H=9, features=features)
    for tier, (name, plan) in product(TIERS, EVERY_PLAN):
        yield tier, Case(name, plan, T=4, B=5, H=17, features=("ragged", "bidirectional"))


def part(tried: Iterator[tuple[Way, Case]]) -> list[tuple[Way, Case]]:
    """The pairs for which there are kernels; of several processes, this one's share."""
    index, processes = map(int, os.environ.get("FESTINA_PART", "0/1").split("/"))
    served = [
        (way, case)
        for way, case in dict.fromkeys(tried)
        if TRITON.can_run(case.on("cpu")) is None and not (way.tier == "team" and case.P)
    ]
    return served[index::processes]


@pytest.fixture(autouse=True)
def poisoned_memory():
    """New memory holds NaN, so that an element never written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    with backends.use("triton"):
        yield
    torch.use_deterministic_algorithms(False)


def take(monkeypatch: pytest.MonkeyPatch, way: Way, threads: Threads | None = None) -> None:
    """Let calls go the way, each program of a team in its own thread; a diagonal cell always loops."""

    def tier_of(plan, B, directions, dtype, device, steps_of_a_run):
        if way.tier == "loop" or plan.is_diagonal:
            return usual(plan, B, directions, dtype, device._replace(shared_bytes=1 << 30), steps_of_a_run)
        if way.tier == "step":
            return tiers.Tier("step", "a test asked for it")
        K = -(-plan.H // way.HS)
        of_pass = [tiers.team_of(plan, K, way.HS, dtype == torch.float32, is_backward) for is_backward in (False, True)]
        return tiers.Tier(f"team of {K}", "a test asked for it", *of_pass, way.teams)

    usual = tiers.tier_of
    monkeypatch.setattr(setup, "tier_of", tier_of)
    setup.forget()
    if way.tier == "team":
        (threads or Threads(drift=2e-4)).install(monkeypatch)
        sys.setswitchinterval(1e-4)


@pytest.fixture(autouse=True)
def forgotten():
    """No test sees the setup, or the switch interval, of another."""
    interval = sys.getswitchinterval()
    yield
    sys.setswitchinterval(interval)
    setup.forget()


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
CHUNKED = [
    Case("lstm", norms.HASTE, T=5, B=4, H=9, features=EVERYTHING),
    Case("gru", norms.DREAMER, T=4, B=3, H=9),
    Case("lstm", norms.HASTE, T=5, B=3, H=9, features=("bidirectional", "resets")),
]


@pytest.mark.parametrize("tier", [*TIERS, TEAM], ids=str)
@pytest.mark.parametrize("case", CHUNKED, ids=str)
@pytest.mark.parametrize("rows", [1, 6])
def test_chunks_do_not_matter(case, tier, rows, monkeypatch):
    take(monkeypatch, tier)
    gates = len(CELLS[case.cell].gates)
    monkeypatch.setattr(setup, "CHUNK_BYTES", rows * 16 * gates * case.H * case.layer.directions)
    check(case)


@pytest.mark.parametrize("tier", [*TIERS, TEAM], ids=str)
def test_runs_are_the_same_bit_for_bit(tier, monkeypatch):
    take(monkeypatch, tier)
    call, cotangents = CHUNKED[0].build()
    one, two = (evaluate(functional.recurrence, call, cotangents) for _ in range(2))
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


# Deliberately wrong kernels: the comparison must fail for each


@triton.jit
def wide_normalize(v, tile, plan: tl.constexpr, spans: tl.constexpr, slot: tl.constexpr, exchange, STATS):
    """The deviation is 1 % too large, about as the unbiased variance of 36 values makes it."""
    normed, stats = norm.normalize(v, tile, plan, spans, slot, exchange, STATS)
    less = ()
    for g in tl.static_range(len(v)):
        less += (normed[g] * 0.99,)
    return less, stats


@triton.jit
def half_normalize_backward(d, normed, stats, sums, plan: tl.constexpr, spans: tl.constexpr):
    """The mean and the variance are taken for constants."""
    none = ()
    for i in tl.static_range(len(sums)):
        none += (sums[i] * 0.0,)
    return norm.normalize_backward(d, normed, stats, none, plan, spans)


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
    (AROUND, [(one_launch, "load_flags")], no_flags),
    (AROUND, [(one_launch, "zoneout"), (step, "zoneout")], crossed_zoneout),
    (AROUND, [(one_launch, "zoneout_backward")], unkept_zoneout_backward),
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
    monkeypatch.setattr(Direction, "states_before", nowhere)
    must_fail(LSTM)


right = Direction.states_before


def nowhere(self, chunk, output, c):
    h, c = right(self, chunk, output, c)
    return h.zero_(), c


@pytest.mark.parametrize("rows", [1, 5, 1000])
@pytest.mark.parametrize("features", [("bidirectional",), ("ragged", "idle", "bidirectional", "resets")], ids=str)
def test_states_before_each_step(features, rows, monkeypatch):
    """Against the reference: an IndRNN with relu that adds 1 to h at every step shows where h came from."""
    monkeypatch.setattr(setup, "CHUNK_BYTES", rows * 4 * 3 * 2)
    case = Case("indrnn_relu", T=5, B=4, I=1, H=3, features=features)
    call, _ = case.build()
    ones = {"weight_ih": 1.0, "weight_hh": 1.0, "bias_ih": 0.0}
    names = call.layer.parameter_names * 2
    parameters = tuple(torch.full_like(p, ones[name]) for name, p in zip(names, call.parameters))
    call = call.with_tensors([torch.ones_like(call.input), call.h_0.abs().mul(100).floor(), *parameters])
    output = reference.run(call)[0]
    for d in range(2):
        of_direction = Direction(call, setup.setup_of(call), d)
        states = output[:, 3 * d : 3 * d + 3]
        for chunk in of_direction.chunks():
            start, end = min(run.start for run in chunk), max(run.end for run in chunk)
            before, also_before = of_direction.states_before(chunk, states, None)
            assert torch.equal(before, states[start:end] - 1)
            assert also_before is None


# Teams: what the exchanges are worth, and what happens if they fail


@triton.jit
def hasty_wait(ptr, at, index, step: tl.constexpr, end: tl.constexpr, count: tl.constexpr, exchange):
    """Whatever is there."""
    words, _ = team.load_words(ptr, at, index, step, end, count, 0, exchange)
    values = ()
    for b in tl.static_range(count):
        values += (words[b].to(tl.int32),)
    return values


@triton.jit
def there_at_all(words, exchange):
    """As if a word had no tag, and only said that it is there."""
    return ((words >> 32).to(tl.int32) == 0).to(tl.int32)


@triton.jit
def apart(tiles, i: tl.constexpr, gates: tl.constexpr, plan: tl.constexpr, VP: tl.constexpr):
    """The members' means do not count for the deviation."""
    mean, _ = right_moments(tiles, i, gates, plan, VP)
    squares = team.sum_of(tiles, i + 1, VP)
    return mean, tl.rsqrt(squares / (plan.H * gates) + plan.eps)


right_moments = norm.combine_moments


@triton.jit
def coarse_split(v):
    """No lower part: float16 instead of float32."""
    hi = v.to(tl.float16)
    return hi, hi * 0.0


@triton.jit
def even_mean(tiles, one, a, two, b):
    """The norm on c forgets one of its two sums."""
    return right_combined(tiles, one, a * 0.0, two, b)


right_combined = step.combined
TEAM_CASE = Case("lstm", norms.HASTE, T=4, B=3, I=5, H=43)
TEAM_MUTANTS = [
    ("no waiting for h and its gradient", products, "wait", hasty_wait),
    ("no waiting for sums", team, "wait", hasty_wait),
    ("words without a step", team, "missing", there_at_all),
    ("members apart", norm, "combine_moments", apart),
    ("no lower halves", products, "split", coarse_split),
    ("one sum short", step, "combined", even_mean),
]


@pytest.mark.parametrize(("place", "name", "mutant"), [m[1:] for m in TEAM_MUTANTS], ids=[m[0] for m in TEAM_MUTANTS])
def test_a_wrong_team_is_found_out(place, name, mutant, monkeypatch):
    take(monkeypatch, TEAM, Threads(late={1}))
    monkeypatch.setattr(place, name, mutant)
    must_fail(TEAM_CASE)


def test_a_late_member_does_not_matter(monkeypatch):
    take(monkeypatch, TEAM, Threads(late={1}))
    check(TEAM_CASE)


def test_members_without_the_others_give_up(monkeypatch):
    """NaN, and soon: the first member that loses patience tells the others."""
    take(monkeypatch, TEAM, Threads(absent={2}))
    monkeypatch.setattr(team, "LIMIT", tl.constexpr(20))
    call, _ = TEAM_CASE.build()
    with torch.no_grad():
        output = functional.recurrence(call)[0]
    assert output[-call.h_0.shape[1] :, :32].isnan().all()


LARGE = Case("lstm", norms.HASTE, T=3, B=3, H=19)


@pytest.mark.parametrize("way", [LOOP, TEAM], ids=str)
def test_numbers_beyond_float16(way, monkeypatch):
    """A weight and a state that float16 cannot hold: float32 products are right all the same."""
    take(monkeypatch, way)
    call, cotangents = LARGE.build()
    call = scaled(call, "weight_hh", 1e6)
    call.h_0.mul_(torch.tensor([1e6, 1.0, 1e-3])[:, None])
    want = evaluate(reference.run, widened(call), cotangents)
    assert_close(evaluate(functional.recurrence, call, cotangents), want, TOLERANCES[torch.float32])


def scaled(call: Call, name: str, factor: float) -> Call:
    """The call with one parameter multiplied."""
    names = call.layer.parameter_names * call.layer.directions
    return replace(call, parameters=tuple(p * factor if n == name else p for n, p in zip(names, call.parameters)))
