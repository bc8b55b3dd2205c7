"""Which tier takes the steps of a call, and the sizes of its programs. `docs/gpu.md` has the table.

Three tiers take the steps of a call: the loop tier, where one program keeps all weights on chip; the team tier, where
several programs do so together; and the step tier, a launch a step.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from festina.backends.triton.device import Device
from festina.backends.triton.launch import block, power_of_two, programs, rows_per_program
from festina.backends.triton.step import Plan
from festina.backends.triton.team import BLOCK, Team

ROWS = 16
"""Rows of a block: those of a tensor core's tile."""

SPARE_BYTES = 24 << 10
"""Shared memory that the one-launch tiers need beside the weights, at most."""

TENSOR_CORES = 80
"""The compute capability from which Triton uses tensor cores; before, operands of a product are float32 on chip."""

WAVES = 2
"""Blocks that a team takes one after another, at most: with more, a launch a step over all rows is faster."""

RUN_STEPS = 4
"""Steps of a run, on average, below which a team's launch, which loads the weights, costs more than it saves."""

WORDS = 4096
"""Words that a member waits for at once, at most."""


class Tier(NamedTuple):
    """A tier with its sizes, and why it was taken.

    Args:
        name: "loop", "team of K" or "step".
        why: a phrase.
        forward, backward: how a block of rows is worked on; None in the step tier.
        teams: that run at once in one direction; 0 if there is a program for every block.
    """

    name: str
    why: str
    forward: Team | None = None
    backward: Team | None = None
    teams: int = 0

    @property
    def is_team(self) -> bool:
        """Several programs take a block of rows together."""
        return self.teams > 0


def tier_of(plan: Plan, B: int, directions: int, dtype: torch.dtype, device: Device, steps_of_a_run: float) -> Tier:
    """The tier that takes the steps of a call of `B` rows, in runs of `steps_of_a_run` steps with equally many rows."""
    is_split = dtype == torch.float32
    BH, BP = block(plan.H), block(plan.P)
    if plan.is_diagonal:
        team = Team(1, rows_per_program(BH), BH, BP, False)
        return Tier("loop", "there is no recurrent product", team, team)
    if device.backend != "cuda":
        return Tier("step", "the tiers of one launch are for NVIDIA")
    size = (4 if is_split else 2) * (2 if device.capability < TENSOR_CORES else 1)
    weights = size * BH * BP * (plan.G + plan.is_projected)
    room = device.shared_bytes - SPARE_BYTES
    if weights <= room:
        team = Team(1, ROWS, BH, BP, is_split)
        return Tier("loop", "all weights fit on one processor", team, team)
    if plan.is_projected:
        return Tier("step", "the layer has a projection")
    if steps_of_a_run < RUN_STEPS:
        return Tier("step", "lengths change too often for a launch each")
    GP = power_of_two(plan.G)
    for HS in (32, 16, 8):
        K = programs(plan.H, HS)
        forward, backward = (team_of(plan, K, HS, is_split, is_backward) for is_backward in (False, True))
        if max(forward.HP, backward.HP) * HS * GP * size <= room:
            break
    else:
        return Tier("step", f"the weights of 8 units, {GP * plan.H * 8 * size >> 10} KiB, do not fit on a processor")
    most = device.processors // (K * directions)
    blocks = programs(B, ROWS)
    if blocks > WAVES * most:
        return Tier("step", f"{blocks} blocks of rows for teams of {K} do not fit {device.processors} processors")
    why = f"{K} programs of {HS} units share the weights"
    return Tier(f"team of {K}", why, forward, backward, teams=min(blocks, most))


def team_of(plan: Plan, K: int, HS: int, is_split: bool, is_backward: bool) -> Team:
    """A team of K members with HS units each."""
    width = K * HS
    if is_backward:
        most = 128
        parts = len(plan.spans) if plan.has_hh_norm else 0
        values = 2 * (plan.has_c_norm + parts * (3 if plan.has_c_norm else 1))
        VP = max(2, power_of_two(values))
    else:
        most = max(32, WORDS // ROWS * (1 if is_split else 2))
        values = 2 * plan.statistics
        VP = 2  # not used: each norm needs its own
    sizes = [size for size in (32, 64, 128, 256, 512) if size <= most]
    BK = min(
        sizes, key=lambda size: (programs(width, size) * size, -size)
    )  # little beyond the last unit, then few parts
    HP = programs(width, BK) * BK
    h_box = -(-values * ROWS * K // int(BLOCK)) * int(BLOCK)
    h_words = ROWS * (width * K if is_backward else HP if is_split else HP // 2)
    return Team(
        K, ROWS, HS, HS, is_split,
        GP=power_of_two(plan.G), BK=BK, HP=HP, VP=VP, words=h_box + h_words, h_box=h_box,
    )  # fmt: skip
