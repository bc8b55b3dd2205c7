"""Every validation, once: of what users give, and of a `Call` before a backend sees it.

An error says what was wanted, what came and what to do. `check_call` is the door: kernels take addresses and sizes on
trust, so every `Call` passes it. The shorter way of a single step (`festina.dispatch.step`) compares its tensors with a
prepared step instead, and hands over to a `Call` if anything differs.
"""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Mapping, Sequence
from functools import lru_cache
from operator import attrgetter, ge
from typing import Any

import torch
from torch import Tensor

from festina.call import Call, float32_becomes
from festina.norms import NormPlan
from festina.spec import CELLS, CellSpec, LayerSpec

Lengths = Tensor | Sequence[int]
Parameters = Mapping[str, Tensor]
"""The parameters of one direction by name: `weight_ih`, `weight_hh`, ... as `LayerSpec.parameter_shapes` lists them."""

_SHAPE = attrgetter("shape")


class MismatchError(ValueError, RuntimeError):
    """Sizes, dtypes or devices of what a call is given do not agree. `torch.nn` raises a RuntimeError for most of these; code
    that catches either type catches this one."""


def check_flags(**flags: bool) -> None:
    """Raise unless every flag is a bool, as in `torch.nn`: an argument in a wrong place shows.

    Raises:
        TypeError: it is not.
    """
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise TypeError(f"{name} must be True or False, got {flag!r}")


def as_flag(name: str, value: Any) -> bool:
    """The flag that `value` stands for: True, False, or 1 or 0 of any type, where `torch.nn` takes these too.

    Raises:
        TypeError: it stands for none.
    """
    if getattr(value, "ndim", 0) or value not in (0, 1):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return bool(value)


def as_count(name: str, value: Any, least: int = 1) -> int:
    """`value`, an integer of any type (NumPy's, a tensor without axes), as an int of at least `least`.

    True and False are refused, though `torch.nn` takes them: the third argument of haste's layers is `batch_first`.

    Raises:
        TypeError: it is not an integer.
        ValueError: it is below `least`.
    """
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    count = operator.index(value)
    if count < least:
        raise ValueError(f"{name} must be at least {least}, got {count}")
    return count


def as_rate(name: str, value: Any) -> float:
    """`value`, a number in [0, 1] of any type, as a float.

    Raises:
        ValueError: it is none; True and False are none either.
    """
    if not is_rate(value):
        raise ValueError(f"{name} must be a probability in [0, 1], got {value!r}")
    return float(value)


def check_dtype(dtype: torch.dtype | None) -> None:
    """Raise unless `dtype` is None, for torch's default, or a floating-point type.

    Raises:
        TypeError: it is no dtype.
        ValueError: it is not of floating-point numbers.
    """
    if dtype is None:
        return
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype must be a torch.dtype, such as torch.float32, or None, got {dtype!r}")
    if not dtype.is_floating_point or dtype.itemsize < 2:
        raise ValueError(f"dtype must be of floating-point numbers of 16, 32 or 64 bits, got {dtype}")


def check_proj_size(cell: CellSpec, proj_size: int, hidden_size: int) -> None:
    """Raise unless `proj_size` lies below `hidden_size`, and is 0 for a cell without a projection.

    Raises:
        ValueError: it is out of range.
    """
    if proj_size and proj_size >= hidden_size:
        raise ValueError(f"proj_size must lie in [0, hidden_size) = [0, {hidden_size}), got {proj_size}")
    if proj_size and not cell.projects:
        raise ValueError(f"proj_size must be 0: the {cell.name} cell has no projection, got {proj_size}")


def check_zoneout_cell(cell: CellSpec, zoneout_cell: float) -> None:
    """Raise unless `zoneout_cell` is 0 for a cell without c.

    Raises:
        ValueError: it is not.
    """
    if zoneout_cell and "c" not in cell.states:
        raise ValueError(f"zoneout_cell must be 0: the {cell.name} cell has no c, got {zoneout_cell}")


def is_rate(rate: Any) -> bool:
    """Whether `rate` is a number in [0, 1]; True and False are none."""
    return isinstance(rate, numbers.Real) and not isinstance(rate, bool) and 0 <= float(rate) <= 1


def check_forget_bias(cell: CellSpec, forget_bias: float | None) -> None:
    """Raise unless `forget_bias` is None or a finite number, and 0 for a cell without a forget gate.

    Raises:
        ValueError: it is not.
    """
    if forget_bias is None:
        return
    if isinstance(forget_bias, bool) or not isinstance(forget_bias, numbers.Real) or not math.isfinite(forget_bias):
        raise ValueError(f"forget_bias must be a finite number, got {forget_bias!r}")
    if forget_bias and "f" not in cell.gates:
        raise ValueError(f"forget_bias must be 0: the {cell.name} cell has no forget gate, got {forget_bias}")


def check_parameters(cell: str, norm: NormPlan, per_direction: Sequence[Parameters]) -> tuple[LayerSpec, int, int]:
    """The layer that the parameters make, its H and its P.

    Raises:
        TypeError: the norm is no plan, or a parameter no tensor.
        ValueError: the cell is unknown, the norm does not fit it, or names, shapes, dtypes or devices are not those of
            such a layer.
    """
    if cell not in CELLS:
        raise ValueError(f"cell must be one of {', '.join(map(repr, CELLS))}, got {cell!r}")
    if len(per_direction) not in (1, 2):
        raise ValueError(f"parameters must be those of 1 or 2 directions, got {len(per_direction)}")
    first = per_direction[0]
    for name in ("weight_ih", "weight_hh"):
        if name not in first:
            raise ValueError(f"parameters must hold {name}, got {', '.join(first) or 'none'}")
    for name, tensor in ((name, tensor) for held in per_direction for name, tensor in held.items()):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(tensor).__name__}")
        if name in ("weight_ih", "weight_hr") and tensor.dim() != 2:
            raise ValueError(f"{name} must be a matrix, got {list(tensor.shape)}")
        check_like(name, tensor, first["weight_ih"], "weight_ih")
    bias = any(name.startswith("bias") for name in first)
    spec = LayerSpec(CELLS[cell], norm, bias, "weight_hr" in first, len(per_direction))
    H = first["weight_ih"].shape[0] // len(spec.cell.gates)
    P = first["weight_hr"].shape[0] if spec.projected else H
    want = spec.parameter_shapes(first["weight_ih"].shape[1], H, P)
    for d, held in enumerate(per_direction):
        got = {name: tuple(tensor.shape) for name, tensor in held.items()}
        if got != want:
            raise ValueError(f"the parameters of direction {d} must be {want}, got {got}")
    return spec, H, P


def check_row_axes(input: Tensor) -> None:
    """Raise unless the input of a cell has the axes of one.

    Raises:
        MismatchError: it has not.
    """
    if input.is_nested:
        raise MismatchError("input must be 2-D, [B, I], or 1-D, [I], got a NestedTensor; a layer takes one")
    if input.dim() not in (1, 2):
        raise MismatchError(f"input must be 2-D, [B, I], or 1-D, [I], got {input.dim()}-D {list(input.shape)}")


def check_input(steps: Tensor, input_size: int, weight: Tensor) -> None:
    """Raise unless packed steps fit the weight that they meet: size, dtype (autocast aside), device.

    Raises:
        MismatchError: they do not.
    """
    if steps.shape[-1] != input_size:
        raise MismatchError(f"the last axis of input must be input_size = {input_size}, got {steps.shape[-1]}")
    if steps.dtype != weight.dtype or steps.device != weight.device:
        check_like("input", steps, weight, "the parameters")


def check_like(name: str, tensor: Tensor, like: Tensor, whose: str) -> None:
    """Raise unless a tensor has the dtype (autocast aside) and the device of another one.

    Raises:
        MismatchError: it does not.
    """
    if tensor.dtype != like.dtype and {tensor.dtype, like.dtype} != {torch.float32, float32_becomes(like.device.type)}:
        raise MismatchError(f"{name} must be {like.dtype} as {whose}, got {tensor.dtype}; call .to({like.dtype})")
    if tensor.device != like.device:
        raise MismatchError(f"{name} must be on {like.device} as {whose}, got {tensor.device}; move one of them")


def check_lengths(lengths: Lengths, B: int) -> Tensor:
    """`lengths` as an int64 tensor on the CPU; `festina.sequences.sort_rows` checks the numbers.

    Raises:
        TypeError: not integers.
        MismatchError: not `[B]`, or not on the CPU.
    """
    if not isinstance(lengths, Tensor):
        try:
            lengths = torch.tensor(lengths, dtype=None if len(lengths) else torch.int64, device="cpu")
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(
                f"lengths must be a tensor or a list of integers, one for each row, got {lengths!r}"
            ) from None
    if lengths.dtype.is_floating_point or lengths.dtype.is_complex or lengths.dtype == torch.bool:
        raise TypeError(f"lengths must hold integers, the steps of each row, got {lengths.dtype}")
    if lengths.device.type != "cpu":
        raise MismatchError(
            f"lengths must be on the CPU, where the batch is laid out, got {lengths.device}; call lengths.cpu()"
        )
    if lengths.shape != (B,):
        raise MismatchError(f"lengths must be [B] = [{B}], one for each row, got {list(lengths.shape)}")
    return lengths.long()


def check_nested(name: str, tensor: Tensor, axes: str) -> tuple[Tensor, Tensor]:
    """The start `[B]` and the length `[B]` of each row among the values of a NestedTensor, int64 on the CPU.

    torch.nested checks no offsets. A compiled graph checks them when it runs.

    Raises:
        TypeError: the offsets or lengths are not integers.
        MismatchError: another layout or other axes than `axes`, or rows that do not lie one after the other in the values.
        RuntimeError: the last, in a compiled graph.
    """
    if tensor.layout != torch.jagged:
        raise MismatchError(
            f"a nested {name} must have the layout torch.jagged, got {tensor.layout}; "
            f"torch.nested.nested_tensor({name}.unbind(), layout=torch.jagged) has it"
        )
    if tensor.dim() != axes.count(",") + 1 or tensor.values().dim() != tensor.dim() - 1:
        raise MismatchError(f"a nested {name} must be {axes}, got {tensor.shape}")
    offsets, lengths = tensor.offsets(), tensor.lengths()  # type: ignore[attr-defined]
    for rows in (offsets, lengths):
        if rows is not None and rows.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"the offsets and lengths of a nested {name} must be int64, got {rows.dtype}")
    starts = offsets[:-1].cpu().long()
    lengths = (offsets.diff() if lengths is None else lengths).cpu().long()
    if starts.dim() != 1 or lengths.dim() != 1:
        raise MismatchError(f"the offsets and lengths of a nested {name} must have one axis, got {list(offsets.shape)}")
    values = tensor.values().shape[0]
    bounds = torch.stack([starts, starts + lengths], 1).flatten()
    fits = (bounds >= 0).all() & (bounds <= values).all() & (bounds.diff() >= 0).all()
    wanted = f"the rows of a nested {name} must lie one after the other in its values"
    if torch.compiler.is_compiling():
        torch._assert_async(fits, wanted)
        return starts, lengths
    if axes.endswith("I]") and not isinstance(tensor.shape[-1], int):
        raise MismatchError(f"a nested {name} must be {axes}, ragged in its second axis, got {tensor.shape}")
    if not fits:
        got = f"offsets {offsets.tolist()} and lengths {lengths.tolist()}"
        raise MismatchError(f"{wanted}, of which there are {values}, got {got}")
    return starts, lengths


def check_resets(resets: Tensor, shape: tuple[int, ...], axes: str, device: torch.device) -> None:
    """Raise unless `resets` is a bool tensor of `shape` on `device`; `axes` names the shape.

    Raises:
        TypeError: not a bool tensor.
        MismatchError: another shape or device.
    """
    if not isinstance(resets, Tensor) or resets.dtype != torch.bool:
        got = resets.dtype if isinstance(resets, Tensor) else type(resets).__name__
        raise TypeError(f"resets must be a bool tensor, got {got}; torch.as_tensor(resets).bool() is one")
    if resets.shape != shape:
        raise MismatchError(f"resets must be {axes} = {list(shape)}, got {list(resets.shape)}")
    if resets.device != device:
        raise MismatchError(f"resets must be on the input's device, {device}, got {resets.device}; move one of them")


def check_mask(name: str, mask: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    """Raise unless a Zoneout mask is a bool tensor of `shape` on `device`.

    Raises:
        TypeError: not a bool tensor.
        MismatchError: another shape or device.
    """
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{name} must be a bool tensor, got {got}")
    if mask.shape != shape or mask.device != device:
        raise MismatchError(
            f"{name} must be {list(shape)} on {device} as the input, got {list(mask.shape)} on {mask.device}"
        )


def check_state(
    cell: CellSpec,
    hx: Tensor | tuple[Tensor, Tensor],
    axes: Mapping[str, int],
    widths: tuple[int, int],
    steps: Tensor,
) -> list[Tensor]:
    """The states in `hx`, h_0 and for a cell with a c c_0: each has the sizes `axes`, then its width of `widths`, (P, H).

    Raises:
        TypeError: a bare tensor for a cell with two states, a pair for a cell with one, or neither.
        MismatchError: a state of a wrong shape, or not of the dtype and device of `steps`.
    """
    given = hx if isinstance(hx, (tuple, list)) else (hx,)
    if isinstance(hx, (tuple, list)) != (len(cell.states) > 1) or len(given) != len(cell.states):
        want = "a tuple (h_0, c_0)" if len(cell.states) > 1 else "one tensor h_0"
        got = f"a {type(hx).__name__}" + (f" of {len(given)}" if isinstance(hx, (tuple, list)) else "")
        raise TypeError(f"hx of the {cell.name} cell must be {want}, got {got}")
    lead = tuple(axes.values())
    for state, tensor, width in zip(cell.states, given, widths):
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"{state}_0 must be a Tensor, got {type(tensor).__name__}; torch.zeros is the state of a start"
            )
        want_shape = (*lead, width)
        if tensor.shape != want_shape:
            named = ", ".join((*axes, "P" if state == "h" else "H"))
            hint = f"; call {state}_0.unsqueeze(0) for the first axis" if (1, *tensor.shape) == want_shape else ""
            raise MismatchError(f"{state}_0 must be [{named}] = {list(want_shape)}, got {list(tensor.shape)}{hint}")
        if tensor.dtype != steps.dtype or tensor.device != steps.device:
            check_like(f"{state}_0", tensor, steps, "the input")
    return list(given)


@lru_cache(maxsize=1024)
def _parameter_shapes(layer: LayerSpec, I: int, H: int, P: int) -> tuple[tuple[int, ...], ...]:
    return tuple(layer.parameter_shapes(I, H, P).values()) * layer.directions


def check_tensors(call: Call, tensors: Sequence[Tensor]) -> None:
    """Raise unless all `call.tensors()` are tensors of one dtype on one device; no value and no size is read.

    A watched call is checked so far at once, and by `check_call` when its operator runs.

    Raises:
        TypeError: one is not a tensor, as a parameter that was set to None.
        MismatchError: one has another dtype or device than the input.
    """
    names = ("input", *(f"{state}_0" for state in call.layer.cell.states), *call.layer.parameter_names * 2)
    dtype, device = call.input.dtype, call.input.device
    for name, tensor in zip(names, tensors):
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"{name} must be a Tensor, got {type(tensor).__name__}; bias=False makes a layer without biases"
            )
        if tensor.dtype != dtype or tensor.device != device:
            raise MismatchError(
                f"{name} must be {dtype} on {device} as the input, got {tensor.dtype} on {tensor.device}; "
                f"call .to('{device}', {dtype}) on the whole layer"
            )


def check_call(call: Call, tensors: Sequence[Tensor]) -> None:
    """Raise unless the sizes, dtypes and devices of a call agree: the door that every `Call` passes on its way to a backend.

    Args:
        call: the call.
        tensors: `call.tensors()`, which every caller has at hand.

    Raises:
        TypeError: `resets` or a mask is not a bool tensor.
        MismatchError: anything else that does not fit; the error names it.
    """
    input, h_0, c_0 = call.input, call.h_0, call.c_0
    dtype, device = input.dtype, input.device
    for tensor in tensors:
        if tensor.dtype != dtype or tensor.device != device:
            check_tensors(call, tensors)  # which names it
    if input.dim() != 2 or h_0.dim() != 3 or (c_0 is None) != (len(call.layer.cell.states) == 1):
        _refuse_state(call)
    (N, I), (D, B, P) = input.shape, h_0.shape
    H = P
    if c_0 is not None:
        if c_0.dim() != 3 or c_0.shape[:2] != (D, B):
            _refuse_state(call)
        H = c_0.shape[2]
    if (*map(_SHAPE, call.parameters),) != _parameter_shapes(call.layer, I, H, P):
        _refuse_shape(call, I, H, P)
    if call.layer.directions != D:
        _refuse_state(call)
    if call.batch_sizes is not None:
        _check_batch_sizes(call.batch_sizes, N, B)
    elif N % B if B else N:
        raise MismatchError(f"input must hold whole steps of B = {B} rows, since batch_sizes is None, got {N} rows")
    if call.is_active is not None:
        raise MismatchError("is_active must be None outside of an ONNX export; batch_sizes says which rows run")
    if call.resets is not None:
        check_resets(call.resets, (D, N), "[D, N]", device)
    if call.zoneout_mask is not None:
        check_mask("zoneout_mask", call.zoneout_mask, (D, N, P), device)
    if call.zoneout_cell_mask is not None:
        if c_0 is None:
            raise MismatchError(f"zoneout_cell_mask must be None: the {call.layer.cell.name} cell has no c")
        check_mask("zoneout_cell_mask", call.zoneout_cell_mask, (D, N, H), device)


def _check_batch_sizes(batch_sizes: Tensor, N: int, B: int) -> None:
    if batch_sizes.dtype != torch.int64 or batch_sizes.device.type != "cpu" or batch_sizes.dim() != 1:
        raise MismatchError(
            f"batch_sizes must be int64 [T] on the CPU, got {batch_sizes.dtype} {list(batch_sizes.shape)} on "
            f"{batch_sizes.device}; torch.nn.utils.rnn.pack_padded_sequence makes it"
        )
    sizes = batch_sizes.tolist()
    if sizes and not (sizes[0] <= B and sizes[-1] >= 1 and all(map(ge, sizes, sizes[1:]))):
        raise MismatchError(
            f"batch_sizes must not increase, from at most B = {B} down to at least 1, got {_short(sizes)}"
        )
    if sum(sizes) != N:
        raise MismatchError(
            f"batch_sizes must add up to the {N} rows of input, got {_short(sizes)}, which make {sum(sizes)}"
        )


def _short(sizes: list[int]) -> str:
    return str(sizes) if len(sizes) <= 12 else f"[{', '.join(map(str, sizes[:9]))}, ..., {sizes[-1]}]"


def _refuse_state(call: Call) -> None:
    states = call.layer.cell.states
    if len(call.state) != len(states):
        raise MismatchError(
            f"the {call.layer.cell.name} cell must have the states {', '.join(states)}, got {len(call.state)}"
        )
    got = ", ".join(f"{state}_0 {list(tensor.shape)}" for state, tensor in zip(states, call.state))
    raise MismatchError(
        f"input must be [N, I], h_0 [D, B, P] and c_0 [D, B, H], with D = {call.layer.directions} directions, got input "
        f"{list(call.input.shape)}, {got}"
    )


def _refuse_shape(call: Call, I: int, H: int, P: int) -> None:
    names, shapes = call.layer.parameter_names * call.layer.directions, _parameter_shapes(call.layer, I, H, P)
    if len(call.parameters) != len(names):
        raise MismatchError(f"parameters must be the {len(names)} of {', '.join(names)}, got {len(call.parameters)}")
    for name, parameter, shape in zip(names, call.parameters, shapes):
        if parameter.shape != shape:
            raise MismatchError(
                f"{name} must be {list(shape)} for input_size = {I} and hidden_size = {H}, got {list(parameter.shape)}"
            )
