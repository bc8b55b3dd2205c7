"""ONNX: `export` writes a model whose recurrence is one ONNX operator, with T and B left open.

A plain LSTM or GRU becomes the ONNX operator of that name, everything else a Scan (`festina.backends.export`).

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
from torch.export import Dim
from torch.utils._pytree import tree_map

from festina.cells import Cell
from festina.layers import Recurrent
from festina.output import replacing

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
        OSError: the file cannot be written; one that was there is as before.

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
        with replacing(path) as unfinished:
            program.save(unfinished)
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
