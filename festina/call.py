"""What travels between the layers and the backends: `Call` goes in, `Outputs` come back, and a backend is chosen by a `Case`.

Sizes: `T` steps, `B` batch, `I` input_size, `H` hidden_size, `P` width of h (proj_size, or H), `D` directions, `N` valid
steps of all rows together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.nn import Module

from festina.spec import LayerSpec

OWNERS: WeakValueDictionary[int, Module] = WeakValueDictionary()
"""The module that registered a parameter, by the parameter's id. It may hold another one by now, or the id be that of another
tensor: whoever asks compares."""


@dataclass(eq=False, kw_only=True, slots=True)
class Call:
    """One call of the recurrence: one layer, every direction, over packed steps.

    Packed means: rows sorted by length, the `batch_sizes[t]` active rows of step t one after the other, as in
    `torch.nn.utils.rnn.PackedSequence`.

    Args:
        layer: what to compute.
        input: `[N, I]`, the packed steps.
        h_0: `[D, B, P]`.
        c_0: `[D, B, H]` if the cell has a c, else None.
        parameters: those of direction 0 in the order of `layer.parameter_names`, then those of direction 1.
        batch_sizes: `[T]` int64 on the CPU, not increasing; None if every row runs to the end. A row that is never active
            keeps its initial state.
        is_active: `[T, B]` bool, the rows that run at each step. Only inside an ONNX export, where steps stay padded and
            `batch_sizes` is None; otherwise None.
        resets: `[D, N]` bool: h and c are zeroed before that step, in the order of the direction; None for no reset.
        zoneout_mask: `[D, N, P]` bool: True keeps the old h; None for the expectation at rate `zoneout`.
        zoneout_cell_mask: `[D, N, H]` bool: True keeps the old c; None for the expectation at rate `zoneout_cell`.
        zoneout: rate of Zoneout on h; used only without a mask.
        zoneout_cell: rate of Zoneout on c; used only without a mask.
        owner: the module that makes the call, or that registered its parameters if an operator makes it. A backend may keep
            what it derives from the module's parameters as long as the module lives; None keeps nothing beyond the
            tensors themselves.
    """

    layer: LayerSpec
    input: Tensor
    h_0: Tensor
    c_0: Tensor | None = None
    parameters: tuple[Tensor, ...]
    batch_sizes: Tensor | None = None
    is_active: Tensor | None = None
    resets: Tensor | None = None
    zoneout_mask: Tensor | None = None
    zoneout_cell_mask: Tensor | None = None
    zoneout: float = 0.0
    zoneout_cell: float = 0.0
    owner: Module | None = None

    @property
    def state(self) -> list[Tensor]:
        """The initial states: h_0, and c_0 if the cell has a c."""
        return [self.h_0] if self.c_0 is None else [self.h_0, self.c_0]

    def tensors(self) -> list[Tensor]:
        """The tensors that have gradients: input, initial states, parameters."""
        return [self.input, *self.state, *self.parameters]

    def around(self) -> list[Tensor]:
        """The tensors without gradients, those that there are: batch sizes, resets, the masks of Zoneout."""
        tensors = (self.batch_sizes, self.resets, self.zoneout_mask, self.zoneout_cell_mask)
        return [tensor for tensor in tensors if tensor is not None]

    def with_tensors(self, tensors: Sequence[Tensor]) -> Call:
        """The same call on other `tensors()`, which no module owns."""
        input, h_0, *rest = tensors
        c_0 = None if self.c_0 is None else rest.pop(0)
        return replace(self, input=input, h_0=h_0, c_0=c_0, parameters=tuple(rest), owner=None)

    def sizes(self) -> list[int]:
        """The number of active rows of each step."""
        if self.batch_sizes is not None:
            return [int(size) for size in self.batch_sizes.tolist()]
        rows = self.h_0.shape[1]
        return [rows] * (self.input.shape[0] // rows) if rows else []

    def of_direction(self, d: int) -> dict[str, Tensor]:
        """The parameters of direction `d` by name."""
        names = self.layer.parameter_names
        return dict(zip(names, self.parameters[d * len(names) : (d + 1) * len(names)], strict=True))


class Outputs(NamedTuple):
    """What a call gives: output `[N, D·P]`, h_n `[D, B, P]`, and c_n `[D, B, H]`, None if the cell has no c."""

    output: Tensor
    h_n: Tensor
    c_n: Tensor | None


class Step(NamedTuple):
    """What one step of a cell gives: the new states, `[B, P]` and, if the cell has a c, `[B, H]`, and what training saves."""

    state: list[Tensor]
    saved: list[Tensor]


class Case(NamedTuple):
    """What a backend is chosen by: everything that is known before a number is seen."""

    layer: LayerSpec
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, call: Call) -> Case:
        """The case of a call."""
        return cls(call.layer, call.input.dtype, call.input.device)


def float32_becomes(device: str) -> torch.dtype:
    """The dtype that float32 tensors are cast to before a call: autocast's, or float32 outside of autocast."""
    if device == "meta" or not torch.is_autocast_enabled(device):  # autocast knows no meta device
        return torch.float32
    return torch.get_autocast_dtype(device)
