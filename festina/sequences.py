"""From the user's sequences (padded, unbatched, packed or nested, with lengths and resets) to the one packed layout, and back.

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
from torch._C import _get_tracing_state, _len_torch_dispatch_stack
from torch.nn.utils.rnn import PackedSequence
from torch.utils._python_dispatch import _disable_current_modes

from festina.checks import Lengths, MismatchError, check_lengths, check_nested, check_resets, check_state
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
        index: `[N]`, the place of each packed step in the flattened batch, or among the values of a NestedTensor; None if
            nothing moved.
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
        if isinstance(self.like, PackedSequence) or self.like.is_nested:
            index = self.places(self.batch_first).to(padded.device)
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
        if self.like.is_nested:
            assert self.index is not None
            values = packed.new_zeros(self.like.values().shape[0], packed.shape[1]).index_copy(0, self.index, packed)
            # The same offsets make the same ragged size: the output can be added to what has the size of the input.
            longest = None if torch.compiler.is_compiling() else self.T
            offsets, lengths = self.like.offsets(), self.like.lengths()  # type: ignore[attr-defined]
            return torch.nested.nested_tensor_from_jagged(values, offsets, lengths, max_seqlen=longest)
        axes = (self.B, self.T) if self.batch_first else (self.T, self.B)
        if self.index is not None:
            flat = packed.new_zeros(self.T * self.B, packed.shape[1]).index_copy(0, self.index, packed)
            output = flat.view(*axes, packed.shape[1])
        else:
            output = packed.view(self.T, self.B, packed.shape[1])
            output = output.transpose(0, 1) if self.batch_first else output
        return output if self.is_batched else output.squeeze(0 if self.batch_first else 1)

    def places(self, batch_first: bool) -> Tensor:
        """`[N]`, the place of each packed step in a flattened batch of T steps and B rows; on the CPU.

        For input that is not padded: its `batch_sizes` and `order` say which steps there are.
        """
        assert self.batch_sizes is not None
        order = torch.arange(self.B, device="cpu") if self.order is None else self.order.cpu()
        return _index(_lengths(self.batch_sizes, self.B), order, self.T, self.B, batch_first)

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


def _sorted(lengths: Tensor, T: int, B: int, batch_first: bool) -> tuple[Tensor, Tensor, Tensor]:
    """`sort_rows`, by the operator if a graph is made."""
    if torch.compiler.is_compiling():
        found: tuple[Tensor, Tensor, Tensor] = torch.ops.festina.sort_rows(lengths, T, batch_first)
        return found
    if _get_tracing_state() is not None:
        sizes = [torch.as_tensor(size, device="cpu") for size in (T, B)]
        found = torch.ops.festina.sort_rows.traced(lengths, *sizes, batch_first)
        return found
    return sort_rows(lengths, T, batch_first)


def _index(lengths: Tensor, order: Tensor, T: int, B: int, batch_first: bool) -> Tensor:
    """The place of each packed step in the flattened batch; `lengths` in packed order."""
    t = torch.arange(T, device=lengths.device).unsqueeze(1)
    places = order * T + t if batch_first else t * B + order
    return places[t < lengths]


def _lengths(batch_sizes: Tensor, B: int) -> Tensor:
    """The length of each of B rows, longest first."""
    return (batch_sizes.unsqueeze(1) > torch.arange(B, device=batch_sizes.device)).sum(0)


def _directed(resets: Tensor, lengths: Tensor | None, directions: int) -> Tensor:
    """`[T, B]` resets in the order of each direction: `[D, T, B]`.

    A reset at t cuts a row between t − 1 and t. Forward, the state is zeroed before step t; in reverse before step t − 1,
    which comes after t there. A cut beyond a row's end has no effect.
    """
    if directions == 1:
        return resets.unsqueeze(0)
    if lengths is not None:
        steps = torch.arange(resets.shape[0], device=lengths.device)
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
        input: `[T, B, I]`, `[B, T, I]` under batch_first, `[T, I]` for one row, a `PackedSequence`, or a NestedTensor
            `[B, j, I]` of the layout torch.jagged.
        directions: 1 or 2.
        batch_first: the batch axis comes first, in `input`, `resets` and the output.
        lengths: `[B]`, steps of each row, in any order, 0 allowed; on the CPU, or a list.
        resets: `[T, B]` (or `[B, T]`, or `[T]` for one row; nested `[B, j]` if the input is) bool: the row restarts from
            zero at that step.

    Raises:
        TypeError: input, lengths or resets are of a wrong type.
        MismatchError: they are of a wrong shape, on a wrong device, or lengths are out of range.
    """
    if isinstance(input, PackedSequence):
        return _pack_packed(input, directions, batch_first, lengths, resets)
    if not isinstance(input, Tensor):
        raise TypeError(f"input must be a Tensor or a PackedSequence, got {type(input).__name__}")
    if input.is_nested:
        return _pack_nested(input, directions, batch_first, lengths, resets)
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
    is_traced = _get_tracing_state() is not None
    if lengths is not None and is_compiling and torch.onnx.is_in_onnx_export():
        packing.is_active = torch.arange(T, device=lengths.device).unsqueeze(1) < lengths
        packing.resets = None if resets is None else _directed(resets, lengths, directions).flatten(1)
        return packing.pack(batched), packing
    with _out_of_sight():
        is_ragged = lengths is not None and (is_compiling or is_traced or bool((lengths != T).any()))
    if lengths is None or not is_ragged:
        packing.resets = None if resets is None else _directed(resets, None, directions).flatten(1)
        return packing.pack(batched), packing
    with _out_of_sight():
        order, packing.batch_sizes, index = _sorted(lengths, T, B, batch_first)
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
        by_length = _lengths(input.batch_sizes, B)
        lengths = by_length if input.unsorted_indices is None else by_length[input.unsorted_indices.cpu()]
        places = packing.places(batch_first=False).to(input.data.device)
        packing.resets = _directed(resets, lengths, directions).flatten(1)[:, places]
    return input.data, packing


def _pack_nested(
    input: Tensor, directions: int, batch_first: bool, lengths: Lengths | None, resets: Tensor | None
) -> tuple[Tensor, Packing]:
    if lengths is not None:
        raise MismatchError("a NestedTensor holds its own lengths; give lengths with a padded tensor only")
    values, device = input.values(), input.device
    stride = values.shape[0] + 1  # in a batch of so many steps every row would fit
    with _out_of_sight():
        starts, rows = check_nested("input", input, "[B, j, I]")
        order, batch_sizes, index = _sorted(rows, stride, rows.shape[0], True)

    def places(starts: Tensor) -> Tensor:
        return (starts[index // stride] + index % stride).to(device)

    index_of_values = places(starts)
    packing = Packing(
        T=batch_sizes.shape[0],
        B=rows.shape[0],
        like=input,
        batch_first=batch_first,
        batch_sizes=batch_sizes,
        order=order.to(device),
        index=index_of_values,
    )
    if resets is not None:
        if not (isinstance(resets, Tensor) and resets.is_nested):
            raise TypeError(
                "resets must be nested as the input is, [B, j]; "
                "torch.nested.nested_tensor_from_jagged(flags, input.offsets()) makes them from a flag for each step"
            )
        starts_of_resets, lengths_of_resets = check_nested("resets", resets, "[B, j]")
        check_resets(resets.values(), resets.values().shape, "[B, j]", device)
        if torch.compiler.is_compiling():
            torch._assert_async((lengths_of_resets == rows).all(), "resets must have the lengths of the input")
        elif not torch.equal(lengths_of_resets, rows):
            raise MismatchError(
                f"resets must have the lengths of the input, {rows.tolist()}, got {lengths_of_resets.tolist()}"
            )
        padded = resets.values().new_zeros(packing.T * packing.B)
        at = packing.places(batch_first=False).to(device)
        padded[at] = resets.values()[places(starts_of_resets)]
        packing.resets = _directed(padded.view(packing.T, packing.B), rows, directions).flatten(1)[:, at]
    return values.index_select(0, index_of_values), packing
