"""Stateless entry points: check, choose a backend, call the operator.

`layer` is for users who hold parameters and masks themselves; `recurrence` is the door that it, the modules and
everything else go through.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from festina import ops, reference
from festina.call import Call, Outputs, float32_becomes
from festina.norms import NONE, NormPlan
from festina.packing import Lengths, pack
from festina.spec import CELLS, CellSpec, LayerSpec

Parameters = Mapping[str, Tensor]
"""The parameters of one direction by name: `weight_ih`, `weight_hh`, ... as `LayerSpec.parameter_shapes` lists them."""


def recurrence(call: Call) -> Outputs:
    """Carry out a `Call` on the backend in force for it: output `[N, D·P]`, h_n `[D, B, P]`, c_n `[D, B, H]` or None.

    Under autocast, float32 tensors are cast to its type first. Inside a `torch.func` transform the reference runs,
    whatever the backend: every transform goes through it.

    Raises:
        festina.backends.BackendError: a backend was forced that cannot run this call.
    """
    low = float32_becomes(call.input.device.type)
    if low != torch.float32:
        call = call.with_tensors([t.to(low) if t.dtype == torch.float32 else t for t in call.tensors()])
    if torch._C._are_functorch_transforms_active():
        return reference.run(call)
    if torch.compiler.is_compiling() and torch.onnx.is_in_onnx_export():
        from festina import onnx  # which needs the layers, and they this module

        return onnx.recurrence(call)
    return ops.run(call)


def layer(
    cell: str,
    input: Tensor | PackedSequence,
    parameters: Parameters | Sequence[Parameters],
    hx: Tensor | tuple[Tensor, Tensor] | None = None,
    *,
    norm: NormPlan = NONE,
    batch_first: bool = False,
    lengths: Lengths | None = None,
    resets: Tensor | None = None,
    zoneout: float = 0.0,
    zoneout_cell: float = 0.0,
    zoneout_mask: Tensor | None = None,
    zoneout_cell_mask: Tensor | None = None,
) -> tuple[Tensor | PackedSequence, Tensor | tuple[Tensor, Tensor]]:
    """One recurrent layer over time. The equations are the steps of `festina.reference`.

    Args:
        cell: a name of `festina.spec.CELLS`: `lstm`, `gru`, `indrnn`, `indrnn_relu`.
        input: `[T, B, I]`, `[B, T, I]` under batch_first, `[T, I]` for one row, or a `PackedSequence`.
        parameters: one direction's by name, or a sequence of two for a bidirectional layer. Which biases and whether
            `weight_hr` (a projection) are there says what the layer has.
        hx: h_0 `[D, B, P]`, for the LSTM (h_0, c_0 `[D, B, H]`); zeros if None. Without B for one row.
        norm: where the norms sit.
        lengths, resets: as in `festina.LSTM`.
        zoneout, zoneout_cell: rates of the expectation, in [0, 1]; they count where there is no mask.
        zoneout_mask, zoneout_cell_mask: bool, True keeps the old h (c): `[D, T, B, P]`, `[D, T, B, H]`, with B and T
            exchanged under batch_first.

    Returns:
        output in the form of the input, `[T, B, D·P]`; and h_n, for the LSTM (h_n, c_n), shaped as `hx`.

    Raises:
        TypeError, ValueError: an argument is of a wrong type, shape, dtype, device or range.

    >>> parameters = {"weight_ih": torch.ones(3, 2), "weight_hh": torch.ones(3)}
    >>> output, h_n = layer("indrnn", torch.zeros(5, 1, 2), parameters)
    >>> output.shape, h_n.shape
    (torch.Size([5, 1, 3]), torch.Size([1, 1, 3]))
    """
    per_direction = [parameters] if isinstance(parameters, Mapping) else list(parameters)
    spec, H, P = check_parameters(cell, norm, per_direction)
    steps, packing = pack(input, spec.directions, batch_first, lengths, resets)
    weight_ih = per_direction[0]["weight_ih"]
    check_input(steps, weight_ih.shape[1], weight_ih)
    check_rates(spec.cell, zoneout=zoneout, zoneout_cell=zoneout_cell)
    if zoneout_cell_mask is not None and "c" not in spec.cell.states:
        raise ValueError(f"zoneout_cell_mask must be None: the {cell} cell has no c")
    axes = packing.state_axes({"num_directions": spec.directions})
    state = initial_state(spec.cell, hx, axes, (spec.directions, packing.B), (P, H), steps)

    def packed(mask: Tensor | None, name: str, width: int) -> Tensor | None:
        if mask is None:
            return None
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"{name} must be a bool tensor, got {got}")
        axes = (packing.B, packing.T) if batch_first else (packing.T, packing.B)
        want = (spec.directions, *axes, width)
        if mask.shape != want or mask.device != steps.device:
            raise ValueError(
                f"{name} must be {list(want)} on {steps.device} as the input, got {list(mask.shape)} on {mask.device}"
            )
        return torch.stack([packing.pack(direction) for direction in mask])

    output, h_n, c_n = recurrence(
        Call(
            layer=spec,
            input=steps,
            h_0=packing.pack_state(state[0]),
            c_0=packing.pack_state(state[1]) if len(state) > 1 else None,
            parameters=tuple(p[name] for p in per_direction for name in spec.parameter_names),
            batch_sizes=packing.batch_sizes,
            resets=packing.resets,
            zoneout_mask=packed(zoneout_mask, "zoneout_mask", P),
            zoneout_cell_mask=packed(zoneout_cell_mask, "zoneout_cell_mask", H),
            zoneout=zoneout,
            zoneout_cell=zoneout_cell,
        )
    )
    h_n = packing.unpack_state(h_n)
    return packing.unpack(output), h_n if c_n is None else (h_n, packing.unpack_state(c_n))


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
        _check_like(name, tensor, first["weight_ih"], "weight_ih")
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


def check_flags(**flags: bool) -> None:
    """Raise unless every flag is a bool, as in `torch.nn`: an argument in a wrong place shows.

    Raises:
        TypeError: it is not.
    """
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise TypeError(f"{name} must be True or False, got {flag!r}")


def check_rates(cell: CellSpec, **rates: float) -> None:
    """Raise unless every rate is a number in [0, 1], and `zoneout_cell` is 0 where the cell has no c.

    Raises:
        ValueError: it is not.
    """
    for name, rate in rates.items():
        if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 <= rate <= 1:
            raise ValueError(f"{name} must be a probability in [0, 1], got {rate!r}")
    if rates.get("zoneout_cell") and "c" not in cell.states:
        raise ValueError(f"zoneout_cell must be 0: the {cell.name} cell has no c, got {rates['zoneout_cell']}")


def check_input(steps: Tensor, input_size: int, weight: Tensor) -> None:
    """Raise unless packed steps fit the weight they meet: size, dtype (autocast aside), device.

    Raises:
        ValueError: they do not.
    """
    if steps.shape[-1] != input_size:
        raise ValueError(f"the last axis of input must be input_size = {input_size}, got {steps.shape[-1]}")
    _check_like("input", steps, weight, "the parameters")


def _check_like(name: str, tensor: Tensor, like: Tensor, whose: str) -> None:
    if tensor.dtype != like.dtype and {tensor.dtype, like.dtype} != {torch.float32, float32_becomes(like.device.type)}:
        raise ValueError(f"{name} must be {like.dtype} as {whose}, got {tensor.dtype}; call .to({like.dtype})")
    if tensor.device != like.device:
        raise ValueError(f"{name} must be on {like.device} as {whose}, got {tensor.device}; move one of them")


def initial_state(
    cell: CellSpec,
    hx: Tensor | tuple[Tensor, Tensor] | None,
    axes: Mapping[str, int],
    shape: tuple[int, int],
    widths: tuple[int, int],
    steps: Tensor,
) -> list[Tensor]:
    """The initial states `[L·D, B, P]` and, for a cell with c, `[L·D, B, H]`: `hx` checked, or zeros.

    Args:
        cell: the cell.
        hx: what the user gave.
        axes: the axes, by name, that a state has before its width in the user's layout.
        shape: (L·D, B).
        widths: (P, H), the widths of h and c.
        steps: the packed input, whose dtype and device the states must have.

    Raises:
        TypeError: a bare tensor where the cell wants a pair, a pair where it wants a tensor, or neither.
        ValueError: a state of a wrong shape, dtype or device.
    """
    sizes = dict(zip(("h", "c"), widths))
    if hx is None:
        return [steps.new_zeros(*shape, sizes[state]) for state in cell.states]
    given = hx if isinstance(hx, (tuple, list)) else (hx,)
    if isinstance(hx, (tuple, list)) != (len(cell.states) > 1) or len(given) != len(cell.states):
        want = "a tuple (h_0, c_0)" if len(cell.states) > 1 else "one tensor h_0"
        got = f"a {type(hx).__name__}" + (f" of {len(given)}" if isinstance(hx, (tuple, list)) else "")
        raise TypeError(f"hx of the {cell.name} cell must be {want}, got {got}")
    states = []
    for state, tensor in zip(cell.states, given, strict=True):
        name = f"{state}_0"
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"{name} must be a Tensor, got {type(tensor).__name__}; torch.zeros is the state of a start"
            )
        want_shape = (*axes.values(), sizes[state])
        if tensor.shape != want_shape:
            named = ", ".join((*axes, "P" if state == "h" else "H"))
            hint = f"; call {name}.unsqueeze(0) for the first axis" if (1, *tensor.shape) == want_shape else ""
            raise ValueError(f"{name} must be [{named}] = {list(want_shape)}, got {list(tensor.shape)}{hint}")
        _check_like(name, tensor, steps, "the input")
        states.append(tensor.reshape(*shape, sizes[state]))
    return states
