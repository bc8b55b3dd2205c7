"""Deliberately wrong equations: the comparison that judges backends must fail for each, by name, and by a wide margin.

A mutant is the reference with one piece changed. It runs in float64 on a case of `CASES`, so that what is measured is
the change alone, and is judged with the tolerance of float32, 1e-5.

Measured: right equations in float32 differ by 3.3e-6 at worst over `CASES` (d_bias_ih of
lstm-HASTE-T4B4I5H9-f32-resets-bidirectional). The mildest mutants here differ by 1.5e-3 (eps 1e-5 where the plan says
1e-3, in the DREAMER GRU), 1.1e-2 (the same under TFA) and 1.3e-2 (the unbiased variance, DREAMER GRU).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import mutants
import pytest
import torch
import torch.nn.functional as F
from cases import CASES
from torch import Tensor

from festina import reference
from festina.call import Call
from festina.reference import total, wide
from festina.testing import TOLERANCES, assert_close, evaluate, worst

TOLERANCE = TOLERANCES[torch.float32]
MARGIN = 10

BY_ID = {str(case): case for case in CASES}

# Layer norms with the plans' own eps; the raw plans have one so large that its place shows.
LSTM, GRU, INDRNN = (f"{cell}-HASTE-T3B3I5H17-f64" for cell in ("lstm", "gru", "indrnn"))
LSTM_PLAIN, GRU_PLAIN = (f"{cell}-NONE-T3B3I5H17-f64" for cell in ("lstm", "gru"))
CARRIED, PER_GATE, JOINT = (f"lstm-{plan}-T3B3I5H17-f64" for plan in ("FASTRNNS", "ICEFALL", "TORCHAUDIO"))
DREAMER, SPLIT = "gru-DREAMER-T3B3I5H17-f64", "gru-BA2016_GRU-T3B3I5H17-f64"
LOUD, LOUD_RMS = "lstm-separate-T3B3I6H9-f32", "lstm-joint+rms-T3B3I6H9-f32"
LOUD_C = "lstm-none+readout-T3B3I6H9-f32"


def with_feature(features: str, cell: str = "lstm", plan: str = "HASTE", P: str = "") -> str:
    return f"{cell}-{plan}-T4B4I5H9{P}-{'f32' if P else 'f64'}-{features}"


Run = Callable[[Call], tuple]


@dataclass(frozen=True)
class Mutant:
    """One wrong equation. `make` patches the reference, or gives a function to run in its place."""

    case: str
    make: Callable[[pytest.MonkeyPatch], Run | None]

    def __str__(self) -> str:
        return self.make.__name__


MUTANTS: list[Mutant] = []


def mutant(*cases: str) -> Callable:
    """Register a wrong equation, to be found out on each of `cases`."""

    def register(make: Callable[[pytest.MonkeyPatch], Run | None]) -> Callable:
        MUTANTS.extend(Mutant(case, make) for case in cases)
        return make

    return register


# The norm.


def patch_statistics(patch: pytest.MonkeyPatch, normed: Callable[[Tensor, reference.NormPlan], Tensor]) -> None:
    """Norms are `normed` of a group's values, whatever the plan says about kind and eps."""

    def normalize(v, plan, gain, shift=None):
        groups = [normed(wide(v[..., first:end, :]).flatten(-2), plan) for first, end in plan.spans(v.shape[-2])]
        result = torch.cat(groups, -1).view(v.shape) * gain.view(v.shape[-2:])
        return result if shift is None else result + shift.view(v.shape[-2:])

    patch.setattr(reference, "normalize", normalize)


def patch_plan(patch: pytest.MonkeyPatch, **fields) -> None:
    """Norms take their statistics as another plan would."""
    true = reference.normalize
    patch.setattr(reference, "normalize", lambda v, plan, *rest: true(v, replace(plan, **fields), *rest))


def centred(v: Tensor) -> Tensor:
    return v - v.mean(-1, keepdim=True)


@mutant(LSTM, GRU, INDRNN, PER_GATE, DREAMER)
def unbiased_variance(patch):
    patch_statistics(patch, lambda v, plan: centred(v) * torch.rsqrt(v.var(-1, keepdim=True) + plan.eps))


@mutant(LOUD, LOUD_C)
def eps_outside_the_root(patch):
    patch_statistics(patch, lambda v, plan: centred(v) / (v.var(-1, keepdim=True, correction=0).sqrt() + plan.eps))


@mutant(LOUD, LOUD_C)
def eps_missing(patch):
    patch_statistics(patch, lambda v, _: centred(v) * torch.rsqrt(v.var(-1, keepdim=True, correction=0)))


@mutant("lstm-TFA-T3B3I5H17-f64", DREAMER, LOUD_C)
def eps_1e_5_whatever_the_plan_says(patch):
    patch_plan(patch, eps=1e-5)


@mutant(LSTM, GRU, INDRNN, PER_GATE, DREAMER)
def mean_not_subtracted(patch):
    patch_plan(patch, kind="rms")


@mutant(LOUD_RMS)
def mean_subtracted_from_an_rms_norm(patch):
    patch_plan(patch, kind="layer")


@mutant(LSTM, GRU, JOINT, SPLIT)
def statistics_per_gate_instead_of_all(patch):
    patch_plan(patch, groups="gate")


@mutant(PER_GATE, SPLIT)
def statistics_over_all_gates_instead_of_groups(patch):
    patch_plan(patch, groups="all")


@mutant(LSTM, GRU, JOINT)
def no_gradient_through_the_variance(patch):
    patch_statistics(
        patch, lambda v, plan: centred(v) * torch.rsqrt(v.var(-1, keepdim=True, correction=0) + plan.eps).detach()
    )


@mutant(LSTM, GRU, JOINT)
def no_gradient_through_the_mean(patch):
    def normed(v, plan):
        c = v - v.mean(-1, keepdim=True).detach()
        return c * torch.rsqrt(c.square().mean(-1, keepdim=True) + plan.eps)

    patch_statistics(patch, normed)


@mutant(LSTM, JOINT)
def shift_before_the_gain(patch):
    true = reference.normalize

    def normalize(v, plan, gain, shift=None):
        ones = torch.ones_like(gain)
        return true(v, plan, ones, shift) * gain.view(v.shape[-2:])

    patch.setattr(reference, "normalize", normalize)


# Where it sits.


def on_plan(**fields) -> Run:
    """Another plan on the same parameters."""
    return lambda call: reference.run(replace(call, layer=replace(call.layer, plan=replace(call.layer.plan, **fields))))


@mutant(LSTM)
def c_carried_instead_of_readout(patch):
    return on_plan(cell="carried")


@mutant(CARRIED, PER_GATE)
def c_readout_instead_of_carried(patch):
    return on_plan(cell="readout")


@mutant(LSTM, CARRIED)
def no_norm_on_c(patch):
    patch.setattr(reference, "norm_c", lambda c, plan, p: c * p["gain_c"] + p["bias_c"])


@mutant(JOINT, DREAMER)
def x_normalised_before_the_joint_norm(patch):
    true = reference.input_product

    def input_product(layer, input, p):
        return reference.normalize(true(layer, input, p), layer.plan, p["gain_joint"], p["bias_joint"])

    patch.setattr(reference, "input_product", input_product)


@mutant(PER_GATE)
def inner_bias_after_the_norm(patch):
    true_product, true_normalize = reference.input_product, reference.normalize
    inner = {}

    def input_product(layer, input, p):
        inner["bias"] = p["bias_inner"]
        return true_product(layer, input, {name: value for name, value in p.items() if name != "bias_inner"})

    def normalize(v, plan, gain, shift=None):
        result = true_normalize(v, plan, gain, shift)
        return result + inner["bias"].view(v.shape[-2:]) if v.shape[-2] == 4 else result

    patch.setattr(reference, "input_product", input_product)
    patch.setattr(reference, "normalize", normalize)


# Parameters.


def with_parameters(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Run:
    """The reference on changed parameters, direction by direction."""

    def run(call: Call):
        changed = [change(call.of_direction(d)) for d in range(call.layer.directions)]
        return reference.run(
            replace(call, parameters=tuple(p[name] for p in changed for name in call.layer.parameter_names))
        )

    return run


def without(name: str) -> Run:
    return with_parameters(lambda p: {**p, name: 0 * p[name]})


@mutant(LSTM, GRU, INDRNN, LSTM_PLAIN, GRU_PLAIN)
def bias_ih_missing(patch):
    return without("bias_ih")


@mutant(LSTM, GRU, LSTM_PLAIN, GRU_PLAIN)
def bias_hh_missing(patch):
    return without("bias_hh")


@mutant(LSTM, CARRIED, PER_GATE)
def bias_c_missing(patch):
    return without("bias_c")


@mutant(PER_GATE)
def bias_inner_missing(patch):
    return without("bias_inner")


@mutant(LSTM, GRU)
def gains_exchanged(patch):
    return with_parameters(lambda p: {**p, "gain_ih": p["gain_hh"], "gain_hh": p["gain_ih"]})


@mutant(LSTM, CARRIED)
def gain_c_missing(patch):
    return with_parameters(lambda p: {**p, "gain_c": p["gain_c"] ** 0})


def gate_order(*order: int) -> Run:
    """The gate blocks of every parameter read in another order."""

    def change(p):
        size = len(p["weight_ih"])
        return {
            name: value.unflatten(0, (len(order), -1))[list(order)].flatten(0, 1) if len(value) == size else value
            for name, value in p.items()
        }

    return with_parameters(change)


@mutant(LSTM, LSTM_PLAIN, PER_GATE)
def i_and_f_exchanged(patch):
    return gate_order(1, 0, 2, 3)


@mutant(LSTM, LSTM_PLAIN)
def gates_in_the_order_of_haste(patch):
    return gate_order(0, 2, 1, 3)


@mutant(GRU, GRU_PLAIN, DREAMER)
def r_and_z_exchanged(patch):
    return gate_order(1, 0, 2)


# The cells.


def patch_lstm(patch, update=reference.lstm_update, emit=reference.lstm_emit) -> None:
    patch.setitem(reference.HALVES, "lstm", (update, emit))


@mutant(LSTM, LSTM_PLAIN)
def input_gate_tied_to_the_forget_gate(patch):
    def update(pre, state):
        f, g = torch.sigmoid(total(pre)[:, 1]), torch.tanh(total(pre)[:, 2])
        return f * state[1] + (1 - f) * g

    patch_lstm(patch, update)


@mutant(LSTM, LSTM_PLAIN)
def forget_bias_added_at_run_time(patch):
    def update(pre, state):
        i, f = torch.sigmoid(total(pre)[:, 0]), torch.sigmoid(total(pre)[:, 1] + 1)
        return f * state[1] + i * torch.tanh(total(pre)[:, 2])

    patch_lstm(patch, update)


@mutant(LSTM, LSTM_PLAIN)
def c_read_out_without_tanh(patch):
    patch_lstm(patch, emit=lambda pre, c: torch.sigmoid(total(pre)[:, 3]) * c)


@mutant(LSTM, LSTM_PLAIN)
def old_c_read_out(patch):
    def update(pre, state):
        update.old = state[1]
        return reference.lstm_update(pre, state)

    patch_lstm(patch, update, lambda pre, c: reference.lstm_emit(pre, update.old))


@mutant(LSTM, LSTM_PLAIN)
def no_gradient_through_c_over_time(patch):
    patch_lstm(patch, lambda pre, state: reference.lstm_update(pre, (state[0], state[1].detach())))


def patch_gru(patch, candidate, old_by_z: bool = True) -> None:
    def step(pre, state):
        x, h = pre
        r, z = torch.sigmoid(x[:, :2] + h[:, :2]).unbind(1)
        n = candidate(x[:, 2], h[:, 2], r)
        return z * state[0] + (1 - z) * n if old_by_z else z * n + (1 - z) * state[0]

    patch.setitem(reference.STEPS, "gru", step)


@mutant(GRU, GRU_PLAIN)
def reset_after_the_candidate(patch):
    patch_gru(patch, lambda x, h, r: r * torch.tanh(x + h))


@mutant(GRU, GRU_PLAIN)
def reset_of_the_whole_candidate(patch):
    patch_gru(patch, lambda x, h, r: torch.tanh(r * (x + h)))


@mutant(GRU, GRU_PLAIN)
def z_opens_for_the_new_h(patch):
    patch_gru(patch, lambda x, h, r: torch.tanh(x + r * h), old_by_z=False)


@mutant(GRU, GRU_PLAIN)
def recurrent_bias_outside_of_the_reset(patch):
    true = reference.cell_step

    def cell_step(layer, x, state, p):
        bias = p["bias_hh"].view(3, -1)
        x = x + torch.cat([torch.zeros_like(bias[:2]), bias[2:]])
        kept = torch.cat([bias[:2], torch.zeros_like(bias[2:])]).flatten()
        return true(layer, x, state, {**p, "bias_hh": kept})

    patch.setattr(reference, "cell_step", cell_step)


def patch_dreamer(patch, shift: float, flip: bool = False) -> None:
    def step(pre, state):
        r, z, n = pre[0].unbind(1)
        n, z = torch.tanh(torch.sigmoid(r) * n), torch.sigmoid(z + shift)
        return (1 - z) * n + z * state[0] if flip else z * n + (1 - z) * state[0]

    patch.setitem(reference.STEPS, "gru_joint", step)


@mutant(DREAMER)
def update_without_its_minus_one(patch):
    patch_dreamer(patch, shift=0)


@mutant(DREAMER)
def update_keeps_the_old_h(patch):
    patch_dreamer(patch, shift=-1, flip=True)


@mutant(INDRNN)
def relu_for_tanh(patch):
    patch.setitem(reference.STEPS, "indrnn", reference.STEPS["indrnn_relu"])


@mutant("indrnn_relu-HASTE-T3B3I5H17-f64")
def tanh_for_relu(patch):
    patch.setitem(reference.STEPS, "indrnn_relu", reference.STEPS["indrnn"])


# Around the cell.


def with_call(**changes) -> Run:
    """The reference on a changed call; a change is a value, or a function of the call."""
    return lambda call: reference.run(
        replace(call, **{name: change(call) if callable(change) else change for name, change in changes.items()})
    )


@mutant(with_feature("zoneout"), with_feature("zoneout", "gru"), with_feature("zoneout", "indrnn"))
def zoneout_mask_inverted(patch):
    return with_call(zoneout_mask=lambda call: ~call.zoneout_mask)


@mutant(with_feature("zoneout_cell"))
def zoneout_cell_mask_inverted(patch):
    return with_call(zoneout_cell_mask=lambda call: ~call.zoneout_cell_mask)


@mutant(with_feature("zoneout_cell"))
def mask_of_c_used_for_h(patch):
    return with_call(zoneout_mask=lambda call: call.zoneout_cell_mask)


@mutant(with_feature("expectation"), with_feature("expectation", "gru"))
def expectation_of_zoneout_ignored(patch):
    return with_call(zoneout=0.0, zoneout_cell=0.0)


@mutant(with_feature("expectation"))
def rates_of_zoneout_exchanged(patch):
    return with_call(zoneout=lambda call: call.zoneout_cell, zoneout_cell=lambda call: call.zoneout)


@mutant(with_feature("zoneout"))
def masked_steps_scaled_up_as_in_dropout(patch):
    true = reference.zoneout
    patch.setattr(reference, "zoneout", lambda old, new, mask, rate: true(old, new / (1 - 0.4), mask, rate))


@mutant(with_feature("zoneout", P="P5"))
def projection_after_zoneout(patch):
    """Zoneout on the H values before the projection, the old h lifted to H so that it comes out as it was."""
    true_step, true_zoneout = reference.cell_step, reference.zoneout
    held = {}

    def cell_step(layer, x, state, p):
        held["weight"] = p["weight_hr"]
        return true_step(replace(layer, projected=False), x, state, p)

    def zoneout(old, new, mask, rate):
        if old.shape == new.shape:
            return true_zoneout(old, new, mask, rate)
        lifted = F.linear(old, torch.linalg.pinv(held["weight"]))
        mask = F.pad(mask, (0, new.shape[-1] - mask.shape[-1]))
        return F.linear(true_zoneout(lifted, new, mask, rate), held["weight"])

    patch.setattr(reference, "cell_step", cell_step)
    patch.setattr(reference, "zoneout", zoneout)


@mutant(with_feature("resets"), with_feature("resets", "gru"), with_feature("resets", "indrnn"))
def resets_ignored(patch):
    return with_call(resets=None)


@mutant(with_feature("resets"))
def reset_one_step_late(patch):
    return with_call(resets=lambda call: call.resets.roll(call.h_0.shape[1], 1))


@mutant(with_feature("resets"))
def reset_of_h_but_not_of_c(patch):
    def run(call: Call):
        outputs, h, c = [], call.h_0, call.c_0
        for x, resets in zip(call.input.split(h.shape[1]), call.resets.split(h.shape[1], 1), strict=True):
            h = torch.where(resets.unsqueeze(-1), 0.0, h)
            output, h, c = reference.run(replace(call, input=x, resets=None, h_0=h, c_0=c))
            outputs.append(output)
        return torch.cat(outputs), h, c

    return run


@mutant(with_feature("resets-bidirectional"))
def resets_of_the_forward_direction_in_both(patch):
    return with_call(resets=lambda call: call.resets[:1].expand_as(call.resets))


@mutant(with_feature("bidirectional"), with_feature("bidirectional", "gru"))
def reverse_direction_runs_forward(patch):
    true = reference.unroll

    def unroll(call, d):
        own = call.parameters[d * len(call.layer.parameter_names) :]
        return true(replace(call, parameters=own, h_0=call.h_0[d:], c_0=None if call.c_0 is None else call.c_0[d:]), 0)

    def of_direction(call, d):
        return dict(zip(call.layer.parameter_names, call.parameters))

    patch.setattr(Call, "of_direction", of_direction)
    patch.setattr(reference, "unroll", unroll)


@mutant(with_feature("bidirectional"))
def one_set_of_parameters_for_both_directions(patch):
    return with_call(parameters=lambda call: call.parameters[: len(call.layer.parameter_names)] * 2)


@mutant(with_feature("ragged"), with_feature("ragged-bidirectional"), with_feature("idle"))
def rows_that_are_not_active_lose_their_state(patch):
    def run(call: Call):
        output, h_n, c_n = reference.run(call)
        last = int(call.batch_sizes[-1])
        keep = (torch.arange(h_n.shape[1]) < last).view(1, -1, 1)
        return output, h_n * keep, None if c_n is None else c_n * keep

    return run


@mutant(with_feature("ragged-bidirectional"))
def reverse_direction_starts_from_zeros(patch):
    return with_call(h_0=lambda call: call.h_0 * torch.tensor([1.0, 0.0]).view(2, 1, 1))


@pytest.mark.parametrize("wrong", MUTANTS, ids=lambda m: f"{m}-{m.case}")
def test_mutant_is_found_out(wrong, monkeypatch):
    call, cotangents = replace(BY_ID[wrong.case], dtype=torch.float64).build()
    want = evaluate(reference.run, call, cotangents)
    got = evaluate(wrong.make(monkeypatch) or reference.run, call, cotangents)
    found, name = worst(got, want)
    assert found >= MARGIN * TOLERANCE, f"{wrong}: {name} moves by {found:.1e} only"
    with pytest.raises(AssertionError, match="differs by"):
        assert_close(got, want, TOLERANCE)


def test_every_wrong_version_can_still_be_made():
    """`make mutants` runs them; here, each finds the text that it replaces, once."""
    for version in mutants.MUTANTS:
        mutants.applied(version, (mutants.ROOT / version.file).read_text())
    names = [version.name for version in mutants.MUTANTS]
    assert len(set(names)) == len(names) >= 60


def test_a_wrong_version_is_killed_and_a_right_one_is_not():
    version = next(version for version in mutants.MUTANTS if version.file == "festina/sequences.py")
    version = version._replace(tests="tests/test_sequences.py")
    for one, want in ((version, "killed"), (version._replace(new=version.old), "SURVIVED")):
        assert mutants.result(one, core=None) == want
