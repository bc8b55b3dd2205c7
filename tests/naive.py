"""The recurrence from the equations in the documentation, one number at a time: no tensors, no shared code.

Slow and plain on purpose. `festina.reference` must compute the same; if the two differ, one of them is wrong.
"""

from __future__ import annotations

from itertools import pairwise
from math import exp, sqrt, tanh


def sigmoid(v):
    return 1 / (1 + exp(-v))


def dot(row, vector):
    return sum(w * v for w, v in zip(row, vector, strict=True))


def norm(values, plan, gain, shift):
    """N(v; gain) + shift over all of `values`."""
    n = len(values)
    mean = sum(values) / n if plan.kind == "layer" else 0.0
    spread = sqrt(sum((v - mean) ** 2 for v in values) / n + plan.eps)
    return [g * (v - mean) / spread + s for v, g, s in zip(values, gain, shift, strict=True)]


def norm_gates(values, plan, gates, gain, shift):
    """`norm` over each group that shares statistics: all gates, each gate, or all but the last and the last."""
    H = len(values) // gates
    cuts = {"all": [0, gates], "gate": range(gates + 1), "gates|candidate": [0, gates - 1, gates]}[plan.groups]
    normed = []
    for first, end in pairwise(cuts):
        part = slice(first * H, end * H)
        normed += norm(values[part], plan, gain[part], shift[part])
    return normed


def pre_activations(cell, plan, p, x, h, r=None):
    """The pre-activations from x and from h, G·H numbers each; under a joint norm their normalised sum, and zeros.

    Given `r`, the reset gate acts here: on the candidate's rows of the recurrent product, or on h before the product.
    """
    gates = {"lstm": 4, "gru": 3, "indrnn": 1, "indrnn_relu": 1}[cell]
    size = len(p["weight_ih"])
    none = [0.0] * size

    from_x = [dot(row, x) for row in p["weight_ih"]]
    if cell.startswith("indrnn"):
        from_h = [u * v for u, v in zip(p["weight_hh"], h, strict=True)]
    else:
        biases = p.get("bias_inner_hh", none)
        from_h = [dot(row, h) + b for row, b in zip(p["weight_hh"], biases, strict=True)]
    if r is not None:
        last = range(size - len(h), size)
        if plan.reset == "state":
            kept = [a * b for a, b in zip(r, h, strict=True)]
            from_h[last.start :] = [dot(p["weight_hh"][k], kept) + biases[k] for k in last]
        else:
            from_h[last.start :] = [a * from_h[k] for a, k in zip(r, last, strict=True)]
    if plan.inner_bias:
        from_x = [v + b for v, b in zip(from_x, p.get("bias_inner", none), strict=True)]

    b_ih, b_hh = p.get("bias_ih", none), p.get("bias_hh", none)
    if plan.placement == "joint":
        both = [a + b for a, b in zip(from_x, from_h, strict=True)]
        return norm_gates(both, plan, gates, p["gain_joint"], p.get("bias_joint", none)), none
    if plan.placement == "separate":
        from_x = norm_gates(from_x, plan, gates, p["gain_ih"], b_ih)
        if not cell.startswith("indrnn"):
            from_h = norm_gates(from_h, plan, gates, p["gain_hh"], b_hh)
        return from_x, from_h
    return [v + b for v, b in zip(from_x, b_ih, strict=True)], [v + b for v, b in zip(from_h, b_hh, strict=True)]


def lstm(plan, p, x, h, c):
    H = len(c)
    new_h, new_c = [], []
    for j in range(H):
        i, f, g, o = (x[k * H + j] + h[k * H + j] for k in range(4))
        new_c.append(sigmoid(f) * c[j] + sigmoid(i) * tanh(g))
        new_h.append(sigmoid(o))

    def norm_c(values):
        return norm(values, plan, p["gain_c"], p.get("bias_c", [0.0] * H))

    if plan.cell == "carried":
        new_c = norm_c(new_c)
    if plan.clip is not None:
        new_c = [min(max(v, -plan.clip), plan.clip) for v in new_c]
    seen = norm_c(new_c) if plan.cell == "readout" else new_c
    return [o * tanh(v) for o, v in zip(new_h, seen, strict=True)], new_c


def gru(plan, x, h, old):
    H = len(old)
    new = []
    for j in range(H):
        if plan.reset != "normed":
            z = sigmoid(x[H + j] + h[H + j])
            new.append(z * old[j] + (1 - z) * tanh(x[2 * H + j] + h[2 * H + j]))
        elif plan.placement == "joint":
            n = tanh(sigmoid(x[j]) * x[2 * H + j])
            update = sigmoid(x[H + j] - 1)
            new.append(update * n + (1 - update) * old[j])
        else:
            r, z = sigmoid(x[j] + h[j]), sigmoid(x[H + j] + h[H + j])
            n = tanh(x[2 * H + j] + r * h[2 * H + j])
            new.append(z * old[j] + (1 - z) * n)
    return new


def step(cell, plan, p, x, h, c):
    """One row, one step: the new h and c, projected, before Zoneout."""
    from_x, from_h = pre_activations(cell, plan, p, x, h)
    if plan.reset != "normed":
        r = [sigmoid(a + b) for a, b in zip(from_x[: len(h)], from_h[: len(h)], strict=True)]
        from_x, from_h = pre_activations(cell, plan, p, x, h, r=r)
    if cell == "lstm":
        h, c = lstm(plan, p, from_x, from_h, c)
    elif cell == "gru":
        h = gru(plan, from_x, from_h, h)
    else:
        total = [a + b for a, b in zip(from_x, from_h, strict=True)]
        h = [tanh(v) if cell == "indrnn" else max(v, 0.0) for v in total]
    if "weight_hr" in p:
        h = [dot(row, h) for row in p["weight_hr"]]
    return h, c


def keep(old, new, mask, rate):
    """Zoneout: the old value where the mask is true; without a mask the expectation."""
    if mask is None:
        return [rate * o + (1 - rate) * n for o, n in zip(old, new, strict=True)]
    return [o if m else n for o, n, m in zip(old, new, mask, strict=True)]


def run(call):
    """Run a `festina.call.Call` row by row: output [N][D·P], h_n [D][B][P], c_n [D][B][H], as nested lists."""
    plan, cell = call.layer.plan, call.layer.cell.name
    rows = call.h_0.shape[1]
    sizes = call.batch_sizes.tolist() if call.batch_sizes is not None else [rows] * (len(call.input) // rows)
    starts = [sum(sizes[:t]) for t in range(len(sizes))]
    output = [[] for _ in range(sum(sizes))]
    h_n, c_n = [], []
    for d in range(call.layer.directions):
        p = {name: value.tolist() for name, value in call.of_direction(d).items()}
        h_n.append([])
        c_n.append([])
        for b in range(rows):
            h = call.h_0[d, b].tolist()
            c = None if call.c_0 is None else call.c_0[d, b].tolist()
            places = [start + b for start, size in zip(starts, sizes, strict=True) if b < size]
            for at in places if d == 0 else reversed(places):
                if call.resets is not None and call.resets[d, at]:
                    h, c = [0.0] * len(h), None if c is None else [0.0] * len(c)
                new_h, new_c = step(cell, plan, p, call.input[at].tolist(), h=h, c=c)
                mask, cell_mask = (
                    None if m is None else m[d, at].tolist() for m in (call.zoneout_mask, call.zoneout_cell_mask)
                )
                h = keep(h, new_h, mask, call.zoneout)
                c = None if c is None else keep(c, new_c, cell_mask, call.zoneout_cell)
                output[at] += h
            h_n[d].append(h)
            c_n[d].append(c)
    return output, h_n, c_n
