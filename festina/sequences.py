"""From the user's sequences (padded, unbatched or packed, with lengths and resets) to the one packed layout, and back.

Packed means: rows sorted by length, longest first, and for each step the rows that still run, one after the other, as in
`torch.nn.utils.rnn.PackedSequence`. A batch whose rows all run to the end is packed as it stands.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack
from torch.nn.utils.rnn import PackedSequence
from torch.utils._python_dispatch import _disable_current_modes

from festina.checks import Lengths, MismatchError, check_lengths, check_resets, check_state
from festina.spec import CellSpec

InitialState = Tensor | tuple[Tensor, Tensor]
"""hx: h_0, for a cell with a c (h_0, c_0)."""


@dataclass(eq=False, kw_only=True, slots=True)
class Packing:
    """How the rows and steps of a batch were packed; `pack` makes it.

    Args:
        T, B: steps and rows of the batch.
        like: the input as the user gave it.
        batch_first: the batch is `[B, T, ...]`.
        is_batched: False if the input was one row without a batch axis.
        batch_sizes: `[T']` int64 on the CPU, rows running at each step; None if all run to the end.
        is_active: `[T, B]` bool, which rows run, inside an ONNX export (`festina.backends.export`): nothing is packed there.
        resets: `[D, N]` bool, as `festina.call.Call` takes it, or None.
        order: `[B]`, the row of the batch that each packed row is; None if rows kept their places.
        index: `[N]`, the place of each packed step in the flattened batch; None if nothing moved.
    """

    T: int
    B: int
    like: Tensor | PackedSequence
    batch_first: bool
    is_batched: bool = True
    batch_sizes: Tensor | None = None
    is_active: Tensor | None = None
    resets: Tensor | None = None
    order: Tensor | None = None
    index: Tensor | None = None

    def pack(self, padded: Tensor) -> Tensor:
        """A batch `[T, B, W]` (`[B, T, W]` under batch_first) as packed steps `[N, W]`."""
        if isinstance(self.like, PackedSequence):
            index = _places(self.like, _lengths(self.like), self.batch_first)
            return padded.reshape(self.T * self.B, padded.shape[2]).index_select(0, index)
        if self.index is not None:
            return padded.reshape(self.T * self.B, padded.shape[2]).index_select(0, self.index)
        if self.batch_first:
            padded = padded.transpose(0, 1)
        return padded.reshape(self.T * self.B, padded.shape[2])

    def unpack(self, packed: Tensor) -> Tensor | PackedSequence:
        """A packed output `[N, W]` in the form that the input had; steps past a row's length are 0."""
        if isinstance(self.like, PackedSequence):
            return PackedSequence(packed, self.like.batch_sizes, self.like.sorted_indices, self.like.unsorted_indices)
        axes = (self.B, self.T) if self.batch_first else (self.T, self.B)
        if self.index is not None:
            flat = packed.new_zeros(self.T * self.B, packed.shape[1]).index_copy(0, self.index, packed)
            output = flat.view(*axes, packed.shape[1])
        else:
            output = packed.view(self.T, self.B, packed.shape[1])
            output = output.transpose(0, 1) if self.batch_first else output
        return output if self.is_batched else output.squeeze(0 if self.batch_first else 1)

    def initial_state(
        self,
        cell: CellSpec,
        hx: InitialState | None,
        *,
        lead: tuple[str, int],
        widths: tuple[int, int],
        steps: Tensor,
    ) -> list[Tensor]:
        """The initial states `[X, B, P]` and, for a cell with a c, `[X, B, H]`, rows in packed order: `hx`, or zeros.

        Args:
            cell: the cell.
            hx: the state that the user gave: X, then B if the input is batched, then its width.
            lead: the name of the axis before B, and its size X.
            widths: (P, H), the widths of h and c.
            steps: the packed input, whose dtype and device the states must have.

        Raises:
            TypeError: a bare tensor for a cell with two states, a pair for a cell with one, or neither.
            MismatchError: a state of a wrong shape, dtype or device.
        """
        name, X = lead
        if hx is None:
            return [steps.new_zeros(X, self.B, width) for _, width in zip(cell.states, widths)]
        axes = {name: X, "B": self.B} if self.is_batched else {name: X}
        given = [state.reshape(X, self.B, state.shape[-1]) for state in check_state(cell, hx, axes, widths, steps)]
        return given if self.order is None else [state.index_select(1, self.order) for state in given]

    def final_state(self, states: Sequence[Tensor]) -> Any:
        """The last states `[X, B, W]` as the user gets them: rows in the order of the batch, without the batch axis if the
        input had none; a tuple if there are two."""
        if self.order is not None:
            back = torch.argsort(self.order)
            states = [state.index_select(1, back) for state in states]
        if not self.is_batched:
            states = [state.squeeze(1) for state in states]
        return states[0] if len(states) == 1 else tuple(states)


def sort_rows(lengths: Tensor, T: int, batch_first: bool) -> tuple[Tensor, Tensor, Tensor]:
    """How rows of these `lengths` are packed: `order`, `batch_sizes` and `index` of a `Packing`.

    torch.compile calls it as the operator `festina::sort_rows`, since it cannot trace data-dependent shapes.

    Raises:
        MismatchError: a length below 0 or above T.
    """
    B = len(lengths)
    if B and (int(lengths.min()) < 0 or int(lengths.max()) > T):
        raise MismatchError(f"lengths must lie in [0, T] = [0, {T}], got {lengths.tolist()}")
    order = torch.argsort(lengths, descending=True, stable=True)
    by_length = lengths[order]
    steps = torch.arange(int(by_length[0]) if B else 0, device=lengths.device)
    return order, (steps.unsqueeze(1) < by_length).sum(1), _index(by_length, order, T, B, batch_first)


def _index(lengths: Tensor, order: Tensor, T: int, B: int, batch_first: bool) -> Tensor:
    """The place of each packed step in the flattened batch; `lengths` in packed order."""
    t = torch.arange(T, device=lengths.device).unsqueeze(1)
    places = order * T + t if batch_first else t * B + order
    return places[t < lengths]


def _lengths(packed: PackedSequence) -> Tensor:
    """The length of each row of a `PackedSequence`, longest first."""
    sizes = packed.batch_sizes
    return (sizes.unsqueeze(1) > torch.arange(int(sizes[0]), device=sizes.device)).sum(0)


def _places(packed: PackedSequence, by_length: Tensor, batch_first: bool) -> Tensor:
    """The place of each step of a `PackedSequence` in the flattened batch."""
    T, B = len(packed.batch_sizes), len(by_length)
    order = torch.arange(B, device=by_length.device) if packed.sorted_indices is None else packed.sorted_indices.cpu()
    return _index(by_length, order, T, B, batch_first).to(packed.data.device)


def _directed(resets: Tensor, lengths: Tensor | None, directions: int) -> Tensor:
    """`[T, B]` resets in the order of each direction: `[D, T, B]`.

    A reset at t cuts a row between t − 1 and t. Forward, the state is zeroed before step t; in reverse before step t − 1,
    which comes after t there. A cut beyond a row's end has no effect.
    """
    if directions == 1:
        return resets.unsqueeze(0)
    if lengths is not None:
        steps = torch.arange(len(resets), device=lengths.device)
        resets = resets & (steps.unsqueeze(1) < lengths).to(resets.device)
    return torch.stack([resets, torch.cat([resets[1:], torch.zeros_like(resets[:1])])])


def _out_of_sight() -> AbstractContextManager[Any]:
    """Lengths are plain numbers to whatever follows the tensors of a call: `torch.func.linearize` refuses to read a tensor
    that it has seen. A compiler does see them."""
    if torch.compiler.is_compiling() or _len_torch_dispatch_stack() == 0:
        return nullcontext()
    context: AbstractContextManager[Any] = _disable_current_modes()
    return context


def pack(
    input: Tensor | PackedSequence,
    directions: int = 1,
    batch_first: bool = False,
    lengths: Lengths | None = None,
    resets: Tensor | None = None,
) -> tuple[Tensor, Packing]:
    """The packed steps `[N, I]` of `input`, and the `Packing` that undoes it.

    Args:
        input: `[T, B, I]`, `[B, T, I]` under batch_first, `[T, I]` for one row, or a `PackedSequence`.
        directions: 1 or 2.
        batch_first: the batch axis comes first, in `input`, `resets` and the output.
        lengths: `[B]`, steps of each row, in any order, 0 allowed; on the CPU, or a list.
        resets: `[T, B]` (or `[B, T]`, or `[T]` for one row) bool: the row restarts from zero at that step.

    Raises:
        TypeError: input, lengths or resets are of a wrong type.
        MismatchError: they are of a wrong shape, on a wrong device, or lengths are out of range.
    """
    if isinstance(input, PackedSequence):
        return _pack_packed(input, directions, batch_first, lengths, resets)
    if not isinstance(input, Tensor):
        raise TypeError(f"input must be a Tensor or a PackedSequence, got {type(input).__name__}")
    if input.dim() not in (2, 3):
        raise MismatchError(
            f"input must be 3-D, {'[B, T, I]' if batch_first else '[T, B, I]'}, or 2-D, [T, I], for one row; "
            f"got {input.dim()}-D {list(input.shape)}"
        )
    is_batched = input.dim() == 3
    batched = input if is_batched else input.unsqueeze(0 if batch_first else 1)
    T, B = (batched.shape[1], batched.shape[0]) if batch_first else (batched.shape[0], batched.shape[1])
    packing = Packing(T=T, B=B, like=input, batch_first=batch_first, is_batched=is_batched)
    if lengths is None and resets is None:
        return packing.pack(batched), packing
    if lengths is not None:
        if not is_batched:
            raise MismatchError("lengths belong to a batch, but input is one row, [T, I]; cut it with input[:length]")
        with _out_of_sight():
            lengths = check_lengths(lengths, B)
    if resets is not None:
        shape, axes = ((B, T), "[B, T]") if batch_first else ((T, B), "[T, B]")
        check_resets(resets, shape if is_batched else (T,), axes if is_batched else "[T]", input.device)
        resets = resets.view(shape).t() if batch_first else resets.view(shape)

    is_compiling = torch.compiler.is_compiling()
    if lengths is not None and is_compiling and torch.onnx.is_in_onnx_export():
        packing.is_active = torch.arange(T, device=lengths.device).unsqueeze(1) < lengths
        packing.resets = None if resets is None else _directed(resets, lengths, directions).flatten(1)
        return packing.pack(batched), packing
    with _out_of_sight():
        is_ragged = lengths is not None and (is_compiling or bool((lengths != T).any()))
    if lengths is None or not is_ragged:
        packing.resets = None if resets is None else _directed(resets, None, directions).flatten(1)
        return packing.pack(batched), packing
    sort = torch.ops.festina.sort_rows if is_compiling else sort_rows
    with _out_of_sight():
        order, packing.batch_sizes, index = sort(lengths, T, batch_first)
    packing.order, packing.index = order.to(input.device), index.to(input.device)
    if resets is not None:
        steps = packing.index
        steps = steps % T * B + steps // T if batch_first else steps
        packing.resets = _directed(resets, lengths, directions).flatten(1)[:, steps]
    return packing.pack(batched), packing


def _pack_packed(
    input: PackedSequence, directions: int, batch_first: bool, lengths: Lengths | None, resets: Tensor | None
) -> tuple[Tensor, Packing]:
    if lengths is not None:
        raise MismatchError("a PackedSequence holds its own lengths; give lengths with a padded tensor only")
    if not len(input.batch_sizes):
        raise MismatchError("a PackedSequence must have at least one step, got none in batch_sizes")
    T, B = len(input.batch_sizes), int(input.batch_sizes[0])
    for order in (input.sorted_indices, input.unsorted_indices):
        if order is not None and order.shape != (B,):
            raise MismatchError(
                f"sorted_indices and unsorted_indices of a PackedSequence must be [B] = [{B}], as batch_sizes[0] says, got "
                f"{list(order.shape)}"
            )
    packing = Packing(T=T, B=B, like=input, batch_first=batch_first)
    packing.batch_sizes, packing.order = input.batch_sizes, input.sorted_indices
    if resets is not None:
        shape, axes = ((B, T), "[B, T]") if batch_first else ((T, B), "[T, B]")
        check_resets(resets, shape, axes, input.data.device)
        resets = resets.t() if batch_first else resets
        by_length = _lengths(input)
        lengths = by_length if input.unsorted_indices is None else by_length[input.unsorted_indices.cpu()]
        packing.resets = _directed(resets, lengths, directions).flatten(1)[:, _places(input, by_length, False)]
    return input.data, packing
