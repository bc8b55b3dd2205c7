"""Our own state dicts: the norm plan stands in them, so they become a layer without being told which."""

from __future__ import annotations

from festina.convert.engine import Table
from festina.spec import GRU, INDRNN, INDRNN_RELU, LSTM, CellSpec

_MAYBE = ("bias_ih", "bias_hh", "weight_hr", "gain_ih", "gain_hh", "gain", "bias", "bias_inner", "bias_inner_hh")
_MAYBE_C = ("gain_c", "bias_c")


def _own(cell: CellSpec) -> Table:
    keys = {"weight_ih": "weight_ih", "weight_hh": "weight_hh", **{f"{name}?": name for name in (*_MAYBE, *_MAYBE_C)}}
    return Table(cell, None, "".join(cell.gates), keys, ("{key}", "{key}_l{l}{reverse}"))


def lstm() -> Table:
    """`festina.LSTM`, `LayerNormLSTM`, and their cells."""
    return _own(LSTM)


def gru() -> Table:
    """`festina.GRU`, `LayerNormGRU`, and their cells."""
    return _own(GRU)


def indrnn(nonlinearity: str = "tanh") -> Table:
    """`festina.IndRNN`, `LayerNormIndRNN`, and their cells, of this nonlinearity."""
    return _own({"tanh": INDRNN, "relu": INDRNN_RELU}[nonlinearity])


FORMATS = {"festina.LSTM": lstm, "festina.GRU": gru, "festina.IndRNN": indrnn}
