"""From what a user holds (padded, unbatched or packed sequences, lengths, resets) to the one packed layout, and back.

Packed means: rows sorted by length, longest first, and for each step the rows that are still running, one after the
other, as in `torch.nn.utils.rnn.PackedSequence`. A batch whose rows all run to the end is packed as it stands.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

Lengths = Tensor | Sequence[int]


@dataclass(eq=False, slots=True)
class Packing:
    """How the rows and steps of a batch were packed; `pack` makes it.

    Args:
        T, B: steps and rows of the batch.
        batch_sizes: `[T']` int64 on the CPU, rows running at each step; None where all run to the end. Inside an ONNX export
            `[T, B]` bool, which rows run: there nothing is packed (`festina.onnx`).
        resets: `[D, N]` bool, what `festina.reference.Call` takes, or None.
        order: `[B]`, which row of the batch each packed row is; None where rows kept their places.
        index: `[N]`, where in the flattened batch each packed step comes from; None where nothing moved.
        like: what the input looked like.
        batch_first: the batch is `[B, T, ...]`.
    """

    T: int
    B: int
    batch_sizes: Tensor | None
    resets: Tensor | None
    order: Tensor | None
    index: Tensor | None
    like: Tensor | PackedSequence
    batch_first: bool

    @property
    def is_batched(self) -> bool:
        """False where the input was one row without a batch axis."""
        return isinstance(self.like, PackedSequence) or self.like.dim() == 3

    def state_axes(self, lead: dict[str, int]) -> dict[str, int]:
        """The axes of a state before its width: `lead`, and B unless the input was one row."""
        return {**lead, "B": self.B} if self.is_batched else lead

    def pack(self, padded: Tensor) -> Tensor:
        """A batch `[T, B, W]` (`[B, T, W]` under batch_first), packed: `[N, W]`."""
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

    def pack_state(self, state: Tensor) -> Tensor:
        """A state `[X, B, W]` with its rows in packed order."""
        return state if self.order is None else state.index_select(1, self.order)

    def unpack_state(self, state: Tensor) -> Tensor:
        """A state `[X, B, W]` with its rows in the order of the batch, without the batch axis if the input had none."""
        if self.order is not None:
            state = state.index_select(1, torch.argsort(self.order))
        return state if self.is_batched else state.squeeze(1)


def check_lengths(lengths: Lengths, B: int) -> Tensor:
    """`lengths` as an int64 tensor on the CPU; `sort_rows` checks the numbers.

    Raises:
        TypeError: not integers.
        ValueError: not `[B]`, or not on the CPU.
    """
    if not isinstance(lengths, Tensor):
        try:
            lengths = torch.tensor(lengths, dtype=None if len(lengths) else torch.int64)
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(
                f"lengths must be a tensor or a list of integers, one for each row, got {lengths!r}"
            ) from None
    if lengths.dtype.is_floating_point or lengths.dtype.is_complex or lengths.dtype == torch.bool:
        raise TypeError(f"lengths must hold integers, the steps of each row, got {lengths.dtype}")
    if lengths.device.type != "cpu":
        raise ValueError(
            f"lengths must be on the CPU, where the batch is laid out, got {lengths.device}; call lengths.cpu()"
        )
    if lengths.shape != (B,):
        raise ValueError(f"lengths must be [B] = [{B}], one for each row, got {list(lengths.shape)}")
    return lengths.long()


def sort_rows(lengths: Tensor, T: int, batch_first: bool) -> tuple[Tensor, Tensor, Tensor]:
    """How rows of these `lengths` are packed: `order`, `batch_sizes` and `index` of a `Packing`.

    The operator `festina::sort_rows` is the same for torch.compile, which cannot follow sizes that hang on numbers.

    Raises:
        ValueError: a length below 0 or above T.
    """
    B = len(lengths)
    if B and (int(lengths.min()) < 0 or int(lengths.max()) > T):
        raise ValueError(f"lengths must lie in [0, T] = [0, {T}], got {lengths.tolist()}")
    order = torch.argsort(lengths, descending=True, stable=True)
    by_length = lengths[order]
    steps = torch.arange(int(by_length[0]) if B else 0)
    return order, (steps.unsqueeze(1) < by_length).sum(1), _index(by_length, order, T, B, batch_first)


def check_resets(resets: Tensor, shape: tuple[int, ...], axes: str, device: torch.device) -> None:
    """Raise unless `resets` is a bool tensor of `shape` on `device`; `axes` names the shape.

    Raises:
        TypeError: not a bool tensor.
        ValueError: another shape or device.
    """
    if not isinstance(resets, Tensor) or resets.dtype != torch.bool:
        got = resets.dtype if isinstance(resets, Tensor) else type(resets).__name__
        raise TypeError(f"resets must be a bool tensor, got {got}; torch.as_tensor(resets).bool() is one")
    if resets.shape != shape:
        raise ValueError(f"resets must be {axes} = {list(shape)}, got {list(resets.shape)}")
    if resets.device != device:
        raise ValueError(f"resets must be on the input's device, {device}, got {resets.device}; move one of them")


def _index(lengths: Tensor, order: Tensor, T: int, B: int, batch_first: bool) -> Tensor:
    """Where in the flattened batch each packed step comes from; `lengths` in packed order."""
    t = torch.arange(T).unsqueeze(1)
    places = order * T + t if batch_first else t * B + order
    return places[t < lengths]


def _lengths(packed: PackedSequence) -> Tensor:
    """The length of each row of a `PackedSequence`, longest first."""
    return (packed.batch_sizes.unsqueeze(1) > torch.arange(int(packed.batch_sizes[0]))).sum(0)


def _places(packed: PackedSequence, by_length: Tensor, batch_first: bool) -> Tensor:
    """Where in the flattened batch each step of a `PackedSequence` comes from."""
    T, B = len(packed.batch_sizes), len(by_length)
    order = torch.arange(B) if packed.sorted_indices is None else packed.sorted_indices.cpu()
    return _index(by_length, order, T, B, batch_first).to(packed.data.device)


def _directed(resets: Tensor, lengths: Tensor | None, directions: int) -> Tensor:
    """`[T, B]` resets as each direction meets them: `[D, T, B]`.

    A reset at t cuts a row between t − 1 and t. Forward, the state is zeroed before step t; backward, before step t − 1,
    which comes after t there. A cut beyond a row's end is none.
    """
    if directions == 1:
        return resets.unsqueeze(0)
    if lengths is not None:
        resets = resets & (torch.arange(len(resets)).unsqueeze(1) < lengths).to(resets.device)
    return torch.stack([resets, torch.cat([resets[1:], torch.zeros_like(resets[:1])])])


def pack(
    input: Tensor | PackedSequence,
    directions: int = 1,
    batch_first: bool = False,
    lengths: Lengths | None = None,
    resets: Tensor | None = None,
) -> tuple[Tensor, Packing]:
    """The packed steps `[N, I]` of `input`, and how they were packed.

    Args:
        input: `[T, B, I]`, `[B, T, I]` under batch_first, `[T, I]` for one row, or a `PackedSequence`.
        directions: 1 or 2.
        batch_first: the batch axis comes first, in `input`, `resets` and the output.
        lengths: `[B]`, steps of each row, in any order, 0 allowed; on the CPU, or a list.
        resets: `[T, B]` (or `[B, T]`, or `[T]` for one row) bool: a row starts anew at that step.

    Raises:
        TypeError: input, lengths or resets are of a wrong type.
        ValueError: they are of a wrong shape, on a wrong device, or lengths are out of range.
    """
    if isinstance(input, PackedSequence):
        return _pack_packed(input, directions, batch_first, lengths, resets)
    if not isinstance(input, Tensor):
        raise TypeError(f"input must be a Tensor or a PackedSequence, got {type(input).__name__}")
    if input.dim() not in (2, 3):
        raise ValueError(
            f"input must be 3-D, {'[B, T, I]' if batch_first else '[T, B, I]'}, or 2-D, [T, I], for one row; "
            f"got {input.dim()}-D {list(input.shape)}"
        )
    batched = input if input.dim() == 3 else input.unsqueeze(0 if batch_first else 1)
    T, B = (batched.shape[1], batched.shape[0]) if batch_first else (batched.shape[0], batched.shape[1])
    if lengths is not None:
        if input.dim() == 2:
            raise ValueError("lengths belong to a batch, but input is one row, [T, I]; cut it with input[:length]")
        lengths = check_lengths(lengths, B)
    if resets is not None:
        shape, axes = ((B, T), "[B, T]") if batch_first else ((T, B), "[T, B]")
        check_resets(resets, shape if input.dim() == 3 else (T,), axes if input.dim() == 3 else "[T]", input.device)
        resets = resets.view(shape).t() if batch_first else resets.view(shape)

    is_compiling = torch.compiler.is_compiling()
    if lengths is not None and is_compiling and torch.onnx.is_in_onnx_export():
        runs = torch.arange(T).unsqueeze(1) < lengths
        flat = None if resets is None else _directed(resets, lengths, directions).flatten(1)
        packing = Packing(T, B, runs, flat, None, None, input, batch_first)
        return packing.pack(batched), packing
    if lengths is None or not (is_compiling or bool((lengths != T).any())):
        flat = None if resets is None else _directed(resets, None, directions).flatten(1)
        packing = Packing(T, B, None, flat, None, None, input, batch_first)
        return packing.pack(batched), packing
    sort = torch.ops.festina.sort_rows if is_compiling else sort_rows
    order, batch_sizes, index = sort(lengths, T, batch_first)
    index = index.to(input.device)
    if resets is not None:
        steps = index % T * B + index // T if batch_first else index
        resets = _directed(resets, lengths, directions).flatten(1)[:, steps]
    packing = Packing(T, B, batch_sizes, resets, order.to(input.device), index, input, batch_first)
    return packing.pack(batched), packing


def _pack_packed(
    input: PackedSequence, directions: int, batch_first: bool, lengths: Lengths | None, resets: Tensor | None
) -> tuple[Tensor, Packing]:
    if lengths is not None:
        raise ValueError("a PackedSequence holds its own lengths; give lengths with a padded tensor only")
    T, B = len(input.batch_sizes), int(input.batch_sizes[0])
    if resets is not None:
        check_resets(
            resets, (B, T) if batch_first else (T, B), "[B, T]" if batch_first else "[T, B]", input.data.device
        )
        resets = resets.t() if batch_first else resets
        by_length = _lengths(input)
        lengths = by_length if input.unsorted_indices is None else by_length[input.unsorted_indices.cpu()]
        resets = _directed(resets, lengths, directions).flatten(1)[:, _places(input, by_length, False)]
    packing = Packing(T, B, input.batch_sizes, resets, input.sorted_indices, None, input, batch_first)
    return input.data, packing
