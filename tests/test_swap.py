"""`festina.replace`: a model of torch's modules on Festina's, in place and back."""

from __future__ import annotations

import abc
import copy
import pickle
from typing import Any

import pytest
import torch
from samples import assert_same
from torch import Tensor, nn

import festina
from festina import norms

T, B = 5, 3


class Model(nn.Module):
    """Every class that is replaced, in each place where a module can be: by name, in a list, twice, behind a plain list."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.LSTM(4, 6, 2, batch_first=True, dropout=0.25, bidirectional=True)
        self.decoders = nn.ModuleList([nn.GRU(12, 6, bias=False), nn.GRU(6, 6)])
        self.again = self.decoders[1]
        self.lstm_cell, self.gru_cell = nn.LSTMCell(6, 5), nn.GRUCell(5, 5, bias=False)
        self.projected = nn.LSTM(5, 5, proj_size=3)
        self.hidden = [self.projected]

    def forward(self, x: Tensor) -> Tensor:
        x = self.encoder(x)[0].transpose(0, 1)
        for decoder in self.decoders:
            x = decoder(x)[0]
        x = self.again(x)[0]
        h, _ = self.lstm_cell(x[-1])
        steps = torch.stack([self.gru_cell(h), h])
        return self.hidden[0](steps)[0]


OURS = {
    "encoder": festina.LSTM,
    "decoders.0": festina.GRU,
    "decoders.1": festina.GRU,
    "lstm_cell": festina.LSTMCell,
    "gru_cell": festina.GRUCell,
    "projected": festina.LSTM,
}


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model()


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(x).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_a_model_computes_what_it_did(model: Model) -> None:
    x = torch.randn(B, T, 4)
    model.eval()
    before, want, d_want = copy.deepcopy(model), model(x), gradients(model, x)
    parameters = dict(model.named_parameters())

    found = festina.replace(model)
    assert {name: type(module) for name, module in found.replaced.items()} == OURS
    assert not (found.kept)
    assert not (found.new)
    assert not found.removed
    assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, p in parameters.items()}
    assert model.again is model.decoders[1]
    assert not model.encoder.training
    assert model.state_dict().keys() == before.state_dict().keys()
    assert_same(model(x), want, 1e-4, 1e-5)
    assert_same(gradients(model, x), d_want, 1e-3, 1e-4)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same(other(x), model(x), 0, 0)
    assert_same(torch.compile(model, backend="eager", fullgraph=True)(x), want, 1e-4, 1e-5)
    assert str(found).splitlines()[0] == (
        "encoder: now LSTM(4, 6, num_layers=2, batch_first=True, dropout=0.25, bidirectional=True)"
    )


@pytest.mark.parametrize("norm", [None, norms.HASTE, norms.DREAMER], ids=str)
def test_undo_gives_torchs_modules_with_what_was_learnt(model: Model, norm: Any) -> None:
    x = torch.randn(B, T, 4)
    kinds = {name: (type(module), vars(module).keys()) for name, module in model.named_modules()}
    names = [name for name, _ in model.named_parameters()]
    found = festina.replace(model, norm)
    assert all(isinstance(module, OURS[name]) for name, module in found.replaced.items())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    gradients(model, x)
    optimizer.step()
    learnt = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.double()
    found.undo()
    found.undo()
    assert {name: (type(module), vars(module).keys()) for name, module in model.named_modules()} == kinds
    assert sorted(name for name, _ in model.named_parameters()) == sorted(names)
    twin = Model().double()
    twin.load_state_dict(model.state_dict())
    assert_same(model.eval()(x.double()), twin.eval()(x.double()), 0, 0)
    for name in learnt.keys() & {*names}:
        assert_same(model.get_parameter(name), learnt[name].double(), 0, 0)


@pytest.mark.parametrize("norm", [norms.HASTE, norms.DREAMER], ids=str)
def test_a_norm_adds_gains_to_the_weights_that_there_are(model: Model, norm: Any) -> None:
    before = dict(model.named_parameters())
    festina.replace(model.encoder)  # what is Festina's already is normalised too
    found = festina.replace(model, norm)
    assert not found.kept
    assert {module.norm.placement for module in found.replaced.values()} == {norm.placement}
    after = dict(model.named_parameters())
    assert found.new.keys() == after.keys() - before.keys()
    assert found.removed.keys() == before.keys() - after.keys()
    assert bool(found.removed) == (norm is norms.DREAMER)
    assert all(after[name] is before[name] for name in before.keys() & after.keys())
    assert all((p == ("gain" in name)).all() and after[name] is p for name, p in found.new.items())
    model(torch.randn(B, T, 4)).sum().backward()
    built = festina.LayerNormGRU(6, 6, norm=norm)
    assert repr(model.again) == repr(built)
    built.load_state_dict(model.again.state_dict())


def test_a_model_that_is_a_layer_itself(model: Model) -> None:
    layer, calls = nn.GRU(4, 6), []
    layer.register_forward_hook(lambda *args: calls.append(args))
    x = torch.randn(T, B, 4)
    want = layer(x)[0]
    found = festina.replace(layer)
    assert type(layer) is festina.GRU
    assert str(found) == "(the model): now GRU(4, 6)"
    assert_same(layer(x)[0], want, 1e-4, 1e-5)
    assert len(calls) == 2


class Empty(abc.ABC):
    """A mixin, as pytorch-forecasting's: methods on top of torch's, a constructor and attributes of its own."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.calls = 0

    @abc.abstractmethod
    def zeros(self, rows: int) -> Any: ...

    def run(self, x: Tensor) -> Any:
        self.calls += 1
        return self(x, self.zeros(len(x)))


class Own(Empty, nn.LSTM):
    def __init__(self, width: int) -> None:
        super().__init__(3, width, batch_first=True)

    def zeros(self, rows: int) -> Any:
        h = torch.zeros(1, rows, self.hidden_size)
        return h, h

    def describe(self) -> str:
        return "own " + super().extra_repr()


class OwnForward(nn.GRU):
    def forward(self, input: Tensor, hx: Any = None) -> Any:
        return super().forward(2 * input, hx)


class OwnCheck(nn.LSTM):
    def permute_hidden(self, hx: Any, permutation: Any) -> Any:
        return hx


class OwnNorm(nn.LSTM):
    """`norm` is a name of Festina's."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.norm = nn.LayerNorm(4)


class OwnCell(nn.GRUCell):
    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name)


class OwnBase(nn.RNNBase):
    def __init__(self) -> None:
        super().__init__("LSTM", 3, 4)


@pytest.mark.parametrize("norm", [None, norms.HASTE], ids=str)
def test_a_class_that_only_adds_becomes_one_of_both(norm: Any) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Own(4)), torch.randn(B, T, 3)
    own: Any = model[0]
    want, keys = own.run(x), own.state_dict().keys()
    found = festina.replace(model, norm)
    assert not found.kept
    assert own is model[0]
    assert isinstance(own, Own)
    assert isinstance(own, festina.LSTM)
    assert isinstance(own, festina.LayerNormLSTM) == (norm is not None)
    assert type(own).forward is festina.LSTM.forward
    assert str(found) == "0: now " + repr(own)
    built = (festina.LayerNormLSTM if norm else festina.LSTM)(3, 4, batch_first=True)
    assert repr(own) == repr(built).replace(type(built).__name__, "Own", 1)
    assert own.describe() == "own " + built.extra_repr()
    built.load_state_dict(own.state_dict())
    want = built(x) if norm else want
    for other in (own, copy.deepcopy(own), pickle.loads(pickle.dumps(own))):
        assert_same(other.run(x), want, 1e-4, 1e-5)
        assert type(other) is type(own)
        assert other.calls == 2
    own.calls = 7
    found.undo()
    assert type(own) is Own
    assert own.calls == 7
    assert own.state_dict().keys() == keys
    assert_same(own.run(x), Own.forward(own, x), 1e-4, 1e-5)


def test_what_was_set_on_a_module_stays() -> None:
    layer: Any = nn.LSTM(3, 4)
    layer.tag, layer.head = "encoder", nn.Linear(4, 2)
    found = festina.replace(layer)
    assert (layer.tag, layer.head.out_features) == ("encoder", 2)
    layer.tag = "decoder"
    found.undo()
    assert layer.tag == "decoder"
    layer.forward = lambda x: (2 * x, None)
    found = festina.replace(layer)
    assert found.kept[""] == "it has forward of its own, in the place of torch's or of Festina's"
    assert_same(layer(torch.ones(1))[0], 2 * torch.ones(1), 0, 0)


def test_what_is_kept_has_its_reason() -> None:
    model = nn.ModuleDict(
        {
            "rnn": nn.RNN(3, 4),
            "own_forward": OwnForward(3, 4),
            "own_check": OwnCheck(3, 4),
            "own_norm": OwnNorm(3, 4),
            "own_getattr": OwnCell(3, 4),
            "own_base": OwnBase(),
            "ours": festina.LayerNormLSTM(3, 4),
            "parametrized": nn.utils.parametrizations.weight_norm(nn.LSTM(3, 4), "weight_hh_l0"),
            "normed": nn.utils.weight_norm(nn.LSTM(3, 4), "weight_hh_l0"),
        }
    )
    found = festina.replace(model)
    assert found.kept["rnn"] == "Festina has no plain RNN"
    for name, what in (("own_forward", "forward"), ("own_check", "permute_hidden"), ("own_getattr", "__getattr__")):
        assert f"is a class of its own, which overrides {what} of torch's or of Festina's" in found.kept[name]
    assert found.kept["own_norm"] == "it has norm of its own, in the place of torch's or of Festina's"
    assert found.kept["own_base"] == "OwnBase is a class of its own, and none of those that Festina has"
    assert found.kept["ours"] == "it is Festina's already"
    assert found.kept["parametrized"].startswith("ParametrizedLSTM is a class of its own")
    assert [*found.replaced] == ["normed"]  # a weight computed by a hook goes on being computed
    model["normed"](torch.randn(T, B, 3))[0].sum().backward()
    assert model["normed"].weight_hh_l0_g.grad.any()
    assert festina.replace(model, norms.HASTE).kept["ours"] == "it has a norm already, HASTE"
    assert str(festina.replace(nn.Linear(2, 2))) == "no recurrent module of torch.nn found"


def test_a_plan_that_does_not_fit_changes_nothing(model: Model) -> None:
    with pytest.raises(ValueError, match="BA2016_GRU does not fit the lstm cell"):
        festina.replace(model, norms.BA2016_GRU)
    assert type(model.encoder) is nn.LSTM
    assert type(model.gru_cell) is nn.GRUCell
    with pytest.raises(TypeError, match="norm must be a NormPlan"):
        festina.replace(model, "HASTE")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got dict"):
        festina.replace({})  # type: ignore[arg-type]
