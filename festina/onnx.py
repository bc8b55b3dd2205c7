"""ONNX: `export` writes a model whose recurrence is one ONNX operator, with T and B left open.

A plain LSTM or GRU becomes the ONNX operator of that name. Everything else becomes a Scan, whose body is traced from
`festina.reference.advance`: every cell and every plan, without the equations being told again. Scan and the native
operators walk over padded steps, so inside an export `festina.packing` lays a batch out as it stands and says by a mask
which rows run at which step.

`torch.onnx.export(model, ..., dynamo=True)` does the same to a model that holds such layers; `export` adds the defaults.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from torch._higher_order_ops.scan import scan
from torch.export import Dim
from torch.utils._pytree import tree_map

from festina import reference
from festina.call import Call, Outputs
from festina.cells import Cell
from festina.layers import Recurrent
from festina.reference import State

# The operator and the order of its gates, in our letters: ONNX writes iofc and zrh.
_NATIVE = {"lstm": ("LSTM", "iofg"), "gru": ("GRU", "zrn")}

_NEEDS = ("onnx", "onnxscript")


def export(
    module: nn.Module,
    args: Tensor | Sequence[Any],
    path: str | PathLike[str] | None = None,
    *,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    **options: Any,
) -> torch.onnx.ONNXProgram:
    """Write `module` as an ONNX model, as it computes in eval mode.

    Args:
        module: a layer, a cell, or any module that holds some.
        args: example inputs, in order; T and B at least 2, since 1 would be taken for a constant.
        path: the file to write; None: only return the model.
        kwargs: example inputs by name, such as `{"lengths": torch.tensor([5, 3])}`. `lengths` must be a tensor here, and
            each must lie in [0, T]: an ONNX model cannot check them.
        dynamic_shapes: what `torch.export.export` takes; None: for a layer or cell T and B are open, for another module
            every axis is that PyTorch does not find to be fixed.
        options: handed on to `torch.onnx.export`: `input_names`, `output_names`, `opset_version`, ...

    Returns:
        The `torch.onnx.ONNXProgram`; calling it runs onnxruntime.

    Raises:
        ImportError: the packages of the extra `onnx` are not installed.
        ValueError: an axis that is to stay open is 1 in the example.

    Example::

        layer = festina.LayerNormLSTM(80, 256, batch_first=True)
        festina.onnx.export(layer, torch.randn(2, 9, 80), "layer.onnx", kwargs={"lengths": torch.tensor([9, 5])})
    """
    absent = [package for package in _NEEDS if find_spec(package) is None]
    if absent:
        raise ImportError(
            f"festina.onnx.export needs {' and '.join(absent)}, not installed here; pip install 'festina[onnx]' brings it"
        )
    args = (args,) if isinstance(args, Tensor) else tuple(args)
    kwargs = dict(kwargs or {})
    if dynamic_shapes is None:
        dynamic_shapes = _open_axes(module, args, kwargs)
    modes = {part: part.training for part in module.modules()}
    try:
        with torch.no_grad():
            program = torch.onnx.export(
                module.eval(), args, kwargs=kwargs, dynamic_shapes=dynamic_shapes, dynamo=True, verbose=False, **options
            )
    finally:
        for part, training in modes.items():
            part.training = training
    assert program is not None  # with dynamo=True it never is
    if path is not None:
        program.save(path)
    return program


def _open_axes(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The axes of each example that may change: T and B of a layer, B of a cell; of another module, any."""
    examples = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    axes = _axes(module, examples)
    named = {name: Dim(name) for name in "TB"}

    def opened(tensor: Any, names: Sequence[str] | None) -> dict[int, Any] | None:
        if not isinstance(tensor, Tensor):
            return None
        if names is None:
            return dict.fromkeys(range(tensor.dim()), Dim.AUTO)
        for axis, name in enumerate(names):
            if name in named and tensor.shape[axis] == 1:
                raise ValueError(
                    f"{name} must be at least 2 in the example, since 1 would be taken for a constant; "
                    f"got {list(tensor.shape)}. The model then runs at any {name}"
                )
        return {axis: named[name] for axis, name in enumerate(names) if name in named}

    return {
        name: tree_map(partial(opened, names=axes.get(name) if axes else None), example)
        for name, example in examples.items()
    }


def _axes(module: nn.Module, examples: Mapping[str, Any]) -> dict[str, str]:
    """What the axes of each argument are, a letter an axis; empty for a module that is no layer and no cell."""
    if isinstance(module, Cell):
        rows = "B" if examples["input"].dim() == 2 else ""
        return {"input": rows + "I", "hx": rows + "H", "resets": rows}
    if isinstance(module, Recurrent):
        rows = "B" if examples["input"].dim() == 3 else ""
        steps = rows + "T" if module.batch_first else "T" + rows
        return {"input": steps + "I", "hx": "L" + rows + "H", "lengths": "B", "resets": steps}
    return {}


def recurrence(call: Call) -> Outputs:
    """`festina.functional.recurrence` inside an export: T · B padded steps, `call.batch_sizes` None or which rows run.

    Args:
        call: `batch_sizes` is None, or `[T, B]` bool, the mask that `festina.packing` makes in an export.
    """
    layer, rates = call.layer, (call.zoneout, call.zoneout_cell)
    is_plain = layer.plan.is_none and not layer.projected and call.resets is None
    # float32 is the one type in which every runtime has the native operators.
    if layer.cell.name in _NATIVE and is_plain and not any(rates) and call.input.dtype == torch.float32:
        return _native(call)
    outputs, states = zip(*(_scan(call, d) for d in range(layer.directions)))
    h_n, *c_n = (torch.stack(values) for values in zip(*states))
    return Outputs(torch.cat(outputs, 1), h_n, c_n[0].to(call.input.dtype) if c_n else None)


def _native(call: Call) -> Outputs:
    """One ONNX LSTM or GRU, both directions."""
    layer, (D, B, H) = call.layer, call.h_0.shape
    op, gates = _NATIVE[layer.cell.name]
    sides = [call.of_direction(d) for d in range(D)]

    def in_order(name: str) -> Tensor:
        return torch.stack([torch.cat([p[name][layer.cell.rows(gate, H)] for gate in gates]) for p in sides])

    x = call.input.view(-1, B, call.input.shape[1])
    lengths = None if call.batch_sizes is None else call.batch_sizes.sum(0, dtype=torch.int32)
    bias = torch.cat([in_order("bias_ih"), in_order("bias_hh")], 1) if layer.bias else None
    y, *state_n = torch.onnx.ops.symbolic_multi_out(
        op,
        (x, in_order("weight_ih"), in_order("weight_hh"), bias, lengths, *call.state),
        {
            "hidden_size": H,
            "direction": "bidirectional" if D == 2 else "forward",
            **({"linear_before_reset": 1} if op == "GRU" else {}),
        },
        dtypes=[call.input.dtype] * (1 + len(call.state)),
        shapes=[(x.shape[0], D, B, H), *(state.shape for state in call.state)],
    )
    output = y.transpose(1, 2).reshape(-1, D * H)
    return Outputs(output, state_n[0], state_n[1] if len(state_n) > 1 else None)


def _scan(call: Call, d: int) -> tuple[Tensor, State]:
    """Direction `d` of a call as a scan over its steps: output [T·B, P] and the last state."""
    layer, p, rates = call.layer, call.of_direction(d), (call.zoneout, call.zoneout_cell)
    B = call.h_0.shape[1]
    x = reference.project(layer, call.input, p)
    given = {
        "x": x.view(-1, B, *x.shape[1:]),
        "runs": call.batch_sizes,
        "resets": None if call.resets is None else call.resets[d].view(-1, B),
    }

    def step(state: State, here: dict[str, Tensor]) -> tuple[State, Tensor]:
        new = reference.advance(layer, here["x"], state, p, here.get("resets"), (None, None), rates)
        if "runs" not in here:
            return new, new[0].clone()
        runs = here["runs"].unsqueeze(1)
        new = tuple(torch.where(runs, now, was) for now, was in zip(new, state))
        return new, torch.where(runs, new[0], torch.zeros_like(new[0]))

    initial = (call.h_0[d].clone(), *(reference.wide(c[d].clone()) for c in call.state[1:]))
    state, output = scan(step, initial, {name: t for name, t in given.items() if t is not None}, reverse=d == 1)
    return output.view(-1, output.shape[2]), state
