"""Keras and TensorFlow Addons: kernels [in, out], LSTM gates i f c o, GRU gates z r h.

The names of one layer's variables are read in every form that Keras gives them, whatever comes before:

- `lstm_1/lstm_cell_3/kernel:0`, a variable's name or path, in files of Keras 2 as well;
- `layers/lstm_1/cell/vars/0`, in a `.weights.h5` of Keras 3;
- `layer_with_weights-0/cell/kernel/.ATTRIBUTES/VARIABLE_VALUE`, in a checkpoint of TensorFlow 2;
- `0`, `1`, ...: a list as `get_weights()` gives it, or `arr_0`, ... as `numpy.savez` stores it.

The two layers of a Bidirectional are told by a part of the name that begins with `forward_` or `backward_`; in a list the
forward layer comes first.
"""

from __future__ import annotations

import re
from functools import partial

from torch import Tensor

from festina.convert.engine import ConvertError, Table
from festina.convert.layout import Block, Described, flip, stack
from festina.norms import NONE, RESET_BEFORE, TFA
from festina.spec import GRU, LSTM

_KERNELS: dict[str, Described] = {"kernel": flip("weight_ih"), "recurrent_kernel": flip("weight_hh")}


def lstm() -> Table:
    """keras.layers.LSTM with its default activations."""
    keys = {**_KERNELS, "bias?": Block("bias_ih", fold="bias_hh")}
    return Table(LSTM, NONE, "ifgo", keys, ("{key}", "{side}_lstm/{key}"), adapt=_of_one_layer)


def gru(reset_after: bool | None = None) -> Table:
    """keras.layers.GRU with its default activations.

    Args:
        reset_after: its reset_after; False (Keras' default before 2.0) resets h before the product, which is another function.
            None: as the bias says, which has one axis under False and two under True; True without a bias, and to `dump`.
    """
    is_after = reset_after is not False
    bias = stack("bias_ih", "bias_hh") if is_after else Block("bias_ih", fold="bias_hh")
    return Table(
        GRU,
        NONE if is_after else RESET_BEFORE,
        "zrn",
        {**_KERNELS, "bias?": bias},
        ("{key}", "{side}_gru/{key}"),
        adapt=partial(_gru_variables, reset_after),
    )


def layer_norm_lstm_cell(eps: float = 1e-3) -> Table:
    """tensorflow_addons/rnn/layer_norm_lstm_cell.py, LayerNormLSTMCell.

    Args:
        eps: its norm_epsilon.
    """
    return Table(
        LSTM,
        TFA.with_eps(eps),
        "ifgo",
        {
            **_KERNELS,
            "bias?": "bias_ih",
            "kernel_norm/gamma": "gain_ih",
            "kernel_norm/beta": "bias_ih",
            "recurrent_norm/gamma": "gain_hh",
            "recurrent_norm/beta": "bias_hh",
            "state_norm/gamma": "gain_c",
            "state_norm/beta": "bias_c",
        },
        ("{key}", "{side}_rnn/{key}"),
        adapt=_of_one_layer,
    )


def _of_one_layer(table: Table, state: dict[str, Tensor]) -> tuple[Table, dict[str, Tensor]]:
    """The variables of one layer, or of a Bidirectional, under the table's names; a name that is none of Keras' stays.

    Raises:
        ConvertError: there are the variables of several layers.
    """
    keys = [key.rstrip("?") for key in table.keys]
    variable = re.compile(
        rf"(?:(?P<scope>.*)/)?(?:(?P<key>{'|'.join(map(re.escape, keys))})|vars/(?P<index>\d{{1,3}}))"
        r"(?:/\.ATTRIBUTES/VARIABLE_VALUE)?"
    )
    scopes: dict[str, dict[str, Tensor]] = {}
    rest: dict[str, Tensor] = {}
    for name, tensor in _listed(state).items():
        if "seed_generator" in name:  # of its dropout
            continue
        match = variable.fullmatch(name)
        at = int(match["index"]) if match and match["index"] else 0
        key = match and (match["key"] or (keys[at] if at < len(keys) else None))
        held = scopes.setdefault(match["scope"] or "", {}) if match and key else rest
        if key in held:  # a name that is read twice is reported as unknown
            held, key = rest, None
        held[key or name] = tensor
    if len(scopes) < 2:
        return table, {**next(iter(scopes.values()), {}), **rest}
    sides = {_side(scope): held for scope, held in scopes.items()}
    around = {(before, after) for before, _, after in sides}
    if len(scopes) > 2 or len(around) > 1 or {side for _, side, _ in sides} != {0, 1}:
        raise ConvertError(
            "the variables must be those of one layer, or of one Bidirectional, got those of "
            f"{', '.join(scope or '(no name)' for scope in scopes)}; choose a layer by prefix, and stack layers afterwards"
        )
    both = {
        table.full(key, table.scopes[-1], 0, side): held[key] for (_, side, _), held in sides.items() for key in held
    }
    return table, {**both, **rest}


def _side(scope: str) -> tuple[str, int, str]:
    """A scope's direction, with what stands before and after it: 0 for `forward_`, 1 for `backward_`; -1 if it has none."""
    match = re.fullmatch(r"(?P<before>(?:.*/)?)(?P<side>forward|backward)_(?P<after>[^/]*)(?:/.*)?", scope)
    if match is None:
        return scope, -1, ""
    return match["before"], ("forward", "backward").index(match["side"]), match["after"]


def _listed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A list from `get_weights()` under the names of a `.weights.h5`; any other state dict as it is.

    Raises:
        ConvertError: a list of one layer's weights is never so long.
    """
    if not state or not all(re.fullmatch(r"(arr_)?\d+", name) for name in state):
        return state
    tensors = [state[name] for name in sorted(state, key=lambda name: int(name.removeprefix("arr_")))]
    if len(tensors) in (2, 3):
        return {f"vars/{at}": tensor for at, tensor in enumerate(tensors)}
    if len(tensors) in (4, 6):
        half = len(tensors) // 2
        return {f"{('forward', 'backward')[at // half]}_layer/vars/{at % half}": t for at, t in enumerate(tensors)}
    raise ConvertError(
        "get_weights() of one layer must give 2 arrays, 3 with a bias, or twice as many for a Bidirectional, got "
        f"{len(tensors)}; call it on the layer, not on the model"
    )


def _gru_variables(reset_after: bool | None, table: Table, state: dict[str, Tensor]) -> tuple[Table, dict[str, Tensor]]:
    """`_of_one_layer`, with the table of the reset_after that the bias has.

    Raises:
        ConvertError: the bias contradicts `reset_after`, or there are the variables of several layers.
    """
    table, state = _of_one_layer(table, state)
    axes = {tensor.dim() for name, tensor in state.items() if name.rpartition("/")[2] == "bias"}
    if axes not in ({1}, {2}):
        return table, state
    is_after = axes == {2}
    if reset_after not in (None, is_after):
        raise ConvertError(
            f"bias must have {'two axes' if reset_after else 'one axis'} under reset_after={reset_after}, got one of a GRU "
            f"with reset_after={is_after}, which is another function; leave the option out, or pass reset_after={is_after}"
        )
    return gru(is_after), state


FORMATS = {"keras.LSTM": lstm, "keras.GRU": gru, "tfa.LayerNormLSTMCell": layer_norm_lstm_cell}
