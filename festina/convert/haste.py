"""haste (lmnt-com/haste), PyTorch and TensorFlow: kernels are [in, out], LSTM gates i g f o, GRU gates z r h.

haste_tf stores both kernels as one, the rows of x above those of h, and concatenates the GRU's two biases. A layer with
direction='bidirectional' has its variables under `fw/` and `bw/`; the scope before these is the `prefix`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from festina.convert.engine import Table
from festina.convert.layout import Block, Described, columns, flip, rows, stack
from festina.norms import HASTE, NONE
from festina.spec import GRU, INDRNN, LSTM


def lstm() -> Table:
    """frameworks/pytorch/lstm.py, LSTM."""
    return Table(
        LSTM,
        NONE,
        "igfo",
        {
            "kernel": flip("weight_ih"),
            "recurrent_kernel": flip("weight_hh"),
            "bias": Block("bias_ih", fold="bias_hh"),
        },
    )


def layer_norm_lstm() -> Table:
    """frameworks/pytorch/layer_norm_lstm.py, LayerNormLSTM."""
    norm: dict[str, Described] = {"gamma": stack("gain_ih", "gain_hh"), "gamma_h": "gain_c", "beta_h": "bias_c"}
    return replace(lstm(), plan=HASTE, keys={**lstm().keys, **norm})


def gru() -> Table:
    """frameworks/pytorch/gru.py, GRU."""
    return Table(
        GRU,
        NONE,
        "zrn",
        {
            "kernel": flip("weight_ih"),
            "recurrent_kernel": flip("weight_hh"),
            "bias": "bias_ih",
            "recurrent_bias": "bias_hh",
        },
    )


def layer_norm_gru() -> Table:
    """frameworks/pytorch/layer_norm_gru.py, LayerNormGRU."""
    return replace(gru(), plan=HASTE, keys={**gru().keys, "gamma": stack("gain_ih", "gain_hh")})


def indrnn() -> Table:
    """frameworks/pytorch/indrnn.py, IndRNN."""
    return Table(INDRNN, NONE, "h", {"kernel": flip("weight_ih"), "recurrent_scale": "weight_hh", "bias": "bias_ih"})


def layer_norm_indrnn() -> Table:
    """frameworks/pytorch/layer_norm_indrnn.py, LayerNormIndRNN. It never reads the second row of gamma."""
    gamma = stack("gain_ih", Block("gain_ih", plus=1.0, unused=True))
    return replace(indrnn(), plan=HASTE, keys={**indrnn().keys, "gamma": gamma})


def _tf(table: Table, changed: Mapping[str, Described | None] | None = None) -> Table:
    """haste_tf's version of a table, with these layouts changed; None removes a name."""
    keys = {**table.keys, **(changed or {})}
    return replace(table, keys={key: part for key, part in keys.items() if part}, scopes=("{key}", "{fw}/{key}"))


_BOTH: dict[str, Described | None] = {"kernel": flip(columns("weight_ih", "weight_hh")), "recurrent_kernel": None}
_BIASES: dict[str, Described | None] = {"bias": rows("bias_ih", "bias_hh"), "recurrent_bias": None}


def tf_lstm() -> Table:
    """frameworks/tf/lstm.py, LSTM."""
    return _tf(lstm(), _BOTH)


def tf_layer_norm_lstm() -> Table:
    """frameworks/tf/layer_norm_lstm.py, LayerNormLSTM."""
    return _tf(layer_norm_lstm(), _BOTH)


def tf_gru() -> Table:
    """frameworks/tf/gru.py, GRU."""
    return _tf(gru(), {**_BOTH, **_BIASES})


def tf_layer_norm_gru() -> Table:
    """frameworks/tf/layer_norm_gru.py, LayerNormGRU."""
    return _tf(layer_norm_gru(), {**_BOTH, **_BIASES})


def tf_indrnn() -> Table:
    """frameworks/tf/indrnn.py, IndRNN."""
    return _tf(indrnn())


def tf_layer_norm_indrnn() -> Table:
    """frameworks/tf/layer_norm_indrnn.py, LayerNormIndRNN."""
    return _tf(layer_norm_indrnn())


FORMATS = {
    "haste.LSTM": lstm,
    "haste.GRU": gru,
    "haste.IndRNN": indrnn,
    "haste.LayerNormLSTM": layer_norm_lstm,
    "haste.LayerNormGRU": layer_norm_gru,
    "haste.LayerNormIndRNN": layer_norm_indrnn,
    "haste_tf.LSTM": tf_lstm,
    "haste_tf.GRU": tf_gru,
    "haste_tf.IndRNN": tf_indrnn,
    "haste_tf.LayerNormLSTM": tf_layer_norm_lstm,
    "haste_tf.LayerNormGRU": tf_layer_norm_gru,
    "haste_tf.LayerNormIndRNN": tf_layer_norm_indrnn,
}
