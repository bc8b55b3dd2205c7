"""Lingvo (lingvo/core/rnn_cell.py): one kernel, the rows of x above those of m, our h.

Its gates are i_i (our g), i_g (our i), f_g, o_g. `w_proj` is there with num_hidden_nodes. Its zo_prob is both our zoneout and
our zoneout_cell. Coupled input and forget gates, and an output without tanh, make other cells.
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
        forget_gate_bias: what it was built with; the checkpoint does not hold it.
        cell_value_cap: the bound of c; None for none, which more backends run.
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
    """LayerNormalizedLSTMCellLean: it stores gains less 1.

    Args:
        eps: its layer_norm_epsilon.
        enable_ln_on_c: whether c is normalised for the output.
        cell_value_cap: the bound of c; None for none.
        enable_lstm_bias: whether there is a `b`, which is added after the norms.
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
