# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, assignment"
"""One step of any cell under any plan, forward and back, on tiles: what the two tiers have in common.

Neither loads a state nor makes a product: `x` is this step's part of the input, `p` the recurrent product, both as
tuples with a tile a gate; h and c are tiles, c is None where the cell has none.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from festina.backends.triton.cells import CELLS, SOURCE, Cell
from festina.backends.triton.norm import (
    load_row,
    load_tiles,
    normalize,
    normalize_backward,
    scaled,
    shifted,
    store_tiles,
)
from festina.spec import LayerSpec


class Plan(NamedTuple):
    """A layer as kernels take it: one constant.

    `source` is there for Triton's cache on disk, which knows a function inside a constant by its name alone: without it
    a changed step would run as the old one.

    Before Triton 3.8 a field is a constant only under a name of its own: `G: tl.constexpr = plan.G`.
    """

    cell: Cell
    source: str
    G: int
    H: int
    P: int
    spans: tuple[tuple[int, int], ...]
    centred: bool
    eps: float
    is_joint: bool
    has_hh_norm: bool
    has_c: bool
    has_c_norm: bool
    is_c_carried_normed: bool
    is_diagonal: bool
    is_projected: bool

    @classmethod
    def of(cls, layer: LayerSpec, H: int, P: int) -> Plan:
        """The plan of a layer of these sizes."""
        plan = layer.plan
        return cls(
            cell=CELLS[layer.step],
            source=SOURCE,
            G=len(layer.cell.gates),
            H=H,
            P=P,
            spans=tuple(plan.spans(len(layer.cell.gates))),
            centred=plan.kind == "layer",
            eps=plan.eps,
            is_joint=plan.placement == "joint",
            has_hh_norm=plan.placement != "none" and not layer.cell.diagonal,
            has_c="c" in layer.cell.states,
            has_c_norm=plan.cell != "none",
            is_c_carried_normed=plan.cell == "carried",
            is_diagonal=layer.cell.diagonal,
            is_projected=layer.projected,
        )


class Weights(NamedTuple):
    """What a step reads besides its input: contiguous tensors, or None where the layer has no such parameter."""

    hh: Any  # [G·H, P], or [H] of a diagonal cell
    hr: Any  # [P, H]
    gain: Any  # the norm on the recurrent product, or on the sum if it is joint
    shift: Any
    gain_c: Any
    bias_c: Any


class Around(NamedTuple):
    """What happens around the cell: flags as bytes, packed as the steps are, and rates; None where there is nothing."""

    resets: Any
    keep_h: Any
    keep_c: Any
    rate_h: Any
    rate_c: Any


@triton.jit
def pre_activations(x, p, w, col, mask, plan: tl.constexpr):
    """What the cell sees from x and from h; and p (or x + p) normalised with its reciprocals, for the way back."""
    G: tl.constexpr = plan.G
    raw = p
    if plan.is_joint:
        raw = ()
        for g in tl.static_range(G):
            raw += (x[g] + p[g],)
    normed, reciprocals = raw, raw
    from_h = raw
    if plan.has_hh_norm:
        spans: tl.constexpr = plan.spans
        normed, reciprocals = normalize(raw, mask, plan, spans)
        from_h = scaled(normed, w.gain, col, plan.H, G)
    from_h = shifted(from_h, w.shift, col, plan.H, G)
    if plan.is_joint:
        zeros = ()
        for g in tl.static_range(G):
            zeros += (tl.zeros_like(x[g]),)
        return from_h, zeros, normed, reciprocals
    else:
        return x, from_h, normed, reciprocals


@triton.jit
def see(new, w, col, mask, plan: tl.constexpr):
    """The updated state as `emit` sees it; and normalised with its reciprocal, for the way back."""
    if plan.has_c_norm:
        normed, reciprocals = normalize((new,), mask, plan, ((0, 1),))
        seen = shifted(scaled(normed, w.gain_c, col, plan.H, 1), w.bias_c, col, plan.H, 1)
        return seen[0], normed, reciprocals
    else:
        return new, (new,), (new,)


@triton.jit
def advance(x, p, h, c, w, col, mask, plan: tl.constexpr):
    """To the new h, before projection and Zoneout, and the new c, before Zoneout."""
    from_x, from_h, _, _ = pre_activations(x, p, w, col, mask, plan)
    new = plan.cell.update(from_x, from_h, c if plan.has_c else h)
    seen, _, _ = see(new, w, col, mask, plan)
    return plan.cell.emit(from_x, from_h, seen), seen if plan.is_c_carried_normed else new


@triton.jit
def retreat(x, p, h, c, d_h, d_c, w, col, mask, plan: tl.constexpr):
    """Back through `advance`, whose results are computed once more.

    Returns the gradients of x, of what is added to the shift, of p, of the old state that the cell carries, and of
    what the norm on c gave; then the new h, and c before its norm.
    """
    from_x, from_h, normed, reciprocals = pre_activations(x, p, w, col, mask, plan)
    old = c if plan.has_c else h
    new = plan.cell.update(from_x, from_h, old)
    seen, normed_c, reciprocal_c = see(new, w, col, mask, plan)

    d_seen, d_late = plan.cell.emit_backward(from_x, from_h, seen, d_h)
    if plan.is_c_carried_normed:
        d_seen += d_c
    d_new = d_seen
    if plan.has_c_norm:
        d_normed_c = scaled((d_seen,), w.gain_c, col, plan.H, 1)
        d_new = normalize_backward(d_normed_c, normed_c, reciprocal_c, mask, plan, ((0, 1),))[0]
    if plan.has_c and not plan.is_c_carried_normed:
        d_new += d_c
    d_x, d_from_h, d_old = plan.cell.update_backward(from_x, from_h, old, d_new, d_late)

    d_p = d_from_h
    if plan.has_hh_norm:
        spans: tl.constexpr = plan.spans
        d_normed = scaled(d_from_h, w.gain, col, plan.H, plan.G)
        d_p = normalize_backward(d_normed, normed, reciprocals, mask, plan, spans)
    if plan.is_joint:
        d_x = d_p
    return d_x, d_from_h, d_p, d_old, d_seen, plan.cell.emit(from_x, from_h, seen), new


@triton.jit
def place(rows, first, width: tl.constexpr, BM: tl.constexpr, BLOCK: tl.constexpr):
    """This program's rows and their places from `first` on, its columns, which rows there are, and the tile's mask."""
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    col = tl.arange(0, BLOCK)
    is_row = row < rows
    return row, tl.cast(first, tl.int64) + row, col, is_row, is_row[:, None] & (col < width)[None, :]


@triton.jit
def load_flags(ptr, n, is_row):
    """A flag a row, as `[rows, 1]`; False where there is no tensor to ask."""
    if ptr is None:
        return (is_row & False)[:, None]
    else:
        return (tl.load(ptr + n, mask=is_row, other=0) != 0)[:, None]


@triton.jit
def zoneout(old, new, keep, rate, n, col, mask, width: tl.constexpr):
    """Where `keep` says so, or by the expectation at `rate`, the old value stays."""
    if keep is not None:
        return tl.where(tl.load(keep + n[:, None] * width + col[None, :], mask=mask, other=0) != 0, old, new)
    elif rate is not None:
        return rate * old + (1 - rate) * new
    else:
        return new


@triton.jit
def zoneout_backward(d, keep, rate, n, col, mask, width: tl.constexpr):
    """The gradients of old and new."""
    zero = tl.zeros_like(d)
    if keep is not None:
        kept = tl.load(keep + n[:, None] * width + col[None, :], mask=mask, other=0) != 0
        return tl.where(kept, d, zero), tl.where(kept, zero, d)
    elif rate is not None:
        return rate * d, (1 - rate) * d
    else:
        return zero, d


@triton.jit
def step_on(X, C, p, h, c, w, around, n, at, col, mask, plan: tl.constexpr):
    """A step from x in memory and the states after resets: to h before projection and Zoneout, and to c, also into C.

    n are the rows' places among all packed steps, `at` those in the chunk X.
    """
    x = load_tiles(X, at, col, mask, plan.H, plan.G)
    new_h, new_c = advance(x, p, h, c, w, col, mask, plan)
    if plan.has_c:
        new_c = zoneout(c, new_c, around.keep_c, around.rate_c, n, col, mask, plan.H)
        if C is not None:
            store_tiles(C, (new_c,), n, col, mask, plan.H, 1)
    return new_h, new_c


class Chunk(NamedTuple):
    """What a backward step finds in memory, for some steps in a row, and what it leaves there."""

    x: Any  # float32 [rows, G·H]: what x gave
    d_x: (
        Any  # float32 [rows, G·H]: its gradient, in the same place if x is not needed any more; None if it is that of p
    )
    p: Any  # [rows, G·H]: the recurrent product; None for a diagonal cell
    h: Any  # [rows, P]: h before each step, after resets
    c: Any  # float32 [rows, H]: likewise; becomes what the norm on c took, if there is one
    d_a: Any  # float32 [rows, G·H]: gradient of what is added to shift: of p, of the norm of p or x + p; None if it is d_p
    d_p: Any  # [rows, G·H]: gradient of p, zero after a reset: it goes on to the h before
    d_seen: Any  # float32 [rows, H]: gradient of what the norm on c gave, if there is one
    unprojected: Any  # [rows, H]: h before its projection, if there is one
    d_q: Any  # [rows, P]: gradient of the projected h, likewise


@triton.jit
def step_back(chunk, d_h, d_c, w, around, is_reset, n, at, col, mask, plan: tl.constexpr):
    """Back through `step_on`, from the gradients of its h and of c after Zoneout: to those of p and of the old state.

    That of p comes in the type of the product which it goes into.
    """
    x = load_tiles(chunk.x, at, col, mask, plan.H, plan.G)
    h, c, d_kept = None, None, None
    if plan.has_c:
        c = load_tiles(chunk.c, at, col, mask, plan.H, 1)[0]
        d_kept, d_c = zoneout_backward(d_c, around.keep_c, around.rate_c, n, col, mask, plan.H)
    else:
        h = load_tiles(chunk.h, at, col, mask, plan.H, 1)[0]
    p = None if plan.is_diagonal else load_tiles(chunk.p, at, col, mask, plan.H, plan.G)
    if plan.is_diagonal:
        p = (h * load_row(w.hh, col, plan.H, 1)[0],)

    d_x, d_a, d_products, d_old, d_seen, new_h, new_c = retreat(x, p, h, c, d_h, d_c, w, col, mask, plan)
    G: tl.constexpr = plan.G
    d_p = ()
    for g in tl.static_range(G):
        d_p += (tl.where(is_reset | (mask == 0), 0.0, d_products[g]).to(chunk.d_p.dtype.element_ty),)
    store_tiles(chunk.d_p, d_p, at, col, mask, plan.H, plan.G)
    if chunk.d_x is not None:
        store_tiles(chunk.d_x, d_x, at, col, mask, plan.H, plan.G)
    if chunk.d_a is not None:
        store_tiles(chunk.d_a, d_a, at, col, mask, plan.H, plan.G)
    if plan.has_c_norm:
        store_tiles(chunk.c, (new_c,), at, col, mask, plan.H, 1)
        store_tiles(chunk.d_seen, (d_seen,), at, col, mask, plan.H, 1)
    if plan.is_projected:
        store_tiles(chunk.unprojected, (new_h,), at, col, mask, plan.H, 1)
    if plan.has_c:
        d_old += d_kept
    return d_p, tl.where(is_reset, 0.0, d_old)
