"""`festina.onnx.export`: onnxruntime gives the layer's numbers at sizes that the export has not seen."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest
import samples
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.utils._pytree import tree_leaves

import festina
from festina import NormPlan, norms

pytest.importorskip("onnxscript")
ort = pytest.importorskip("onnxruntime")
import festina.onnx  # noqa: E402

I, H = 5, 6
RMS = NormPlan("separate", groups="gate", cell="carried", kind="rms")
STACK: dict[str, Any] = {"num_layers": 2, "bidirectional": True}

# What is exported, as the operators it must hold; `full` marks what only repeats another's path through the exporter.
LAYERS: list[Any] = [
    pytest.param(festina.LSTM, {"batch_first": True, **STACK}, {"LSTM"}, id="lstm-two-layers-bidirectional"),
    pytest.param(festina.GRU, {}, {"GRU"}, id="gru"),
    pytest.param(festina.IndRNN, {"nonlinearity": "relu"}, {"Scan"}, id="indrnn-relu"),
    pytest.param(festina.LayerNormLSTM, {"bidirectional": True}, {"Scan"}, id="lstm-haste-bidirectional"),
    pytest.param(festina.GRU, {"norm": norms.DREAMER, "batch_first": True}, {"Scan"}, id="gru-dreamer"),
    *(
        pytest.param(layer, options, operators, id=name, marks=pytest.mark.full)
        for name, layer, options, operators in [
            ("lstm-haste-two-layers-bidirectional", festina.LayerNormLSTM, STACK, {"Scan"}),
            ("lstm-icefall-projection", festina.LSTM, {"proj_size": 3, "norm": norms.ICEFALL}, {"Scan"}),
            ("lstm-no-bias", festina.LSTM, {"bias": False}, {"LSTM"}),
            ("lstm-projection", festina.LSTM, {"proj_size": 3}, {"Scan"}),
            ("lstm-zoneout", festina.LSTM, {"zoneout": 0.2, "zoneout_cell": 0.3}, {"Scan"}),
            ("lstm-fastrnns", festina.LSTM, {"norm": norms.FASTRNNS}, {"Scan"}),
            ("lstm-torchaudio", festina.LSTM, {"norm": norms.TORCHAUDIO, "bias": False}, {"Scan"}),
            ("lstm-rms", festina.LSTM, {"norm": RMS}, {"Scan"}),
            ("lstm-float64", festina.LSTM, {"dtype": torch.float64}, {"Scan"}),
            ("gru-two-layers-bidirectional", festina.GRU, STACK, {"GRU"}),
            ("gru-haste", festina.LayerNormGRU, {"zoneout": 0.2}, {"Scan"}),
            ("gru-ba2016", festina.GRU, {"norm": norms.BA2016_GRU, "bidirectional": True}, {"Scan"}),
            ("indrnn", festina.IndRNN, {"batch_first": True}, {"Scan"}),
            ("indrnn-haste", festina.LayerNormIndRNN, {"bidirectional": True}, {"Scan"}),
        ]
    ),
]


def stirred(module: nn.Module) -> nn.Module:
    """The module with every gain and shift away from 1 and 0, so that they count."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return module


def operators(program: torch.onnx.ONNXProgram) -> set[str]:
    """The recurrent operators of the model."""
    return {node.op_type for node in program.model.graph} & {"LSTM", "GRU", "RNN", "Scan", "Loop"}


def assert_runs_alike(path: Path, module: nn.Module, *args: Any, **kwargs: Any) -> None:
    """onnxruntime's numbers are those of the module in eval mode."""
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    inputs = [tensor.numpy() for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)]
    got = session.run(None, {given.name: value for given, value in zip(session.get_inputs(), inputs, strict=True)})
    training = module.training
    with torch.no_grad():
        want = tree_leaves(module.eval()(*args, **kwargs))
    module.train(training)
    torch.testing.assert_close([torch.from_numpy(value) for value in got], want, rtol=0, atol=1e-5)


def batch(layer: Any, T: int, B: int) -> Tensor:
    return torch.randn(*((B, T) if layer.batch_first else (T, B)), I, dtype=layer.weight_ih_l0.dtype)


@pytest.mark.parametrize(("layer_class", "options", "expected"), LAYERS)
def test_a_layer_with_lengths_runs_at_any_size(
    layer_class: Any, options: dict[str, Any], expected: set[str], tmp_path: Path
) -> None:
    layer = stirred(layer_class(I, H, **options))
    program = festina.onnx.export(
        layer, batch(layer, 4, 3), tmp_path / "layer.onnx", kwargs={"lengths": torch.tensor([2, 4, 3])}
    )
    assert operators(program) == expected
    assert layer.training
    for lengths, T in (([4, 1, 2], 4), ([1], 1), ([3, 7, 0, 7, 5], 7)):
        assert_runs_alike(tmp_path / "layer.onnx", layer, batch(layer, T, len(lengths)), lengths=torch.tensor(lengths))


def by_torch(is_open: bool, layer_class: Any, options: dict[str, Any], *marks: Any) -> Any:
    name = "-".join([layer_class.__name__, *options, "open" if is_open else "fixed"])
    return pytest.param(layer_class, options, is_open, id=name, marks=marks)


EVERY: list[dict[str, Any]] = [{}, {"zoneout": 0.2}, {"bidirectional": True, "zoneout": 0.2}]


@pytest.mark.parametrize(
    ("layer_class", "options", "is_open"),
    [
        by_torch(False, festina.LayerNormGRU, {}),
        by_torch(True, festina.GRU, {"zoneout": 0.2}),
        *(
            by_torch(o, kind, options, pytest.mark.full)
            for kind in samples.LAYERS
            for options in EVERY
            for o in (False, True)
        ),
    ],
)
def test_torchs_own_export_takes_a_layer(
    layer_class: Any, options: dict[str, Any], is_open: bool, tmp_path: Path
) -> None:
    """Whether it has one state or two, whether sizes are fixed or open, and though gradients are on."""
    layer = stirred(layer_class(I, H, **options)).eval()
    shapes = {"input": {0: Dim("T"), 1: Dim("B")}} if is_open else None
    T, B = (3, 2) if is_open else (4, 1)
    program = torch.onnx.export(layer, (batch(layer, T, B),), dynamo=True, verbose=False, dynamic_shapes=shapes)
    assert program is not None
    program.save(tmp_path / "layer.onnx")
    for sizes in ((T, B), (5, 4)) if is_open else ((T, B),):
        assert_runs_alike(tmp_path / "layer.onnx", layer, batch(layer, *sizes))


class Functional(nn.Module):
    def forward(self, input: Tensor, *parameters: Tensor) -> Any:
        names = ("weight_ih", "weight_hh")
        return festina.functional.layer("gru", input, dict(zip(names, parameters)))


@pytest.mark.filterwarnings("ignore")
def test_the_exporter_of_torchscript_is_refused() -> None:
    sequence, weights = torch.randn(4, 3, I), (torch.randn(3 * H, I), torch.randn(3 * H, H))
    for module, args in (
        (festina.LayerNormGRU(I, H), (sequence,)),
        (nn.Sequential(festina.LSTM(I, H)), (sequence,)),
        (festina.IndRNNCell(I, H), (sequence[0],)),
        (Functional(), (sequence, *weights)),
    ):
        with pytest.raises(
            RuntimeError, match=r"must be exported by festina\.onnx\.export.* but this is .*dynamo=False"
        ):
            torch.onnx.export(module, args, io.BytesIO(), dynamo=False)


@pytest.mark.slow
def test_states_and_resets_are_inputs_of_the_model(tmp_path: Path) -> None:
    layer = stirred(festina.LSTM(I, H, bidirectional=True))

    def example(T: int, B: int) -> tuple[Any, ...]:
        return batch(layer, T, B), (torch.randn(2, B, H), torch.randn(2, B, H))

    def resets(T: int, B: int) -> Tensor:
        return torch.rand(T, B) < 0.4

    program = festina.onnx.export(layer, example(4, 3), tmp_path / "layer.onnx", kwargs={"resets": resets(4, 3)})
    assert operators(program) == {"Scan"}  # the ONNX LSTM cannot begin anew on its way
    for T, B in ((4, 3), (9, 1), (1, 5)):
        assert_runs_alike(tmp_path / "layer.onnx", layer, *example(T, B), resets=resets(T, B))


class Tagger(nn.Module):
    """Words to scores, as models have their layers: inside, with lengths computed from the input."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, I)
        self.rnn = festina.LSTM(I, H, batch_first=True, bidirectional=True)
        self.scores = nn.Linear(2 * H, 3)

    def forward(self, words: Tensor) -> Tensor:
        output, _ = self.rnn(self.embedding(words), lengths=(words != 0).sum(1))
        scores: Tensor = self.scores(output)
        return scores


@pytest.mark.slow
def test_a_module_that_holds_a_layer_exports(tmp_path: Path) -> None:
    def words(*lengths: int) -> Tensor:
        rows = torch.randint(1, 7, (len(lengths), max(lengths)))
        return rows * (torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1))

    model = stirred(Tagger())
    program = festina.onnx.export(model, words(3, 5), tmp_path / "tagger.onnx")
    assert operators(program) == {"LSTM"}
    for lengths in ((5, 3), (1,), (2, 9, 4)):
        assert_runs_alike(tmp_path / "tagger.onnx", model, words(*lengths))


def test_a_cell_exports(tmp_path: Path) -> None:
    cell = stirred(festina.LayerNormGRUCell(I, H))
    festina.onnx.export(cell, (torch.randn(3, I), torch.randn(3, H)), tmp_path / "cell.onnx")
    assert_runs_alike(tmp_path / "cell.onnx", cell, torch.randn(1, I), torch.randn(1, H))


def test_an_example_of_one_row_is_refused() -> None:
    with pytest.raises(ValueError, match=r"B must be at least 2 in the example.* got \[4, 1, 5\]"):
        festina.onnx.export(festina.LSTM(I, H), torch.randn(4, 1, I))


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r"festina\.onnx\.export needs onnxscript.*pip install 'festina\[onnx\]'"):
        festina.onnx.export(festina.LSTM(I, H), torch.randn(4, 2, I))
