"""The equations, for people: a step function for each cell, one norm, one unroll. The oracle of every kernel.

It runs on any device and in any dtype, through any transform, and is differentiated by autograd (`gradients` in
`festina/backends/eager.py`). It is not written for speed. In a low type (bfloat16, float16) products are made in that type,
while norms, gates and c are float32; in float32 and float64 everything stays in the type of the input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from festina.call import Call, Outputs
from festina.norms import NormPlan
from festina.spec import LayerSpec

State = tuple[Tensor, ...]
PreActivations = tuple[Tensor, ...]


def total(pre: PreActivations) -> Tensor:
    """The sum of what x and h contribute, for cells that do not tell them apart."""
    return pre[0] if len(pre) == 1 else pre[0] + pre[1]


def lstm_gates(pre: PreActivations) -> tuple[Tensor, Tensor]:
    """pre: [B, 4, H] from x and from h, or their one normalised sum, order i f g o. To what c is multiplied by, σ(f), and what
    is added to it, σ(i)·tanh(g), both [B, H]."""
    a = total(pre)
    i, f = torch.sigmoid(a[:, :2]).unbind(1)
    return f, i * torch.tanh(a[:, 2])


def lstm_update(pre: PreActivations, state: State) -> Tensor:
    """pre as in `lstm_gates`; state: (h [B, P], c [B, H]). To c."""
    kept, added = lstm_gates(pre)
    return kept * state[1] + added


def lstm_emit(pre: PreActivations, c: Tensor) -> Tensor:
    """From c, normalised or not, to h [B, H]."""
    a = total(pre)
    return torch.sigmoid(a[:, 3]) * torch.tanh(c)


def gru_step(pre: PreActivations, state: State) -> Tensor:
    """pre: [B, 3, H] from x and from h, order r z n; state: (h [B, H],).

    Reset gate after the recurrent product, so one product serves all three gates (Cho et al. 2014, v1; cuDNN).
    """
    x, h = pre
    r, z = torch.sigmoid(x[:, :2] + h[:, :2]).unbind(1)
    n = torch.tanh(x[:, 2] + r * h[:, 2])
    return z * state[0] + (1 - z) * n


def gru_joint_step(pre: PreActivations, state: State) -> Tensor:
    """pre: the one normalised sum [B, 3, H], order r z n; state: (h [B, H],). The GRU of DreamerV2 and V3.

    The reset gate multiplies the whole candidate, its x part too. z opens for the new state, shifted by −1, where the
    z of `gru_step` keeps the old one.
    """
    (a,) = pre
    r, z, n = a.unbind(1)
    n = torch.tanh(torch.sigmoid(r) * n)
    z = torch.sigmoid(z - 1)
    return z * n + (1 - z) * state[0]


def gru_early_step(pre: PreActivations, state: State) -> Tensor:
    """pre: [B, 3, H] from x and from h, or their one normalised sum, order r z n, with r already in n, be it in its product
    or in the h of that; state: (h [B, H],)."""
    _, z, n = total(pre).unbind(1)
    z = torch.sigmoid(z)
    return z * state[0] + (1 - z) * torch.tanh(n)


def indrnn_step(activation: Callable[[Tensor], Tensor], pre: PreActivations, state: State) -> Tensor:
    """pre: [B, 1, H] from x, and u ⊙ h; state: (h [B, H],)."""
    x, h = pre
    return activation(x[:, 0] + h[:, 0])


STEPS: dict[str, Callable[[PreActivations, State], Tensor]] = {
    "gru": gru_step,
    "gru_joint": gru_joint_step,
    "gru_early": gru_early_step,
    "gru_state": gru_early_step,
    "indrnn": partial(indrnn_step, torch.tanh),
    "indrnn_relu": partial(indrnn_step, torch.relu),
}
"""Steps of the cells that carry h alone."""

HALVES: dict[str, tuple[Callable[[PreActivations, State], Tensor], Callable[[PreActivations, Tensor], Tensor]]] = {
    "lstm": (lstm_update, lstm_emit),
}
"""Steps of the cells with an inner state: to c, and from c to h. The norm on c sits between them."""


def wide(v: Tensor) -> Tensor:
    """`v` in float32 or wider: the type of norms, gates and c."""
    return v.to(torch.promote_types(v.dtype, torch.float32))


def normalize(v: Tensor, plan: NormPlan, gain: Tensor, shift: Tensor | None = None) -> Tensor:
    """N(v; gain) + shift for v [..., gates, H], group by group as the plan says; see `NormPlan` for N."""
    groups = []
    for first, end in plan.spans(v.shape[-2]):
        group = wide(v[..., first:end, :])
        if plan.kind == "layer":
            group = group - group.mean((-2, -1), keepdim=True)
        groups.append(group * torch.rsqrt(group.square().mean((-2, -1), keepdim=True) + plan.eps))
    normed = torch.cat(groups, -2) * gain.view(v.shape[-2:])
    return normed if shift is None else normed + shift.view(v.shape[-2:])


def norm_c(c: Tensor, plan: NormPlan, p: dict[str, Tensor]) -> Tensor:
    """The norm on c: N(c; gain_c) + bias_c over the H values of a row, all one group."""
    whole = NormPlan("separate", kind=plan.kind, eps=plan.eps)
    return normalize(c.unsqueeze(-2), whole, p["gain_c"], p.get("bias_c")).squeeze(-2)


def recurrent_product(layer: LayerSpec, h: Tensor, p: dict[str, Tensor]) -> Tensor:
    """W_hh h: [B, P] to [B, G, H], not yet normalised."""
    product = h * p["weight_hh"] if layer.cell.diagonal else F.linear(h, p["weight_hh"], p.get("bias_inner_hh"))
    gates = len(layer.cell.gates)
    return product.view(h.shape[0], gates, product.shape[1] // gates)


def pre_activations(layer: LayerSpec, x: Tensor, product: Tensor, p: dict[str, Tensor]) -> PreActivations:
    """`input_product` and `recurrent_product`, normalised and shifted: a pair, or their one sum if the norm is joint."""
    plan = layer.plan
    if plan.placement == "joint":
        return (normalize(x + product, plan, p["gain_joint"], p.get("bias_joint")),)
    if "gain_hh" in p:
        return x, normalize(product, plan, p["gain_hh"], p.get("bias_hh"))
    if "bias_hh" in p:
        return x, wide(product) + p["bias_hh"].view(product.shape[1:])
    return x, wide(product)


def reset_early(layer: LayerSpec, pre: PreActivations, product: Tensor, h: Tensor, p: dict[str, Tensor]) -> Tensor:
    """The recurrent product with the reset gate applied to its last block, the candidate's; `pre` gives the gate, r z n."""
    r = torch.sigmoid(total(pre)[:, 0])
    again = (
        recurrent_product(layer, (r * h).to(h.dtype), p) if layer.plan.reset == "state" else r.unsqueeze(1) * product
    )
    return torch.cat([wide(product)[:, :-1], wide(again)[:, -1:]], 1)


def cell_step(layer: LayerSpec, x: Tensor, state: State, p: dict[str, Tensor]) -> State:
    """x [B, G, H], this step's rows of `input_product`, and the old state to (h [B, P], [c]), before Zoneout."""
    plan, h = layer.plan, state[0]
    product = recurrent_product(layer, h, p)
    pre = pre_activations(layer, x, product, p)
    if plan.reset != "normed":
        pre = pre_activations(layer, x, reset_early(layer, pre, product, h, p), p)

    if "c" in layer.cell.states:
        update, emit = HALVES[layer.step]
        c = update(pre, state)
        if plan.cell == "carried":
            c = norm_c(c, plan, p)
        if plan.clip is not None:
            c = c.clamp(-plan.clip, plan.clip)
        new: State = (emit(pre, norm_c(c, plan, p) if plan.cell == "readout" else c).to(h.dtype), c)
    else:
        new = (STEPS[layer.step](pre, state).to(h.dtype),)
    return (F.linear(new[0], p["weight_hr"]), *new[1:]) if layer.projected else new


def input_product(layer: LayerSpec, input: Tensor, p: dict[str, Tensor]) -> Tensor:
    """W_ih x of every step at once: [N, I] to [N, G, H], normalised and shifted unless the norm is joint."""
    gates = len(layer.cell.gates)
    H = p["weight_ih"].shape[0] // gates
    x = wide(F.linear(input, p["weight_ih"], p.get("bias_inner"))).view(input.shape[0], gates, H)
    if "gain_ih" in p:
        return normalize(x, layer.plan, p["gain_ih"], p.get("bias_ih"))
    return x + p["bias_ih"].view(gates, H) if "bias_ih" in p else x


def zoneout(old: Tensor, new: Tensor, mask: Tensor | None, rate: float) -> Tensor:
    """Where the mask is True, or by the expectation at `rate`, the old value stays (Krueger et al. 2016)."""
    if mask is not None:
        return torch.where(mask, old, new)
    return rate * old + (1 - rate) * new if rate else new


def step(
    layer: LayerSpec,
    x: Tensor,
    state: State,
    p: dict[str, Tensor],
    *,
    resets: Tensor | None,
    masks: Sequence[Tensor | None],
    rates: Sequence[float],
) -> State:
    """One step of one direction: reset, `cell_step`, Zoneout. resets [B] bool; masks [B, P], [B, H] and rates of h and c."""
    if resets is not None:
        state = tuple(torch.where(resets.unsqueeze(1), torch.zeros_like(s), s) for s in state)
    new = cell_step(layer, x, state, p)
    return tuple(zoneout(was, now, mask, rate) for was, now, mask, rate in zip(state, new, masks, rates))


def unroll(call: Call, d: int) -> tuple[Tensor, State]:
    """Direction `d` of a call: output [N, P], and every row's own last state.

    Direction 1 takes the steps from the last to the first; a row joins at its own end. Rows that are not active, before
    their first step or after their last, keep their state.
    """
    p, sizes = call.of_direction(d), call.sizes()
    x = input_product(call.layer, call.input, p)
    state: State = (call.h_0[d],) if call.c_0 is None else (call.h_0[d], wide(call.c_0[d]))
    rates = (call.zoneout, call.zoneout_cell)
    masks = (call.zoneout_mask, call.zoneout_cell_mask)

    starts = [0]
    for rows in sizes:
        starts.append(starts[-1] + rows)
    outputs: list[Tensor] = [call.input.new_zeros(0, call.h_0.shape[2])] * len(sizes)
    for t in range(len(sizes)) if d == 0 else reversed(range(len(sizes))):
        rows, here = sizes[t], slice(starts[t], starts[t + 1])
        old = tuple(s[:rows] for s in state)
        resets = None if call.resets is None else call.resets[d, here]
        kept = [None if mask is None else mask[d, here] for mask in masks]
        new = step(call.layer, x[here], old, p, resets=resets, masks=kept, rates=rates)
        outputs[t] = new[0]
        state = tuple(torch.cat([now, s[rows:]]) for now, s in zip(new, state, strict=True))
    output = torch.cat(outputs) if outputs else call.input.new_zeros(0, call.h_0.shape[2])
    return output, state


def run(call: Call) -> Outputs:
    """The whole call: output [N, D·P], h_n [D, B, P] and c_n [D, B, H] (None if the cell has no c)."""
    outputs, states = zip(*(unroll(call, d) for d in range(call.layer.directions)))
    h_n, *c_n = (torch.stack(values) for values in zip(*states))
    return Outputs(torch.cat(outputs, 1), h_n, c_n[0].to(call.input.dtype) if c_n else None)
