"""haste_pytorch's example and validation, with only the import changed.

haste's validation (validation/pytorch.py) compares its CUDA path with its TorchScript path, and LSTM and GRU with torch.nn.
Here each backend is compared with the reference, at small sizes and, once per type, at haste's: T=250, B=32, I=128, H=256.
"""

from __future__ import annotations

import re
from typing import Any
from unittest import mock

import pytest
import torch
from samples import assert_same, listed
from torch import Tensor, nn

import festina.compat.haste as haste
from festina import backends, convert, functional
from festina.call import Case

TYPES = {
    name: getattr(haste, name) for name in ("LSTM", "GRU", "IndRNN", "LayerNormLSTM", "LayerNormGRU", "LayerNormIndRNN")
}
NATIVE = {"LSTM": nn.LSTM, "GRU": nn.GRU}
SMALL, LARGE = (7, 3, 4, 6), (250, 32, 128, 256)
FAST = [name for name in backends.names() if name != "eager"]

every_type = pytest.mark.parametrize("name", TYPES)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def trained(rnn: Any) -> Any:
    """The layer with biases and gains moved away from their initial values."""
    with torch.no_grad():
        for key, parameter in rnn.named_parameters():
            if "kernel" not in key:
                parameter += 0.2 * torch.randn_like(parameter)
    return rnn


def run(rnn: Any, x: Tensor, *args: Any) -> list[Tensor]:
    """Output, states, and the gradients of the output's sum (as in haste's validation) for x and all parameters."""
    x = x.clone().requires_grad_()
    y, state = rnn(x, *args)
    gradients = torch.autograd.grad(y.sum(), [x, *rnn.parameters()], materialize_grads=True)
    return [y, *listed(state), *gradients]


def assert_near(got: list[Tensor], want: list[Tensor], ratio: float = 1e-5) -> None:
    """Compare root mean squares: over 250 steps float32 drifts by 1e-4 in single values, a wrong cell by 1e-1 in all."""
    for a, b in zip(got, want, strict=True):
        assert (a - b).detach().square().mean().sqrt() <= ratio * b.detach().square().mean().sqrt() + 1e-7


def test_readme_example() -> None:
    norm_lstm_layer = haste.LayerNormLSTM(input_size=128, hidden_size=256, zoneout=0.1, dropout=0.05)
    x = torch.rand([25, 5, 128])
    y, state = norm_lstm_layer(x)
    assert y.shape == (25, 5, 256)
    assert [s.shape for s in state] == [(1, 5, 256)] * 2


def script(name: str, p: dict[str, Tensor], x: Tensor, zoneout: float, mask: Tensor | None) -> Tensor:
    """haste's layers from their documentation, step by step, as its TorchScript path computes them."""
    h = c = torch.zeros(
        x.shape[1], p["bias"].shape[0] // {"LSTM": 4, "GRU": 3, "IndRNN": 1}[name.removeprefix("LayerNorm")]
    )

    def norm(v: Tensor, row: int) -> Tensor:
        return nn.functional.layer_norm(v, v.shape[-1:], p["gamma"][row]) if "gamma" in p else v

    outputs = []
    for t, x_t in enumerate(x):
        v = norm(x_t @ p["kernel"], 0) + p["bias"]
        old = h
        if name.endswith("LSTM"):
            i, g, f, o = (v + norm(h @ p["recurrent_kernel"], 1)).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            seen = nn.functional.layer_norm(c, c.shape[-1:], p["gamma_h"], p["beta_h"]) if "gamma" in p else c
            h = o.sigmoid() * seen.tanh()
        elif name.endswith("GRU"):
            zx, rx, gx = v.chunk(3, 1)
            zh, rh, gh = (norm(h @ p["recurrent_kernel"], 1) + p["recurrent_bias"]).chunk(3, 1)
            z = (zx + zh).sigmoid()
            h = z * h + (1 - z) * (gx + (rx + rh).sigmoid() * gh).tanh()
        else:
            h = (v + h * p["recurrent_scale"]).tanh()
        if zoneout:
            h = zoneout * old + (1 - zoneout) * h if mask is None else (h - old) * mask[t] + old
        outputs.append(h)
    return torch.stack(outputs)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("zoneout", [0.0, 0.5])
@every_type
def test_consistency_with_the_script(name: str, zoneout: float, training: bool) -> None:
    """The same seed gives haste's mask, so training can be compared as well."""
    T, B, I, H = SMALL
    rnn = trained(TYPES[name](I, H, zoneout=zoneout)).train(training)
    x = torch.rand(T, B, I)
    torch.manual_seed(3)
    mask = torch.empty(T, B, H).bernoulli_(1.0 - zoneout) if training and zoneout else None
    torch.manual_seed(3)
    y, _ = rnn(x)
    torch.testing.assert_close(y, script(name, dict(rnn.named_parameters()), x, zoneout, mask))


@pytest.mark.parametrize("zoneout", [0.0, 0.5])
@pytest.mark.parametrize("backend", FAST)
@every_type
def test_self_consistency(name: str, backend: str, zoneout: float) -> None:
    T, B, I, H = SMALL
    rnn, x = trained(TYPES[name](I, H, zoneout=zoneout)), torch.rand(T, B, I)
    if reason := backends.get(backend).can_run(Case(rnn._spec, x.dtype, x.device)):
        pytest.skip(f"{backend}: {reason}")
    found = []
    for used in (backend, "eager"):
        torch.manual_seed(0)
        with backends.use(used):
            found.append(run(rnn, x))
    assert_near(*found)


@pytest.mark.parametrize("name", NATIVE)
def test_native_consistency(name: str) -> None:
    T, B, I, H = SMALL
    native, rnn, x = NATIVE[name](I, H), TYPES[name](I, H), torch.rand(T, B, I)
    rnn.from_native_weights(native.weight_ih_l0, native.weight_hh_l0, native.bias_ih_l0, native.bias_hh_l0)
    got, want = run(rnn, x), run(native, x)
    states = 3 if name == "LSTM" else 2
    assert_near(got[: states + 1], want[: states + 1])
    back = rnn.to_native_weights()
    assert all(isinstance(p, nn.Parameter) for p in back)
    fresh = NATIVE[name](I, H)
    fresh.load_state_dict(dict(zip(fresh.state_dict(), back)))
    assert_near([fresh(x)[0]], [want[0]])


@every_type
def test_hastes_sizes(name: str) -> None:
    """Once per type. Gradients only on faster backends: the reference takes seconds for a backward pass of this size."""
    T, B, I, H = LARGE
    rnn, x = TYPES[name](I, H), torch.rand(T, B, I)
    with torch.no_grad():
        assert_near([rnn(x)[0]], [script(name, dict(rnn.named_parameters()), x, 0.0, None)], ratio=1e-4)
    if backends.select(Case(rnn._spec, x.dtype, x.device)) != "eager":
        found = run(rnn, x)
        with backends.use("eager"):
            assert_near(found, run(rnn, x), ratio=1e-4)


KERNELS = {"LSTM": 4, "GRU": 3, "IndRNN": 1}


@every_type
def test_parameters_and_their_initial_values(name: str) -> None:
    I, H = 4, 6
    G = KERNELS[name.removeprefix("LayerNorm")]
    p = dict(TYPES[name](I, H).named_parameters())
    want = {"kernel": (I, G * H), "bias": (G * H,)}
    want |= {"recurrent_scale": (H,)} if G == 1 else {"recurrent_kernel": (H, G * H)}
    want |= {"recurrent_bias": (G * H,)} if G == 3 else {}
    want |= {"gamma": (2, G * H)} if name.startswith("LayerNorm") else {}
    want |= {"gamma_h": (H,), "beta_h": (H,)} if name == "LayerNormLSTM" else {}
    assert {key: tuple(value.shape) for key, value in p.items()} == want
    assert all((p[key] == 1).all() for key in p if key.startswith("gamma"))
    assert all((p[key] == 0).all() for key in p if key in ("recurrent_bias", "beta_h"))
    bias = torch.zeros(G, H)
    if G == 4:
        bias[2] = 1.0  # gates i g f o, forget_bias 1
    assert_same(p["bias"].detach().view(G, H), bias)
    for gate in p.get("recurrent_kernel", torch.eye(H)).chunk(G, 1):
        torch.testing.assert_close(gate @ gate.t(), torch.eye(H))


def test_initial_values_come_in_hastes_order() -> None:
    torch.manual_seed(5)
    rnn = haste.GRU(4, 6)
    torch.manual_seed(5)
    kernel, recurrent = torch.empty(4, 18), torch.empty(6, 18)
    for gate in range(3):
        nn.init.xavier_uniform_(kernel[:, gate * 6 : gate * 6 + 6])
        nn.init.orthogonal_(recurrent[:, gate * 6 : gate * 6 + 6])
    assert torch.equal(rnn.kernel, kernel)
    assert torch.equal(rnn.recurrent_kernel, recurrent)


@every_type
def test_lengths_leave_the_output_unmasked(name: str) -> None:
    """The output is that of a run without lengths; each row's state is that at its length."""
    T, B, I, H = SMALL
    rnn, x, lengths = trained(TYPES[name](I, H)), torch.rand(T, B, I), torch.tensor([7, 0, 4])
    y, state = rnn(x, None, lengths)
    assert_same(y, rnn(x)[0], rtol=1e-5, atol=1e-6)
    for row, length in enumerate(lengths.tolist()):
        if length:
            _, short = rnn(x[:length, row : row + 1])
            assert_same([s[:, row] for s in listed(state)], [s[:, 0] for s in listed(short)], rtol=1e-5, atol=1e-6)
        else:
            assert all((s[:, row] == 0).all() for s in listed(state))


def test_lengths_and_zoneout_together() -> None:
    """One mask for the whole call: the output with lengths equals that without."""
    T, B, I, H = SMALL
    rnn, x = trained(haste.LayerNormLSTM(I, H, zoneout=0.5)), torch.rand(T, B, I)
    found = []
    for lengths in (None, torch.tensor([2, 7, 5])):
        torch.manual_seed(1)
        found.append(rnn(x, None, lengths)[0])
    assert_same(*found, rtol=1e-5, atol=1e-6)


@every_type
def test_a_default_device_moves_no_tensor_of_a_call(name: str) -> None:
    """Masks, lengths and states are where the input is."""
    T, B, I, H = SMALL
    rnn, x = trained(TYPES[name](I, H, zoneout=0.3)), torch.rand(T, B, I)
    found = []
    for device in ("cpu", "meta"):
        with torch.device(device):
            torch.manual_seed(1)
            found.append(run(rnn, x, None, [7, 2, 3]))
            rnn.return_state_sequence = True
            found[-1] += run(rnn, x)
            rnn.return_state_sequence = False
    assert_same(*found, rtol=0, atol=0)


@every_type
@pytest.mark.parametrize("batch_first", [False, True])
def test_return_state_sequence(name: str, batch_first: bool) -> None:
    T, B, I, H = SMALL
    rnn = trained(TYPES[name](I, H, batch_first=batch_first, return_state_sequence=True))
    x = torch.rand(T, B, I)
    y, state = rnn(x.transpose(0, 1) if batch_first else x, None, [7, 2, 3])
    y, states = (y.transpose(0, 1), [s.transpose(1, 2) for s in listed(state)]) if batch_first else (y, listed(state))
    rnn.return_state_sequence, rnn.batch_first = False, False
    assert_same(y, rnn(x)[0], rtol=1e-5, atol=1e-6)
    for t in range(T):
        _, last = rnn(x[: t + 1])
        assert_same([s[:, t] for s in states], listed(last), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["LSTM", "LayerNormLSTM"])
def test_the_state_sequence_has_the_gradients_of_single_steps(
    name: str, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And takes one call of the layer, where there were T."""
    T, B, I, H = SMALL
    rnn = trained(TYPES[name](I, H, zoneout=0.3, return_state_sequence=True)).double().train(training)
    x = torch.rand(T, B, I, dtype=torch.float64, requires_grad=True)
    start = [torch.randn(1, B, H, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    torch.manual_seed(1)
    with mock.patch.object(haste, "functional", mock.Mock(wraps=functional)) as watched:
        _, got = rnn(x, tuple(start))
    assert watched.layer.call_count == 1

    rnn.return_state_sequence = False
    torch.manual_seed(1)
    mask, state, steps = rnn._get_zoneout_mask(x), tuple(start), []
    for t in range(T):
        monkeypatch.setattr(rnn, "_get_zoneout_mask", lambda _, t=t: mask[t : t + 1])
        _, state = rnn(x[t : t + 1], state)
        steps.append(state)
    want = [torch.stack(states, 1) for states in zip(*steps)]
    assert_same(list(got), want, rtol=1e-12, atol=1e-14)
    weights, leaves = torch.randn_like(want[1]), [x, *start, *rnn.parameters()]
    gradients = [
        torch.autograd.grad((h.sum() + (weights * c).sum()), leaves, materialize_grads=True) for h, c in (got, want)
    ]
    assert_same(*gradients, rtol=1e-10, atol=1e-12)


@every_type
def test_a_state_sequence_without_steps_or_rows(name: str) -> None:
    _, _, I, H = SMALL
    rnn = TYPES[name](I, H, return_state_sequence=True)
    for T, B in ((0, 2), (3, 0)):
        assert {s.shape for s in listed(rnn(torch.zeros(T, B, I))[1])} == {(1, T, B, H)}


@every_type
@pytest.mark.parametrize("zoneout", [0.0, 0.5])
def test_hastes_inner_methods(name: str, zoneout: float) -> None:
    """What haste's forward does, from its parts, and what its validation replaces to get the other path."""
    T, B, I, H = SMALL
    rnn, x = trained(TYPES[name](I, H, batch_first=True, zoneout=zoneout)), torch.rand(B, T, I)
    torch.manual_seed(3)
    y, state = rnn(x)
    torch.manual_seed(3)
    with mock.patch.object(rnn, "_is_cuda", return_value=False):
        assert_same(rnn(x)[0], y, rtol=0, atol=0)
    torch.manual_seed(3)
    steps, shape = rnn._permute(x), [1, B, H]
    start = listed(rnn._get_state(steps, None, (shape, shape) if name.endswith("LSTM") else shape))
    assert not rnn._is_cuda()
    assert all((s == 0).all() for s in start)
    inner = [s[0] for s in start]
    states = listed(rnn._impl(steps, tuple(inner) if len(inner) > 1 else inner[0], rnn._get_zoneout_mask(steps)))
    assert_same(rnn._permute(states[0][1:]), y, rtol=1e-5, atol=1e-6)
    assert_same([s[-1:] for s in states], listed(state), rtol=1e-5, atol=1e-6)
    assert_same([s[:1] for s in states], start, rtol=0, atol=0)


def test_the_other_path_is_the_reference() -> None:
    """haste's validation replaces `_is_cuda` on a GPU; `_run` decides, so it stands in for a GPU here."""
    rnn = haste.GRU(3, 5)
    on_gpu = mock.Mock(is_cuda=True)
    for is_cuda in (True, False):
        with mock.patch.object(rnn, "_is_cuda", return_value=is_cuda):
            run, _ = rnn._run(on_gpu, torch.empty(0, 0, 0))
            assert run.is_script != is_cuda
    used = []

    def layer(*args: Any, **kwargs: Any) -> Any:
        used.append(backends.forced())
        return functional.layer(*args, **kwargs)

    with mock.patch.object(haste, "functional", mock.Mock(layer=layer)):
        run(torch.zeros(2, 1, 3), [torch.zeros(1, 1, 5)], None)
    assert used == ["eager"]


@every_type
def test_backward_in_eval_mode_and_from_a_state(name: str) -> None:
    T, B, I, H = SMALL
    rnn = trained(TYPES[name](I, H, zoneout=0.3)).double().eval()
    x = torch.rand(T, B, I, dtype=torch.float64, requires_grad=True)
    y, state = rnn(x[:3])
    z, _ = rnn(x[3:], state)
    assert_same(torch.cat([y, z]), rnn(x)[0])
    (gradient,) = torch.autograd.grad(rnn(x)[0].sum(), x)
    assert gradient.abs().sum() > 0


def test_dropout_is_dropconnect() -> None:
    rnn, x = haste.LSTM(4, 6, dropout=1.0), torch.rand(7, 3, 4)
    nn.init.zeros_(rnn.recurrent_kernel)
    assert_same(rnn(x)[0], rnn.eval()(x)[0])
    nn.init.ones_(rnn.recurrent_kernel)
    assert (rnn.train()(x)[0] - rnn.eval()(x)[0]).abs().max() > 0.1


@every_type
def test_state_dict_is_hastes_and_loads_by_name(name: str) -> None:
    T, B, I, H = SMALL
    rnn, x = trained(TYPES[name](I, H)), torch.rand(T, B, I)
    layer = convert.load(f"haste.{name}", rnn.state_dict())
    assert_same(layer(x)[0], rnn(x)[0], rtol=0, atol=0)
    fresh = TYPES[name](I, H)
    dumped = convert.dump(f"haste.{name}", layer)
    fresh.load_state_dict(dumped)
    assert_same(fresh(x)[0], rnn(x)[0], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: haste.LSTM(3, 5, dropout=1.5), "LSTM: dropout must be in [0.0, 1.0]"),
        (lambda: haste.LayerNormGRU(3, 5, zoneout=-0.1), "LayerNormGRU: zoneout must be in [0.0, 1.0]"),
        (lambda: haste.GRU(3, 5, zoneout=float("nan")), "GRU: zoneout must be in [0.0, 1.0]"),
        (lambda: haste.GRU(3, 5, dropout="0.1"), "GRU: dropout must be in [0.0, 1.0]"),  # type: ignore[arg-type]
        (lambda: haste.LSTM(3, 5, forget_bias=float("nan")), "forget_bias must be a finite number, got nan"),
        (
            lambda: haste.LSTM(3, 5)(torch.zeros(7, 2, 3), torch.zeros(1, 2, 5)),
            "RNN state has invalid structure; expected ([1, 2, 5], [1, 2, 5])",
        ),
        (
            lambda: haste.GRU(3, 5)(torch.zeros(7, 2, 3), torch.zeros(2, 5)),
            "RNN state dimension mismatch; expected 3 got 2",
        ),
        (
            lambda: haste.GRU(3, 5)(torch.zeros(7, 2, 3), torch.zeros(1, 4, 5)),
            "RNN state size mismatch on dim 1; expected 2 got 4",
        ),
    ],
)
def test_validation_messages(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
