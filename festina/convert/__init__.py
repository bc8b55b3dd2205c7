"""Other projects' checkpoints: `load` one by name, `dump` a layer back, `to_torch` a plain one.

Every format is a table in a module of this package, one module a project; its docstring names the source. `names()` lists them.
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
"""Every format by name: a function from the options that a checkpoint does not hold to its table."""

_CLASSES: dict[str, tuple[type[Recurrent], type[Recurrent], dict[str, Any]]] = {
    "lstm": (layers.LSTM, layers.LayerNormLSTM, {}),
    "gru": (layers.GRU, layers.LayerNormGRU, {}),
    "indrnn": (layers.IndRNN, layers.LayerNormIndRNN, {}),
    "indrnn_relu": (layers.IndRNN, layers.LayerNormIndRNN, {"nonlinearity": "relu"}),
}
"""For each cell: the class of a plain layer, of one with a norm plan, and what tells it from the class's usual cell."""


def names() -> list[str]:
    """The names of the formats that `load` and `dump` know.

    >>> "haste.LayerNormLSTM" in names()
    True
    """
    return list(FORMATS)


def table(name: str, **options: Any) -> Table:
    """The table of a format.

    Raises:
        ValueError: there is no format of that name.
        TypeError: the format has no such option.
    """
    if name not in FORMATS:
        raise ValueError(f"there is no format {name!r}; there are {', '.join(FORMATS)}")
    known = inspect.signature(FORMATS[name]).parameters
    unknown = [option for option in options if option not in known]
    if unknown:
        raise TypeError(f"{name} has no option {', '.join(unknown)}; it has {', '.join(known) or 'none'}")
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
    """A layer over time from another project's state dict, also from that of a single cell.

    Args:
        name: the format, one of `names()`.
        state_dict: torch tensors or NumPy arrays by the names of the project's own checkpoint; a `:0` at the end, which is
            TensorFlow's, does not count. The layer's dtype and device are theirs (of several dtypes the widest).
        prefix: take only the names that begin so, without it: `encoder.rnn.`.
        batch_first, dropout, zoneout, zoneout_cell, dropconnect: as in `festina.LSTM`; no checkpoint holds them.
        options: what else the checkpoint does not hold, such as `eps`; the format's function in `FORMATS` lists its own.

    Returns:
        A `festina` layer of the cell and with the norm plan of the format; as many layers and directions as were found.

    Raises:
        ConvertError: names are missing or unknown, or tensors are misshapen; one error lists them all.
        ValueError, TypeError: there is no format of that name, or it has no such option.

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
        device="meta",  # so that nothing is initialised and no random number is drawn
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
        raise TypeError(f"{name} must be a tensor or an array, got a {type(value).__name__}") from None


def dump(name: str, layer: Recurrent, **options: Any) -> dict[str, Tensor]:
    """The state dict of another project that holds this layer: the inverse of `load`, and exact.

    Args:
        name: the format, one of `names()`.
        layer: a layer whose cell and norm plan are the format's.
        options: as in `load`.

    Raises:
        ConvertError: the layer is another function than the format can hold, or has parameters that it has no place for.
        ValueError, TypeError: there is no format of that name, or it has no such option.

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
    """The format of ours that holds this layer, and its options.

    >>> own_format(layers.LayerNormIndRNN(3, 5, nonlinearity="relu"))
    ('festina.IndRNN', {'nonlinearity': 'relu'})
    """
    plain, _, options = _CLASSES[layer.spec.cell.name]
    return f"festina.{plain.__name__}", dict(options)


def to_torch(layer: Recurrent) -> nn.LSTM | nn.GRU:
    """The `torch.nn.LSTM` or `GRU` that computes what a plain layer computes, with its own copy of the parameters.

    Raises:
        ConvertError: torch.nn has no such layer; every reason is listed.

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
        layer.num_layers,
        layer.bias,
        layer.batch_first,
        layer.dropout,
        layer.bidirectional,
        device="meta",
        dtype=first.dtype,
        **sizes,
    ).to_empty(device=first.device)
    plain.load_state_dict(layer.state_dict())
    return plain.train(layer.training)
