"""Validation (`festina.checks`): each argument that is refused, and the text of its error. An error says what was wanted, what
came and what to do, and nothing is half-done after it. Errors of plans: test_norms.py; of checkpoints: test_module.py."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from samples import LAYERS, VARIANTS, assert_same, make
from torch import nn

import festina
from festina import backends, functional, norms, ops

T, B, I, H = 4, 2, 3, 5
CELLS = [layer.cell_class for layer in LAYERS]

CONSTRUCTION: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"input_size": -1}, ValueError, r"input_size must be at least [01], got -1"),
    ({"input_size": "3"}, TypeError, r"input_size must be an int, got str"),
    ({"input_size": True}, TypeError, r"input_size must be an int, got bool"),
    ({"hidden_size": -2}, ValueError, r"hidden_size must be at least [01], got -2"),
    ({"hidden_size": 5.0}, TypeError, r"hidden_size must be an int, got float"),
    ({"proj_size": 5}, ValueError, r"proj_size must lie in \[0, hidden_size\) = \[0, 5\), got 5"),
    ({"proj_size": -1}, ValueError, r"proj_size must be at least 0, got -1"),
    ({"proj_size": "2"}, TypeError, r"proj_size must be an int, got str"),
    ({"zoneout": float("nan")}, ValueError, r"zoneout must be a probability in \[0, 1\], got nan"),
    ({"zoneout": True}, ValueError, r"zoneout must be a probability in \[0, 1\], got True"),
    ({"dropconnect": "0.1"}, ValueError, r"dropconnect must be a probability in \[0, 1\], got '0.1'"),
    ({"dropconnect": -0.1}, ValueError, r"dropconnect must be a probability in \[0, 1\], got -0.1"),
    ({"zoneout_cell": 1.5}, ValueError, r"zoneout_cell must be a probability in \[0, 1\], got 1.5"),
    ({"bias": 2}, TypeError, r"bias must be True or False, got 2"),
    ({"bias": 0.5}, TypeError, r"bias must be True or False, got 0.5"),
    ({"norm": "HASTE"}, TypeError, r"norm must be a NormPlan, such as norms.HASTE, got 'HASTE'; festina.norms has"),
    ({"norm": True}, TypeError, r"norm must be a NormPlan, such as norms.HASTE, got True"),
    ({"forget_bias": "1"}, ValueError, r"forget_bias must be a finite number, got '1'"),
    ({"forget_bias": float("inf")}, ValueError, r"forget_bias must be a finite number, got inf"),
    (
        {"dtype": torch.int64},
        ValueError,
        r"dtype must be of floating-point numbers of 16, 32 or 64 bits, got torch.int64",
    ),
    ({"dtype": torch.complex64}, ValueError, r"dtype must be of floating-point numbers"),
    ({"dtype": torch.float8_e4m3fn}, ValueError, r"dtype must be of floating-point numbers"),
    ({"dtype": "float32"}, TypeError, r"dtype must be a torch.dtype, .* got 'float32'"),
]


@pytest.mark.parametrize(("options", "error", "text"), CONSTRUCTION, ids=[str(row[0]) for row in CONSTRUCTION])
@pytest.mark.parametrize("module", [*LAYERS, *CELLS], ids=lambda module: module.__name__)
def test_construction(module: Any, options: dict[str, Any], error: type[Exception], text: str) -> None:
    before = torch.get_rng_state()
    with pytest.raises(error, match=text):
        module(**{"input_size": I, "hidden_size": H, **options})
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.__name__)
def test_construction_of_layers(layer: Any) -> None:
    with pytest.raises(ValueError, match="input_size must be at least 1, got 0"):
        layer(0, H)
    with pytest.raises(ValueError, match="hidden_size must be at least 1, got 0"):
        layer(I, 0)
    with pytest.raises(TypeError, match="bias must be True or False, got 1"):
        layer(I, H, bias=1)
    with pytest.raises(ValueError, match="num_layers must be at least 1, got 0"):
        layer(I, H, 0)
    with pytest.raises(TypeError, match="num_layers must be an int, got bool"):
        layer(I, H, True)  # haste's third argument is batch_first
    with pytest.raises(TypeError, match="num_layers must be an int, got float"):
        layer(I, H, 2.0)
    with pytest.raises(ValueError, match=r"dropout must be a probability in \[0, 1\], got 2"):
        layer(I, H, 2, dropout=2)
    with pytest.raises(TypeError, match=r"batch_first must be True or False, got 0"):
        layer(I, H, batch_first=0)
    with pytest.raises(TypeError, match=r"bidirectional must be True or False, got 'yes'"):
        layer(I, H, bidirectional="yes")
    with pytest.warns(UserWarning, match=r"dropout=0.5 acts between layers, and there is only one layer"):
        layer(I, H, dropout=0.5)


@pytest.mark.parametrize(
    ("module", "options", "text"),
    [
        (festina.GRU, {"proj_size": 2}, "proj_size must be 0: the gru cell has no projection, got 2"),
        (festina.IndRNNCell, {"proj_size": 2}, "proj_size must be 0: the indrnn cell has no projection, got 2"),
        (festina.GRU, {"zoneout_cell": 0.1}, "zoneout_cell must be 0: the gru cell has no c, got 0.1"),
        (festina.IndRNN, {"zoneout_cell": 0.1}, "zoneout_cell must be 0: the indrnn cell has no c, got 0.1"),
        (festina.GRU, {"forget_bias": 1.0}, "forget_bias must be 0: the gru cell has no forget gate, got 1.0"),
        (festina.IndRNN, {"nonlinearity": "gelu"}, "nonlinearity must be 'tanh' or 'relu', got 'gelu'"),
        (
            festina.LSTM,
            {"norm": norms.BA2016_GRU},
            "the norm plan BA2016_GRU does not fit the lstm cell: groups must be one of 'all', 'gate', got 'gates|candidate'",
        ),
        (
            festina.IndRNN,
            {"norm": norms.DREAMER},
            "the norm plan DREAMER does not fit the indrnn cell: placement must be one of 'none', 'separate', got 'joint'",
        ),
    ],
)
def test_what_a_cell_does_not_have(module: Any, options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError) as caught:
        module(I, H, **options)
    assert str(caught.value) == text


def test_a_norm_on_one_input_feature_warns_once() -> None:
    """N(w·x) = sign(x)·N(w): the magnitude of x is lost."""
    for make_layer in (festina.LayerNormLSTM, festina.LayerNormGRU, festina.LayerNormIndRNN, festina.LayerNormLSTMCell):
        with pytest.warns(
            UserWarning, match="single input feature removes its magnitude.*linear layer in front"
        ) as caught:
            layer = make_layer(1, H)
        assert len(caught) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            layer(torch.zeros(2, 1))
            if isinstance(layer, festina.LayerNormLSTM):
                layer.cell()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        festina.LayerNormLSTM(1, H, norm=norms.NONE)
        festina.LayerNormLSTM(1, H, norm=norms.TORCHAUDIO)
        festina.LayerNormLSTM(2, H)


# Calls. Each row: an id, what is changed in a good call, the error, its text.

X = torch.zeros(T, B, I)
H_0 = torch.zeros(1, B, H)
MASK = torch.zeros(T, B, dtype=torch.bool)

CALLS: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    (
        "rank",
        {"input": X[None]},
        ValueError,
        r"input must be 3-D, \[T, B, I\], or 2-D, \[T, I\].*got 4-D \[1, 4, 2, 3\]",
    ),
    ("size", {"input": X[..., :2]}, ValueError, r"last axis of input must be input_size = 3, got 2"),
    ("type", {"input": X.tolist()}, TypeError, r"input must be a Tensor or a PackedSequence, got list"),
    ("int", {"input": X.long()}, ValueError, r"input must be torch.float32 as the parameters, got torch.int64; call"),
    (
        "double",
        {"input": X.double()},
        ValueError,
        r"input must be torch.float32 .*, got torch.float64; call .to\(torch.flo",
    ),
    ("meta", {"input": X.to("meta")}, ValueError, r"input must be on cpu as the parameters, got meta"),
    ("lengths floats", {"lengths": [1.5, 2.0]}, TypeError, r"lengths must hold integers, .* got torch.float32"),
    ("lengths bools", {"lengths": [True, False]}, TypeError, r"lengths must hold integers, .* got torch.bool"),
    ("lengths number", {"lengths": 4}, TypeError, r"lengths must be a tensor or a list of integers.*got 4"),
    ("lengths text", {"lengths": "ab"}, TypeError, r"lengths must be a tensor or a list of integers.*got 'ab'"),
    ("lengths None", {"lengths": [4, None]}, TypeError, r"lengths must be a tensor or a list of integers.*None"),
    ("lengths ragged", {"lengths": [[1], [1, 2]]}, TypeError, r"lengths must be a tensor or a list of integers"),
    ("lengths empty", {"lengths": []}, ValueError, r"lengths must be \[B\] = \[2\], one for each row, got \[0\]"),
    (
        "lengths count",
        {"lengths": [1, 2, 3]},
        ValueError,
        r"lengths must be \[B\] = \[2\], one for each row, got \[3\]",
    ),
    ("lengths nested", {"lengths": [[1, 2]]}, ValueError, r"lengths must be \[B\] = \[2\].*got \[1, 2\]"),
    ("lengths negative", {"lengths": [-1, 2]}, ValueError, r"lengths must lie in \[0, T\] = \[0, 4\], got \[-1, 2\]"),
    ("lengths long", {"lengths": [1, 5]}, ValueError, r"lengths must lie in \[0, T\] = \[0, 4\], got \[1, 5\]"),
    (
        "lengths meta",
        {"lengths": torch.zeros(2, dtype=torch.long, device="meta")},
        ValueError,
        r"lengths must be on the CPU, .* got meta; call lengths.cpu\(\)",
    ),
    (
        "lengths of one row",
        {"input": X[:, 0], "lengths": [2]},
        ValueError,
        r"lengths belong to a batch.*input\[:length\]",
    ),
    (
        "lengths of packed",
        {"input": nn.utils.rnn.pack_padded_sequence(X, [4, 2]), "lengths": [4, 2]},
        ValueError,
        r"a PackedSequence holds its own lengths",
    ),
    (
        "resets dtype",
        {"resets": MASK.float()},
        TypeError,
        r"resets must be a bool tensor, got torch.float32; torch.as_tens",
    ),
    ("resets list", {"resets": MASK.tolist()}, TypeError, r"resets must be a bool tensor, got list; torch.as_tensor"),
    ("resets shape", {"resets": MASK.t()}, ValueError, r"resets must be \[T, B\] = \[4, 2\], got \[2, 4\]"),
    ("resets row", {"input": X[:, 0], "resets": MASK}, ValueError, r"resets must be \[T\] = \[4\], got \[4, 2\]"),
    ("resets meta", {"resets": MASK.to("meta")}, ValueError, r"resets must be on the input's device, cpu, got meta"),
    (
        "resets packed",
        {"input": nn.utils.rnn.pack_padded_sequence(X, [3, 2]), "resets": MASK},
        ValueError,
        r"resets must be \[T, B\] = \[3, 2\], got \[4, 2\]",
    ),
]


@pytest.mark.parametrize(("options", "error", "text"), [row[1:] for row in CALLS], ids=[row[0] for row in CALLS])
@pytest.mark.parametrize("variant", ["lstm", "lstm-haste", "gru-haste", "indrnn"])
def test_call(variant: str, options: dict[str, Any], error: type[Exception], text: str) -> None:
    layer = make(variant, I, H, zoneout=0.5)
    weights, before = copy.deepcopy(layer.state_dict()), torch.get_rng_state()
    with pytest.raises(error, match=text):
        layer(**{"input": X, **options})
    assert torch.equal(torch.get_rng_state(), before)
    assert_same(layer.state_dict(), weights)


def test_call_batch_first() -> None:
    layer = festina.GRU(I, H, batch_first=True)
    with pytest.raises(ValueError, match=r"input must be 3-D, \[B, T, I\], or 2-D"):
        layer(X[0, 0])
    with pytest.raises(ValueError, match=r"resets must be \[B, T\] = \[4, 2\], got \[2, 4\]"):
        layer(X, resets=MASK.t())
    with pytest.raises(ValueError, match=r"lengths must lie in \[0, T\] = \[0, 2\], got \[3, 1, 1, 1\]"):
        layer(X, lengths=[3, 1, 1, 1])


LSTM_STATES: list[tuple[str, Any, type[Exception], str]] = [
    ("bare", H_0, TypeError, r"hx of the lstm cell must be a tuple \(h_0, c_0\), got a Tensor"),
    ("one", (H_0,), TypeError, r"hx of the lstm cell must be a tuple \(h_0, c_0\), got a tuple of 1"),
    ("three", (H_0, H_0, H_0), TypeError, r"must be a tuple \(h_0, c_0\), got a tuple of 3"),
    ("None", (H_0, None), TypeError, r"c_0 must be a Tensor, got NoneType; torch.zeros is"),
    (
        "batch",
        (H_0[:, :1], H_0),
        ValueError,
        r"h_0 must be \[num_layers \* num_directions, B, P\] = \[1, 2, 5\], got \[1, 1, 5\]",
    ),
    ("width", (H_0, H_0[..., :4]), ValueError, r"c_0 must be \[.*, B, H\] = \[1, 2, 5\], got \[1, 2, 4\]"),
    ("axis", (H_0[0], H_0[0]), ValueError, r"h_0 must be .*, got \[2, 5\]; call h_0.unsqueeze\(0\) for the first axis"),
    ("dtype", (H_0, H_0.double()), ValueError, r"c_0 must be torch.float32 as the input, got torch.float64; call"),
    ("device", (H_0.to("meta"), H_0), ValueError, r"h_0 must be on cpu as the input, got meta"),
]
GRU_STATES: list[tuple[str, Any, type[Exception], str]] = [
    ("tuple", (H_0, H_0), TypeError, r"hx of the gru cell must be one tensor h_0, got a tuple of 2"),
    ("in a tuple", (H_0,), TypeError, r"hx of the gru cell must be one tensor h_0, got a tuple of 1"),
    ("number", 0.0, TypeError, r"h_0 must be a Tensor, got float"),
    ("width", H_0[..., :4], ValueError, r"h_0 must be \[.*\] = \[1, 2, 5\], got \[1, 2, 4\]"),
    ("dtype", H_0.half(), ValueError, r"h_0 must be torch.float32 as the input, got torch.float16"),
]


@pytest.mark.parametrize(
    ("make_layer", "hx", "error", "text"),
    [
        *((festina.LSTM, *row[1:]) for row in LSTM_STATES),
        *((festina.LayerNormLSTM, *row[1:]) for row in LSTM_STATES),
        *((festina.LayerNormGRU, *row[1:]) for row in GRU_STATES),
    ],
)
def test_initial_state(make_layer: Any, hx: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        make_layer(I, H)(X, hx)


def test_initial_state_of_projection_and_one_row() -> None:
    layer = festina.LSTM(I, H, proj_size=2)
    with pytest.raises(ValueError, match=r"h_0 must be \[.*, B, P\] = \[1, 2, 2\], got \[1, 2, 5\]"):
        layer(X, (H_0, H_0))
    with pytest.raises(
        ValueError, match=r"h_0 must be \[num_layers \* num_directions, P\] = \[1, 5\], got \[1, 2, 5\]"
    ):
        festina.GRU(I, H)(X[:, 0], H_0)


CELL_CALLS: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: festina.GRUCell(I, H)([0.0] * I), TypeError, r"input must be a Tensor, got list"),
    (lambda: festina.GRUCell(I, H)(X), ValueError, r"input must be 2-D, \[B, I\], or 1-D, \[I\], got 3-D \[4, 2, 3\]"),
    (lambda: festina.GRUCell(I, H)(X[0, :, :2]), ValueError, r"last axis of input must be input_size = 3, got 2"),
    (lambda: festina.GRUCell(I, H)(X[0].long()), ValueError, r"input must be torch.float32 .*, got torch.int64"),
    (lambda: festina.LSTMCell(I, H)(X[0], H_0[0]), TypeError, r"must be a tuple \(h_0, c_0\), got a Tensor"),
    (lambda: festina.GRUCell(I, H)(X[0], (H_0[0], H_0[0])), TypeError, r"must be one tensor h_0, got a tuple of 2"),
    (lambda: festina.GRUCell(I, H)(X[0], H_0), ValueError, r"h_0 must be \[B, P\] = \[2, 5\], got \[1, 2, 5\]"),
    (lambda: festina.GRUCell(I, H)(X[0, 0], H_0[0]), ValueError, r"h_0 must be \[P\] = \[5\], got \[2, 5\]"),
    (lambda: festina.GRUCell(I, H)(X[0], resets=MASK), ValueError, r"resets must be \[B\] = \[2\], got \[4, 2\]"),
    (
        lambda: festina.GRUCell(I, H)(X[0], resets=X[0, :, 0]),
        TypeError,
        r"resets must be a bool tensor, got torch.float32",
    ),
    (lambda: festina.GRU(I, H, 2).cell(2), IndexError, r"layer must lie in \[0, 2\), got 2"),
    (lambda: festina.GRU(I, H).cell(reverse=True), IndexError, r"the layer is not bidirectional"),
]


@pytest.mark.parametrize(("call", "error", "text"), CELL_CALLS, ids=[row[2][:30] for row in CELL_CALLS])
def test_cell_call(call: Callable[[], Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        call()


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64, torch.float16])
def test_autocast_casts_float32_only(dtype: torch.dtype) -> None:
    layer = festina.LayerNormLSTM(I, H)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(ValueError, match=rf"input must be torch.float32 as the parameters, got {dtype}"):
            layer(X.to(dtype))
        with pytest.raises(ValueError, match=rf"c_0 must be torch.float32 as the input, got {dtype}"):
            layer(X, (H_0, H_0.to(dtype)))
        assert layer(X.bfloat16(), (H_0.bfloat16(), H_0))[0].dtype == torch.bfloat16


# `functional.layer`.


def lstm_parameters(**changed: Any) -> dict[str, Any]:
    given = {"weight_ih": torch.zeros(4 * H, I), "weight_hh": torch.zeros(4 * H, H), **changed}
    return {name: value for name, value in given.items() if value is not None}


GRU = {"weight_ih": torch.zeros(3 * H, I), "weight_hh": torch.zeros(3 * H, H)}
FUNCTIONAL: list[tuple[str, Any, dict[str, Any], type[Exception], str]] = [
    (
        "rnn",
        lstm_parameters(),
        {},
        ValueError,
        r"cell must be one of 'lstm', 'gru', 'indrnn', 'indrnn_relu', got 'rnn'",
    ),
    ("lstm", [lstm_parameters()] * 3, {}, ValueError, r"parameters must be those of 1 or 2 directions, got 3"),
    ("lstm", [], {}, ValueError, r"parameters must be those of 1 or 2 directions, got 0"),
    ("lstm", lstm_parameters(weight_hh=None), {}, ValueError, r"parameters must hold weight_hh, got weight_ih"),
    ("lstm", {}, {}, ValueError, r"parameters must hold weight_ih, got none"),
    ("lstm", lstm_parameters(weight_hh=[1.0]), {}, TypeError, r"weight_hh must be a Tensor, got list"),
    ("lstm", lstm_parameters(weight_ih=torch.zeros(4)), {}, ValueError, r"weight_ih must be a matrix, got \[4\]"),
    ("lstm", lstm_parameters(weight_ih=torch.zeros(21, I)), {}, ValueError, r"parameters of direction 0 must be .*got"),
    (
        "lstm",
        lstm_parameters(bias_ih=torch.zeros(4 * H)),
        {},
        ValueError,
        r"direction 0 must be .*'bias_hh': \(20,\).*got",
    ),
    ("lstm", [lstm_parameters(), GRU], {}, ValueError, r"the parameters of direction 1 must be"),
    (
        "lstm",
        lstm_parameters(weight_hh=torch.zeros(4 * H, H).double()),
        {},
        ValueError,
        r"weight_hh must be torch.float32 as weight_ih, got torch.float64",
    ),
    (
        "lstm",
        lstm_parameters(),
        {"norm": "HASTE"},
        TypeError,
        r"norm must be a NormPlan, such as norms.HASTE, got 'HASTE'",
    ),
    ("lstm", lstm_parameters(), {"norm": norms.HASTE}, ValueError, r"direction 0 must be .*'gain_ih': \(20,\).*got"),
    ("lstm", lstm_parameters(), {"zoneout": -0.1}, ValueError, r"zoneout must be a probability"),
    ("lstm", lstm_parameters(), {"hx": H_0}, TypeError, r"must be a tuple \(h_0, c_0\), got a Tensor"),
    ("lstm", lstm_parameters(), {"zoneout_mask": 0.1}, TypeError, r"zoneout_mask must be a bool tensor, got float"),
    (
        "lstm",
        lstm_parameters(),
        {"zoneout_mask": X},
        TypeError,
        r"zoneout_mask must be a bool tensor, got torch.float32",
    ),
    (
        "lstm",
        lstm_parameters(),
        {"zoneout_cell_mask": MASK},
        ValueError,
        r"zoneout_cell_mask must be \[1, 4, 2, 5\] on cpu as the input, got \[4, 2\] on cpu",
    ),
    ("gru", GRU, {"zoneout_cell": 0.5}, ValueError, r"zoneout_cell must be 0: the gru cell has no c, got 0.5"),
    ("gru", GRU, {"zoneout_cell_mask": MASK}, ValueError, r"zoneout_cell_mask must be None: the gru cell has no c"),
]


@pytest.mark.parametrize(
    ("cell", "parameters", "options", "error", "text"), FUNCTIONAL, ids=[r[4][:40] for r in FUNCTIONAL]
)
def test_functional(cell: str, parameters: Any, options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        functional.layer(cell, X, parameters, **options)


# Parameters that no longer fit their layer.


@pytest.mark.parametrize("name", ["weight_hh", "gain_hh", "bias_c"])
def test_a_parameter_of_another_type_is_named(name: str) -> None:
    layer = festina.LayerNormLSTM(I, H)
    parameter = getattr(layer, f"{name}_l0")
    parameter.data = parameter.data.double()
    with pytest.raises(
        ValueError, match=rf"{name} must be torch.float32 on cpu as the input, got torch.float64 on cpu; call"
    ):
        layer(X)
    with torch.inference_mode(), pytest.raises(ValueError, match=f"{name} must be torch.float32"):
        layer.cell()(X[0])


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_parameter_of_another_shape_is_named(variant: str, backend: str) -> None:
    """Replaced by another parameter, by other data or for one call; unchecked, a kernel would read past its end."""
    layer = make(variant, I, H)
    for name, parameter in list(layer.named_parameters()):
        wrong = torch.randn([size + 1 for size in parameter.shape])
        text = rf"{name.split('_l')[0]} must be \[.*\] for input_size = .*, got \[{', '.join(map(str, wrong.shape))}\]"
        whole = parameter.data
        for is_training in (True, False):
            with backends.use(backend), torch.set_grad_enabled(is_training):
                with pytest.raises(ValueError, match=text):
                    torch.func.functional_call(layer, {name: wrong}, (X,))
                layer(X)
                parameter.data = wrong
                with pytest.raises(ValueError, match=text):
                    layer(X)
                parameter.data = whole


@pytest.mark.parametrize("is_recorded", [True, False])
def test_an_operator_with_a_parameter_of_another_shape(is_recorded: bool) -> None:
    layer = festina.LayerNormLSTM(I, H)
    layer.weight_ih_l0 = nn.Parameter(torch.randn(60, I))
    call = layer._call(layer.layer_parameters(), X.flatten(0, 1), [torch.zeros(1, B, H), torch.zeros(1, B, H)])
    with torch.set_grad_enabled(is_recorded), pytest.raises(ValueError, match=r"weight_ih must be \[20, 3\] for"):
        torch.ops.festina.recurrence(*ops.arguments(call, "cpu"))


def test_a_step_of_a_cell_with_a_parameter_of_another_shape() -> None:
    cell = festina.LayerNormLSTMCell(I, H)
    with torch.no_grad():
        state = cell(X[0], cell(X[0]))
        cell.gain_hh = nn.Parameter(torch.ones(1))
        with pytest.raises(
            ValueError, match=r"gain_hh must be \[20\] for input_size = 3 and hidden_size = 5, got \[1\]"
        ):
            cell(X[0], state)
