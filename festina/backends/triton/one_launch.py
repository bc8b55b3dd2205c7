# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, assignment, misc, var-annotated"
"""The one-launch tiers: a block of rows goes through all steps in one launch, with its states in registers and the weights
on chip. For small sizes, and for diagonal cells of any size, one program takes a block (the loop tier); otherwise a team of
programs does (the team tier).

`packed_start` is the first step's first row among all packed steps, `chunk_start` that in the chunk; each step moves both by
`stride` rows, a negative number if steps are taken from the last to the first. With two directions in one launch the second
one takes the steps the other way round: the two mirrors are what both starts add up to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import OutOfResources

from festina.backends.triton.launch import Launch, programs, warps_for
from festina.backends.triton.norm import store_statistics
from festina.backends.triton.product import (
    h_0_factors,
    load_hh,
    load_matrix,
    load_member_hh,
    load_member_hh_backward,
    member_d_h,
    member_product,
    post_d_h,
    post_h,
    project,
    recurrent_product,
    recurrent_product_backward,
    right,
    row_factors,
)
from festina.backends.triton.step import (
    Around,
    Chunk,
    Weights,
    chunk_step,
    chunk_step_backward,
    load_flags,
    store_chunk,
    zoneout,
    zoneout_backward,
)
from festina.backends.triton.team import HEAD, Team, exchange_of
from festina.backends.triton.tile import load_tile, load_tiles, moved, place, store_tile

if TYPE_CHECKING:
    from festina.backends.triton import recurrence
    from festina.backends.triton.direction import Direction
    from festina.backends.triton.runs import Run


class Forward(NamedTuple):
    """What forward steps of a direction read and write in memory, beside the weights."""

    X: Any  # float32 [rows, G·H]: the input product of the chunk
    H_0: Any  # [B, P]
    C_0: Any  # [B, H], or None
    H_N: Any  # may be H_0
    C_N: Any  # may be C_0
    OUT: Any  # [N, P], rows `out_width` apart
    C: Any  # float32 [N, H]: c after every step; None if it is not wanted
    STATS: Any  # float32 [N, statistics, 2]: the statistics of all norms; None if they are not wanted


class Backward(NamedTuple):
    """What backward steps of a direction read and write in memory, beside the weights and the chunk."""

    D_OUT: Any  # [N, P], rows `out_width` apart; None for zeros
    D_H_N: Any  # [B, P]; None for zeros
    D_C_N: Any  # [B, H]; None for zeros
    D_H_0: Any  # may be D_H_N
    D_C_0: Any  # may be D_C_N
    STATS: Any  # as forward kept them; None if it did not


@triton.jit(
    do_not_specialize=[
        "packed_start",
        "chunk_start",
        "stride",
        "packed_mirror",
        "chunk_mirror",
        "steps",
        "rows",
        "blocks",
        "teams",
    ]
)
def loop_forward(
    packed_start, chunk_start, stride, packed_mirror, chunk_mirror, steps, rows, blocks, teams,
    side, w, around, BOXES, other_side, other_w, other_around, plan: tl.constexpr, out_width: tl.constexpr,
):  # fmt: skip
    """`steps` steps of `rows` rows, which are `blocks` blocks for `teams` teams: of one direction, or of both."""
    K: tl.constexpr = plan.team.K
    member, team = tl.program_id(0) % K, tl.program_id(0) // K
    if other_w.hh is None:
        forward_steps(
            side, w, around, BOXES, team, member, team, packed_start, chunk_start, stride, steps, rows, blocks, teams,
            plan, out_width,
        )  # fmt: skip
    else:
        if tl.program_id(1) == 0:
            forward_steps(
                side, w, around, BOXES, team, member, team, packed_start, chunk_start, stride, steps, rows, blocks, teams,
                plan, out_width,
            )  # fmt: skip
        else:
            forward_steps(
                other_side, other_w, other_around, BOXES, teams + team, member, team, packed_mirror - packed_start,
                chunk_mirror - chunk_start, -stride, steps, rows, blocks, teams, plan, out_width,
            )  # fmt: skip


@triton.jit
def forward_steps(
    side, w, around, BOXES, boxes, member, team, packed_start, chunk_start, stride, steps, rows, blocks, teams,
    plan: tl.constexpr, out_width: tl.constexpr,
):  # fmt: skip
    """The blocks of one team and one direction, block after block; `boxes` says which boxes are theirs."""
    G: tl.constexpr = plan.G
    K: tl.constexpr = plan.team.K
    BM: tl.constexpr = plan.team.BM
    HS: tl.constexpr = plan.team.HS
    BP: tl.constexpr = plan.team.BP
    col, col_p = member * HS + tl.arange(0, HS), member * BP + tl.arange(0, BP)
    hh = load_hh(w.hh, col_p, col, plan.P, plan.H, 1, plan.P, plan) if K == 1 else load_member_hh(w.hh, member, plan)
    hr = (
        (right(load_matrix(w.hr, col, col_p, plan.H, plan.P, 1, plan.H), plan.team.is_split),)
        if plan.is_projected
        else ()
    )
    tag = 0
    for block in range(team, blocks, teams):
        first = place(block, col, rows, packed_start, chunk_start, plan.H, BM)
        first_p = place(block, col_p, rows, packed_start, chunk_start, plan.P, BM)
        packed_row, chunk_row = first.packed_row, first.chunk_row
        h = load_tile(side.H_0, first_p.row, first_p, plan.P)
        c = None
        if plan.has_c:
            c = load_tile(side.C_0, first.row, first, plan.H)
        up, down = h_0_factors(side.H_0, first_p, rows, block, plan)
        if K > 1:
            tag += 1
            post_h(h, down, hh[0][0].dtype, exchange_of(BOXES, boxes, member, tag, plan), plan)
        for t in range(steps):
            tile, tile_p = moved(first, packed_row, chunk_row), moved(first_p, packed_row, chunk_row)
            x = load_tiles(side.X, chunk_row, tile, plan.H, plan.G)
            is_reset = load_flags(around.resets, tile)
            h = tl.where(is_reset, 0.0, h)
            if plan.has_c:
                c = tl.where(is_reset, 0.0, c)
            exchange = None
            if K > 1:
                exchange = exchange_of(BOXES, boxes, member, tag, plan)
                products = member_product(up, hh, exchange, plan)
                p = ()
                for g in tl.static_range(G):
                    p += (tl.where(is_reset, 0.0, products[g]),)
            else:
                if plan.is_projected:  # a projected h has no bound
                    up, down = row_factors(h, 127, plan.team.is_split)
                p = recurrent_product(h, up, down, w.hh, hh, col, plan)
            new_h, new_c, stats = chunk_step(side.C, x, p, h, c, w, around, tile, plan, exchange)
            if plan.has_c:
                c = new_c
            if plan.is_projected:
                new_h = project(new_h, hr[0], plan)
            h = zoneout(h, new_h, around.keep_h, around.rate_h, tile_p, plan.P)
            h = h.to(side.OUT.dtype.element_ty).to(tl.float32)  # backward starts from what the output holds
            if K > 1:
                has_next = t + 1 < steps
                if has_next:  # after the last step the next block's h_0 has the next tag
                    tag += 1
                    post_h(h, down, hh[0][0].dtype, exchange_of(BOXES, boxes, member, tag, plan), plan)
            store_tile(side.OUT, h, packed_row, tile_p, out_width)
            if side.STATS is not None:
                store_statistics(side.STATS, stats, tile, member, plan)
            packed_row += stride
            chunk_row += stride
        store_tile(side.H_N, h, first_p.row, first_p, plan.P)
        if plan.has_c:
            store_tile(side.C_N, c, first.row, first, plan.H)


@triton.jit(
    do_not_specialize=[
        "packed_start",
        "chunk_start",
        "stride",
        "packed_mirror",
        "chunk_mirror",
        "steps",
        "rows",
        "blocks",
        "teams",
    ]
)
def loop_backward(
    packed_start, chunk_start, stride, packed_mirror, chunk_mirror, steps, rows, blocks, teams,
    side, chunk, w, around, BOXES, other_side, other_chunk, other_w, other_around,
    plan: tl.constexpr, out_width: tl.constexpr,
):  # fmt: skip
    """Backward of `loop_forward`, from the last step."""
    K: tl.constexpr = plan.team.K
    member, team = tl.program_id(0) % K, tl.program_id(0) // K
    if other_w.hh is None:
        backward_steps(
            side, chunk, w, around, BOXES, team, member, team, packed_start, chunk_start, stride, steps, rows, blocks,
            teams, plan, out_width,
        )  # fmt: skip
    else:
        if tl.program_id(1) == 0:
            backward_steps(
                side, chunk, w, around, BOXES, team, member, team, packed_start, chunk_start, stride, steps, rows, blocks,
                teams, plan, out_width,
            )  # fmt: skip
        else:
            backward_steps(
                other_side, other_chunk, other_w, other_around, BOXES, teams + team, member, team,
                packed_mirror - packed_start, chunk_mirror - chunk_start, -stride, steps, rows, blocks, teams, plan,
                out_width,
            )  # fmt: skip


@triton.jit
def backward_steps(
    side, chunk, w, around, BOXES, boxes, member, team, packed_start, chunk_start, stride, steps, rows, blocks, teams,
    plan: tl.constexpr, out_width: tl.constexpr,
):  # fmt: skip
    """Backward of `forward_steps`."""
    K: tl.constexpr = plan.team.K
    BM: tl.constexpr = plan.team.BM
    HS: tl.constexpr = plan.team.HS
    BP: tl.constexpr = plan.team.BP
    col, col_p = member * HS + tl.arange(0, HS), member * BP + tl.arange(0, BP)
    hh = (
        load_hh(w.hh, col, col_p, plan.H, plan.P, plan.P, 1, plan)
        if K == 1
        else load_member_hh_backward(w.hh, member, plan)
    )
    hr = (
        (right(load_matrix(w.hr, col_p, col, plan.P, plan.H, plan.H, 1), plan.team.is_split),)
        if plan.is_projected
        else ()
    )
    tag = 0
    for block in range(team, blocks, teams):
        first = place(block, col, rows, packed_start, chunk_start, plan.H, BM)
        first_p = place(block, col_p, rows, packed_start, chunk_start, plan.P, BM)
        packed_row, chunk_row = first.packed_row, first.chunk_row
        d_h = tl.zeros((BM, BP), tl.float32)
        if side.D_H_N is not None:
            d_h = load_tile(side.D_H_N, first_p.row, first_p, plan.P)
        d_c = None
        if plan.has_c:
            d_c = tl.zeros((BM, HS), tl.float32)
            if side.D_C_N is not None:
                d_c = load_tile(side.D_C_N, first.row, first, plan.H)
        for _ in range(steps):
            tile, tile_p = moved(first, packed_row, chunk_row), moved(first_p, packed_row, chunk_row)
            is_reset = load_flags(around.resets, tile)
            if side.D_OUT is not None:
                d_h += load_tile(side.D_OUT, packed_row, tile_p, out_width)
            d_kept, d_new = zoneout_backward(d_h, around.keep_h, around.rate_h, tile_p, plan.P)
            if plan.is_projected:
                store_tile(chunk.d_projected, d_new, chunk_row, tile_p, plan.P)
                d_new = project(d_new, hr[0], plan)
            exchange = None
            if K > 1:
                tag += 1
                exchange = exchange_of(BOXES, boxes, member, tag, plan)
            found, d_old = chunk_step_backward(chunk, d_new, d_c, w, around, is_reset, tile, plan, exchange, side.STATS)
            if K > 1:
                post_d_h(found.d_p, hh, exchange, plan)  # before everything that the others do not wait for
                store_chunk(chunk, found, tile, plan)
                d_h = tl.where(is_reset, 0.0, d_kept) + tl.where(tile_p.mask, member_d_h(exchange, plan), 0.0)
            else:
                store_chunk(chunk, found, tile, plan)
                d_h = tl.where(is_reset, 0.0, d_kept) + recurrent_product_backward(found.d_p, w.hh, hh, col, plan)
            if plan.has_c:
                d_c = d_old
            else:
                d_h += d_old
            packed_row += stride
            chunk_row += stride
        store_tile(side.D_H_0, d_h, first_p.row, first_p, plan.P)
        if plan.has_c:
            store_tile(side.D_C_0, d_c, first.row, first, plan.H)


class Refused(RuntimeError):
    """The device does not start a launch: its programs cannot all run at once, or one of them needs more than there is."""


REFUSALS = ("cooperative", "not supported", "out of resource")
"""What the driver says then, in part."""

TEAM_WARPS = 8

_BARE = (Weights(*[None] * len(Weights._fields)), Around(*[None] * len(Around._fields)))
NONE: dict[int, tuple[Any, ...]] = {
    3: (Forward(*[None] * len(Forward._fields)), *_BARE),
    4: (Backward(*[None] * len(Backward._fields)), Chunk(*[None] * len(Chunk._fields)), *_BARE),
}
"""The second direction of a launch that has one, by the number of tuples of a direction."""


def forward(
    group: Sequence[Direction], runs: Sequence[Run], xs: Sequence[Tensor], origins: Sequence[int],
    states: Sequence[recurrence.States],
) -> None:  # fmt: skip
    """The steps of a run of each direction. `xs` are the chunks' input products; chunks begin at packed rows `origins`.

    Raises:
        Refused: the device does not start them.
    """
    sides = [
        (Forward(x, s.h_0, s.c_0, s.h, s.c, s.output, s.every_c, s.stats), direction.weights, direction.around)
        for direction, x, s in zip(group, xs, states)
    ]
    setup = group[0].setup
    _start(loop_forward, group, runs, origins, sides, setup.forward_plan, states[0].out_width, backward=False)


def backward(group: Sequence[Direction], runs: Sequence[Run], passes: Sequence[recurrence.Backward]) -> None:
    """Backward of the steps of a run of each direction.

    Raises:
        Refused: the device does not start them.
    """
    sides = []
    for direction, one in zip(group, passes):
        g = one.gradients
        side = Backward(g.output, g.h_n, g.c_n, g.h, g.c, g.stats)
        sides.append((side, one.chunk, direction.weights, direction.around))
    origins, width = [one.origin for one in passes], passes[0].gradients.out_width
    _start(loop_backward, group, runs, origins, sides, group[0].setup.backward_plan, width, backward=True)


def _start(
    kernel: Any, group: Sequence[Direction], runs: Sequence[Run], origins: Sequence[int], sides: Sequence[tuple[Any, ...]],
    plan: Any, out_width: int, *, backward: bool,
) -> None:  # fmt: skip
    setup, run = group[0].setup, runs[0]
    team: Team = plan.team
    starts = []
    for direction, of_direction, origin in zip(group, runs, origins):
        packed_start, stride = direction.start_and_stride(of_direction, backward)
        starts.append((packed_start, packed_start - origin, stride))
    (packed_start, chunk_start, stride), (other_packed, other_chunk, _) = starts[0], starts[-1]
    blocks = programs(run.rows, team.BM)
    teams = min(setup.ruled.teams, blocks) if team.K > 1 else blocks
    boxes = None
    if team.K > 1:
        words = int(HEAD) + 2 * len(group) * teams * team.words
        boxes = torch.zeros(words, dtype=torch.int64, device=group[0].call.input.device)
    warps = TEAM_WARPS if team.K > 1 else warps_for(team.BM * team.HS)
    parts = (*sides[0], (boxes,), *(sides[1] if len(sides) > 1 else NONE[len(sides[0])]))
    start = Launch(
        setup.kernels, kernel, (teams * team.K, len(group)), warps, parts, plan, (out_width,), is_cooperative=team.K > 1
    )
    moving = (
        packed_start, chunk_start, stride, packed_start + other_packed, chunk_start + other_chunk,
        run.steps, run.rows, blocks, teams,
    )  # fmt: skip
    try:
        start(*moving)
    except (RuntimeError, OutOfResources) as error:
        is_refused = not isinstance(error, torch.OutOfMemoryError) and any(
            text in str(error).lower() for text in REFUSALS
        )
        if is_refused and not plan.is_diagonal:  # a diagonal cell has no other tier
            raise Refused(f"the device did not start the {setup.ruled.name}: {error}") from error
        raise
