# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, assignment"
"""The norm, told once: on tiles within a step, and over many rows at once for products over time.

`spans` says which gates share statistics. Tiles are wider than a row if its width is not a power of two; `mask` is True
inside the row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from festina.backends.triton.tile import Tile, load_row, load_tiles, place, store_tiles


@triton.jit
def normalize(v, mask, plan: tl.constexpr, spans: tl.constexpr):
    """Each tile normalised, without gain; and for each tile the reciprocal deviation `[rows, 1]` of its span."""
    parts: tl.constexpr = len(spans)
    normed, reciprocals = (), ()
    for s in tl.static_range(parts):
        tiles, reciprocal = normalize_span(v, mask, plan, spans[s][0], spans[s][1])
        normed += tiles
        for _ in tl.static_range(len(tiles)):
            reciprocals += (reciprocal,)
    return normed, reciprocals


@triton.jit
def normalize_span(v, mask, plan: tl.constexpr, first: tl.constexpr, end: tl.constexpr):
    """Tiles `first` to `end` normalised together, and their one reciprocal deviation."""
    width = plan.H * (end - first)
    mean = tl.zeros_like(tl.sum(v[0], 1, keep_dims=True))
    if plan.is_centred:
        total = v[first]
        for g in tl.static_range(first + 1, end):
            total += v[g]
        mean = tl.sum(total, 1, keep_dims=True) / width
    squares = tl.zeros_like(v[0])
    for g in tl.static_range(first, end):
        centred = tl.where(mask, v[g] - mean, 0.0)
        squares += centred * centred
    reciprocal = tl.rsqrt(tl.sum(squares, 1, keep_dims=True) / width + plan.eps)
    normed = ()
    for g in tl.static_range(first, end):
        normed += (tl.where(mask, v[g] - mean, 0.0) * reciprocal,)
    return normed, reciprocal


@triton.jit
def normalize_backward(d, normed, reciprocals, mask, plan: tl.constexpr, spans: tl.constexpr):
    """Backward of `normalize`: the gradient of `v`, from that of `normed`."""
    parts: tl.constexpr = len(spans)
    d_v = ()
    for s in tl.static_range(parts):
        d_v += normalize_span_backward(d, normed, reciprocals, mask, plan, spans[s][0], spans[s][1])
    return d_v


@triton.jit
def normalize_span_backward(d, normed, reciprocals, mask, plan: tl.constexpr, first: tl.constexpr, end: tl.constexpr):
    """Backward of `normalize_span`."""
    width = plan.H * (end - first)
    total, along = tl.zeros_like(d[0]), tl.zeros_like(d[0])
    for g in tl.static_range(first, end):
        inside = tl.where(mask, d[g], 0.0)
        total += inside
        along += inside * normed[g]
    mean = tl.zeros_like(reciprocals[0])
    if plan.is_centred:
        mean = tl.sum(total, 1, keep_dims=True) / width
    slope = tl.sum(along, 1, keep_dims=True) / width
    d_v = ()
    for g in tl.static_range(first, end):
        d_v += ((d[g] - mean - normed[g] * slope) * reciprocals[g],)
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
def rows_forward(V, GAIN, SHIFT, OUT, rows, plan: tl.constexpr, BM: tl.constexpr, BH: tl.constexpr):
    """OUT [rows, G·H] = N(V; GAIN) + SHIFT, for all steps at once."""
    tile = place(rows, 0, 0, plan.H, BM, BH)
    spans: tl.constexpr = plan.spans
    normed, _ = normalize(load_tiles(V, tile.row, tile, plan.H, plan.G), tile.mask, plan, spans)
    out = shifted(scaled(normed, GAIN, tile.col, plan.H, plan.G), SHIFT, tile.col, plan.H, plan.G)
    store_tiles(OUT, out, tile.row, tile, plan.H, plan.G)


@triton.jit(do_not_specialize=["rows"])
def rows_backward(
    V, ADDEND, GAIN, D, D_V, D_GAIN, D_SHIFT, rows, STRIP: tl.constexpr,
    plan: tl.constexpr, spans: tl.constexpr, G: tl.constexpr, BM: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """Backward of the norm of V (+ ADDEND), from the gradient D of its result, for all steps at once.

    D_V, unless None, becomes the gradient of V; it may be D itself. D_GAIN and D_SHIFT [programs, G·H] become the sums
    over each program's STRIP rows; the caller adds them up in a fixed order, so that results are reproducible.
    """
    strip_start = tl.program_id(0).to(tl.int64) * STRIP
    col = tl.arange(0, BH)
    d_gain, d_shift = (), ()
    for _ in tl.static_range(G):
        d_gain += (tl.zeros((BM, BH), tl.float32),)
        d_shift += (tl.zeros((BM, BH), tl.float32),)
    for block in range(0, STRIP, BM):
        row = strip_start + block + tl.arange(0, BM)
        is_row = row < rows
        tile = Tile(row, row, row, col, is_row, is_row[:, None] & (col < plan.H)[None, :])
        v = load_tiles(V, row, tile, plan.H, G)
        d = load_tiles(D, row, tile, plan.H, G)
        if ADDEND is not None:
            addend = load_tiles(ADDEND, row, tile, plan.H, G)
            total = ()
            for g in tl.static_range(G):
                total += (v[g] + addend[g],)
            v = total
        normed, reciprocals = normalize(v, tile.mask, plan, spans)
        if D_V is not None:
            d_normed = scaled(d, GAIN, col, plan.H, G)
            d_v = normalize_backward(d_normed, normed, reciprocals, tile.mask, plan, spans)
            store_tiles(D_V, d_v, row, tile, plan.H, G)
        gain_sums, shift_sums = (), ()
        for g in tl.static_range(G):
            gain_sums += (d_gain[g] + d[g] * normed[g],)
            shift_sums += (d_shift[g] + d[g],)
        d_gain, d_shift = gain_sums, shift_sums
    inside = col < plan.H
    for g in tl.static_range(G):
        offset = tl.program_id(0).to(tl.int64) * (G * plan.H) + g * plan.H + col
        tl.store(D_GAIN + offset, tl.sum(d_gain[g], 0), mask=inside)
        tl.store(D_SHIFT + offset, tl.sum(d_shift[g], 0), mask=inside)
