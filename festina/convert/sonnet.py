"""DeepMind Sonnet 1 (sonnet/python/modules/gated_rnn.py): one kernel, the rows of x above those of h, gates i j f o."""

from __future__ import annotations

from festina.convert.engine import Table
from festina.convert.layout import Block, Described, columns, flip
from festina.norms import NONE, SONNET
from festina.spec import LSTM


def lstm(eps: float = 1e-5, forget_bias: float = 1.0, layer_norm: bool = True) -> Table:
    """LSTM without peepholes, clipping and projection.

    Args:
        eps: the eps of its snt.LayerNorm.
        forget_bias: its forget_bias, which the checkpoint does not hold.
        layer_norm: its use_layer_norm.
    """
    shift = Block("bias_joint" if layer_norm else "bias_ih", plus=forget_bias, plus_gates="f")
    keys: dict[str, Described] = {"w_gates": flip(columns("weight_ih", "weight_hh")), "b_gates": shift}
    norm = {"layer_norm/gamma": "gain_joint", "layer_norm/beta": "bias_joint"}
    plan = SONNET.with_eps(eps) if layer_norm else NONE
    return Table(LSTM, plan, "igfo", {**keys, **norm} if layer_norm else keys)


FORMATS = {"sonnet.LSTM": lstm}
