# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, assignment, misc, var-annotated"
"""Programs that share the units of a block of rows, and what they tell each other at every step.

A team has K members. Each owns `HS` units with all their gates, keeps its part of W_hh on chip, and needs from the others
h at every step and the sums over a row. They exchange words of 64 bits through memory: the upper half is a tag, the
number of the exchange, the lower half the value. Whoever reads a value knows from its tag that it is new, so there are no
fences and no flags.

Words lie in boxes. A team has two sets of them, used in turn: to overwrite a set, a member must have read everybody's words
of the following tag, which they posted after reading this one. So no tag may be skipped, and boxes must be zero at launch.

Members spin, so all of them must run at once: the launch is cooperative, which fails if they do not fit. If a member is
missing all the same, the others give up after `LIMIT` tries and compute NaN; none hangs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

LIMIT: tl.constexpr = tl.constexpr(1 << 24)
"""Tries, each of a microsecond or so, before a member gives up."""

GAVE_UP: tl.constexpr = tl.constexpr(1 << 16)
"""What a member writes down that gave up: more than words can be missing."""

BLOCK: tl.constexpr = tl.constexpr(16)
"""Members whose numbers make one tile, in `share`."""


class Team(NamedTuple):
    """How a block of rows is worked on, as constants of a kernel. One program alone is a team of one."""

    K: int  # members
    BM: int  # rows of a block
    HS: int  # units of a member; of a team of one, H as a block
    BP: int  # columns of h of a member: HS, or of a team of one, P as a block
    is_split: bool  # float32 operands of a product are two float16 numbers each
    # Of a team of one, the rest is 0.
    GP: int = 0  # gates as a power of two
    BK: int = 0  # units of h to a product: forward, those that are waited for together; backward, that get a gradient
    HP: int = 0  # K · HS as a multiple of BK
    VP: int = 0  # the most that one exchange shares, as a power of two, at least 2
    words: int = 0  # of the boxes of one tag
    h_box: int = 0  # where the box of h, or of its gradient, begins among them


ALONE = Team(1, 0, 0, 0, False)
"""Of kernels that take no more than a step, or none: each program has whole rows."""


class Exchange(NamedTuple):
    """One step's exchanges, as one member sees them."""

    box: Any  # int64: the boxes of this tag
    gave_up: Any  # int64: GAVE_UP once a member has given up
    member: Any
    tag: Any  # int32


HEAD: tl.constexpr = tl.constexpr(16)
"""Words before the first box; the first of them says whether a member gave up."""


@triton.jit
def exchange_of(BOXES, team, member, tag, plan: tl.constexpr):
    """The exchanges with a tag, of a team."""
    first = BOXES + HEAD + (tl.cast(team, tl.int64) * 2 + tag % 2) * plan.team.words
    return Exchange(first, BOXES, member, tag)


@triton.jit
def post(ptr, bits, mask, exchange):
    """Words with the exchange's tag; `bits` are int32."""
    word = (tl.cast(exchange.tag, tl.int64) << 32) | (bits.to(tl.int64) & 0xFFFFFFFF)
    tl.atomic_xchg(ptr, word, mask=mask, sem="relaxed", scope="gpu")


@triton.jit
def missing(words, exchange):
    """1 for each word that has not the exchange's tag."""
    return ((words >> 32).to(tl.int32) != exchange.tag).to(tl.int32)


@triton.jit
def load_words(ptr, at, index, step: tl.constexpr, end: tl.constexpr, count: tl.constexpr, gave_up, exchange):
    """The words of `wait`, and a number: 0 if all are there, `GAVE_UP` or more if some thread has read that in `gave_up`."""
    absent = tl.cast(exchange.tag, tl.int64) << 32
    words = ()
    for b in tl.static_range(count):
        mask = (at >= 0) & (index + b * step < end)
        words += (tl.load(ptr + at + b * step, mask=mask, other=absent, volatile=True),)
    late = missing(words[0], exchange) + gave_up
    for b in tl.static_range(1, count):
        late += missing(words[b], exchange)
    return words, tl.max(late)


@triton.jit
def wait(ptr, at, index, step: tl.constexpr, end: tl.constexpr, count: tl.constexpr, exchange):
    """The values of `count` tiles of words, int32, once all of the words have the exchange's tag.

    The tiles begin `step` words apart, the first one at `ptr`; `at` says where its words lie, and a negative number that
    there is none. `index`, which grows by `step` from tile to tile, is below `end` where a word exists; elsewhere the value
    is 0.
    """
    words, late = load_words(ptr, at, index, step, end, count, 0, exchange)
    tries = 0
    while (late > 0) & (late < GAVE_UP) & (tries < LIMIT):  # which all threads answer alike
        gave_up = tl.load(exchange.gave_up, volatile=True).to(tl.int32)
        words, late = load_words(ptr, at, index, step, end, count, gave_up, exchange)
        tries += 1
    if late > 0:
        tl.store(exchange.gave_up, GAVE_UP)
    values = ()
    for b in tl.static_range(count):  # NaN in float32 and in both 16-bit types, if the others are late for good
        values += (tl.where(late > 0, 0x7FFF7FFF, words[b].to(tl.int32)),)
    return values


@triton.jit
def share(numbers, slot: tl.constexpr, exchange, plan: tl.constexpr, VP: tl.constexpr):
    """Numbers of a row, each float32 `[BM, 1]`, to all members and from all, in one exchange.

    Returns a tile `[BM, VP · BLOCK]` for each `BLOCK` members, number by number; it is 0 beyond the last one. `slot` says
    how many numbers the same tag has shared before.
    """
    K: tl.constexpr = plan.team.K
    BM: tl.constexpr = plan.team.BM
    blocks: tl.constexpr = (K + BLOCK - 1) // BLOCK
    count: tl.constexpr = len(numbers)
    ptr = exchange.box + slot * BM * K
    j = tl.arange(0, VP * BLOCK)[None, :]
    number, member = j // BLOCK, j % BLOCK
    mine = tl.zeros((BM, VP * BLOCK), tl.float32)
    for i in tl.static_range(count):
        mine = tl.where(number == i, numbers[i], mine)
    at = (number * BM + tl.arange(0, BM)[:, None]) * K + member
    is_mine = (at >= 0) & (number < count) & (member == exchange.member % BLOCK)  # as it is read: no change of layout
    here = at + (exchange.member // BLOCK) * BLOCK
    post(ptr + here, mine.to(tl.int32, bitcast=True), is_mine, exchange)
    values = wait(ptr, tl.where(number < count, at, -1), member, BLOCK, K, blocks, exchange)
    tiles = ()
    for b in tl.static_range(blocks):
        tiles += (values[b].to(tl.float32, bitcast=True),)
    return tiles


@triton.jit
def sum_of(tiles, i: tl.constexpr, VP: tl.constexpr):
    """The sum over the members of number `i` of `share`, `[BM, 1]`."""
    total = tiles[0]
    count: tl.constexpr = len(tiles)
    for b in tl.static_range(1, count):
        total += tiles[b]
    return tl.sum(tl.where(tl.arange(0, VP * BLOCK)[None, :] // BLOCK == i, total, 0.0), 1, keep_dims=True)


@triton.jit
def sums_of(tiles, number: tl.constexpr, VP: tl.constexpr):
    """`sum_of` each of several numbers: fewer steps, but a layout that does not suit what depends on few of them."""
    count: tl.constexpr = len(tiles)
    total = tiles[0]
    for b in tl.static_range(1, count):
        total += tiles[b]
    by_number = tl.sum(tl.reshape(total, (total.shape[0], VP, BLOCK)), 2)
    sums = ()
    for i in tl.static_range(number):
        sums += (tl.sum(tl.where(tl.arange(0, VP)[None, :] == i, by_number, 0.0), 1, keep_dims=True),)
    return sums


@triton.jit
def columns_of(b: tl.constexpr, plan: tl.constexpr, VP: tl.constexpr):
    """How many units each member has, over tile `b` of `share`; float32 `[1, VP · BLOCK]`."""
    HS: tl.constexpr = plan.team.HS
    member = b * BLOCK + tl.arange(0, VP * BLOCK)[None, :] % BLOCK
    return tl.minimum(tl.maximum(plan.H - member * HS, 0), HS).to(tl.float32)
