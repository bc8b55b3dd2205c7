"""TensorFlow 1's tf.contrib.rnn: one kernel, the rows of x above those of h, gates i j f o, one norm per gate."""

from __future__ import annotations

from festina.convert.engine import Table
from festina.convert.layout import Block, columns, flip
from festina.norms import TF_CONTRIB
from festina.spec import LSTM


def layer_norm_basic_lstm_cell(eps: float = 1e-12, forget_bias: float = 1.0) -> Table:
    """tensorflow/contrib/rnn/python/ops/rnn_cell.py, LayerNormBasicLSTMCell with layer_norm=True.

    Args:
        eps: the eps of contrib.layers.layer_norm: 1e-12, in float16 1e-3.
        forget_bias: its forget_bias, which the checkpoint does not hold.
    """
    return Table(
        LSTM,
        TF_CONTRIB.with_eps(eps),
        "igfo",
        {
            "kernel": flip(columns("weight_ih", "weight_hh")),
            "input/gamma": Block("gain_joint", "i"),
            "input/beta": Block("bias_joint", "i"),
            "transform/gamma": Block("gain_joint", "g"),
            "transform/beta": Block("bias_joint", "g"),
            "forget/gamma": Block("gain_joint", "f"),
            "forget/beta": Block("bias_joint", "f", plus=forget_bias),
            "output/gamma": Block("gain_joint", "o"),
            "output/beta": Block("bias_joint", "o"),
            "state/gamma": "gain_c",
            "state/beta": "bias_c",
        },
    )


FORMATS = {"tf_contrib.LayerNormBasicLSTMCell": layer_norm_basic_lstm_cell}
