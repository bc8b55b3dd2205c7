"""opendilab/DI-engine, ding/torch_utils/network/rnn.py: kernels [in, out], gates i f o u, one bias for all layers."""

from __future__ import annotations

from festina.convert.engine import Table
from festina.convert.layout import flip
from festina.norms import DING
from festina.spec import LSTM


def lstm(eps: float = 1e-5) -> Table:
    """LSTM with norm_type='LN'.

    Args:
        eps: the eps of its nn.LayerNorm.
    """
    return Table(
        LSTM,
        DING.with_eps(eps),
        "ifog",
        {
            "wx.{l}": flip("weight_ih"),
            "wh.{l}": flip("weight_hh"),
            "bias.{l}": "bias_ih",
            "norm.{even}.weight": "gain_ih",
            "norm.{even}.bias": "bias_ih",
            "norm.{odd}.weight": "gain_hh",
            "norm.{odd}.bias": "bias_hh",
        },
        stacked=("bias",),
    )


FORMATS = {"ding.LSTM": lstm}
