# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, assignment"
"""The norm, once: on tiles inside a step, and over many rows at once where time is parallel.

A row of pre-activations is a tuple with one tile `[rows, width]` a gate; `spans` says which gates share statistics.
Tiles are wider than a row where its width is no power of two: `mask` is True inside.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def normalize(v, mask, plan: tl.constexpr, spans: tl.constexpr):
    """Each tile normalised, and for each tile the reciprocal deviation `[rows, 1]` of its span; no gain yet."""
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
    if plan.centred:
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
    """The gradient of what `normalize` took, from that of what it gave."""
    parts: tl.constexpr = len(spans)
    d_v = ()
    for s in tl.static_range(parts):
        d_v += normalize_span_backward(d, normed, reciprocals, mask, plan, spans[s][0], spans[s][1])
    return d_v


@triton.jit
def normalize_span_backward(d, normed, reciprocals, mask, plan: tl.constexpr, first: tl.constexpr, end: tl.constexpr):
    """The same of `normalize_span`."""
    width = plan.H * (end - first)
    total, along = tl.zeros_like(d[0]), tl.zeros_like(d[0])
    for g in tl.static_range(first, end):
        inside = tl.where(mask, d[g], 0.0)
        total += inside
        along += inside * normed[g]
    mean = tl.zeros_like(reciprocals[0])
    if plan.centred:
        mean = tl.sum(total, 1, keep_dims=True) / width
    slope = tl.sum(along, 1, keep_dims=True) / width
    d_v = ()
    for g in tl.static_range(first, end):
        d_v += ((d[g] - mean - normed[g] * slope) * reciprocals[g],)
    return d_v


@triton.jit
def load_row(ptr, col, width: tl.constexpr, gates: tl.constexpr):
    """A parameter `[gates · width]` as a tuple of float32 rows `[1, BLOCK]`."""
    row = ()
    for g in tl.static_range(gates):
        row += (tl.load(ptr + g * width + col, mask=col < width, other=0.0).to(tl.float32)[None, :],)
    return row


@triton.jit
def load_tiles(ptr, row, col, mask, width: tl.constexpr, gates: tl.constexpr):
    """Rows of a `[..., gates · width]` tensor as a tuple of float32 tiles."""
    tiles = ()
    at = row[:, None] * (gates * width) + col[None, :]
    for g in tl.static_range(gates):
        tiles += (tl.load(ptr + at + g * width, mask=mask, other=0.0).to(tl.float32),)
    return tiles


@triton.jit
def store_tiles(ptr, tiles, row, col, mask, width: tl.constexpr, gates: tl.constexpr):
    """The way back of `load_tiles`, in the type of the tensor."""
    at = row[:, None] * (gates * width) + col[None, :]
    for g in tl.static_range(gates):
        tl.store(ptr + at + g * width, tiles[g].to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def shifted(tiles, shift, col, width: tl.constexpr, gates: tl.constexpr):
    """tiles + shift, or the tiles where there is none."""
    if shift is None:
        return tiles
    else:
        row = load_row(shift, col, width, gates)
        moved = ()
        for g in tl.static_range(gates):
            moved += (tiles[g] + row[g],)
        return moved


@triton.jit
def scaled(tiles, gain, col, width: tl.constexpr, gates: tl.constexpr):
    """gain · tiles."""
    row = load_row(gain, col, width, gates)
    grown = ()
    for g in tl.static_range(gates):
        grown += (tiles[g] * row[g],)
    return grown


@triton.jit(do_not_specialize=["rows"])
def rows_forward(V, GAIN, SHIFT, OUT, rows, plan: tl.constexpr, BM: tl.constexpr, BH: tl.constexpr):
    """OUT [rows, G·H] = N(V; GAIN) + SHIFT, for all steps at once."""
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    col = tl.arange(0, BH)
    mask = (row < rows)[:, None] & (col < plan.H)[None, :]
    spans: tl.constexpr = plan.spans
    normed, _ = normalize(load_tiles(V, row, col, mask, plan.H, plan.G), mask, plan, spans)
    out = shifted(scaled(normed, GAIN, col, plan.H, plan.G), SHIFT, col, plan.H, plan.G)
    store_tiles(OUT, out, row, col, mask, plan.H, plan.G)


@triton.jit(do_not_specialize=["rows"])
def rows_backward(
    V, ADDEND, GAIN, D, D_V, D_GAIN, D_SHIFT, rows, STRIP: tl.constexpr,
    plan: tl.constexpr, spans: tl.constexpr, G: tl.constexpr, BM: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """Back through the norm of V (+ ADDEND), from the gradient D of what came out, for all steps at once.

    D_V, where it is wanted, is the gradient of V; it may be D. D_GAIN and D_SHIFT [programs, G·H] are the sums over
    each program's STRIP rows: whoever adds those up does it in one order, so the result is the same every time.
    """
    first = tl.program_id(0).to(tl.int64) * STRIP
    col = tl.arange(0, BH)
    d_gain, d_shift = (), ()
    for _ in tl.static_range(G):
        d_gain += (tl.zeros((BM, BH), tl.float32),)
        d_shift += (tl.zeros((BM, BH), tl.float32),)
    for block in range(0, STRIP, BM):
        row = first + block + tl.arange(0, BM)
        mask = (row < rows)[:, None] & (col < plan.H)[None, :]
        v = load_tiles(V, row, col, mask, plan.H, G)
        d = load_tiles(D, row, col, mask, plan.H, G)
        if ADDEND is not None:
            addend = load_tiles(ADDEND, row, col, mask, plan.H, G)
            total = ()
            for g in tl.static_range(G):
                total += (v[g] + addend[g],)
            v = total
        normed, reciprocals = normalize(v, mask, plan, spans)
        if D_V is not None:
            d_normed = scaled(d, GAIN, col, plan.H, G)
            d_v = normalize_backward(d_normed, normed, reciprocals, mask, plan, spans)
            store_tiles(D_V, d_v, row, col, mask, plan.H, G)
        sums, shifts = (), ()
        for g in tl.static_range(G):
            sums += (d_gain[g] + d[g] * normed[g],)
            shifts += (d_shift[g] + d[g],)
        d_gain, d_shift = sums, shifts
    inside = col < plan.H
    for g in tl.static_range(G):
        at = tl.program_id(0).to(tl.int64) * (G * plan.H) + g * plan.H + col
        tl.store(D_GAIN + at, tl.sum(d_gain[g], 0), mask=inside)
        tl.store(D_SHIFT + at, tl.sum(d_shift[g], 0), mask=inside)
