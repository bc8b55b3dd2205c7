"""Festina: layer-normalised LSTM, GRU and IndRNN for PyTorch that cost no more time than the plain ones."""

from torch.serialization import add_safe_globals

from festina import backends, convert, functional, norms, spec
from festina.cells import GRUCell, IndRNNCell, LayerNormGRUCell, LayerNormIndRNNCell, LayerNormLSTMCell, LSTMCell
from festina.frozen import freeze
from festina.layers import GRU, LSTM, IndRNN, LayerNormGRU, LayerNormIndRNN, LayerNormLSTM
from festina.lazy import (
    LazyGRU,
    LazyGRUCell,
    LazyIndRNN,
    LazyIndRNNCell,
    LazyLayerNormGRU,
    LazyLayerNormGRUCell,
    LazyLayerNormIndRNN,
    LazyLayerNormIndRNNCell,
    LazyLayerNormLSTM,
    LazyLayerNormLSTMCell,
    LazyLSTM,
    LazyLSTMCell,
)
from festina.norms import NormPlan
from festina.swap import replace

__version__ = "0.1.0.dev0"

__all__ = [
    "GRU",
    "LSTM",
    "GRUCell",
    "IndRNN",
    "IndRNNCell",
    "LSTMCell",
    "LayerNormGRU",
    "LayerNormGRUCell",
    "LayerNormIndRNN",
    "LayerNormIndRNNCell",
    "LayerNormLSTM",
    "LayerNormLSTMCell",
    "LazyGRU",
    "LazyGRUCell",
    "LazyIndRNN",
    "LazyIndRNNCell",
    "LazyLSTM",
    "LazyLSTMCell",
    "LazyLayerNormGRU",
    "LazyLayerNormGRUCell",
    "LazyLayerNormIndRNN",
    "LazyLayerNormIndRNNCell",
    "LazyLayerNormLSTM",
    "LazyLayerNormLSTMCell",
    "NormPlan",
    "backends",
    "convert",
    "freeze",
    "functional",
    "norms",
    "replace",
]

# What a pickled layer or cell is made of, so that torch.load(weights_only=True) reads one. Each class and function checks what
# a pickle gives it.
add_safe_globals(
    [
        *(GRU, LSTM, IndRNN, LayerNormGRU, LayerNormIndRNN, LayerNormLSTM),
        *(GRUCell, IndRNNCell, LSTMCell, LayerNormGRUCell, LayerNormIndRNNCell, LayerNormLSTMCell),
        *(spec.restore_cell, spec.restore_layer),
    ]
)
