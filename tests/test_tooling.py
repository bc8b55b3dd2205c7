"""What PyTorch's tools find on layers and cells: TorchScript, eager quantisation, torch.load."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from samples import FIVE_VARIANTS, VARIANTS, assert_same, gradients, make
from torch import Tensor, nn
from torch._weights_only_unpickler import UnpicklingError

import festina
from festina import norms, spec

I, H = 3, 5
F64: dict[str, Any] = {"dtype": torch.float64}
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.(jit|ao):DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


# TorchScript


def reread(traced: Any) -> Any:
    """A traced module, written to a file and read again."""
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    return torch.jit.load(file)


class Tagger(nn.Module):
    """A model with a layer inside, as one traces it: every argument is a tensor."""

    def __init__(self, variant: str) -> None:
        super().__init__()
        self.rnn = make(variant, I, H, 2, bidirectional=True, batch_first=True, **F64)
        self.scores = nn.Linear(2 * H, 2, **F64)

    def forward(self, x: Tensor, lengths: Tensor, resets: Tensor) -> Any:
        output, state = self.rnn(x, lengths=lengths, resets=resets)
        return self.scores(output), state


@pytest.mark.parametrize("variant", FIVE_VARIANTS)
def test_a_traced_model_runs_and_learns_at_any_size_and_lengths(variant: str) -> None:
    def batch(B: int, T: int) -> tuple[Tensor, Tensor, Tensor]:
        return torch.randn(B, T, I, **F64), torch.randint(0, T + 1, (B,)), torch.rand(B, T) < 0.3

    model = Tagger(variant)
    traced = reread(torch.jit.trace(model, batch(4, 6)))
    for B, T in ((2, 9), (7, 3), (1, 1)):
        given = batch(B, T)
        got, want = traced(*given), model(*given)
        assert_same(got, want)
        assert_same(gradients(got[0], traced), gradients(want[0], model))
    x, _, resets = batch(2, 4)
    assert_same(traced(x, torch.tensor([4, 4]), resets), model(x, torch.tensor([4, 4]), resets))
    with pytest.raises(RuntimeError, match=r"lengths must lie in \[0, T\] = \[0, 4\], got \[5, 1\]"):
        traced(x, torch.tensor([5, 1]), resets)
    with pytest.raises(RuntimeError, match=r"lengths must be \[B\] = \[2\], one for each row, got \[1\]"):
        traced(x, torch.tensor([4]), resets)


def test_a_traced_layer_draws_its_masks_anew() -> None:
    layer = make("lstm-haste", I, H, zoneout=0.5, zoneout_cell=0.5, dropconnect=0.5)
    traced = reread(torch.jit.trace(layer, torch.randn(4, 2, I), check_trace=False))
    x, found = torch.randn(9, 5, I), []
    for run in (traced, layer):
        torch.manual_seed(1)
        found.append(run(x)[0])
    assert_same(found[0], found[1], 1e-6, 1e-6)
    assert not torch.equal(traced(x)[0], traced(x)[0])


class Streamer(nn.Module):
    """A loop over time, which only torch.jit.script can take."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(x.shape[1], 5)
        c = torch.zeros(x.shape[1], 5)
        for t in range(x.shape[0]):
            h, c = self.cell(x[t], (h, c))
        return h


def test_a_traced_cell_is_part_of_a_scripted_model() -> None:
    cell = make("lstm-haste", I, H, cell=True)
    traced = torch.jit.trace(cell, (torch.randn(2, I), (torch.randn(2, H), torch.randn(2, H))))
    scripted = reread(torch.jit.script(Streamer(traced)))
    x = torch.randn(7, 3, I)
    assert_same(scripted(x), Streamer(cell)(x), 1e-6, 1e-6)


@pytest.mark.parametrize("module", [festina.LayerNormLSTM(I, H), festina.GRUCell(I, H)], ids=["layer", "cell"])
def test_script_says_what_to_do(module: nn.Module) -> None:
    for given in (module, Streamer(module)):
        message = rf"torch.jit.script cannot compile {type(module).__name__}: put torch.jit.trace.* in its place"
        with pytest.raises(NotImplementedError, match=message):
            torch.jit.script(given)


# Quantisation


@pytest.mark.parametrize("name", ["LSTM", "GRU", "LayerNormLSTM"])
@pytest.mark.parametrize("by_type", [False, True], ids=["all", "by type"])
def test_quantize_dynamic_leaves_a_layer_as_it_is_and_says_so(name: str, by_type: bool) -> None:
    kind = getattr(festina, name)
    model, x = nn.Sequential(kind(I, H)), torch.randn(4, 2, I)
    with pytest.warns(UserWarning, match=f"{name} stays as it is: torch.ao.quantization has no counterpart for it"):
        quantized = torch.ao.quantization.quantize_dynamic(model, {kind} if by_type else None)
    assert type(quantized[0]) is kind
    assert_same(quantized(x), model(x), 0.0, 0.0)
    assert not hasattr(quantized[0], "qconfig")  # as of every module, once that is done
    assert vars(copy.deepcopy(quantized[0])).keys() == vars(model[0]).keys()


# torch.load


@pytest.mark.parametrize("is_cell", [False, True], ids=["layer", "cell"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_pickled_module_is_read_as_weights_only(variant: str, is_cell: bool) -> None:
    module, file = make(variant, I, H, cell=is_cell, zoneout=0.25), io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    read, x = torch.load(file, weights_only=True), torch.randn(2, I) if is_cell else torch.randn(4, 2, I)
    assert type(read) is type(module)
    assert repr(read) == repr(module)
    assert_same(read.eval()(x), module.eval()(x), 0.0, 0.0)


def test_specs_survive_a_pickle_with_the_names_of_their_plans() -> None:
    for cell in spec.CELLS.values():
        assert pickle.loads(pickle.dumps(cell)) is cell
        for plan in (*norms.PLANS.values(), norms.HASTE.with_eps(0.5)):
            if cell.admits(plan):
                layer = spec.LayerSpec(cell, plan, bias=False, directions=2)
                for read in (pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer)):
                    assert read == layer
                    assert read.token == layer.token
                    assert repr(read.plan) == repr(layer.plan)


def test_a_pickle_cannot_make_a_spec_that_was_not_checked() -> None:
    plan = norms.HASTE.to_dict()
    fields = ("lstm", plan, "HASTE", True, False, 1)
    assert spec.restore_layer(*fields).plan.name == "HASTE"
    assert spec.restore_layer("lstm", {**plan, "eps": 1e-3}, "HASTE", True, False, 1).plan.name is None
    bad = {0: ("gru2", ["lstm"], None), 1: ({**plan, "eps": -1.0}, {"gates": 1}, None), 3: (1,), 4: ("",), 5: (3, "1")}
    for at, value in ((at, value) for at, values in bad.items() for value in values):
        with pytest.raises((TypeError, ValueError)):
            spec.restore_layer(*fields[:at], value, *fields[at + 1 :])


def test_a_pickled_layer_with_a_spec_of_another_kind_is_refused() -> None:
    """An object with the names of a LayerSpec could state other sizes than the kernel of that cell reads."""

    class Forged:
        def __init__(self, **state: Any) -> None:
            self.state = {**vars(festina.LSTM(I, H)), **state}

        def __reduce__(self) -> Any:
            return object.__new__, (festina.LSTM,), self.state

    for state, name in (({"spec": nn.Identity()}, "spec"), ({"cell_spec": {"gates": ("i",)}}, "cell_spec")):
        with pytest.raises(TypeError, match=f"{name} of a pickled LSTM must be a (Layer|Cell)Spec, got"):
            pickle.loads(pickle.dumps(Forged(**state)))
    file = io.BytesIO()
    torch.save(spec.LSTM.__class__, file)
    file.seek(0)
    with pytest.raises((UnpicklingError, pickle.UnpicklingError), match=r"festina\.spec\.CellSpec"):
        torch.load(file, weights_only=True)
