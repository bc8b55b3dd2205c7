"""Lingvo (lingvo/core/rnn_cell.py): one kernel, the rows of x above those of m, which is Festina's h.

Its gates are i_i (Festina's g), i_g (Festina's i), f_g, o_g. `w_proj` exists with num_hidden_nodes. Its zo_prob sets both
zoneout and zoneout_cell. Coupled input and forget gates, or an output without tanh, make other cells.
"""

from __future__ import annotations

from dataclasses import replace

from festina.convert.engine import Table
from festina.convert.layout import Block, Described, columns, flip
from festina.norms import LINGVO, LINGVO_LEAN, TFLITE
from festina.spec import LSTM

_WEIGHTS: dict[str, Described] = {"wm": flip(columns("weight_ih", "weight_hh")), "w_proj?": flip("weight_hr")}
_GATES = {"i_i": "g", "i_g": "i", "f_g": "f", "o_g": "o"}


def simple(eps: float = 1e-8, forget_gate_bias: float = 0.0, cell_value_cap: float | None = 10.0) -> Table:
    """LayerNormalizedLSTMCellSimple.

    Args:
        eps: its layer_norm_epsilon.
        forget_gate_bias: its forget_gate_bias, which the checkpoint does not hold.
        cell_value_cap: the bound of c; None: no bound, which more backends can run.
    """
    return Table(
        LSTM,
        replace(LINGVO, eps=eps, clip=cell_value_cap, name=None),
        "gifo",
        {**_WEIGHTS, "ln_scale": "gain_joint", "b": Block("bias_joint", plus=forget_gate_bias, plus_gates="f")},
    )


def lean(
    eps: float = 1e-8,
    enable_ln_on_c: bool = True,
    cell_value_cap: float | None = None,
    enable_lstm_bias: bool = False,
) -> Table:
    """LayerNormalizedLSTMCellLean. It stores gains minus 1.

    Args:
        eps: its layer_norm_epsilon.
        enable_ln_on_c: normalise c for the output.
        cell_value_cap: the bound of c; None: no bound.
        enable_lstm_bias: the cell has a bias `b`, added after the norms.
    """
    norms: dict[str, Described] = {"b": "bias_joint"} if enable_lstm_bias else {}
    for name, gate in _GATES.items():
        norms |= {f"ln_scale_{name}": Block("gain_joint", gate, plus=1.0), f"bias_{name}?": Block("bias_joint", gate)}
    if enable_ln_on_c:
        norms |= {"ln_scale_c": Block("gain_c", plus=1.0), "bias_c?": "bias_c"}
    plan = LINGVO_LEAN if enable_ln_on_c else TFLITE
    return Table(LSTM, replace(plan, eps=eps, clip=cell_value_cap, name=None), "gifo", {**_WEIGHTS, **norms})


FORMATS = {
    "lingvo.LayerNormalizedLSTMCellSimple": simple,
    "lingvo.LayerNormalizedLSTMCellLean": lean,
}
