"""FLOPs of the operators, for `torch.utils.flop_counter.FlopCounterMode`: those of their matrix products.

Counted as PyTorch counts: two for each multiplication and addition of a matrix product, nothing for what is done element by
element: norms, gates, Zoneout, the diagonal recurrence of an IndRNN. A layer counts what `torch.nn`'s does where that is
made of matrix products; where it is one operator, of cuDNN or oneDNN, PyTorch counts nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from festina.spec import LayerSpec

_COUNTER = "torch.utils.flop_counter"


def register() -> None:
    """Give the formulas to PyTorch's table and to the counters that run now, which were made from that table as it was.

    Nothing happens unless the program has imported PyTorch's counter: with it comes Triton, which would make `import festina`
    slow. So this is called when an operator is watched, not on import.
    """
    if torch.compiler.is_compiling() or _COUNTER not in sys.modules:
        return
    counter = sys.modules[_COUNTER]
    formulas: dict[Any, Callable[..., int]] = {
        torch.ops.festina.recurrence: _forward,
        torch.ops.festina.recurrence_train: _forward,
        torch.ops.festina.recurrence_backward: _backward,
    }
    for operator, formula in formulas.items():
        if operator not in counter.flop_registry:
            counter.register_flop_formula(operator, get_raw=True)(formula)
    for mode in _get_current_dispatch_mode_stack():
        if isinstance(mode, counter._FlopCounterMode):
            mode.counter.flop_registry = {**formulas, **mode.counter.flop_registry}


def _operands(*args: Any) -> tuple[LayerSpec, Tensor, Sequence[Tensor], Sequence[Tensor], int]:
    """What the count depends on, of an operator's arguments (`ops.parse` names them): layer, input, state, parameters, and
    the rows of a first step."""
    _backend, layer, batch_sizes, *_, input, state, parameters = args
    first = state[0].shape[1] if batch_sizes is None else int(batch_sizes[:1].sum())
    return LayerSpec.parse(layer), input, state, parameters, min(first, input.shape[0])


def _products(spec: LayerSpec, parameters: Sequence[Tensor], d: int) -> dict[str, int]:
    """The weights of direction `d` that are matrices, by name, and the FLOPs of one step of one row by each."""
    names = spec.parameter_names
    of_direction = zip(names, parameters[d * len(names) : (d + 1) * len(names)])
    return {
        name: 2 * weight.numel() for name, weight in of_direction if name.startswith("weight") and weight.dim() == 2
    }


def _forward(*args: Any, out_val: Any = None) -> int:
    spec, input, _, parameters, _ = _operands(*args)
    return sum(input.shape[0] * sum(_products(spec, parameters, d).values()) for d in range(spec.directions))


def _backward(*args: Any, out_val: Any = None) -> int:
    """A product is differentiated by two: for the weight, if its gradient is wanted, and for what it was multiplied with."""
    *call, _output, _saved, _d_output, _d_h_n, _d_c_n, wanted = args
    spec, input, state, parameters, first = _operands(*call)
    N, names = input.shape[0], spec.parameter_names
    wants_input, wants_h_0 = wanted[0], wanted[1]
    wants_weights = wanted[1 + len(state) :]
    total = 0
    for d in range(spec.directions):
        for name, flops in _products(spec, parameters, d).items():
            total += N * flops * wants_weights[d * len(names) + names.index(name)]
            if name == "weight_ih":
                total += N * flops * wants_input
            elif name == "weight_hh":
                total += (N if wants_h_0 else N - first) * flops
            else:
                total += N * flops
    return total
