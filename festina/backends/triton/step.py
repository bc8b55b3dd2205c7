# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, assignment, misc, var-annotated"
"""One step of any cell under any plan, forward and backward, on tiles: what all tiers share.

`cell_step` works in registers alone; `chunk_step` adds Zoneout on c. x is the input product and p the recurrent product,
both tuples with one tile per gate; h and c are tiles, and c is None if the cell has none. A program has whole rows, and
`exchange` is None; or it is a member of a team, and has its own units of each row.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from festina.backends.triton.cells import CELLS, SOURCE, Cell
from festina.backends.triton.norm import backward_sums, normalize, normalize_backward, scaled, shifted
from festina.backends.triton.team import ALONE, Team, share, sums_of
from festina.backends.triton.tile import load_row, load_tile, load_tiles, store_tile, store_tiles
from festina.spec import LayerSpec


class Plan(NamedTuple):
    """A layer and its sizes, as the one constant that kernels take.

    `source` is for Triton's cache on disk, which knows a function inside a constant by its name alone: without it a
    changed cell would run as the old one.

    Before Triton 3.8 a field is a constant only under a name of its own: `G: tl.constexpr = plan.G`.
    """

    cell: Cell
    source: str
    G: int
    H: int
    P: int
    spans: tuple[tuple[int, int], ...]
    is_centred: bool
    eps: float
    is_joint: bool
    has_hh_norm: bool
    has_c: bool
    has_c_norm: bool
    is_c_carried_normed: bool
    is_diagonal: bool
    is_projected: bool
    statistics: int  # spans that a step normalises, with that of c
    team: Team = ALONE  # of the kernels that take many steps

    @classmethod
    def of(cls, layer: LayerSpec, H: int, P: int) -> Plan:
        """The plan of a layer of these sizes."""
        plan = layer.plan
        has_hh_norm = plan.placement != "none" and not layer.cell.diagonal
        spans = tuple(plan.spans(len(layer.cell.gates)))
        return cls(
            cell=CELLS[layer.step],
            source=SOURCE,
            G=len(layer.cell.gates),
            H=H,
            P=P,
            spans=spans,
            is_centred=plan.kind == "layer",
            eps=plan.eps,
            is_joint=plan.placement == "joint",
            has_hh_norm=has_hh_norm,
            has_c="c" in layer.cell.states,
            has_c_norm=plan.cell != "none",
            is_c_carried_normed=plan.cell == "carried",
            is_diagonal=layer.cell.diagonal,
            is_projected=layer.projected,
            statistics=(len(spans) if has_hh_norm else 0) + (plan.cell != "none"),
        )


class Weights(NamedTuple):
    """The parameters that a step reads: contiguous tensors, or None if the layer has no such parameter."""

    hh: Any  # [G·H, P], or [H] of a diagonal cell
    hr: Any  # [P, H]
    gain: Any  # of the norm on the recurrent product, or on the sum if it is joint
    shift: Any
    gain_c: Any
    bias_c: Any


class Around(NamedTuple):
    """Resets and Zoneout, which act around the cell: packed flags as bytes, and rates; None if the call has none."""

    resets: Any
    keep_h: Any
    keep_c: Any
    rate_h: Any
    rate_c: Any


@triton.jit
def pre_activations(x, p, w, tile, plan: tl.constexpr, exchange, STATS):
    """The pre-activations from x and from h; then p (x + p if joint) normalised and the norm's statistics, for backward."""
    G: tl.constexpr = plan.G
    v = p
    if plan.is_joint:
        v = ()
        for g in tl.static_range(G):
            v += (x[g] + p[g],)
    normed, stats = v, ()
    from_h = v
    if plan.has_hh_norm:
        spans: tl.constexpr = plan.spans
        normed, stats = normalize(v, tile, plan, spans, 0, exchange, STATS)
        from_h = scaled(normed, w.gain, tile.col, plan.H, G)
    from_h = shifted(from_h, w.shift, tile.col, plan.H, G)
    if plan.is_joint:
        zeros = ()
        for g in tl.static_range(G):
            zeros += (tl.zeros_like(x[g]),)
        return from_h, zeros, normed, stats
    else:
        return x, from_h, normed, stats


@triton.jit
def norm_c(new, w, tile, plan: tl.constexpr, exchange, STATS):
    """The updated state as `emit` sees it, behind the norm on c; then normalised and the norm's statistics, for backward."""
    if plan.has_c_norm:
        slot: tl.constexpr = plan.statistics - 1
        normed, stats = normalize((new,), tile, plan, ((0, 1),), slot, exchange, STATS)
        seen = shifted(scaled(normed, w.gain_c, tile.col, plan.H, 1), w.bias_c, tile.col, plan.H, 1)
        return seen[0], normed, stats
    else:
        return new, (new,), ()


@triton.jit
def cell_step(x, p, h, c, w, tile, plan: tl.constexpr, exchange):
    """The new h, before projection and Zoneout, and the new c, before Zoneout; then the statistics of all norms."""
    from_x, from_h, _, stats = pre_activations(x, p, w, tile, plan, exchange, None)
    new = plan.cell.update(from_x, from_h, c if plan.has_c else h)
    seen, _, stats_c = norm_c(new, w, tile, plan, exchange, None)
    return plan.cell.emit(from_x, from_h, seen), seen if plan.is_c_carried_normed else new, stats + stats_c


@triton.jit
def cell_step_backward(x, p, h, c, d_h, d_c, w, tile, plan: tl.constexpr, exchange, STATS):
    """Backward of `cell_step`, whose results are computed again: with the statistics that a team kept, or its own.

    Returns the gradients of x, of what the shift is added to (the norm of p or x + p, or p itself), of p, of the state
    that the cell updates, and of the result of the norm on c; then the new h, and c before its norm.
    """
    spans: tl.constexpr = plan.spans
    from_x, from_h, normed, stats = pre_activations(x, p, w, tile, plan, None, STATS)
    old = c if plan.has_c else h
    new = plan.cell.update(from_x, from_h, old)
    seen, normed_c, stats_c = norm_c(new, w, tile, plan, None, STATS)

    d_seen, d_late = plan.cell.emit_backward(from_x, from_h, seen, d_h)
    if plan.is_c_carried_normed:
        d_seen += d_c
    d_past = tl.zeros_like(d_seen)  # reaches the state past the norm on c
    if plan.has_c and not plan.is_c_carried_normed:
        d_past += d_c

    if plan.team.K == 1:
        d_new = d_seen + d_past
        if plan.has_c_norm:
            d_normed_c = scaled((d_seen,), w.gain_c, tile.col, plan.H, 1)
            sums = backward_sums(d_normed_c, normed_c, tile.mask, ((0, 1),))
            d_new = normalize_backward(d_normed_c, normed_c, stats_c, sums, plan, ((0, 1),))[0] + d_past
        d_x, d_from_h, d_old = plan.cell.update_backward(from_x, from_h, old, d_new, d_late)
        d_p = d_from_h
        if plan.has_hh_norm:
            d_normed = scaled(d_from_h, w.gain, tile.col, plan.H, plan.G)
            sums = backward_sums(d_normed, normed, tile.mask, spans)
            d_p = normalize_backward(d_normed, normed, stats, sums, plan, spans)
    else:
        d_x, d_from_h, d_p, d_old = shared_backward(
            from_x, from_h, old, d_seen, d_past, d_late, normed, stats, normed_c, stats_c, w, tile, plan, exchange
        )
    if plan.is_joint:
        d_x = d_p
    return d_x, d_from_h, d_p, d_old, d_seen, plan.cell.emit(from_x, from_h, seen), new


@triton.jit
def shared_backward(
    from_x, from_h, old, d_seen, d_past, d_late, normed, stats, normed_c, stats_c, w, tile, plan: tl.constexpr, exchange
):
    """The norms and the update of `cell_step_backward` with one exchange, where one after the other would take two.

    Everything behind the norm on c is linear in the two sums that its backward needs. So it is computed three times, for
    the gradient without those sums and for each of them alone, and the sums of all three are shared at once.
    """
    spans: tl.constexpr = plan.spans
    parts: tl.constexpr = len(plan.spans)
    d_new = d_seen + d_past
    numbers = ()
    if plan.has_c_norm:
        d_normed_c = scaled((d_seen,), w.gain_c, tile.col, plan.H, 1)
        numbers = backward_sums(d_normed_c, normed_c, tile.mask, ((0, 1),))
        d_new = d_normed_c[0] * stats_c[0][1] + d_past
    d_x, d_from_h, d_old = plan.cell.update_backward(from_x, from_h, old, d_new, d_late)
    if plan.has_hh_norm:
        d_normed = scaled(d_from_h, w.gain, tile.col, plan.H, plan.G)
        numbers += backward_sums(d_normed, normed, tile.mask, spans)
    if plan.has_c_norm:
        unit = tl.where(tile.mask, -stats_c[0][1], 0.0)
        none = tl.zeros_like(unit)
        x_1, h_1, old_1 = plan.cell.update_backward(from_x, from_h, old, unit, none)
        x_2, h_2, old_2 = plan.cell.update_backward(from_x, from_h, old, unit * normed_c[0], none)
        if plan.has_hh_norm:
            numbers += backward_sums(scaled(h_1, w.gain, tile.col, plan.H, plan.G), normed, tile.mask, spans)
            numbers += backward_sums(scaled(h_2, w.gain, tile.col, plan.H, plan.G), normed, tile.mask, spans)

    sums = ()
    count: tl.constexpr = len(numbers)
    if count > 0:
        VP: tl.constexpr = plan.team.VP
        sums = sums_of(share(numbers, 0, exchange, plan, VP), count, VP)

    first: tl.constexpr = 2 if plan.has_c_norm else 0  # of the sums of the norm on p
    if plan.has_c_norm:
        mean = tl.zeros_like(sums[0])
        if plan.is_centred:
            mean = sums[0] / plan.H
        slope = sums[1] / plan.H
        d_x = combined(d_x, x_1, mean, x_2, slope)
        d_from_h = combined(d_from_h, h_1, mean, h_2, slope)
        d_old += mean * old_1 + slope * old_2
    d_p = d_from_h
    if plan.has_hh_norm:
        of_p = ()
        for i in tl.static_range(2 * parts):
            total = sums[first + i]
            if plan.has_c_norm:
                total += mean * sums[first + 2 * parts + i] + slope * sums[first + 4 * parts + i]
            of_p += (total,)
        d_normed = scaled(d_from_h, w.gain, tile.col, plan.H, plan.G)
        d_p = normalize_backward(d_normed, normed, stats, of_p, plan, spans)
    return d_x, d_from_h, d_p, d_old


@triton.jit
def combined(tiles, one, a, two, b):
    """tiles + a · one + b · two."""
    sums = ()
    count: tl.constexpr = len(tiles)
    for g in tl.static_range(count):
        sums += (tiles[g] + a * one[g] + b * two[g],)
    return sums


@triton.jit
def load_flags(ptr, tile):
    """One flag per row, `[rows, 1]`; False if `ptr` is None."""
    if ptr is None:
        return (tile.is_row & False)[:, None]
    else:
        return (tl.load(ptr + tile.packed_row, mask=tile.is_row, other=0) != 0)[:, None]


@triton.jit
def load_keep(ptr, tile, width: tl.constexpr):
    """A Zoneout mask: True where the old value stays."""
    return tl.load(ptr + tile.packed_row[:, None] * width + tile.col[None, :], mask=tile.mask, other=0) != 0


@triton.jit
def zoneout(old, new, keep, rate, tile, width: tl.constexpr):
    """The old value where the mask `keep` is True, or the expectation at `rate`; the new value if both are None."""
    if keep is not None:
        return tl.where(load_keep(keep, tile, width), old, new)
    elif rate is not None:
        return rate * old + (1 - rate) * new
    else:
        return new


@triton.jit
def zoneout_backward(d, keep, rate, tile, width: tl.constexpr):
    """The gradients of old and new."""
    zero = tl.zeros_like(d)
    if keep is not None:
        kept = load_keep(keep, tile, width)
        return tl.where(kept, d, zero), tl.where(kept, zero, d)
    elif rate is not None:
        return rate * d, (1 - rate) * d
    else:
        return zero, d


@triton.jit
def chunk_step(C, x, p, h, c, w, around, tile, plan: tl.constexpr, exchange):
    """`cell_step`, then Zoneout on c; h and c are the states after resets.

    Returns h before projection and Zoneout, c, and the statistics of all norms; unless C is None, c is also stored there,
    among all packed steps.
    """
    new_h, new_c, stats = cell_step(x, p, h, c, w, tile, plan, exchange)
    if plan.has_c:
        new_c = zoneout(c, new_c, around.keep_c, around.rate_c, tile, plan.H)
        if C is not None:
            store_tile(C, new_c, tile.packed_row, tile, plan.H)
    return new_h, new_c, stats


class Chunk(NamedTuple):
    """What backward steps read and write in memory, for the packed steps of a chunk; a field is None if it is not needed."""

    x: Any  # float32 [rows, G·H]: the input product, normalised and shifted unless the norm is joint
    d_x: Any  # float32 [rows, G·H]: its gradient, stored over x if x is not needed again; None if it equals d_p
    p: Any  # [rows, G·H]: the recurrent product; None of a diagonal cell
    h: Any  # [rows, P]: h before each step, after resets
    c: Any  # float32 [rows, H]: c likewise; overwritten by the input of the norm on c, if the plan has one
    d_a: Any  # float32 [rows, G·H]: gradient of what the shift is added to; None if it equals d_p
    d_p: Any  # [rows, G·H]: gradient of p, zero after a reset: the source of that of the previous h
    d_seen: Any  # float32 [rows, H]: gradient of the result of the norm on c
    unprojected: Any  # [rows, H]: h before its projection
    d_projected: Any  # [rows, P]: gradient of the projected h


class Found(NamedTuple):
    """What a backward step found, tiles that `store_chunk` keeps."""

    d_x: Any
    d_a: Any
    d_p: Any
    d_seen: Any
    h: Any
    c: Any


@triton.jit
def chunk_step_backward(chunk, d_h, d_c, w, around, is_reset, tile, plan: tl.constexpr, exchange, STATS):
    """Backward of `chunk_step`, from the gradients of its results: what is left for `store_chunk`, and the gradient of the
    state that the cell updates.

    The gradient of p has the dtype of the product that takes it.
    """
    x = load_tiles(chunk.x, tile.chunk_row, tile, plan.H, plan.G)
    h, c, d_kept = None, None, None
    if plan.has_c:
        c = load_tile(chunk.c, tile.chunk_row, tile, plan.H)
        d_kept, d_c = zoneout_backward(d_c, around.keep_c, around.rate_c, tile, plan.H)
    else:
        h = load_tile(chunk.h, tile.chunk_row, tile, plan.H)
    p = None if plan.is_diagonal else load_tiles(chunk.p, tile.chunk_row, tile, plan.H, plan.G)
    if plan.is_diagonal:
        p = (h * load_row(w.hh, tile.col, plan.H, 1)[0],)

    d_x, d_a, d_products, d_old, d_seen, new_h, new_c = cell_step_backward(
        x, p, h, c, d_h, d_c, w, tile, plan, exchange, STATS
    )
    G: tl.constexpr = plan.G
    d_p = ()
    for g in tl.static_range(G):
        d_p += (tl.where(is_reset | (tile.mask == 0), 0.0, d_products[g]).to(chunk.d_p.dtype.element_ty),)
    if plan.has_c:
        d_old += d_kept
    return Found(d_x, d_a, d_p, d_seen, new_h, new_c), tl.where(is_reset, 0.0, d_old)


@triton.jit
def store_chunk(chunk, found, tile, plan: tl.constexpr):
    """Fill the fields of `chunk` for one step."""
    G: tl.constexpr = plan.G
    store_tiles(chunk.d_p, found.d_p, tile.chunk_row, tile, plan.H, G)
    if chunk.d_x is not None:
        store_tiles(chunk.d_x, found.d_x, tile.chunk_row, tile, plan.H, G)
    if chunk.d_a is not None:
        store_tiles(chunk.d_a, found.d_a, tile.chunk_row, tile, plan.H, G)
    if plan.has_c_norm:
        store_tile(chunk.c, found.c, tile.chunk_row, tile, plan.H)
        store_tile(chunk.d_seen, found.d_seen, tile.chunk_row, tile, plan.H)
    if plan.is_projected:
        store_tile(chunk.unprojected, found.h, tile.chunk_row, tile, plan.H)
