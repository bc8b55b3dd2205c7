# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, assignment"
"""Products with weights that stay on chip for a whole launch: by one program, or by a team that shares the outputs.

Operands in bfloat16 and float16 go to tensor cores as they are. A float32 operand goes there as two float16 numbers
(`split`): v = hi + lo / 2048, which keeps 22 bits, and a product is hi·hi + (hi·lo + lo·hi) / 2048. Factors that are powers
of two keep both in float16's range: one for each tile of weights, one for each row of the left operand. Tensor cores round
sums towards zero, so a sum over a long row is made in parts, which are added in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from festina.backends.triton.team import post, wait
from festina.backends.triton.tile import load_row, load_tile, place

LO: tl.constexpr = tl.constexpr(1.0 / 2048.0)
SENDERS: tl.constexpr = tl.constexpr(32)
"""Columns of a tile of parts of a gradient."""


@triton.jit
def power(largest, least: tl.constexpr):
    """A power of two, at least 2^(least - 127), that divides |largest| to less than 2^15; and its reciprocal."""
    exponent = ((tl.abs(largest).to(tl.int32, bitcast=True) >> 23) & 255) - 14
    exponent = tl.minimum(tl.maximum(exponent, least), 253)
    return (exponent << 23).to(tl.float32, bitcast=True), ((254 - exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def split(v):
    """(hi, lo) in float16, so that v = hi + lo / 2048."""
    hi = v.to(tl.float16)
    return hi, ((v - hi.to(tl.float32)) * 2048.0).to(tl.float16)


@triton.jit
def right(weights, is_split: tl.constexpr):
    """A tile of weights as `product` takes it: with its factor, if it is split."""
    if is_split:
        up, down = power(tl.max(tl.abs(weights)), 1)
        hi, lo = split(weights * down)
        return hi, lo, up
    else:
        return (weights,)


@triton.jit
def left(v, down, right, is_split: tl.constexpr):
    """The other operand; `down` are the reciprocals of its rows' factors, used if it is split."""
    if is_split:
        return split(v * down)
    else:
        return (v.to(right[0].dtype),)


@triton.jit
def product(a, b, acc, is_split: tl.constexpr):
    """acc + a · b, in float32, still without the factors of a's rows."""
    if is_split:
        low = tl.dot(a[1], b[0], tl.dot(a[0], b[1]))
        return acc + (tl.dot(a[0], b[0]) + low * LO) * b[2]
    else:
        return tl.dot(a[0], b[0], acc)


@triton.jit
def row_factors(v, least: tl.constexpr, is_split: tl.constexpr):
    """A factor `[rows, 1]` for each row of v, and its reciprocal; 1 if nothing is split."""
    if is_split:
        return power(tl.max(tl.abs(v), 1, keep_dims=True), least)
    else:
        return 1.0, 1.0


@triton.jit
def load_matrix(ptr, row, col, rows, cols, row_stride: tl.constexpr, col_stride: tl.constexpr):
    """`[row, col]` of a matrix with `rows` rows and `cols` columns, 0 outside."""
    inside = (row < rows)[:, None] & (col < cols)[None, :]
    return tl.load(
        ptr + row.to(tl.int64)[:, None] * row_stride + col.to(tl.int64)[None, :] * col_stride, mask=inside, other=0.0
    )


# One program: a product for each gate


@triton.jit
def load_hh(
    hh, row, col, rows, cols, row_stride: tl.constexpr, col_stride: tl.constexpr, plan: tl.constexpr,
):  # fmt: skip
    """W_hh as a right operand, a tile for each gate: of `load_matrix`, whose arguments say which way; of a diagonal cell,
    nothing."""
    G: tl.constexpr = plan.G
    tiles = ()
    if not plan.is_diagonal:
        for g in tl.static_range(G):
            part = load_matrix(hh + g * plan.H * plan.P, row, col, rows, cols, row_stride, col_stride)
            tiles += (right(part, plan.team.is_split),)
    return tiles


@triton.jit
def recurrent_product(h, up, down, hh, tiles, col, plan: tl.constexpr):
    """W_hh · h, a tile for each gate."""
    if plan.is_diagonal:
        return (h * load_row(hh, col, plan.H, 1)[0],)
    else:
        G: tl.constexpr = plan.G
        BM: tl.constexpr = plan.team.BM
        HS: tl.constexpr = plan.team.HS
        is_split: tl.constexpr = plan.team.is_split
        a = left(h, down, tiles[0], is_split)
        p = ()
        for g in tl.static_range(G):
            p += (product(a, tiles[g], tl.zeros((BM, HS), tl.float32), is_split) * up,)
        return p


@triton.jit
def recurrent_product_backward(d_p, hh, tiles, col, plan: tl.constexpr):
    """The gradient of h, from that of the recurrent product."""
    if plan.is_diagonal:
        return d_p[0] * load_row(hh, col, plan.H, 1)[0]
    else:
        G: tl.constexpr = plan.G
        BM: tl.constexpr = plan.team.BM
        BP: tl.constexpr = plan.team.BP
        is_split: tl.constexpr = plan.team.is_split
        largest = tl.abs(d_p[0])
        for g in tl.static_range(1, G):
            largest = tl.maximum(largest, tl.abs(d_p[g]))
        up, down = row_factors(largest, 1, is_split)
        d_h = tl.zeros((BM, BP), tl.float32)
        for g in tl.static_range(G):
            d_h = product(left(d_p[g], down, tiles[0], is_split), tiles[g], d_h, is_split)
        return d_h * up


@triton.jit
def project(h, tile, plan: tl.constexpr):
    """h · tile, a product with W_hr, forward or backward."""
    is_split: tl.constexpr = plan.team.is_split
    up, down = row_factors(h, 1, is_split)
    BM: tl.constexpr = plan.team.BM
    width: tl.constexpr = tile[0].shape[1]
    return product(left(h, down, tile, is_split), tile, tl.zeros((BM, width), tl.float32), is_split) * up


# A team: a member has all gates of its units, side by side, and posts its part of h or of its gradient


@triton.jit
def load_slice(hh, base, step: tl.constexpr, count: tl.constexpr, member, plan: tl.constexpr):
    """W_hh transposed, `[count, HS · GP]`: rows base, base + step, ...; columns the member's units, gates within a unit."""
    HS: tl.constexpr = plan.team.HS
    GP: tl.constexpr = plan.team.GP
    k = base + step * tl.arange(0, count)
    j = tl.arange(0, HS * GP)
    unit, gate = member * HS + j // GP, j % GP
    inside = (k < plan.H)[:, None] & ((unit < plan.H) & (gate < plan.G))[None, :]
    return tl.load(hh + (gate * plan.H + unit).to(tl.int64)[None, :] * plan.H + k[:, None], mask=inside, other=0.0)


@triton.jit
def load_member_hh(hh, member, plan: tl.constexpr):
    """The member's part of W_hh: an entry for each BK units of h, split; or in 16 bits, units 0, 2, ... and units 1, 3, ..."""
    BK: tl.constexpr = plan.team.BK
    parts = ()
    count: tl.constexpr = plan.team.HP // BK
    for i in tl.static_range(count):
        if plan.team.is_split:
            parts += (right(load_slice(hh, i * BK, 1, BK, member, plan), True),)
        else:
            even = load_slice(hh, i * BK, 2, BK // 2, member, plan)
            odd = load_slice(hh, i * BK + 1, 2, BK // 2, member, plan)
            parts += ((even, odd),)
    return parts


@triton.jit
def low_half(bits, dtype: tl.constexpr):
    """The 16-bit number in the lower half of int32 words."""
    return (bits & 0xFFFF).to(tl.int16).to(dtype, bitcast=True)


@triton.jit
def high_half(bits, dtype: tl.constexpr):
    """The 16-bit number in the upper half of int32 words."""
    return ((bits >> 16) & 0xFFFF).to(tl.int16).to(dtype, bitcast=True)


@triton.jit
def halves(low, high):
    """int32 words of two 16-bit numbers."""
    return (low.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF) | (high.to(tl.int16, bitcast=True).to(tl.int32) << 16)


@triton.jit
def post_h(h, down, dtype: tl.constexpr, exchange, plan: tl.constexpr):
    """The member's part of h, for all: a word holds one unit, split, or two units of 16 bits."""
    BM: tl.constexpr = plan.team.BM
    HS: tl.constexpr = plan.team.HS
    per: tl.constexpr = 1 if plan.team.is_split else 2
    if plan.team.is_split:
        hi, lo = split(h * down)
        bits = halves(hi, lo)
    else:
        low, high = tl.split(tl.reshape(h.to(dtype), (BM, HS // 2, 2)))
        bits = halves(low, high)
    row = tl.arange(0, BM)[:, None]
    at = row * (plan.team.HP // per) + exchange.member * (HS // per) + tl.arange(0, HS // per)[None, :]
    post(exchange.box + plan.team.h_box + at, bits, at >= 0, exchange)


@triton.jit
def member_product(up, parts, exchange, plan: tl.constexpr):
    """W_hh · h, the member's tiles, from everybody's `post_h`."""
    BM: tl.constexpr = plan.team.BM
    BK: tl.constexpr = plan.team.BK
    HS: tl.constexpr = plan.team.HS
    GP: tl.constexpr = plan.team.GP
    is_split: tl.constexpr = plan.team.is_split
    per: tl.constexpr = 1 if is_split else 2
    dtype: tl.constexpr = parts[0][0].dtype
    row = tl.arange(0, BM)[:, None]
    acc = tl.zeros((BM, HS * GP), tl.float32)
    count: tl.constexpr = plan.team.HP // BK
    for i in tl.static_range(count):
        word = i * (BK // per) + tl.arange(0, BK // per)[None, :]
        at = row * (plan.team.HP // per) + word
        bits = wait(exchange.box + plan.team.h_box, at, word, 0, plan.team.K * HS // per, 1, exchange)[0]
        a = (low_half(bits, dtype), high_half(bits, dtype))
        if is_split:  # noqa: SIM108  both branches of a ternary would be compiled
            acc = product(a, parts[i], acc, True)
        else:
            acc = tl.dot(a[1], parts[i][1], tl.dot(a[0], parts[i][0], acc))
    if is_split:
        acc *= up
    return unwoven(acc, plan)


@triton.jit
def unwoven(v, plan: tl.constexpr):
    """`[BM, HS · GP]`, gates within a unit, as a tile for each gate."""
    BM: tl.constexpr = plan.team.BM
    HS: tl.constexpr = plan.team.HS
    GP: tl.constexpr = plan.team.GP
    if GP == 1:
        return (v,)
    elif GP == 2:
        return tl.split(tl.reshape(v, (BM, HS, 2)))
    else:
        even, odd = tl.split(tl.reshape(v, (BM, HS, 2, 2)))
        gate_0, gate_2 = tl.split(even)
        gate_1, gate_3 = tl.split(odd)
        if plan.G == 3:
            return gate_0, gate_1, gate_2
        else:
            return gate_0, gate_1, gate_2, gate_3


@triton.jit
def woven(tiles, plan: tl.constexpr):
    """Inverse of `unwoven`."""
    BM: tl.constexpr = plan.team.BM
    HS: tl.constexpr = plan.team.HS
    GP: tl.constexpr = plan.team.GP
    if GP == 1:
        return tiles[0]
    elif GP == 2:
        return tl.reshape(tl.join(tiles[0], tiles[1]), (BM, HS * 2))
    else:
        last = tl.zeros_like(tiles[0])
        if plan.G == 4:
            last = tiles[3]
        return tl.reshape(tl.join(tl.join(tiles[0], tiles[2]), tl.join(tiles[1], last)), (BM, HS * 4))


@triton.jit
def load_member_hh_backward(hh, member, plan: tl.constexpr):
    """The member's part of W_hh, `[HS · GP, BK]` for each BK units of h."""
    HS: tl.constexpr = plan.team.HS
    GP: tl.constexpr = plan.team.GP
    BK: tl.constexpr = plan.team.BK
    j = tl.arange(0, HS * GP)
    unit, gate = member * HS + j // GP, j % GP
    parts = ()
    count: tl.constexpr = plan.team.HP // BK
    for i in tl.static_range(count):
        k = i * BK + tl.arange(0, BK)
        inside = ((unit < plan.H) & (gate < plan.G))[:, None] & (k < plan.H)[None, :]
        part = tl.load(hh + (gate * plan.H + unit).to(tl.int64)[:, None] * plan.H + k[None, :], mask=inside, other=0.0)
        parts += (right(part, plan.team.is_split),)
    return parts


@triton.jit
def post_d_h(d_p, parts, exchange, plan: tl.constexpr):
    """What the member's d_p adds to the gradient of h, to each member its units: `[to][BM][from][HS]`, so that each reads
    one piece of memory."""
    BM: tl.constexpr = plan.team.BM
    HS: tl.constexpr = plan.team.HS
    BK: tl.constexpr = plan.team.BK
    width: tl.constexpr = plan.team.K * plan.team.HS
    is_split: tl.constexpr = plan.team.is_split
    v = woven(d_p, plan)
    up, down = row_factors(v, 1, is_split)
    a = left(v, down, parts[0], is_split)
    row = tl.arange(0, BM)[:, None]
    count: tl.constexpr = plan.team.HP // BK
    for i in tl.static_range(count):
        d_h = product(a, parts[i], tl.zeros((BM, BK), tl.float32), is_split)
        if is_split:
            d_h *= up
        unit = i * BK + tl.arange(0, BK)[None, :]
        at = ((unit // HS) * BM + row) * width + exchange.member * HS + unit % HS
        post(exchange.box + plan.team.h_box + at, d_h.to(tl.int32, bitcast=True), (row >= 0) & (unit < width), exchange)


@triton.jit
def member_d_h(exchange, plan: tl.constexpr):
    """The gradient of the member's units of h, summed over everybody's `post_d_h` in a fixed order."""
    BM: tl.constexpr = plan.team.BM
    HS: tl.constexpr = plan.team.HS
    width: tl.constexpr = plan.team.K * plan.team.HS
    count: tl.constexpr = (width + SENDERS - 1) // SENDERS
    j = tl.arange(0, SENDERS)[None, :]  # of one sender or several: tiles that are as wide as those of 32 units
    at = (exchange.member * BM + tl.arange(0, BM)[:, None]) * width + j
    parts = wait(exchange.box + plan.team.h_box, at, j, SENDERS, width, count, exchange)
    d_h = tl.zeros((BM, SENDERS), tl.float32)
    for i in tl.static_range(count):
        d_h += parts[i].to(tl.float32, bitcast=True)
    if HS == SENDERS:
        return d_h
    else:
        return tl.sum(tl.reshape(d_h, (BM, SENDERS // HS, HS)), 1)


@triton.jit
def h_0_factors(H_0, member_tile, rows, block, plan: tl.constexpr):
    """`row_factors` of h: h never exceeds the larger of 1 and its initial value, so these serve all steps."""
    if not plan.team.is_split:
        return 1.0, 1.0
    elif plan.team.K == 1:
        return row_factors(load_tile(H_0, member_tile.row, member_tile, plan.P), 127, True)
    else:
        BM: tl.constexpr = plan.team.BM
        BK: tl.constexpr = plan.team.BK
        count: tl.constexpr = plan.team.HP // BK
        largest = tl.zeros((BM, 1), tl.float32)
        for i in tl.static_range(count):
            tile = place(block, i * BK + tl.arange(0, BK), rows, 0, 0, plan.H, BM)
            largest = tl.maximum(largest, tl.max(tl.abs(load_tile(H_0, tile.row, tile, plan.H)), 1, keep_dims=True))
        return row_factors(largest, 127, True)
