"""PyTorch's benchmarks/fastrnns/custom_lstms.py and its copies in NVIDIA NeMo and DI-star: gates i f g o, no biases.

Read are the cell alone, a layer (`cell.`), a stack (`layers.0.cell.`), and the bidirectional forms
(`layers.0.directions.0.cell.`).
"""

from __future__ import annotations

from festina.convert.engine import Table
from festina.norms import FASTRNNS
from festina.spec import LSTM


def layer_norm_lstm_cell(eps: float = 1e-5) -> Table:
    """LayerNormLSTMCell, and LSTMLayer, BidirLSTMLayer, StackedLSTM and StackedBidirLSTM made of it.

    No plan covers decompose_layernorm=True: that norm has no eps and is NaN where h is 0.

    Args:
        eps: the eps of its nn.LayerNorm.
    """
    return Table(
        LSTM,
        FASTRNNS.with_eps(eps),
        "ifgo",
        {
            "weight_ih": "weight_ih",
            "weight_hh": "weight_hh",
            "layernorm_i.weight": "gain_ih",
            "layernorm_i.bias": "bias_ih",
            "layernorm_h.weight": "gain_hh",
            "layernorm_h.bias": "bias_hh",
            "layernorm_c.weight": "gain_c",
            "layernorm_c.bias": "bias_c",
        },
        (
            "{key}",
            "cell.{key}",
            "directions.{d}.cell.{key}",
            "layers.{l}.cell.{key}",
            "layers.{l}.directions.{d}.cell.{key}",
        ),
    )


FORMATS = {
    "fastrnns.LayerNormLSTMCell": layer_norm_lstm_cell,
    "nemo.LayerNormLSTMCell": layer_norm_lstm_cell,
    "distar.LayerNormLSTMCell": layer_norm_lstm_cell,
}
