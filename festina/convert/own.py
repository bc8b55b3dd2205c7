"""Festina's own state dicts. They hold the norm plan, so no option has to name it."""

from __future__ import annotations

from festina.cells import indrnn_spec
from festina.convert.engine import Table
from festina.norms import PLANS
from festina.spec import GRU, LSTM, CellSpec, LayerSpec


def _own(cell: CellSpec) -> Table:
    specs = [LayerSpec(cell, plan, projected=cell.projects) for plan in PLANS.values() if cell.admits(plan)]
    names = dict.fromkeys(name for spec in specs for name in spec.parameter_names)
    keys = {name if name in ("weight_ih", "weight_hh") else f"{name}?": name for name in names}
    return Table(cell, None, "".join(cell.gates), keys, ("{key}_l{l}{reverse}", "{key}"))


def lstm() -> Table:
    """`festina.LSTM`, `LayerNormLSTM`, and their cells."""
    return _own(LSTM)


def gru() -> Table:
    """`festina.GRU`, `LayerNormGRU`, and their cells."""
    return _own(GRU)


def indrnn(nonlinearity: str = "tanh") -> Table:
    """`festina.IndRNN`, `LayerNormIndRNN`, and their cells, with this nonlinearity, which the state dict does not hold."""
    return _own(indrnn_spec(nonlinearity))


FORMATS = {"festina.LSTM": lstm, "festina.GRU": gru, "festina.IndRNN": indrnn}
