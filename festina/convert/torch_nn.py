"""PyTorch's torch.nn: plain layers have its names, shapes and gate order, so every layout is the identity."""

from __future__ import annotations

from festina.convert.engine import Table
from festina.norms import NONE
from festina.spec import GRU, LSTM

_SCOPES = ("{key}_l{l}{reverse}", "{key}")


def _identity(names: tuple[str, ...]) -> dict[str, str]:
    return {name: name.rstrip("?") for name in names}


def lstm() -> Table:
    """`torch.nn.LSTM` and `LSTMCell`."""
    return Table(
        LSTM, NONE, "ifgo", _identity(("weight_ih", "weight_hh", "bias_ih?", "bias_hh?", "weight_hr?")), _SCOPES
    )


def gru() -> Table:
    """`torch.nn.GRU` and `GRUCell`."""
    return Table(GRU, NONE, "rzn", _identity(("weight_ih", "weight_hh", "bias_ih?", "bias_hh?")), _SCOPES)


FORMATS = {"torch.LSTM": lstm, "torch.GRU": gru}
