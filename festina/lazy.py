"""Layers and cells that take `input_size` from their first input, as `torch.nn.LazyLinear` does.

Arguments are those of the class without `Lazy`, but for `input_size`. At the first call, or when a state dict is loaded, the
weights on the input are made; at the first call all parameters are initialised, unless they were loaded, and the module
becomes one of the class without `Lazy`. Until then optimizers refuse it, as any module of `torch.nn.modules.lazy`.

>>> layer = LazyLSTM(5)
>>> output, _ = layer(torch.zeros(7, 2, 3))
>>> layer
LSTM(3, 5)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import UninitializedParameter

from festina import cells, layers
from festina.checks import as_count, check_row_axes
from festina.module import PLAN_KEY, warn_of_one_feature
from festina.sequences import pack


class _Lazy(LazyModuleMixin):
    """What makes one of Festina's classes, which comes after it in the order of bases, lazy."""

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(2, *args, **kwargs)  # type: ignore[misc]  # any size but 1, of which layers warn
        self.input_size = 0
        for name in self._on_input():
            weight = self._parameters[name]
            self._parameters[name] = UninitializedParameter(device=weight.device, dtype=weight.dtype)  # type: ignore[call-arg]

    def _on_input(self: Any) -> list[str]:
        return [name for name in self._names[0] if name.startswith("weight_ih")]

    def reset_parameters(self) -> None:
        """Does nothing yet: the first call initialises."""

    def initialize_parameters(self: Any, input: Any = None, *args: Any, **kwargs: Any) -> None:
        """Make what depends on `input_size`; `torch.nn.modules.lazy` calls it with the arguments of the first call.

        Raises:
            TypeError, festina.checks.MismatchError: the input tells no size. The module is as before.
        """
        loaded = not self.has_uninitialized_params()
        features = self._features(input)
        names = self._on_input()
        if loaded:
            self.input_size = self._parameters[names[0]].shape[1]
            return
        input_size = as_count("input_size", features, self.least_size)
        warn_of_one_feature(self.spec, input_size, stacklevel=6)
        shape = self.spec.parameter_shapes(input_size, self.hidden_size, self.output_size)["weight_ih"]
        with torch.no_grad():
            for name in names:
                self._parameters[name].materialize(shape)
        self.input_size = input_size
        super().reset_parameters()  # type: ignore[misc]

    def _save_to_state_dict(self: Any, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[misc]
        if not self.norm.is_none:
            destination[prefix + PLAN_KEY] = self.get_extra_state()


class _LazyLayer(_Lazy):
    def _features(self: Any, input: Any) -> int:
        """I of an input in any form that a layer takes; another form raises."""
        steps, _ = pack(input, self.spec.directions, self.batch_first)
        return steps.shape[1]

    def cell(self, *args: Any, **kwargs: Any) -> cells.Cell:
        raise RuntimeError("input_size is not known yet, so that there is no cell; call the layer once before")


class _LazyCell(_Lazy):
    def _features(self, input: Any) -> int:
        """I of `[B, I]` or `[I]`; anything else raises."""
        if not isinstance(input, Tensor):
            raise TypeError(f"input must be a Tensor, got {type(input).__name__}")
        check_row_axes(input)
        return input.shape[-1]


class LazyLSTM(_LazyLayer, layers.LSTM):
    """`festina.LSTM` without `input_size`."""

    cls_to_become = layers.LSTM


class LazyLayerNormLSTM(_LazyLayer, layers.LayerNormLSTM):
    """`festina.LayerNormLSTM` without `input_size`."""

    cls_to_become = layers.LayerNormLSTM


class LazyGRU(_LazyLayer, layers.GRU):
    """`festina.GRU` without `input_size`."""

    cls_to_become = layers.GRU


class LazyLayerNormGRU(_LazyLayer, layers.LayerNormGRU):
    """`festina.LayerNormGRU` without `input_size`."""

    cls_to_become = layers.LayerNormGRU


class LazyIndRNN(_LazyLayer, layers.IndRNN):
    """`festina.IndRNN` without `input_size`."""

    cls_to_become = layers.IndRNN


class LazyLayerNormIndRNN(_LazyLayer, layers.LayerNormIndRNN):
    """`festina.LayerNormIndRNN` without `input_size`."""

    cls_to_become = layers.LayerNormIndRNN


class LazyLSTMCell(_LazyCell, cells.LSTMCell):
    """`festina.LSTMCell` without `input_size`."""

    cls_to_become = cells.LSTMCell


class LazyLayerNormLSTMCell(_LazyCell, cells.LayerNormLSTMCell):
    """`festina.LayerNormLSTMCell` without `input_size`."""

    cls_to_become = cells.LayerNormLSTMCell


class LazyGRUCell(_LazyCell, cells.GRUCell):
    """`festina.GRUCell` without `input_size`."""

    cls_to_become = cells.GRUCell


class LazyLayerNormGRUCell(_LazyCell, cells.LayerNormGRUCell):
    """`festina.LayerNormGRUCell` without `input_size`."""

    cls_to_become = cells.LayerNormGRUCell


class LazyIndRNNCell(_LazyCell, cells.IndRNNCell):
    """`festina.IndRNNCell` without `input_size`."""

    cls_to_become = cells.IndRNNCell


class LazyLayerNormIndRNNCell(_LazyCell, cells.LayerNormIndRNNCell):
    """`festina.LayerNormIndRNNCell` without `input_size`."""

    cls_to_become = cells.LayerNormIndRNNCell
