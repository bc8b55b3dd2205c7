"""Other projects' checkpoints: `load` reads one into a layer, `dump` writes it back, `to_torch` makes a `torch.nn` layer.

Every format is a table, and every project has a module in this package whose docstring names the source. `names()` lists the
formats.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_type_hints

import numpy as np
import torch
from torch import Tensor, nn

from festina import layers
from festina.checks import check_flags
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
from festina.convert.files import LEAST_LIMIT, MOST_TIMES, unusable
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
        ValueError: the format is unknown, or an option is out of range.
        TypeError: the format has no such option, or an option is of a wrong type.
    """
    if name not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {name!r}")
    known = inspect.signature(FORMATS[name]).parameters
    unknown = [option for option in options if option not in known]
    if unknown:
        raise TypeError(f"options of {name} must be among {', '.join(known) or '(none)'}, got {', '.join(unknown)}")
    kinds = get_type_hints(FORMATS[name])
    for option, value in options.items():
        _check_option(name, option, value, kinds[option])
    return FORMATS[name](**options)


def _check_option(name: str, option: str, value: Any, kind: Any) -> None:
    """Raise unless an option has the type that its format's function declares; numbers must be finite.

    Raises:
        TypeError: it has another type.
        ValueError: it is not finite.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not {float: is_number, float | None: is_number or value is None}.get(kind, isinstance(value, kind)):
        wanted = {
            float: "a number",
            float | None: "a number or None",
            bool: "True or False",
            bool | None: "True, False or None",
            str: "a text",
        }[kind]
        raise TypeError(f"{option} of {name} must be {wanted}, got {value!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{option} of {name} must be finite, got {value}")


def load(
    name: str,
    state_dict: Mapping[str, Any] | Sequence[Any],
    *,
    prefix: str = "",
    batch_first: bool = False,
    dropout: float = 0.0,
    zoneout: float = 0.0,
    zoneout_cell: float = 0.0,
    dropconnect: float = 0.0,
    allow_nonfinite: bool = False,
    **options: Any,
) -> Recurrent:
    """A layer over time from another project's state dict, which may be that of a single cell.

    Args:
        name: the format, one of `names()`.
        state_dict: torch tensors or NumPy arrays under the names of the project's checkpoint; TensorFlow's suffix `:0` is
            ignored. The layer takes their dtype (of several the widest) and device. Of Keras also a list of arrays, as
            `get_weights()` of one layer gives it.
        prefix: read only the names that start with it, and remove it: `encoder.rnn.`.
        batch_first, dropout, zoneout, zoneout_cell, dropconnect: as in `festina.LSTM`; no checkpoint holds them.
        allow_nonfinite: take weights that are NaN or infinite, which make outputs NaN; otherwise they are an error.
        options: whatever else the checkpoint does not hold, such as `eps`: the arguments of the format's function in `FORMATS`.

    Returns:
        A `festina` layer with the cell and the norm plan of the format, and the number of layers and directions found.

    Raises:
        ConvertError: names are missing or unknown, shapes are wrong, tensors are not dense or have no values, or weights are
            not finite; one error lists everything.
        ValueError, TypeError: the format is unknown, or has no such option, or an option is of a wrong type or range.

    >>> cell = torch.nn.GRUCell(3, 5)
    >>> layer = load("torch.GRU", cell.state_dict())
    >>> output, h_n = layer(torch.zeros(7, 2, 3))
    """
    check_flags(allow_nonfinite=allow_nonfinite)
    made = table(name, **options)
    named = state_dict if isinstance(state_dict, Mapping) else {str(at): value for at, value in enumerate(state_dict)}
    found = {
        key.removeprefix(prefix).removesuffix(":0"): _tensor(key, value)
        for key, value in named.items()
        if key.startswith(prefix)
    }
    try:
        _check_tensors(found, allow_nonfinite)
        spec, (I, H, P), parameters = read(made, found)
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
        array = np.asarray(value)
    except ValueError:  # rows of several lengths
        array = np.asarray(None)
    if problem := _repetition(array.shape, array.strides, array.itemsize):
        raise ConvertError(f"{name} {problem}")
    try:
        return torch.tensor(array.astype(array.dtype.newbyteorder("="), copy=False), device="cpu")
    except TypeError:
        raise TypeError(f"{name} must be a tensor or an array, got {type(value).__name__}") from None


def _repetition(shape: Sequence[int], strides: Sequence[int], itemsize: int) -> str | None:
    """Why a view of few elements that takes much memory once it is copied is not converted; None for others."""
    nbytes = math.prod(shape) * itemsize
    spanned = itemsize + sum((size - 1) * abs(stride) for size, stride in zip(shape, strides)) if nbytes else 0
    if nbytes <= max(MOST_TIMES * spanned, LEAST_LIMIT):
        return None
    return f"must hold its values, but repeats {spanned} bytes until they are {nbytes}"


def _check_tensors(found: Mapping[str, Tensor], allow_nonfinite: bool) -> None:
    """Raise unless all tensors are dense, have values and, if they must, finite ones.

    Raises:
        ConvertError: they are not; the error lists all that are wrong.
    """
    problems = {name: _problem(tensor, allow_nonfinite) for name, tensor in found.items()}
    texts = [f"{name} {problem}" for name, problem in problems.items() if problem]
    if texts:
        raise ConvertError("; ".join(texts))


def _problem(tensor: Tensor, allow_nonfinite: bool) -> str | None:
    """Why a tensor cannot be converted, in words, or None."""
    if problem := unusable(tensor):
        return problem
    itemsize = tensor.dtype.itemsize
    if problem := _repetition(tensor.shape, [itemsize * stride for stride in tensor.stride()], itemsize):
        return problem
    if itemsize < 2 or not tensor.is_floating_point() or allow_nonfinite:
        return None
    count = int((~torch.isfinite(tensor)).sum())
    if not count:
        return None
    return (
        f"has {count} values of {tensor.numel()} that are NaN or infinite; allow_nonfinite=True takes them all the same"
    )


def dump(name: str, layer: Recurrent, **options: Any) -> dict[str, Tensor]:
    """The layer as a state dict of another project: the exact inverse of `load`.

    Args:
        name: the format, one of `names()`.
        layer: a layer with the cell and the norm plan of the format.
        options: as in `load`.

    Raises:
        ConvertError: the format cannot hold the layer's function, or has no place for some of its parameters; or the layer
            is on the meta device.
        ValueError, TypeError: the format is unknown, or has no such option, or an option is of a wrong type or range.

    >>> sorted(dump("haste.GRU", layers.GRU(3, 5)))
    ['bias', 'kernel', 'recurrent_bias', 'recurrent_kernel']
    """
    if any(parameter.is_meta for parameter in layer.parameters()):
        raise ConvertError(f"{name}: the layer must have values, but is on the meta device; load its weights first")
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
