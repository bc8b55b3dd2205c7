"""`festina.freeze`: copies for inference alone compute what the module does, in every form, and refuse what they cannot do."""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from samples import VARIANTS, has_c, listed, make, random_state
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import festina
from festina import backends, dispatch, norms
from festina.backends import cpu
from festina.backends.cpu import abi
from festina.frozen import Frozen, FrozenCell, FrozenLayer
from festina.testing import TOLERANCES, assert_rms_close, rms_ratio

pytestmark = pytest.mark.skipif(abi.library().core is None, reason=str(abi.library().reason))

ROUNDED = ["bfloat16", "int8"]


def thawed(frozen, module):
    """The module in float64 with the frozen one's weights."""
    module = copy.deepcopy(module).double()
    with torch.no_grad():
        for index, names in enumerate(module._names):
            for name, value in zip(names, frozen.layer_parameters(index), strict=True):
                getattr(module, name).copy_(value)
    return module.eval()


def same(got, want) -> bool:
    return all(torch.equal(a, b) for a, b in zip(listed(got), listed(want), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_frozen_layer_gives_the_layers_bits(variant, dtype):
    options = {"proj_size": 5} if has_c(variant) else {}
    options |= {"zoneout": 0.2, "num_layers": 2, "bidirectional": True, "dropout": 0.5, "batch_first": True}
    layer = make(variant, 6, 9, **options).to(dtype).eval()
    frozen = festina.freeze(layer)
    x, resets = torch.randn(4, 5, 6, dtype=dtype), torch.rand(4, 5) < 0.3
    hx = random_state(layer, 4, 4)
    packed = pack_padded_sequence(x, [5, 3, 1, 2], batch_first=True, enforce_sorted=False)
    with torch.no_grad():
        for args, given in [
            ((x,), {}),
            ((x, hx), {}),
            ((x, hx), {"lengths": [5, 0, 3, 2], "resets": resets}),
            ((packed, hx), {}),
            ((x[0],), {"resets": resets[0]}),
            ((x[:, :1],), {}),
        ]:
            (got, got_state), (want, want_state) = frozen(*args, **given), layer(*args, **given)
            assert torch.equal(getattr(got, "data", got), getattr(want, "data", want))
            assert same(got_state, want_state)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_frozen_cell_takes_the_cells_steps(variant):
    cell = make(variant, 6, 9, cell=True, zoneout=0.1).eval()
    frozen = festina.freeze(cell)
    with torch.no_grad():
        for B in (1, 3, None):
            x = torch.randn(*([B] if B else []), 6)
            for hx in (None, random_state(cell, 0, B)):
                for _ in range(3):
                    assert same(frozen(x, hx), cell(x, hx))
        resets = torch.tensor([True, False, True])
        x, hx = torch.randn(3, 6), random_state(cell, 0, 3)
        assert same(frozen(x, hx, resets=resets), cell(x, hx, resets=resets))
        assert same(frozen(x.t().contiguous().t(), hx), cell(x, hx))


@pytest.mark.parametrize("weights", ROUNDED)
@pytest.mark.parametrize("variant", VARIANTS)
def test_rounded_weights_are_those_that_are_computed_with(variant, weights):
    """Layers over steps and cells step by step, and close to the unrounded ones."""
    torch.manual_seed(0)
    layer = make(variant, 33, 70).eval()
    frozen, cell = festina.freeze(layer, weights), festina.freeze(layer.cell(), weights)
    exact, x, state = thawed(frozen, layer), torch.randn(6, 2, 33), random_state(layer, 0, 2)
    with torch.no_grad():
        got, want = frozen(x)[0], exact(x.double())[0]
        assert_rms_close("output", got, want, TOLERANCES[torch.float32])
        assert 1e-4 < rms_ratio(got, layer(x)[0]) < 0.05
        wide = tuple(s.double() for s in state) if has_c(variant) else state.double()
        for step in x:
            state, wide = cell(step, state), exact.cell()(step.double(), wide)
        for ours, theirs in zip(listed(state), listed(wide), strict=True):
            assert_rms_close("state", ours, theirs, TOLERANCES[torch.float32])


def test_a_step_takes_the_short_way(monkeypatch):
    """And one that does not fit gets the errors of a cell."""
    cell = make("lstm-haste", 6, 9, cell=True)
    frozen, x, hx = festina.freeze(cell, "int8"), torch.randn(2, 6), random_state(cell, 0, 2)
    monkeypatch.setattr(dispatch, "run", None)
    monkeypatch.setattr(Frozen, "_run", None)
    frozen(x, hx)  # recorded, but nothing requires a gradient
    with torch.inference_mode():
        frozen(x, frozen(x, hx))
    monkeypatch.undo()
    wrong = [
        (x[:, :5], hx),
        (x.double(), hx),
        (x, hx[0]),
        (x, (hx[0], hx[1][:1])),
        (x, (hx[0], hx[1].double())),
        (x[None], hx),
    ]
    for args in wrong:
        with pytest.raises((TypeError, ValueError)) as theirs, torch.no_grad():
            cell(*args)
        with pytest.raises(type(theirs.value), match=re.escape(str(theirs.value))), torch.no_grad():
            frozen(*args)
    with pytest.raises(TypeError, match="input must be a Tensor"):
        frozen([1.0])


@pytest.mark.parametrize("weights", [None, *ROUNDED])
def test_a_frozen_module_survives_copies_files_threads_and_forks(weights):
    layer = make("lstm-haste", 6, 9, num_layers=2)
    frozen, x = festina.freeze(layer, weights), torch.randn(4, 2, 6)
    other = festina.freeze(make("lstm-haste", 6, 9, num_layers=2), weights)
    with torch.no_grad():
        want = frozen(x)[0]
        assert not torch.equal(other(x)[0], want)
        for parameter in layer.parameters():
            parameter.zero_()  # the frozen weights are others
        file = io.BytesIO()
        torch.save(frozen.state_dict(), file)
        file.seek(0)
        other.load_state_dict(torch.load(file))
        for twin in (frozen, other, copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))):
            assert torch.equal(twin(x)[0], want)
            assert repr(twin) == repr(frozen)
        other.load_state_dict({name: value.clone() for name, value in frozen.state_dict().items()}, assign=True)
        assert torch.equal(other(x)[0], want)
        fresh = pickle.loads(pickle.dumps(frozen))
        with ThreadPoolExecutor(4) as pool:
            assert all(torch.equal(got[0], want) for got in pool.map(lambda _: fresh(x), range(40)))
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    worker = context.Process(target=_in_fork, args=(frozen, x, queue))
    worker.start()
    got = queue.get()
    worker.join()
    assert torch.equal(torch.tensor(got), want)


def _in_fork(frozen, x, queue):
    torch.set_num_threads(1)
    with torch.no_grad():
        queue.put(frozen(x)[0].tolist())


def test_state_dicts_of_another_kind_are_refused_whole():
    layer = make("lstm-haste", 6, 9)
    frozen, x = festina.freeze(layer, "int8"), torch.randn(4, 2, 6)
    with torch.no_grad():
        want = frozen(x)[0]
        state = frozen.state_dict()
        wrong = [
            (
                make("lstm-haste", 6, 9).state_dict(),
                "weight_ih_l0 must be torch.int8, as a module with weights='int8' has saved",
            ),
            ({n: v for n, v in state.items() if n != "weight_hh_l0_scale"}, "must be loaded together, got one of them"),
            (festina.freeze(make("lstm", 6, 9), "int8").state_dict(), "saved under the norm plan NONE"),
        ]
        for saved, message in wrong:
            with pytest.raises(RuntimeError, match=re.escape(message)):
                frozen.load_state_dict(saved, strict=False)
            assert torch.equal(frozen(x)[0], want)
        state["weight_ih_l0"] = state["weight_ih_l0"].clamp(-100, 100)
        frozen.load_state_dict(state)
        with pytest.raises(ValueError, match="every row of weight_ih_l0 must reach 127 or -127 or be zero"):
            frozen(x)
    plain = make("gru", 6, 9)
    assert festina.freeze(plain).state_dict().keys() == plain.state_dict().keys()
    nn.GRU(6, 9).load_state_dict(festina.freeze(plain).state_dict())


def test_what_a_frozen_module_is_and_what_it_refuses():
    layer = make("lstm-haste", 6, 9, batch_first=True)
    frozen, x = festina.freeze(layer, "int8"), torch.randn(2, 4, 6)
    assert repr(frozen) == "FrozenLayer(LayerNormLSTM(6, 9, batch_first=True, norm=norms.HASTE), weights='int8')"
    assert repr(festina.freeze(layer.cell())) == "FrozenCell(LayerNormLSTMCell(6, 9, norm=norms.HASTE))"
    assert not frozen.training
    assert not list(frozen.parameters())
    assert {v.dtype for n, v in frozen.named_buffers() if n.startswith("weight") and "scale" not in n} == {torch.int8}
    with torch.no_grad():
        want = frozen(x)[0]
    for attempt in (
        frozen.train,
        frozen.reset_parameters,
        lambda: frozen(x.clone().requires_grad_()),
        lambda: frozen(x, tuple(s.requires_grad_() for s in random_state(layer, 1, 2))),
        lambda: festina.freeze(layer.cell())(x[:, 0].clone().requires_grad_(), random_state(layer, 0, 2)),
    ):
        with pytest.raises(RuntimeError, match=r"the module (that )?it was made from"):
            attempt()
    assert torch.equal(frozen(x)[0], want)  # recorded, but nothing requires a gradient
    for move in (frozen.half, frozen.double, lambda: frozen.to("meta"), lambda: frozen.to_empty(device="cpu")):
        with pytest.raises(RuntimeError, match=re.escape("keeps its dtype, torch.float32, and runs on the CPU")):
            move()
    cell = festina.freeze(layer.cell())
    with torch.no_grad():
        now = x[:, 0].contiguous()
        step = cell(now, random_state(layer, 0, 2))
        cell.zoneout_cell = 1.0  # a plain attribute, as in a cell
        c = torch.randn(2, 9)
        assert torch.equal(cell(now, (step[0], c))[1], c)
    assert frozen.float().cpu().eval().share_memory() is frozen
    assert torch.equal(frozen(x)[0], want)


def test_what_cannot_be_frozen_says_why(monkeypatch):
    class Own(festina.LSTM):
        def forward(self, input):
            return super().forward(input)

    def refused(error, message, module, weights=None):
        with pytest.raises(error, match=re.escape(message)):
            festina.freeze(module, weights)

    layer = make("lstm", 6, 9)
    refused(TypeError, "module must be a torch.nn.Module, got int", 3)
    refused(ValueError, "weights must be None or one of 'float32', 'bfloat16', 'int8', got 'int4'", layer, "int4")
    for weights in ("float32", *ROUNDED):
        message = (
            f"weights must be None for a module of torch.float64, as LSTM, got {weights!r}; call .float() on it before"
        )
        refused(ValueError, message, make("lstm", 6, 9).double(), weights)
    refused(
        ValueError,
        "LSTM cannot be frozen for the cpu backend: it runs on cpu only, and its weights are on meta",
        layer.to("meta"),
    )
    with monkeypatch.context() as patch:
        patch.setattr(cpu, "RARE_KERNELS", frozenset())
        refused(
            ValueError,
            "it has no kernel for a plan where the reset gate acts before the product",
            festina.GRU(3, 4, norm=norms.RESET_BEFORE),
        )
    refused(ValueError, "LazyLSTM has no weights yet; call it once before it is frozen", festina.LazyLSTM(4))
    refused(ValueError, "it is frozen already", festina.freeze(make("lstm", 6, 9)))
    refused(ValueError, "it has no units", festina.LSTMCell(3, 0))
    refused(ValueError, "the forward of Own is its own, and would be lost", Own(3, 4))
    refused(ValueError, "there is nothing to freeze in Linear: there is no recurrent module in it", nn.Linear(3, 4))
    refused(ValueError, "0: Festina has no plain RNN", nn.Sequential(nn.RNN(3, 4)))
    infinite = make("lstm", 6, 9)
    with torch.no_grad():
        infinite.weight_hh_l0[2, 3] = torch.inf
    refused(ValueError, "weight_hh_l0 must be finite to be rounded to int8", infinite, "int8")


def test_a_model_is_copied_and_all_of_it_frozen():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.rnn, self.again = nn.Linear(5, 6), nn.LSTM(6, 9), nn.ModuleList()
            self.again.append(self.rnn)
            self.cell = festina.LayerNormGRUCell(9, 9)
            self.plain = nn.RNN(9, 9)

        def forward(self, x):
            h = self.rnn(self.embed(x))[0]
            return self.plain(self.cell(h[-1], torch.zeros(2, 9))[None])[0]

    model, x = Model(), torch.randn(4, 2, 5)
    with pytest.warns(UserWarning, match="plain is not frozen: Festina has no plain RNN"):
        frozen = festina.freeze(model)
    assert (type(model.rnn), model.training, frozen.training) == (nn.LSTM, True, False)
    assert (type(frozen.rnn), type(frozen.cell)) == (FrozenLayer, FrozenCell)
    assert frozen.again[0] is frozen.rnn
    with torch.no_grad():
        torch.testing.assert_close(frozen(x), model(x), rtol=1e-5, atol=1e-6)
    with pytest.raises(RuntimeError, match="a frozen LSTM has no gradients, but its input or state requires one"):
        frozen(x)
    alone = festina.freeze(nn.GRU(3, 4, bidirectional=True))
    assert repr(alone) == "FrozenLayer(GRU(3, 4, bidirectional=True))"


@pytest.mark.parametrize(
    ("variant", "weights"),
    [("lstm-haste", None), ("gru", "int8"), ("lstm-icefall", "int8"), ("indrnn-haste", "bfloat16")],
)
def test_watched_calls_give_the_same_numbers(variant, weights):
    """Compiled in one graph, exported, profiled, by another backend, in a transform: through the one door."""
    torch._dynamo.reset()
    layer = make(variant, 6, 9)
    frozen, cell, x = festina.freeze(layer, weights), festina.freeze(layer.cell(), weights), torch.randn(4, 2, 6)
    state = random_state(layer, 0, 2)
    with torch.no_grad():
        want, step = frozen(x)[0], listed(cell(x[0], state))
        close = [
            torch.compile(frozen, backend="eager", fullgraph=True)(x)[0],
            torch.func.vmap(lambda row: frozen(row.unsqueeze(1))[0].squeeze(1), in_dims=1, out_dims=1)(x),
            torch.export.export(frozen, (x,)).module()(x)[0],
        ]
        with torch.profiler.profile():
            close.append(frozen(x)[0])
        with backends.use("eager"):
            close.append(frozen(x)[0])
        for got in close:
            torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-6)
        compiled = torch.compile(cell, backend="eager", fullgraph=True)
        for got, exact in zip(listed(compiled(x[0], state)), step):
            torch.testing.assert_close(got, exact, rtol=1e-5, atol=2e-6)
        with torch.autocast("cpu"):
            assert frozen(x)[0].dtype == torch.bfloat16
