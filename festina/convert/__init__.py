"""Other projects' checkpoints: `load` reads one into a layer, `dump` writes it back, `to_torch` makes a `torch.nn` layer.

Every format is a table, and every project has a module in this package whose docstring names the source. `names()` lists the
formats.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from festina import layers
from festina.convert import (
    baselines,
    ding,
    dreamer,
    fastrnns,
    haste,
    icefall,
    keras,
    lingvo,
    nematus,
    own,
    sheeprl,
    sketch_rnn,
    sonnet,
    tf_contrib,
    torch_nn,
    torchaudio,
)
from festina.convert.engine import ConvertError, Table, read, write
from festina.layers import Recurrent

__all__ = ["FORMATS", "ConvertError", "dump", "load", "names", "own_format", "table", "to_torch"]

FORMATS: dict[str, Callable[..., Table]] = {
    name: make
    for module in (
        own,
        torch_nn,
        haste,
        fastrnns,
        icefall,
        torchaudio,
        sheeprl,
        dreamer,
        ding,
        baselines,
        keras,
        tf_contrib,
        sketch_rnn,
        sonnet,
        lingvo,
        nematus,
    )
    for name, make in module.FORMATS.items()
}
"""Every format by name: a function that takes the options missing from a checkpoint and returns the table."""

_CLASSES: dict[str, tuple[type[Recurrent], type[Recurrent], dict[str, Any]]] = {
    "lstm": (layers.LSTM, layers.LayerNormLSTM, {}),
    "gru": (layers.GRU, layers.LayerNormGRU, {}),
    "indrnn": (layers.IndRNN, layers.LayerNormIndRNN, {}),
    "indrnn_relu": (layers.IndRNN, layers.LayerNormIndRNN, {"nonlinearity": "relu"}),
}
"""For each cell: the class of a plain layer, the class of a layer with a norm plan, and the options that select the cell."""


def names() -> list[str]:
    """The names of the formats that `load` and `dump` know.

    >>> "haste.LayerNormLSTM" in names()
    True
    """
    return list(FORMATS)


def table(name: str, **options: Any) -> Table:
    """The table of a format.

    Raises:
        ValueError: the format is unknown.
        TypeError: the format has no such option.
    """
    if name not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {name!r}")
    known = inspect.signature(FORMATS[name]).parameters
    unknown = [option for option in options if option not in known]
    if unknown:
        raise TypeError(f"options of {name} must be among {', '.join(known) or '(none)'}, got {', '.join(unknown)}")
    return FORMATS[name](**options)


def load(
    name: str,
    state_dict: Mapping[str, Any],
    *,
    prefix: str = "",
    batch_first: bool = False,
    dropout: float = 0.0,
    zoneout: float = 0.0,
    zoneout_cell: float = 0.0,
    dropconnect: float = 0.0,
    **options: Any,
) -> Recurrent:
    """A layer over time from another project's state dict, which may be that of a single cell.

    Args:
        name: the format, one of `names()`.
        state_dict: torch tensors or NumPy arrays under the names of the project's checkpoint; TensorFlow's suffix `:0` is
            ignored. The layer takes their dtype (of several the widest) and device.
        prefix: read only the names that start with it, and remove it: `encoder.rnn.`.
        batch_first, dropout, zoneout, zoneout_cell, dropconnect: as in `festina.LSTM`; no checkpoint holds them.
        options: whatever else the checkpoint does not hold, such as `eps`: the arguments of the format's function in `FORMATS`.

    Returns:
        A `festina` layer with the cell and the norm plan of the format, and the number of layers and directions found.

    Raises:
        ConvertError: names are missing or unknown, or shapes are wrong; one error lists everything.
        ValueError, TypeError: the format is unknown, or has no such option.

    >>> cell = torch.nn.GRUCell(3, 5)
    >>> layer = load("torch.GRU", cell.state_dict())
    >>> output, h_n = layer(torch.zeros(7, 2, 3))
    """
    found = {
        key.removeprefix(prefix).removesuffix(":0"): _tensor(key, value)
        for key, value in state_dict.items()
        if key.startswith(prefix)
    }
    try:
        spec, (I, H, P), parameters = read(table(name, **options), found)
    except ConvertError as error:
        raise ConvertError(f"{name}: {error}") from None
    plain, normed, extra = _CLASSES[spec.cell.name]
    if spec.projected:
        extra = {**extra, "proj_size": P}
    tensors = [tensor for of_layer in parameters for held in of_layer for tensor in held.values()]
    dtype = tensors[0].dtype
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    layer = (plain if spec.plan.is_none else normed)(
        I,
        H,
        num_layers=len(parameters),
        bias=spec.bias,
        batch_first=batch_first,
        dropout=dropout,
        bidirectional=spec.directions == 2,
        norm=spec.plan,
        zoneout=zoneout,
        zoneout_cell=zoneout_cell,
        dropconnect=dropconnect,
        device="meta",  # initialises nothing and draws no random number
        dtype=dtype,
        **extra,
    ).to_empty(device=tensors[0].device)
    with torch.no_grad():
        for l, of_layer in enumerate(parameters):
            for own_parameter, value in zip(
                layer.layer_parameters(l), (value for held in of_layer for value in held.values()), strict=True
            ):
                own_parameter.copy_(value)
    return layer


def _tensor(name: str, value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value
    try:
        return torch.tensor(np.asarray(value))
    except TypeError:
        raise TypeError(f"{name} must be a tensor or an array, got {type(value).__name__}") from None


def dump(name: str, layer: Recurrent, **options: Any) -> dict[str, Tensor]:
    """The layer as a state dict of another project: the exact inverse of `load`.

    Args:
        name: the format, one of `names()`.
        layer: a layer with the cell and the norm plan of the format.
        options: as in `load`.

    Raises:
        ConvertError: the format cannot hold the layer's function, or has no place for some of its parameters.
        ValueError, TypeError: the format is unknown, or has no such option.

    >>> sorted(dump("haste.GRU", layers.GRU(3, 5)))
    ['bias', 'kernel', 'recurrent_bias', 'recurrent_kernel']
    """
    try:
        with torch.no_grad():
            state = write(table(name, **options), layer)
    except ConvertError as error:
        raise ConvertError(f"{name}: {error}") from None
    return {key: value.clone(memory_format=torch.contiguous_format) for key, value in state.items()}


def own_format(layer: Recurrent) -> tuple[str, dict[str, Any]]:
    """Festina's own format for this layer, and its options.

    >>> own_format(layers.LayerNormIndRNN(3, 5, nonlinearity="relu"))
    ('festina.IndRNN', {'nonlinearity': 'relu'})
    """
    plain, _, options = _CLASSES[layer.spec.cell.name]
    return f"festina.{plain.__name__}", dict(options)


def to_torch(layer: Recurrent) -> nn.LSTM | nn.GRU:
    """The `torch.nn.LSTM` or `GRU` with the function of a plain layer and a copy of its parameters.

    Raises:
        ConvertError: torch.nn has no such layer; the error lists every reason.

    >>> to_torch(layers.LSTM(3, 5, bidirectional=True))
    LSTM(3, 5, bidirectional=True)
    """
    torch_classes: dict[str, type[nn.LSTM | nn.GRU]] = {"lstm": nn.LSTM, "gru": nn.GRU}
    reasons = [
        f"{rate} is {value}" for rate in ("zoneout", "zoneout_cell", "dropconnect") if (value := getattr(layer, rate))
    ]
    if layer.spec.cell.name not in torch_classes:
        reasons.append(f"torch.nn has no {layer.spec.cell.name}")
    if not layer.norm.is_none:
        reasons.append(f"torch.nn has no norm plan, and this layer has {layer.norm}")
    if reasons:
        raise ConvertError(f"to_torch: {'; '.join(reasons)}")
    first = layer.layer_parameters()[0]
    sizes = {"proj_size": layer.proj_size} if layer.proj_size else {}
    plain = torch_classes[layer.spec.cell.name](
        layer.input_size,
        layer.hidden_size,
        num_layers=layer.num_layers,
        bias=layer.bias,
        batch_first=layer.batch_first,
        dropout=layer.dropout,
        bidirectional=layer.bidirectional,
        device="meta",
        dtype=first.dtype,
        **sizes,
    ).to_empty(device=first.device)
    plain.load_state_dict(layer.state_dict())
    return plain.train(layer.training)
