"""k2-fsa/icefall, egs/librispeech/ASR/transducer/rnn.py: torch.nn's parameters, and one nn.LayerNorm for each gate.

Read are the cell alone, a layer (`cell.`) and a stack (`layers.0.cell.`). icefall's layers are batch_first.
"""

from __future__ import annotations

from festina.convert.engine import Table
from festina.convert.layout import Block
from festina.norms import ICEFALL, ICEFALL_GRU
from festina.spec import GRU, LSTM

_SCOPES = ("{key}", "cell.{key}", "layers.{l}.cell.{key}")


def _norms(gates: dict[str, str]) -> dict[str, Block]:
    """The layouts of `layernorm_<name>`, for `gates` that map icefall's names to Festina's."""
    return {
        f"layernorm_{name}.{part}": Block(ours, gate)
        for name, gate in gates.items()
        for part, ours in (("weight", "gain_joint"), ("bias", "bias_joint"))
    }


def layer_norm_lstm_cell(eps: float = 1e-5) -> Table:
    """LayerNormLSTMCell, LayerNormLSTMLayer, LayerNormLSTM, with or without proj_size.

    Args:
        eps: the eps of its nn.LayerNorm.
    """
    return Table(
        LSTM,
        ICEFALL.with_eps(eps),
        "ifgo",
        {
            "weight_ih": "weight_ih",
            "weight_hh": "weight_hh",
            "bias_ih?": "bias_inner",
            "bias_hh?": "bias_inner",
            "weight_hr?": "weight_hr",
            **_norms({"i": "i", "f": "f", "cx": "g", "o": "o"}),
            "layernorm_cy.weight": "gain_c",
            "layernorm_cy.bias": "bias_c",
        },
        _SCOPES,
    )


def layer_norm_gru_cell(eps: float = 1e-5) -> Table:
    """LayerNormGRUCell, LayerNormGRULayer, LayerNormGRU. icefall's input gate is z.

    Args:
        eps: the eps of its nn.LayerNorm.
    """
    return Table(
        GRU,
        ICEFALL_GRU.with_eps(eps),
        "rzn",
        {
            "weight_ih": "weight_ih",
            "weight_hh": "weight_hh",
            "bias_ih?": "bias_inner",
            "bias_hh?": "bias_inner_hh",
            **_norms({"r": "r", "i": "z", "n": "n"}),
        },
        _SCOPES,
    )


FORMATS = {"icefall.LayerNormLSTMCell": layer_norm_lstm_cell, "icefall.LayerNormGRUCell": layer_norm_gru_cell}
