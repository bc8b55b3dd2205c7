"""What a layer of given sizes needs on the host, made once and kept: its constants, its tier, its compiled kernels."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from math import inf
from typing import Any

import torch

from festina.backends.triton.device import Device, device_of, index_of
from festina.backends.triton.launch import Kept
from festina.backends.triton.runs import Run, chunked
from festina.backends.triton.step import Plan
from festina.backends.triton.team import ALONE, Team
from festina.backends.triton.tiers import Tier, tier_of
from festina.call import Call
from festina.spec import LayerSpec

CHUNK_BYTES = 128 << 20
"""Memory for the pre-activations of a chunk and their gradients, about."""


@dataclass(eq=False)
class Kernels:
    """What all calls of a layer in one dtype and width on one device share.

    Args:
        plan: the layer's constants.
        device, index: the GPU, and its CUDA index; None in the interpreter.
        kept: compiled kernels.
        columns: what `Setup.columns` found.
        refused: why the device did not start a team, by the tier.
    """

    plan: Plan
    device: Device
    index: int | None
    kept: Kept = field(default_factory=dict)
    columns: dict[Any, tuple[list[str], list[int], int, int]] = field(default_factory=dict)
    refused: dict[Tier, str] = field(default_factory=dict)


@dataclass(eq=False)
class Setup:
    """A layer and the sizes of a call, on one device.

    Args:
        layer, dtype: what is computed.
        kernels: what it shares with calls of other lengths.
        B: rows of the batch.
        sizes: rows of each step; or T if all steps have B rows.
    """

    layer: LayerSpec
    dtype: torch.dtype
    kernels: Kernels
    B: int
    sizes: tuple[int, ...] | int

    @property
    def plan(self) -> Plan:
        """The layer's constants."""
        return self.kernels.plan

    @property
    def width(self) -> int:
        """Columns of the pre-activations."""
        return self.plan.G * self.plan.H

    @cached_property
    def N(self) -> int:
        """Packed rows."""
        return self.B * self.sizes if isinstance(self.sizes, int) else sum(self.sizes)

    @cached_property
    def forward_chunks(self) -> list[list[Run]]:
        """The steps, from the first to the last, in chunks for the forward pass, which holds x."""
        return chunked(self.sizes, self.B, CHUNK_BYTES // (4 * self.width * self.layer.directions))

    @cached_property
    def backward_chunks(self) -> list[list[Run]]:
        """The steps, likewise, in chunks for backward, which holds x, p and their gradients."""
        return chunked(self.sizes, self.B, CHUNK_BYTES // (16 * self.width * self.layer.directions))

    @property
    def is_full(self) -> bool:
        """Every step has all rows of the batch, and there is one."""
        return isinstance(self.sizes, int) and self.N > 0

    @cached_property
    def ruled(self) -> Tier:
        """The tier by the rule, whatever the device said when it was asked to start it."""
        steps = inf if isinstance(self.sizes, int) else len(self.sizes) / max(1, len(set(self.sizes)))
        return tier_of(self.plan, self.B, self.layer.directions, self.dtype, self.kernels.device, steps)

    @property
    def tier(self) -> Tier:
        """The tier that takes the steps."""
        refused = self.kernels.refused
        return Tier("step", refused[self.ruled]) if refused and self.ruled in refused else self.ruled

    @cached_property
    def forward_plan(self) -> Plan:
        """The constants of the forward kernels of many steps."""
        return _with_team(self.plan, self.ruled.forward)

    @cached_property
    def backward_plan(self) -> Plan:
        """The constants of the backward kernels of many steps."""
        return _with_team(self.plan, self.ruled.backward)

    @cached_property
    def sums(self) -> dict[str, tuple[str, str]]:
        """Gain and shift of each norm, of which one may be missing, by what it normalises: x, h and c, in this order.

        A plan without a norm there may have the shift alone.
        """
        names = self.layer.parameter_names
        h = ("gain_joint", "bias_joint") if self.plan.is_joint else ("gain_hh", "bias_hh")
        groups = {"x": ("gain_ih", "bias_ih"), "h": h, "c": ("gain_c", "bias_c")}
        return {key: pair for key, pair in groups.items() if pair[0] in names or pair[1] in names}

    def columns(
        self, x: tuple[bool, bool], h: tuple[bool, bool], c: tuple[bool, bool]
    ) -> tuple[list[str], list[int], int, int]:
        """How `rows_backward` lays out its sums: names and widths of all columns, and where those of h and c begin.

        x, h and c say whether there is a gradient, and whether anything is normalised: without that, there is no gain.
        """
        found = self.kernels.columns.get((x, h, c))
        if found is None:
            names: list[str] = []
            widths: list[int] = []
            starts = []
            for key, (is_there, has_gain) in zip("xhc", (x, h, c)):
                starts.append(sum(widths))
                if is_there:
                    pair = self.sums[key] if has_gain else self.sums[key][1:]
                    names += pair
                    widths += [self.plan.H if key == "c" else self.width] * len(pair)
            found = self.kernels.columns[x, h, c] = names, widths, starts[1], starts[2]
        return found


@lru_cache(maxsize=1024)
def _with_team(plan: Plan, team: Team | None) -> Plan:
    return plan._replace(team=team or ALONE)


@lru_cache(maxsize=1024)
def _kernels(layer: LayerSpec, dtype: torch.dtype, device: torch.device, H: int, P: int) -> Kernels:
    return Kernels(Plan.of(layer, H, P), device_of(device), index_of(device))


@lru_cache(maxsize=256)
def made(
    layer: LayerSpec, dtype: torch.dtype, device: torch.device, H: int, P: int, B: int, sizes: tuple[int, ...] | int
) -> Setup:
    """The setup of calls with these sizes: rows of each step, or T if all have B rows."""
    return Setup(layer, dtype, _kernels(layer, dtype, device, H, P), B, sizes)


def setup_of(call: Call) -> Setup:
    """The setup of a call."""
    layer, input, (_, B, P) = call.layer, call.input, call.h_0.shape
    H = P if call.c_0 is None else call.c_0.shape[2]
    sizes = call.batch_sizes
    steps = (input.shape[0] // B if B else 0) if sizes is None else tuple(sizes.tolist())
    return made(layer, input.dtype, input.device, H, P, B, steps)


@lru_cache(maxsize=1024)
def _statistics(layer: LayerSpec) -> int:
    plan = Plan.of(layer, 1, 1)
    return 0 if plan.is_diagonal or plan.is_projected else plan.statistics


def statistics_kept(call: Call) -> int:
    """Statistics of a row that a forward pass keeps room for: those of all norms, where a team might take the steps.

    Sizes and device do not matter, so that shapes can be propagated without them.
    """
    return _statistics(call.layer)


def forget() -> None:
    """Make everything anew: the device, a limit or a kernel has changed."""
    _kernels.cache_clear()
    _statistics.cache_clear()
    made.cache_clear()
