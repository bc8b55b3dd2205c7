"""What the tests of layers share: the variants they run over, and how two results are compared."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import festina
from festina import NormPlan, norms

LAYERS = [
    festina.LSTM,
    festina.GRU,
    festina.IndRNN,
    festina.LayerNormLSTM,
    festina.LayerNormGRU,
    festina.LayerNormIndRNN,
]
"""Every class of layers."""

RMS = NormPlan("separate", groups="gate", cell="carried", kind="rms")
"""A plan without a name: each gate is normalised alone, without subtracting the mean."""

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "lstm": ("LSTM", {}),
    "lstm-haste": ("LayerNormLSTM", {}),
    "lstm-fastrnns": ("LSTM", {"norm": norms.FASTRNNS}),
    "lstm-icefall": ("LSTM", {"norm": norms.ICEFALL}),
    "lstm-rms": ("LSTM", {"norm": RMS}),
    "gru": ("GRU", {}),
    "gru-haste": ("LayerNormGRU", {}),
    "gru-ba2016": ("GRU", {"norm": norms.BA2016_GRU}),
    "gru-dreamer": ("GRU", {"norm": norms.DREAMER}),
    "indrnn": ("IndRNN", {}),
    "indrnn-relu": ("IndRNN", {"nonlinearity": "relu"}),
    "indrnn-haste": ("LayerNormIndRNN", {}),
}
"""Every cell and placement, as a class and its options."""

FIVE_VARIANTS = ["lstm-haste", "lstm-icefall", "gru", "gru-dreamer", "indrnn-haste"]
"""A few that have every cell and every placement, for slower tests."""


def make(variant: str, *args: Any, cell: bool = False, **options: Any) -> Any:
    """The layer (or cell) of a variant, with gains other than 1 and shifts other than 0, so that they change the result."""
    name, own = VARIANTS[variant]
    layer = getattr(festina, name + "Cell" * cell)(*args, **own, **options)
    with torch.no_grad():
        for key, parameter in layer.named_parameters():
            if key.startswith(("gain", "bias")):
                parameter += 0.3 * torch.randn_like(parameter)
    return layer


def has_c(variant: str) -> bool:
    return variant.startswith("lstm")


def listed(state: Any) -> list[Tensor]:
    """The tensors of a state: (h, c) or h."""
    return list(state) if isinstance(state, tuple) else [state]


def random_state(layer: Any, rows: int, B: int | None) -> Any:
    """An initial state for `layer`: `rows` is L·D for a layer, 0 for a cell; B is None for one row without a batch axis."""
    lead = [n for n in (rows or None, B) if n is not None]
    like = next(layer.parameters())
    state = [
        torch.randn(*lead, size, dtype=like.dtype)
        for size in (layer.output_size, layer.hidden_size)[: len(layer.spec.cell.states)]
    ]
    return tuple(state) if len(state) > 1 else state[0]


def assert_same(got: Any, want: Any, rtol: float = 1e-10, atol: float = 1e-11) -> None:
    """Raise unless two nested results hold the same numbers; the default tolerance is for float64."""
    torch.testing.assert_close(got, want, rtol=rtol, atol=atol)


def gradients(output: Tensor, module: nn.Module) -> list[Tensor]:
    """The gradients of the sum of squares of `output`, one for each parameter of `module`."""
    return list(torch.autograd.grad(output.square().sum(), list(module.parameters()), materialize_grads=True))
