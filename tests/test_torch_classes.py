"""Layers and cells in the place of `torch.nn`'s: their classes, attributes, methods and arguments; what other code does with
`isinstance`, subclasses, `torch.fx` and a default device. PyTorch's own module tests: test_module_info.py."""

from __future__ import annotations

import copy
import inspect
import pickle
import subprocess
import sys
import textwrap
from abc import ABC
from typing import Any

import numpy as np
import pytest
import torch
from samples import assert_same
from torch import Tensor, fx, nn
from torch.nn.utils.rnn import pack_padded_sequence

import festina
from festina import checks
from festina.cells import Cell
from festina.layers import Recurrent

T, B, I, H = 5, 3, 4, 6

LAYERS: list[tuple[Any, Any]] = [
    (nn.LSTM, festina.LSTM),
    (nn.LSTM, festina.LayerNormLSTM),
    (nn.GRU, festina.GRU),
    (nn.GRU, festina.LayerNormGRU),
    (nn.RNNBase, festina.IndRNN),
    (nn.RNNBase, festina.LayerNormIndRNN),
]
CELL_OF = {nn.LSTM: nn.LSTMCell, nn.GRU: nn.GRUCell, nn.RNNBase: nn.RNNCellBase}
CELLS = [(CELL_OF[theirs], ours.cell_class) for theirs, ours in LAYERS]
PLAIN_LAYERS, PLAIN_CELLS = LAYERS[:4:2], CELLS[:4:2]


def each(*pairs: tuple[Any, Any]) -> Any:
    return pytest.mark.parametrize(("theirs", "ours"), pairs, ids=[ours.__name__ for _, ours in pairs])


def outputs(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [tensor for part in result for tensor in outputs(part)]


@each(*LAYERS, *CELLS)
def test_a_module_is_one_of_torchs(theirs: Any, ours: Any) -> None:
    module = ours(I, H)
    base = nn.RNNCellBase if "Cell" in ours.__name__ else nn.RNNBase
    assert isinstance(module, theirs)
    assert isinstance(module, base)
    others = {nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell, nn.RNNCell} - {theirs}
    assert not isinstance(module, tuple(others))


@each(*LAYERS)
def test_a_layer_has_the_attributes_of_torchs(theirs: Any, ours: Any) -> None:
    module = ours(I, H, 2, bidirectional=True)
    twin = (nn.GRU if theirs is nn.RNNBase else theirs)(I, H, 2, bidirectional=True)
    for name in set(vars(twin)) - {"_flat_weight_refs", "_flat_weights"}:
        assert hasattr(module, name), name
    if theirs is not nn.RNNBase:
        assert module.mode == twin.mode
    for name in module.__constants__:
        assert isinstance(getattr(module, name), (str, bool, int, float))
    names = [name for name, _ in module.named_parameters()]
    assert module._flat_weights_names == names
    assert [name for names in module._all_weights for name in names] == names
    assert [id(p) for group in module.all_weights for p in group] == [id(p) for p in module.parameters()]
    module.flatten_parameters()
    module._init_flat_weights()
    module._update_flat_weights()


@each(*PLAIN_LAYERS)
@pytest.mark.parametrize("options", [{}, {"bias": False, "num_layers": 2, "bidirectional": True}], ids=["one", "four"])
def test_the_flat_weights_of_a_plain_layer_are_torchs(theirs: Any, ours: Any, options: dict[str, Any]) -> None:
    module = ours(I, H, **options)
    x, L = torch.randn(T, B, I), len(module._all_weights)
    h_0 = torch.zeros(L, B, H)
    kernel, hx = (torch._VF.lstm, (h_0, h_0)) if theirs is nn.LSTM else (torch._VF.gru, h_0)
    got = kernel(x, hx, module._flat_weights, module.bias, module.num_layers, 0.0, False, module.bidirectional, False)
    assert_same(got[0], module(x)[0], 1e-4, 1e-5)

    module._flat_weights = [nn.Parameter(torch.zeros_like(p)) for p in module.parameters()]
    assert not any(p.any() for p in module.parameters())
    with pytest.raises(TypeError):
        module._flat_weights[0] = torch.ones(1)


@each(*(pair for pair in LAYERS if pair not in PLAIN_LAYERS))
def test_a_normalised_layer_gives_nobody_flat_weights(theirs: Any, ours: Any) -> None:
    with pytest.raises(RuntimeError, match="torch's own kernels would compute another layer"):
        ours(I, H)._flat_weights  # noqa: B018


@each(*LAYERS, *CELLS)
def test_what_is_listed_can_be_read(theirs: Any, ours: Any) -> None:
    """`torch.jit.trace` reads all that `dir` lists, as debuggers and documentation tools do."""
    module = ours(I, H)
    unset = [name for name in dir(module) if not hasattr(module, name)]  # raises nothing but AttributeError
    assert set(unset) <= {"qconfig", "__abstractmethods__"}


@each(*LAYERS[:4])
@pytest.mark.parametrize("batch_first", [False, True], ids=["T-B", "B-T"])
def test_methods_of_torchs_layer(theirs: Any, ours: Any, batch_first: bool) -> None:
    proj = {"proj_size": 2} if theirs is nn.LSTM else {}
    module, twin = (cls(I, H, 2, batch_first=batch_first, bidirectional=True, **proj) for cls in (ours, theirs))
    x = torch.randn(T, B, I)
    size = twin.get_expected_hidden_size(x, None)
    assert module.get_expected_hidden_size(x, None) == size
    h_0 = torch.randn(size)
    hx: Any = h_0
    if theirs is nn.LSTM:
        assert module.get_expected_cell_size(x, None) == twin.get_expected_cell_size(x, None)
        hx = (h_0, torch.randn(twin.get_expected_cell_size(x, None)))
    module.check_forward_args(x, hx, None)
    order = torch.randperm(size[1])
    assert_same(outputs(module.permute_hidden(hx, order)), outputs(twin.permute_hidden(hx, order)), 0, 0)
    packed = pack_padded_sequence(x, torch.full((x.shape[0 if batch_first else 1],), 2), batch_first)
    module.check_input(packed.data, packed.batch_sizes)
    for wrong in (x[0], x[..., 1:], x.double()):
        with pytest.raises((RuntimeError, ValueError)):
            twin.check_input(wrong, None)
        with pytest.raises(checks.MismatchError):
            module.check_input(wrong, None)
    with pytest.raises(RuntimeError):
        module.check_forward_args(x, tuple(s[:1] for s in hx) if isinstance(hx, tuple) else hx[:1], None)


@each(*LAYERS, *CELLS)
def test_parameters_are_initialised_last(theirs: Any, ours: Any) -> None:
    """A subclass with a `reset_parameters` of its own finds every option, and its values stay."""

    class Own(ours):  # type: ignore[misc]
        def reset_parameters(self) -> None:
            base = Recurrent if issubclass(ours, Recurrent) else Cell
            options = set(inspect.signature(base).parameters) - {"device", "dtype"}
            self.seen = {name: getattr(self, name) for name in options}
            for parameter in self.parameters():
                nn.init.constant_(parameter, 0.25)

    module = Own(I, H)
    assert module.seen["input_size"] == I
    assert module.seen["zoneout"] == 0
    assert all((p == 0.25).all() for p in module.parameters())


SIZES = [np.int64(4), np.int32(4), torch.tensor(4)]


@each(*PLAIN_CELLS)
@pytest.mark.parametrize("size", SIZES, ids=lambda size: type(size).__name__)
@pytest.mark.parametrize("bias", [1, 0, np.bool_(True)], ids=str)
def test_a_cell_takes_the_arguments_that_torchs_takes(theirs: Any, ours: Any, size: Any, bias: Any) -> None:
    twin, module = theirs(size, size, bias), ours(size, size, bias)
    module.load_state_dict(twin.state_dict())
    assert type(module.hidden_size) is int
    assert type(module.bias) is bool
    x = torch.randn(2, 4)
    assert_same(outputs(module(x)), outputs(twin(x)), 1e-4, 1e-5)


@each(*PLAIN_LAYERS)
def test_a_layer_takes_the_arguments_that_torchs_takes(theirs: Any, ours: Any) -> None:
    options = {"num_layers": np.int64(2), "dropout": np.float32(0.25), "bidirectional": 1}
    theirs(I, H, **options)
    twin, module = theirs(I, H, 2, dropout=0.25, bidirectional=True), ours(I, H, **options)
    module.load_state_dict(twin.state_dict())
    assert [type(getattr(module, name)) for name in options] == [int, float, bool]
    x = torch.randn(T, B, I)
    assert_same(outputs(module.eval()(x)), outputs(twin.eval()(x)), 1e-4, 1e-5)
    assert "bidirectional=True" in repr(module)


@each(*CELLS)
@pytest.mark.parametrize(("inputs", "units"), [(I, 0), (0, H), (0, 0)])
def test_a_cell_may_have_no_units_or_inputs(theirs: Any, ours: Any, inputs: int, units: int) -> None:
    """torch's cells take 0 too. Training, inference and a second step."""
    module = ours(inputs, units)
    x = torch.randn(B, inputs)
    state = module(x)
    state = module(x, state)
    assert [t.shape for t in outputs(state)] == [(B, units)] * len(outputs(state))
    torch.autograd.backward([t.sum() for t in outputs(state)])
    with torch.no_grad():
        assert_same(outputs(module(x, module(x))), [t.detach() for t in outputs(state)], 1e-5, 1e-6)


class Mixed(ABC, nn.RNNBase):
    """As in pytorch-forecasting: what a layer of any kind is to have, in front of torch's class."""

    def forward(self, x: Any, hx: Any = None, lengths: Any = None) -> Any:  # type: ignore[override]
        packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
        return super().forward(packed, hx)


@each(*PLAIN_LAYERS)
def test_a_mixin_in_front_of_a_layer(theirs: Any, ours: Any) -> None:
    class Theirs(Mixed, theirs):  # type: ignore[misc]
        pass

    class Ours(Mixed, ours):  # type: ignore[misc]
        pass

    twin, module = Theirs(I, H, 2), Ours(I, H, 2)
    module.load_state_dict(twin.state_dict())
    x, lengths = torch.randn(T, B, I), torch.tensor([2, 5, 3])
    assert_same(module(x, lengths=lengths)[0].data, twin(x, lengths=lengths)[0].data, 1e-4, 1e-5)


@each(*LAYERS)
def test_what_torchs_class_keeps_beside_is_not_copied_or_pickled(theirs: Any, ours: Any) -> None:
    module = ours(I, H)
    x = torch.randn(T, B, I)
    for other in (copy.copy(module), copy.deepcopy(module), pickle.loads(pickle.dumps(module)), module.float()):
        assert_same(outputs(other(x)), outputs(module(x)), 0, 0)
        assert not {"_flat_weights", "_flat_weight_refs"} & vars(other).keys()
    replica = module._replicate_for_data_parallel()
    assert type(replica) is ours


class Model(nn.Module):
    """A layer and a cell as a user calls them."""

    def __init__(self, layer: nn.Module, cell: nn.Module) -> None:
        super().__init__()
        self.layer, self.cell = layer, cell

    def forward(self, x: Tensor, resets: Tensor) -> Any:
        output, state = self.layer(x, lengths=[5, 3, 1], resets=resets)
        h = state[0] if isinstance(self.layer, nn.LSTM) else state
        return output.sum(), self.cell(output[-1], None), h[-1]


@pytest.mark.parametrize("index", range(len(LAYERS)), ids=[ours.__name__ for _, ours in LAYERS])
def test_fx_sees_a_module_as_a_leaf(index: int) -> None:
    model = Model(LAYERS[index][1](I, H), CELLS[index][1](H, H))
    graph = fx.symbolic_trace(model)
    assert [node.target for node in graph.graph.nodes if node.op == "call_module"] == ["layer", "cell"]
    x, resets = torch.randn(T, B, I), torch.rand(T, B) < 0.3
    assert_same(outputs(graph(x, resets)), outputs(model(x, resets)), 0, 0)


@pytest.mark.parametrize("first", ["torch._dynamo", "festina"])
def test_dynamo_traces_festinas_layers_and_no_others(first: str) -> None:
    """Whichever is imported first; subclasses of Festina's classes too."""
    program = f"""
        import sys
        import {first}
        import torch, festina
        assert ("torch._dynamo" in sys.modules) == ({first!r} != "festina")

        class Own(festina.LayerNormGRU): ...

        x = torch.randn(5, 3, 4)
        for layer in (festina.LSTM(4, 6), Own(4, 6)):
            torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="eager")(x)[0], layer(x)[0])
        assert not torch._dynamo.config.allow_rnn
        try:
            torch.compile(torch.nn.LSTM(4, 6), fullgraph=True, backend="eager")(x)
        except torch._dynamo.exc.Unsupported:
            pass
        else:
            raise AssertionError("torch traces its own LSTM now: festina/dynamo.py may go")
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True, timeout=300)


@pytest.mark.parametrize("bidirectional", [False, True], ids=["one", "both"])
def test_a_default_device_moves_no_index(bidirectional: bool) -> None:
    """Tensors that tell where steps lie follow what they belong to, not the default device."""
    layer = festina.LSTM(I, H, bidirectional=bidirectional)
    x, lengths = torch.randn(T, B, I), [5, 2, 3]
    resets = torch.rand(T, B) < 0.3
    packed = pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False)
    offsets = torch.tensor([0, 5, 7, 10])
    nested, flags = (
        torch.nested.nested_tensor_from_jagged(v, offsets) for v in (torch.randn(10, I), torch.rand(10) < 0.3)
    )

    def everything() -> list[Tensor]:
        cell = layer.cell()
        return [
            layer(x)[0],
            layer(x, lengths=lengths, resets=resets)[0],
            layer(packed)[0].data,
            layer(packed, resets=resets)[0].data,
            layer(nested, resets=flags)[0].values(),
            *cell(x[0], resets=resets[0]),
        ]

    want = everything()
    with torch.device("meta"):
        got = everything()
    assert_same(got, want, 0, 0)
