"""OpenAI baselines, baselines/a2c/utils.py, and stable-baselines: kernels [in, out], gates i f o u."""

from __future__ import annotations

from festina.convert.engine import Table
from festina.convert.layout import flip
from festina.norms import HASTE
from festina.spec import LSTM


def lnlstm() -> Table:
    """lnlstm; stable-baselines' lstm(layer_norm=True). Its state is [c, h] in one tensor, Festina's the pair (h, c)."""
    return Table(
        LSTM,
        HASTE,
        "ifog",
        {
            "wx": flip("weight_ih"),
            "gx": "gain_ih",
            "bx": "bias_ih",
            "wh": flip("weight_hh"),
            "gh": "gain_hh",
            "bh": "bias_hh",
            "b": "bias_ih",
            "gc": "gain_c",
            "bc": "bias_c",
        },
    )


FORMATS = {"baselines.lnlstm": lnlstm}
