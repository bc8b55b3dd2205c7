"""Magenta's sketch-rnn (magenta/models/sketch_rnn/rnn.py): kernels [in, out], gates i j f o."""

from __future__ import annotations

from festina.convert.engine import Table
from festina.convert.layout import Block, flip
from festina.norms import SKETCH_RNN
from festina.spec import LSTM


def layer_norm_lstm_cell(forget_bias: float = 1.0) -> Table:
    """LayerNormLSTMCell. Its state is [h, c] in one tensor, Festina's the pair (h, c).

    Args:
        forget_bias: its forget_bias, which the checkpoint does not hold.
    """
    return Table(
        LSTM,
        SKETCH_RNN,
        "igfo",
        {
            "W_xh": flip("weight_ih"),
            "W_hh": flip("weight_hh"),
            "ln_all/ln_gamma": "gain_joint",
            "ln_all/ln_beta": Block("bias_joint", plus=forget_bias, plus_gates="f"),
            "ln_c/ln_gamma": "gain_c",
            "ln_c/ln_beta": "bias_c",
        },
    )


FORMATS = {"sketch_rnn.LayerNormLSTMCell": layer_norm_lstm_cell}
