"""Opacus over Festina's layers: exact per-sample gradients, for training with differential privacy.

    import festina.compat.opacus
    from opacus import GradSampleModule
    from opacus.validators import ModuleValidator

    model = GradSampleModule(ModuleValidator.fix(model))

Importing this module tells Opacus how to fix a model that holds Festina's layers or cells: each becomes a `PerSample`, as a
`torch.nn.LSTM` becomes Opacus' DPLSTM. Without that step a backward pass raises, since Opacus' hooks on a module see its
positional tensors and its first output alone: neither lengths and resets nor what the last states contribute.
"""

from __future__ import annotations

import copy
from itertools import chain
from typing import Any

import torch
from opacus.grad_sample import register_grad_sampler
from opacus.validators import register_module_fixer, register_module_validator
from opacus.validators.errors import ShouldReplaceModuleError
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from festina import cells, layers
from festina.cells import Cell
from festina.checks import Lengths, check_lengths
from festina.layers import Recurrent
from festina.sequences import InitialState

__all__ = ["PerSample"]

_CLASSES = [
    *(layers.LSTM, layers.GRU, layers.IndRNN, layers.LayerNormLSTM, layers.LayerNormGRU, layers.LayerNormIndRNN),
    *(cells.LSTMCell, cells.GRUCell, cells.IndRNNCell),
    *(cells.LayerNormLSTMCell, cells.LayerNormGRUCell, cells.LayerNormIndRNNCell),
]

_ADVICE = (
    "{} must be a festina.compat.opacus.PerSample to have per-sample gradients; "
    "opacus.validators.ModuleValidator.fix(model) makes it one"
)


class PerSample(nn.Module):
    """A layer or cell of which Opacus computes per-sample gradients: each row of a batch is a call with weights of its own.

    That is exact for every plan and option, lengths, resets, states and their gradients included, and takes a call for each
    row instead of one for the batch. In training every row draws its own masks, that of DropConnect too. In eval mode, or if
    gradients are off, it is the layer.

    Args:
        layer: the layer or cell, whose parameters it takes over.

    Raises:
        TypeError: it is neither.
        ValueError: one of its parameters is computed by a parametrization, or shared with another.
    """

    def __init__(self, layer: Recurrent | Cell) -> None:
        super().__init__()
        if not isinstance(layer, (Recurrent, Cell)):
            raise TypeError(f"layer must be one of Festina's layers or cells, got {type(layer).__name__}")
        if [*chain(*layer._names)] != [name for name, _ in layer.named_parameters()]:
            raise ValueError(
                "layer must have its own parameters for per-sample gradients; remove parametrizations "
                "(torch.nn.utils.parametrize.remove_parametrizations) and ties first"
            )
        self.weights = _Weights(layer)
        # Not a submodule: Opacus would put its hooks on it, and the parameters would be there twice.
        vars(self)["_layer"] = layer

    @property
    def layer(self) -> Recurrent | Cell:
        """The layer itself, on the same parameters: to save, convert or run it elsewhere."""
        layer: Recurrent | Cell = vars(self)["_layer"]
        layer._parameters.update(self.weights._parameters)
        return layer.train(self.training)

    def forward(
        self,
        input: Tensor,
        hx: InitialState | None = None,
        *,
        lengths: Lengths | None = None,
        resets: Tensor | None = None,
    ) -> Any:
        """As the layer's or cell's forward, for a batch that is neither packed nor nested.

        Raises:
            TypeError, ValueError: as there; in training also if there is no batch axis.
        """
        layer = self.layer
        is_cell = isinstance(layer, Cell)
        if not (self.training and torch.is_grad_enabled()):
            return layer(input, hx, **_given(lengths=lengths, resets=resets))
        if not isinstance(input, Tensor) or input.is_nested or input.dim() != (2 if is_cell else 3):
            raise TypeError(
                "input must be a batch in one padded tensor for per-sample gradients; "
                "torch.nn.utils.rnn.pad_packed_sequence and lengths= make it of a PackedSequence"
            )
        axis, axis_of_states = 0 if self.weights.batch_first else 1, 0 if is_cell else 1
        B = input.shape[axis]
        for name, tensor, at in (("resets", resets, axis), *(("hx", s, axis_of_states) for s in tree_leaves(hx))):
            if isinstance(tensor, Tensor) and (tensor.dim() <= at or tensor.shape[at] != B):
                raise ValueError(
                    f"axis {at} of {name} must have the B = {B} rows of the input, got {list(tensor.shape)}"
                )
        if lengths is not None:
            lengths = check_lengths(lengths, B)

        def call(module: nn.Module, b: int, rows: int) -> tuple[list[Tensor], Any]:
            """Rows b to b + rows: the results, and how they are nested."""
            state = tree_map_only(Tensor, lambda s: s.narrow(axis_of_states, b, rows), hx)
            some = _given(
                lengths=None if lengths is None else lengths[b : b + rows],
                resets=None if resets is None else resets.narrow(axis, b, rows),
            )
            return tree_flatten(module(input.narrow(axis, b, rows), state, **some))

        copies = self.weights(input.new_empty((B, 1) if axis == 0 else (1, B)))
        if B == 0:  # no row, but gradients of that many
            results, structure = call(layer, 0, 0)
            return tree_unflatten([result + copies.sum() for result in results], structure)
        found = []
        for b, flat in enumerate(copies.unbind(axis)):
            row = copy.copy(layer)
            row._parameters = self.weights.named(flat)  # type: ignore[assignment]
            results, structure = call(row, b, 1)
            found.append(results)
        axes = (axis, *[axis_of_states] * len(layer.cell_spec.states))
        return tree_unflatten([torch.cat(parts, at) for parts, at in zip(zip(*found), axes)], structure)


class _Weights(nn.Module):
    """The parameters of a layer, and a copy of them for each row: the module that Opacus' hooks are on.

    Opacus looks for the batch where GradSampleModule's batch_first says, in the arguments and the output of every module.
    """

    def __init__(self, layer: Recurrent | Cell) -> None:
        super().__init__()
        self.batch_first = isinstance(layer, Cell) or layer.batch_first
        for name, parameter in layer.named_parameters():
            self.register_parameter(name, parameter)

    def forward(self, rows: Tensor) -> Tensor:
        """The parameters one after the other, `[B, size]` for `rows` `[B, 1]`; `[size, B]` for `[1, B]` without batch_first."""
        flat = torch.cat([parameter.flatten() for parameter in self.parameters()])
        return flat.expand(rows.shape[0], -1) if self.batch_first else flat.unsqueeze(1).expand(-1, rows.shape[1])

    def named(self, flat: Tensor) -> dict[str, Tensor]:
        """Views `[..., *shape]` of the parameters in `flat`, `[..., size]`, by name."""
        shapes = {name: parameter.shape for name, parameter in self.named_parameters()}
        pieces = flat.split([shape.numel() for shape in shapes.values()], dim=-1)
        return {name: piece.unflatten(-1, shape) for (name, shape), piece in zip(shapes.items(), pieces)}


def _given(**options: Any) -> dict[str, Any]:
    """The options that were given: a cell takes no lengths."""
    return {name: value for name, value in options.items() if value is not None}


@register_grad_sampler(_Weights)
def _grad_samples(module: _Weights, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    size = sum(parameter.numel() for parameter in module.parameters())
    if backprops.dim() != 2 or backprops.shape[1] != size:
        raise ValueError(
            "batch_first of GradSampleModule must be that of the layers that it holds, and True for cells; "
            f"got gradients {list(backprops.shape)} of {size} weights"
        )
    samples = module.named(backprops)
    return {parameter: samples[name] for name, parameter in module.named_parameters() if parameter.requires_grad}


@register_grad_sampler(_CLASSES)
def _refuse(module: nn.Module, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    raise ValueError(_ADVICE.format(type(module).__name__))


@register_module_validator(_CLASSES)
def _validate(module: nn.Module) -> list[ShouldReplaceModuleError]:
    return [ShouldReplaceModuleError(_ADVICE.format(type(module).__name__))]


@register_module_fixer(_CLASSES)
def _fix(module: Any, **kwargs: Any) -> PerSample:
    return PerSample(module)
