"""torchaudio, torchaudio/models/rnnt.py: the LSTM of the RNN-T predictor, gates i f g o."""

from __future__ import annotations

from festina.convert.engine import Table
from festina.norms import NONE, TORCHAUDIO
from festina.spec import LSTM


def custom_lstm(eps: float = 1e-5, layer_norm: bool = True) -> Table:
    """_CustomLSTM, alone or under the predictor's `lstm_layers.0.`.

    Args:
        eps: its layer_norm_epsilon; 1e-3 in emformer_rnnt_base and so in the EMFORMER_RNNT_* bundles.
        layer_norm: its layer_norm.
    """
    norm = {
        "g_norm.weight": "gain_joint",
        "g_norm.bias": "bias_joint",
        "c_norm.weight": "gain_c",
        "c_norm.bias": "bias_c",
    }
    return Table(
        LSTM,
        TORCHAUDIO.with_eps(eps) if layer_norm else NONE,
        "ifgo",
        {"x2g.weight": "weight_ih", "p2g.weight": "weight_hh", **(norm if layer_norm else {"x2g.bias": "bias_ih"})},
        ("{key}", "lstm_layers.{l}.{key}"),
    )


FORMATS = {"torchaudio._CustomLSTM": custom_lstm}
