"""Keras and TensorFlow Addons: kernels [in, out], LSTM gates i f c o, GRU gates z r h.

Names are those of a layer's variables without its scope; the `forward_`/`backward_` layers of a Bidirectional are read too.
"""

from __future__ import annotations

from festina.convert.engine import Table
from festina.convert.layout import Block, Described, flip, stack
from festina.norms import NONE, RESET_BEFORE, TFA
from festina.spec import GRU, LSTM

_KERNELS: dict[str, Described] = {"kernel": flip("weight_ih"), "recurrent_kernel": flip("weight_hh")}


def lstm() -> Table:
    """keras.layers.LSTM with its default activations."""
    scopes = ("{key}", "lstm_cell/{key}", "{side}_lstm/{key}", "{side}_lstm/lstm_cell/{key}")
    return Table(LSTM, NONE, "ifgo", {**_KERNELS, "bias?": Block("bias_ih", fold="bias_hh")}, scopes)


def gru(reset_after: bool = True) -> Table:
    """keras.layers.GRU with its default activations.

    Args:
        reset_after: its reset_after; False (Keras' default before 2.0) resets h before the product.
    """
    bias = stack("bias_ih", "bias_hh") if reset_after else Block("bias_ih", fold="bias_hh")
    scopes = ("{key}", "gru_cell/{key}", "{side}_gru/{key}", "{side}_gru/gru_cell/{key}")
    return Table(GRU, NONE if reset_after else RESET_BEFORE, "zrn", {**_KERNELS, "bias?": bias}, scopes)


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
    )


FORMATS = {"keras.LSTM": lstm, "keras.GRU": gru, "tfa.LayerNormLSTMCell": layer_norm_lstm_cell}
