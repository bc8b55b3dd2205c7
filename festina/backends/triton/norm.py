# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, assignment"
"""The norm, told once: on tiles within a step, and over many rows at once for products over time.

`spans` says which gates share statistics. Tiles are wider than a row if its width is not a power of two; the tile's mask
is True inside the row. The statistics of a span are its mean, 0 unless the norm is centred, and the reciprocal of its
deviation, both `[rows, 1]`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from festina.backends.triton.team import columns_of, share, sum_of
from festina.backends.triton.tile import Tile, load_row, load_tiles, place, store_tiles


@triton.jit
def normalize(v, tile, plan: tl.constexpr, spans: tl.constexpr, slot: tl.constexpr, exchange, STATS):
    """Each tile normalised, without gain; and the statistics of each span.

    A program with whole rows computes the statistics alone; a member of a team with the others, in an `exchange`. If STATS
    is not None, they are read there, where `store_statistics` kept them. `slot` is how many spans of a step were normalised
    before.
    """
    parts: tl.constexpr = len(spans)
    stats = ()
    if STATS is not None:
        for s in tl.static_range(parts):
            stats += (load_statistics(STATS, tile, plan, slot + s),)
    elif plan.team.K > 1:
        stats = shared_statistics(v, tile.mask, plan, spans, slot, exchange)
    else:
        for s in tl.static_range(parts):
            width = plan.H * (spans[s][1] - spans[s][0])
            mean, squares = moments(v, tile.mask, plan, spans[s][0], spans[s][1], width)
            stats += ((mean, tl.rsqrt(squares / width + plan.eps)),)
    normed = ()
    for s in tl.static_range(parts):
        normed += normalize_span(v, tile.mask, stats[s], spans[s][0], spans[s][1])
    return normed, stats


@triton.jit
def normalize_span(v, mask, statistics, first: tl.constexpr, end: tl.constexpr):
    """Tiles `first` to `end` normalised, from their statistics."""
    normed = ()
    for g in tl.static_range(first, end):
        normed += (tl.where(mask, v[g] - statistics[0], 0.0) * statistics[1],)
    return normed


@triton.jit
def moments(v, mask, plan: tl.constexpr, first: tl.constexpr, end: tl.constexpr, width):
    """The mean of tiles `first` to `end`, which have `width` values a row, and the sum of squares of the deviations."""
    mean = tl.zeros_like(tl.sum(v[0], 1, keep_dims=True))
    if plan.is_centred:
        total = v[first]
        for g in tl.static_range(first + 1, end):
            total += v[g]
        mean = tl.sum(tl.where(mask, total, 0.0), 1, keep_dims=True) / width
    squares = tl.zeros_like(v[0])
    for g in tl.static_range(first, end):
        deviation = tl.where(mask, v[g] - mean, 0.0)
        squares += deviation * deviation
    return mean, tl.sum(squares, 1, keep_dims=True)


@triton.jit
def shared_statistics(v, mask, plan: tl.constexpr, spans: tl.constexpr, slot: tl.constexpr, exchange):
    """The statistics of each span, from the moments of every member's part (Chan et al. 1979)."""
    parts: tl.constexpr = len(spans)
    VP: tl.constexpr = 2 if parts == 1 else (4 if parts == 2 else 8)
    HS: tl.constexpr = plan.team.HS
    columns = tl.maximum(tl.minimum(plan.H - exchange.member * HS, HS), 1).to(tl.float32)
    numbers = ()
    for s in tl.static_range(parts):
        numbers += moments(v, mask, plan, spans[s][0], spans[s][1], columns * (spans[s][1] - spans[s][0]))
    tiles = share(numbers, 2 * slot, exchange, plan, VP)
    stats = ()
    for s in tl.static_range(parts):
        stats += (combine_moments(tiles, 2 * s, spans[s][1] - spans[s][0], plan, VP),)
    return stats


@triton.jit
def combine_moments(tiles, i: tl.constexpr, gates: tl.constexpr, plan: tl.constexpr, VP: tl.constexpr):
    """The statistics of a span of some gates, from the members' numbers `i` and `i + 1`: mean and sum of squares."""
    squares = sum_of(tiles, i + 1, VP)
    mean = tl.zeros_like(squares)
    if plan.is_centred:
        sums, between = (), ()
        count: tl.constexpr = len(tiles)
        for b in tl.static_range(count):
            sums += (tiles[b] * columns_of(b, plan, VP),)
        mean = sum_of(sums, i, VP) / plan.H
        for b in tl.static_range(count):
            away = tiles[b] - mean
            between += (gates * columns_of(b, plan, VP) * away * away,)
        squares += sum_of(between, i, VP)
    return mean, tl.rsqrt(squares / (plan.H * gates) + plan.eps)


@triton.jit
def load_statistics(STATS, tile, plan: tl.constexpr, slot: tl.constexpr):
    """What `store_statistics` kept: STATS is `[N, statistics, 2]`."""
    at = STATS + tile.packed_row[:, None] * (2 * plan.statistics) + 2 * slot
    is_row = tile.is_row[:, None]
    return tl.load(at, mask=is_row, other=0.0), tl.load(at + 1, mask=is_row, other=0.0)


@triton.jit
def store_statistics(STATS, stats, tile, member, plan: tl.constexpr):
    """All statistics of a step, by the first member of a team: every member has the same bits."""
    at = STATS + tile.packed_row[:, None] * (2 * plan.statistics)
    here = (tile.is_row & (tile.row * 0 + member == 0))[:, None]
    count: tl.constexpr = len(stats)
    for s in tl.static_range(count):
        tl.store(at + 2 * s, stats[s][0], mask=here)
        tl.store(at + 2 * s + 1, stats[s][1], mask=here)


@triton.jit
def backward_sums(d, normed, mask, spans: tl.constexpr):
    """What `normalize_backward` needs of a row, two numbers a span: the sums of d and of d · normed."""
    parts: tl.constexpr = len(spans)
    sums = ()
    for s in tl.static_range(parts):
        sums += span_sums(d, normed, mask, spans[s][0], spans[s][1])
    return sums


@triton.jit
def span_sums(d, normed, mask, first: tl.constexpr, end: tl.constexpr):
    """`backward_sums` of one span."""
    total, along = tl.zeros_like(d[0]), tl.zeros_like(d[0])
    for g in tl.static_range(first, end):
        inside = tl.where(mask, d[g], 0.0)
        total += inside
        along += inside * normed[g]
    return tl.sum(total, 1, keep_dims=True), tl.sum(along, 1, keep_dims=True)


@triton.jit
def normalize_backward(d, normed, stats, sums, plan: tl.constexpr, spans: tl.constexpr):
    """Backward of `normalize`: the gradient of `v`, from that of `normed` and its `backward_sums`."""
    parts: tl.constexpr = len(spans)
    d_v = ()
    for s in tl.static_range(parts):
        d_v += span_backward(d, normed, stats[s][1], sums[2 * s], sums[2 * s + 1], plan, spans[s][0], spans[s][1])
    return d_v


@triton.jit
def span_backward(d, normed, reciprocal, total, along, plan: tl.constexpr, first: tl.constexpr, end: tl.constexpr):
    """`normalize_backward` of one span."""
    width = plan.H * (end - first)
    mean = tl.zeros_like(total)
    if plan.is_centred:
        mean = total / width
    slope = along / width
    d_v = ()
    for g in tl.static_range(first, end):
        d_v += ((d[g] - mean - normed[g] * slope) * reciprocal,)
    return d_v


@triton.jit
def shifted(tiles, shift, col, width: tl.constexpr, gates: tl.constexpr):
    """tiles + shift; the tiles unchanged if shift is None."""
    if shift is None:
        return tiles
    else:
        row = load_row(shift, col, width, gates)
        sums = ()
        for g in tl.static_range(gates):
            sums += (tiles[g] + row[g],)
        return sums


@triton.jit
def scaled(tiles, gain, col, width: tl.constexpr, gates: tl.constexpr):
    """gain · tiles."""
    row = load_row(gain, col, width, gates)
    products = ()
    for g in tl.static_range(gates):
        products += (tiles[g] * row[g],)
    return products


@triton.jit(do_not_specialize=["rows"])
def rows_forward(rows, V, GAIN, SHIFT, OUT, plan: tl.constexpr, BM: tl.constexpr, BH: tl.constexpr):
    """OUT [rows, G·H] = N(V; GAIN) + SHIFT, for all steps at once."""
    tile = place(tl.program_id(0), tl.arange(0, BH), rows, 0, 0, plan.H, BM)
    spans: tl.constexpr = plan.spans
    normed, _ = normalize(load_tiles(V, tile.row, tile, plan.H, plan.G), tile, plan, spans, 0, None, None)
    out = shifted(scaled(normed, GAIN, tile.col, plan.H, plan.G), SHIFT, tile.col, plan.H, plan.G)
    store_tiles(OUT, out, tile.row, tile, plan.H, plan.G)


class Rows(NamedTuple):
    """A norm over many rows, or the place of one that the plan leaves out, for `rows_backward`."""

    D: Any  # float32 [rows, gates·H]: the gradient of its result
    V: Any  # [rows, gates·H]: what was normalised; None if nothing was: then the sums are of D alone
    ADDEND: Any  # added to V first; None for nothing
    GAIN: Any
    D_V: Any  # becomes the gradient of V; may be D itself; None if it is not wanted


NO_ROWS = Rows(None, None, None, None, None)


@triton.jit(do_not_specialize=["rows", "strip", "columns"])
def rows_backward(
    rows, strip, columns, x, h, c, SUMS, plan: tl.constexpr, h_at: tl.constexpr, c_at: tl.constexpr, BM: tl.constexpr,
    BH: tl.constexpr,
):  # fmt: skip
    """Backward of the norms of x, of the recurrent product (or the joint one) and of c, for all steps at once.

    x, h and c are `Rows`, or `NO_ROWS` where there is nothing to do. SUMS `[programs, columns]` becomes the gradients of
    gain and shift, those of x from column 0, of h from `h_at`, of c from `c_at`, summed over each program's `strip` rows;
    the caller adds the programs up in a fixed order, so that results are reproducible.
    """
    sums = SUMS + tl.program_id(0).to(tl.int64) * columns
    spans: tl.constexpr = plan.spans
    if x.D is not None:
        strip_backward(x, sums, rows, strip, plan, spans, plan.G, BM, BH)
    if h.D is not None:
        strip_backward(h, sums + h_at, rows, strip, plan, spans, plan.G, BM, BH)
    if c.D is not None:
        strip_backward(c, sums + c_at, rows, strip, plan, ((0, 1),), 1, BM, BH)


@triton.jit
def strip_backward(
    norm,
    sums,
    rows,
    strip,
    plan: tl.constexpr,
    spans: tl.constexpr,
    G: tl.constexpr,
    BM: tl.constexpr,
    BH: tl.constexpr,
):
    """One of the norms of `rows_backward`, over this program's rows."""
    strip_start = tl.program_id(0).to(tl.int64) * strip
    col = tl.arange(0, BH)
    d_gain, d_shift = (), ()
    for _ in tl.static_range(G):
        d_gain += (tl.zeros((BM, BH), tl.float32),)
        d_shift += (tl.zeros((BM, BH), tl.float32),)
    for block in range(0, strip, BM):
        row = strip_start + block + tl.arange(0, BM)
        is_row = (row < rows) & (row < strip_start + strip)
        tile = Tile(row, row, row, col, is_row, is_row[:, None] & (col < plan.H)[None, :])
        d = load_tiles(norm.D, row, tile, plan.H, G)
        gain_sums, shift_sums = d_gain, ()
        if norm.V is not None:
            v = load_tiles(norm.V, row, tile, plan.H, G)
            if norm.ADDEND is not None:
                addend = load_tiles(norm.ADDEND, row, tile, plan.H, G)
                total = ()
                for g in tl.static_range(G):
                    total += (v[g] + addend[g],)
                v = total
            normed, stats = normalize(v, tile, plan, spans, 0, None, None)
            if norm.D_V is not None:
                d_normed = scaled(d, norm.GAIN, col, plan.H, G)
                sums_of_row = backward_sums(d_normed, normed, tile.mask, spans)
                d_v = normalize_backward(d_normed, normed, stats, sums_of_row, plan, spans)
                store_tiles(norm.D_V, d_v, row, tile, plan.H, G)
            gain_sums = ()
            for g in tl.static_range(G):
                gain_sums += (d_gain[g] + d[g] * normed[g],)
        for g in tl.static_range(G):
            shift_sums += (d_shift[g] + d[g],)
        d_gain, d_shift = gain_sums, shift_sums
    inside = col < plan.H
    for g in tl.static_range(G):
        if norm.V is not None:
            tl.store(sums + g * plan.H + col, tl.sum(d_gain[g], 0), mask=inside)
            tl.store(sums + (G + g) * plan.H + col, tl.sum(d_shift[g], 0), mask=inside)
        else:
            tl.store(sums + g * plan.H + col, tl.sum(d_shift[g], 0), mask=inside)
