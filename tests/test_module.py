"""What layers and cells share (`festina.module`): initial values, repr, copies, state dicts and the plan in them, types and
devices, computed weights, random masks, hooks, threads and processes."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from samples import VARIANTS, assert_same, gradients, has_c, make
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.data import DataLoader, Dataset

import festina
from festina import NormPlan, functional, norms
from festina.module import plan_tensor, saved_plan

T, B, I, H = 6, 4, 3, 5
F64: dict[str, Any] = {"dtype": torch.float64}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


# Construction


def test_initial_values() -> None:
    layer = festina.LayerNormLSTM(I, 64)
    bound = 64**-0.5
    for name, p in layer.named_parameters():
        if name.startswith("gain"):
            assert_same(p.detach(), torch.ones_like(p))
        elif name == "bias_ih_l0":  # forget_bias is 1 here, and gates are i f g o
            assert_same(p.detach().view(4, 64).mean(1), torch.tensor([0.0, 1.0, 0.0, 0.0]))
        elif name.startswith("bias"):
            assert_same(p.detach(), torch.zeros_like(p))
        else:
            assert p.abs().max() <= bound
            assert p.abs().max() > 0.95 * bound


def test_forget_bias() -> None:
    def forget(**options: Any) -> Tensor:
        torch.manual_seed(2)
        layer = options.pop("layer", festina.LSTM)(I, H, **options)
        return (
            dict(layer.named_parameters()).get("bias_ih_l0", getattr(layer, "bias_joint_l0", None)).detach()[H : 2 * H]
        )

    assert_same(forget(forget_bias=2.0), forget() + 2.0, 1e-6, 1e-6)
    assert_same(forget(layer=festina.LayerNormLSTM, forget_bias=0.0), torch.zeros(H))
    assert_same(forget(norm=norms.TORCHAUDIO, forget_bias=3), torch.full((H,), 3.0))
    assert "bias_ih_l0" not in dict(festina.LSTM(I, H, bias=False, forget_bias=1.0).named_parameters())
    assert festina.LayerNormLSTM(I, H).forget_bias == 1.0
    assert festina.LSTM(I, H).forget_bias == 0.0


def test_repr() -> None:
    layer = festina.LayerNormLSTM(
        I, H, 2, False, True, 0.1, True, 2, norm=norms.FASTRNNS, zoneout=0.2, zoneout_cell=0.3, dropconnect=0.4
    )
    assert repr(layer) == (
        "LayerNormLSTM(3, 5, proj_size=2, bias=False, num_layers=2, batch_first=True, dropout=0.1, bidirectional=True, "
        "norm=norms.FASTRNNS, zoneout=0.2, zoneout_cell=0.3, dropconnect=0.4)"
    )
    assert repr(festina.GRU(I, H)) == "GRU(3, 5)"
    assert repr(festina.IndRNN(I, H, nonlinearity="relu")) == "IndRNN(3, 5, nonlinearity=relu)"
    assert repr(layer.cell(1)).startswith(
        "LayerNormLSTMCell(4, 5, proj_size=2, bias=False, norm=norms.FASTRNNS, zoneout="
    )
    assert repr(festina.LSTMCell(I, H, norm=norms.TFA.with_eps(0.5))).startswith(
        "LSTMCell(3, 5, norm=NormPlan(placement='separate', cell='carried', eps=0.5)"
    )


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("cell", [False, True], ids=["layer", "cell"])
def test_copies_and_files(variant: str, cell: bool) -> None:
    """deepcopy, pickle, torch.save of the module, and of its state dict, which weights_only=True loads."""
    module = make(variant, I, H, cell=cell, zoneout=0.1).eval()
    x = torch.randn(B, I) if cell else torch.randn(T, B, I)
    want = module(x)

    def through_file(content: Any, **options: Any) -> Any:
        file = io.BytesIO()
        torch.save(content, file)
        file.seek(0)
        return torch.load(file, **options)

    copies = [copy.deepcopy(module), pickle.loads(pickle.dumps(module)), through_file(module, weights_only=False)]
    fresh = make(variant, I, H, cell=cell, zoneout=0.1).eval()
    fresh.load_state_dict(through_file(module.state_dict(), weights_only=True))
    for other in (*copies, fresh):
        assert_same(other(x), want, 0, 0)
        assert repr(other) == repr(module)
        assert other.norm == module.norm
        assert not {p.data_ptr() for p in other.parameters()} & {p.data_ptr() for p in module.parameters()}


# State dicts


@pytest.mark.parametrize("norm", norms.PLANS)
def test_state_dict_keys(norm: str) -> None:
    """A plan adds one key; a plain layer has torch.nn's keys only."""
    plan = norms.PLANS[norm]
    is_of_gru = plan.groups == "gates|candidate" or plan.reset != "normed"
    module = (festina.GRU if is_of_gru else festina.LSTM)(I, H, norm=plan)
    keys, names = list(module.state_dict()), [name for name, _ in module.named_parameters()]
    assert keys == names + ["_extra_state"] * (norm != "NONE")
    assert len(set(names)) == len(names)


def test_state_dict_hooks_see_and_change_what_is_saved_and_loaded() -> None:
    model = nn.Sequential(make("lstm-haste", I, H))
    seen: list[str] = []

    def save(module: Any, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        for key in list(state):
            state[f"old.{key}"] = state.pop(key)

    def load(module: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
        seen.extend(state)
        for key in list(state):
            state[key.removeprefix("old.")] = state.pop(key)

    handles = [model.register_state_dict_post_hook(save), model.register_load_state_dict_pre_hook(load)]
    after: list[Any] = []
    handles.append(model[0].register_load_state_dict_post_hook(lambda module, keys: after.append(keys)))
    saved = model.state_dict()
    assert all(key.startswith("old.0.") for key in saved)

    other = make("lstm-haste", I, H)
    model[0].load_state_dict(other.state_dict())
    model.load_state_dict(saved)
    assert seen == list(saved)
    assert [keys.missing_keys for keys in after] == [[], []]
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(
        {f"old.{key}": value for key, value in model.state_dict().items()}, dict(saved), rtol=0, atol=0
    )


# The plan in the checkpoint


def saved(variant: str) -> dict[str, Tensor]:
    return dict(make(variant, I, H).state_dict())


OTHER_PLANS = [
    ("lstm-haste", "lstm-fastrnns", "norms.FASTRNNS"),  # the same keys and shapes: only the plan differs
    ("lstm-haste", "lstm", "norms.NONE"),
    ("lstm", "lstm-haste", "norms.HASTE"),
    ("lstm-icefall", "lstm-rms", "NormPlan(placement='separate', groups='gate', cell='carried', kind='rms'"),
    ("gru-haste", "gru-ba2016", "norms.BA2016_GRU"),
    ("gru", "gru-dreamer", "norms.DREAMER"),
    ("indrnn-haste", "indrnn", "norms.NONE"),
]


@pytest.mark.parametrize(("mine", "theirs", "plan"), OTHER_PLANS)
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("inside", [False, True], ids=["alone", "in a model"])
def test_a_checkpoint_under_another_plan_is_refused(
    mine: str, theirs: str, plan: str, strict: bool, inside: bool
) -> None:
    layer = make(mine, I, H)
    model = nn.ModuleDict({"body": nn.Sequential(layer)}) if inside else layer
    prefix = "body.0." if inside else ""
    before = copy.deepcopy(layer.state_dict())
    checkpoint = {prefix + name: value for name, value in saved(theirs).items()}
    with pytest.raises(RuntimeError) as caught:
        model.load_state_dict(checkpoint, strict=strict)
    text = str(caught.value)
    assert "the checkpoint was saved under the norm plan" in text
    assert f"this layer has {layer.norm}" in text
    assert f"Build the layer with norm={plan}" in text
    assert_same(layer.state_dict(), before)


ONE_FIELD_APART: dict[str, tuple[type, NormPlan, dict[str, Any]]] = {
    "placement": (festina.LSTM, norms.HASTE, {"placement": "joint"}),
    "groups": (festina.LSTM, norms.HASTE, {"groups": "gate"}),
    "cell": (festina.LSTM, norms.HASTE, {"cell": "carried"}),
    "kind": (festina.LSTM, norms.HASTE, {"kind": "rms"}),
    "eps": (festina.LSTM, norms.HASTE, {"eps": 2e-5}),
    "inner_bias": (festina.LSTM, norms.HASTE, {"inner_bias": True}),
    "inner_bias_hh": (festina.LSTM, norms.HASTE, {"inner_bias_hh": True}),
    "reset": (festina.GRU, NormPlan("joint", groups="gate"), {"reset": "product"}),
    "clip": (festina.LSTM, norms.HASTE, {"clip": 2.0}),
}


def test_a_checkpoint_is_refused_whichever_field_of_the_plan_differs() -> None:
    assert ONE_FIELD_APART.keys() == {field.name for field in dataclasses.fields(NormPlan) if field.compare}
    for kind, plan, changed in ONE_FIELD_APART.values():
        checkpoint = kind(I, H, norm=plan).state_dict()
        layer = kind(I, H, norm=dataclasses.replace(plan, name=None, **changed))
        for strict in (True, False):
            with pytest.raises(RuntimeError, match="the checkpoint was saved under the norm plan"):
                layer.load_state_dict(checkpoint, strict=strict)


def test_weights_of_torch_nn_do_not_pass_for_a_normalised_layer() -> None:
    layer, plain = festina.LayerNormLSTM(I, H), nn.LSTM(I, H).state_dict()
    before = copy.deepcopy(layer.state_dict())
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=r"saved under the norm plan NONE, this layer has HASTE"):
            layer.load_state_dict(plain, strict=strict)
    assert_same(layer.state_dict(), before)
    layer.load_state_dict({**layer.state_dict(), **plain})  # as the error suggests
    assert_same(layer.weight_ih_l0.detach(), plain["weight_ih_l0"])


def test_a_plan_that_cannot_be_read() -> None:
    layer = festina.LayerNormLSTM(I, H)
    before = copy.deepcopy(layer.state_dict())
    for broken in (
        torch.tensor(list(b'{"when": 1}'), dtype=torch.uint8),
        torch.zeros(3, dtype=torch.uint8),
        torch.full((2048,), torch.nan),
        "HASTE",
    ):
        with pytest.raises(RuntimeError, match=r"_extra_state must hold a norm plan .* cannot be read"):
            layer.load_state_dict({**before, "_extra_state": broken})
        assert_same(layer.state_dict(), before)


Arithmetic = Callable[[Tensor, Tensor, Tensor], Tensor]


def running_mean(decay: float) -> Arithmetic:
    """An EMA by hand, begun at the first tensor, that takes in the two others in turn."""

    def run(*tensors: Tensor) -> Tensor:
        value = tensors[0].clone()
        for tensor in tensors[1:] * 50:
            value.mul_(decay).add_(tensor, alpha=1 - decay)
        return value

    return run


ARITHMETIC: dict[str, Arithmetic] = {
    "mean": lambda a, b, c: torch.stack([a, b, c]).float().mean(0),
    "weighted sum": lambda a, b, c: a * 0.5 + b * 0.3 + c * 0.2,
    "sum of a hundred": lambda a, b, c: sum((t * 0.01 for t in [a] * 98 + [b, c]), start=torch.zeros_like(a)),
    "lerp": lambda a, b, c: a.lerp(b, 0.3).lerp(c, 0.01),
    "difference": lambda a, b, c: a + 0.7 * (b - c),
    "EMA 0.9": running_mean(0.9),
    "EMA 0.999": running_mean(0.999),
    "EMA 0.9999": running_mean(0.9999),
    "from zero": lambda a, b, c: (0.01 * a + 0.01 * b + 0.01 * c) / 0.03,
}
"""What is done with the state dicts of several models, tensor by tensor."""


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("arithmetic", ARITHMETIC.values(), ids=ARITHMETIC)
def test_a_plan_outlives_arithmetic_on_state_dicts(arithmetic: Arithmetic, dtype: torch.dtype) -> None:
    """Of equal plans; the result loads under the plan, and under no other one."""
    dicts = [{name: value.to(dtype) for name, value in make("lstm-haste", I, H).state_dict().items()} for _ in range(3)]
    found = {name: arithmetic(*(one[name] for one in dicts)) for name in dicts[0]}
    layer = make("lstm-haste", I, H)
    for state in (found, {name: value.float() for name, value in found.items()}):
        layer.load_state_dict(state)
        assert_same(layer.weight_ih_l0.detach(), state["weight_ih_l0"].float())
        with pytest.raises(RuntimeError, match="saved under the norm plan HASTE"):
            festina.LSTM(I, H, norm=norms.FASTRNNS).load_state_dict(state)


@pytest.mark.parametrize("arithmetic", ARITHMETIC.values(), ids=ARITHMETIC)
@pytest.mark.parametrize(
    "theirs", [norms.FASTRNNS, norms.HASTE.with_eps(1e-3), NormPlan(cell="readout", clip=1 / 3)], ids=str
)
def test_a_mixture_of_different_plans_is_refused(arithmetic: Arithmetic, theirs: NormPlan) -> None:
    ours = norms.HASTE
    for plans in ((ours, ours, theirs), (ours, theirs, ours)):
        mixture = arithmetic(*map(plan_tensor, plans))
        with pytest.raises(
            ValueError, match=r"the values of a plan must be 0 or 1, got .* layers of one plan, with weights"
        ):
            saved_plan({"_extra_state": mixture}, "")


def test_a_plan_of_bytes_loads() -> None:
    """Checkpoints held the plan as uint8 before."""
    layer = make("lstm-haste", I, H)
    text = torch.tensor(list(norms.HASTE.to_json().encode()), dtype=torch.uint8)
    layer.load_state_dict({**layer.state_dict(), "_extra_state": text})
    with pytest.raises(RuntimeError, match="saved under the norm plan HASTE"):
        festina.LSTM(I, H, norm=norms.FASTRNNS).load_state_dict({**layer.state_dict(), "_extra_state": text})


def test_a_plan_lies_on_the_cpu_and_is_small() -> None:
    with torch.device("meta"):
        plan = festina.LayerNormLSTM(I, H).state_dict()["_extra_state"]
    assert (plan.device.type, plan.dtype) == ("cpu", torch.float32)
    assert {plan_tensor(plan).shape for plan in norms.PLANS.values()} == {plan.shape}
    assert plan.nbytes <= 8192


def test_weights_with_norms_but_no_plan() -> None:
    """Weights converted by hand: strict=True reports the plan as missing, strict=False loads them."""
    layer, weights = festina.LayerNormLSTM(I, H), saved("lstm-haste")
    del weights["_extra_state"]
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "_extra_state"'):
        layer.load_state_dict(weights)
    assert layer.load_state_dict(weights, strict=False).missing_keys == ["_extra_state"]


def test_plain_plans_are_one() -> None:
    """Without a norm eps has no effect, so such layers load each other's state dicts."""
    layer = festina.LSTM(I, H, norm=NormPlan(eps=1e-3))
    layer.load_state_dict(saved("lstm"))
    festina.LSTM(I, H).load_state_dict(layer.state_dict())


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_plan_loads_its_own(variant: str) -> None:
    layer = make(variant, I, H)
    layer.load_state_dict(saved(variant))


# Types and devices


def test_devices_and_types() -> None:
    layer = festina.LayerNormLSTM(I, H, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.bfloat16)}
    layer = layer.to_empty(device="cpu").double()
    layer.reset_parameters()
    output, state = layer(torch.randn(T, B, I, **F64))
    assert {t.dtype for t in (output, *state)} == {torch.float64}
    assert layer.half()(torch.randn(T, B, I).half())[0].dtype == torch.float16


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-6), (torch.float16, 5e-3), (torch.bfloat16, 4e-2)])
@pytest.mark.parametrize("variant", ["lstm", "lstm-haste", "gru-dreamer", "indrnn-haste"])
def test_a_layer_changes_its_type(variant: str, dtype: torch.dtype, atol: float) -> None:
    torch.manual_seed(0)
    layer, x = make(variant, I, H), torch.randn(4, 2, I)
    want = layer(x)[0]
    convert: dict[torch.dtype, Callable[[Any], Any]] = {torch.float64: nn.Module.double, torch.float16: nn.Module.half}
    other = convert.get(dtype, lambda module: module.to(dtype))(copy.deepcopy(layer))
    got = other(x.to(dtype))[0]
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), want, rtol=0, atol=atol)
    got.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == dtype for p in other.parameters())
    assert_same(other.float()(x)[0], want, rtol=0, atol=atol)


def test_a_layer_of_the_meta_device_comes_to_life() -> None:
    torch.manual_seed(0)
    want = festina.LayerNormLSTM(I, H, num_layers=2)
    with torch.device("meta"):
        layer = festina.LayerNormLSTM(I, H, num_layers=2)
    assert layer(torch.empty(4, 2, I, device="meta"))[0].shape == (4, 2, H)  # shapes only
    layer.to_empty(device="cpu")
    torch.manual_seed(0)
    layer.reset_parameters()
    torch.testing.assert_close(dict(layer.state_dict()), dict(want.state_dict()), rtol=0, atol=0)

    layer = festina.LayerNormLSTM(I, H, num_layers=2, device="meta")
    layer.load_state_dict(want.state_dict(), assign=True)
    x = torch.randn(4, 2, I)
    assert torch.equal(layer(x)[0], want(x)[0])


# Computed weights


def by_hand(layer: Any, x: Tensor, **changed: Tensor) -> Tensor:
    """The output of a one-layer `layer` by `functional.layer`, with some parameters replaced."""
    parameters = {name: getattr(layer, name + "_l0") for name in layer.spec.parameter_names}
    output = functional.layer(layer.spec.cell.name, x, {**parameters, **changed}, norm=layer.norm)[0]
    assert isinstance(output, Tensor)
    return output


def doubled(layer: Any) -> None:
    class Twice(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    parametrize.register_parametrization(layer, "weight_hh_l0", Twice())


WAYS: dict[str, Callable[[Any], Any]] = {
    "parametrize": doubled,
    "weight_norm": lambda layer: parametrizations.weight_norm(layer, "weight_hh_l0"),
    "spectral_norm": lambda layer: parametrizations.spectral_norm(layer, "weight_hh_l0"),
    "prune": lambda layer: prune.random_unstructured(layer, "weight_hh_l0", amount=0.5),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("variant", ["lstm-haste", "gru"])
def test_a_computed_weight_counts_and_learns(way: str, variant: str) -> None:
    torch.manual_seed(0)
    layer, x = make(variant, I, H), torch.randn(4, 2, I)
    raw = layer.weight_hh_l0.detach().clone()
    WAYS[way](layer)
    layer.eval()  # in training spectral_norm changes its estimate at every access
    got = layer(x)[0]
    effective = layer.weight_hh_l0
    assert not isinstance(effective, nn.Parameter)
    if way != "weight_norm":  # which keeps the initial weight
        assert not torch.allclose(effective, raw)
    assert_same(got, by_hand(layer, x, weight_hh=effective), rtol=1e-5, atol=1e-6)

    got.square().sum().backward()
    originals = [p for name, p in layer.named_parameters() if "original" in name or "orig" in name]
    assert originals
    assert all(p.grad is not None and bool(p.grad.any()) for p in originals)
    again = make(variant, I, H)
    WAYS[way](again)
    again.load_state_dict(layer.state_dict())
    assert_same(again.eval()(x)[0], got, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("way", ["parametrizations", "hook"])
def test_weight_norm_on_the_recurrent_weight(way: str) -> None:
    layer, x = make("gru-haste", I, H, **F64), torch.randn(T, B, I, **F64)
    want = layer(x)[0]
    if way == "hook":
        with pytest.warns(FutureWarning):
            nn.utils.weight_norm(layer, "weight_hh_l0")
        direction = layer.weight_hh_l0_v
    else:
        nn.utils.parametrizations.weight_norm(layer, "weight_hh_l0")
        direction = layer.parametrizations.weight_hh_l0.original1
    assert_same(layer(x)[0], want)
    with torch.no_grad():
        direction *= 3.0  # its norm has no effect
    assert_same(layer(x)[0], want)
    layer(x)[0].square().sum().backward()
    assert_same((direction.grad * direction).sum(1), torch.zeros(3 * H, **F64))
    assert direction.grad.any()


def test_pruning_the_recurrent_weight() -> None:
    layer, x = make("lstm-haste", I, H, **F64), torch.randn(T, B, I, **F64)
    prune.l1_unstructured(layer, "weight_hh_l0", amount=0.5)
    assert (layer.weight_hh_l0 == 0).double().mean() == 0.5
    layer(x)[0].sum().backward()
    assert (layer.weight_hh_l0_orig.grad[layer.weight_hh_l0 == 0] == 0).all()


@pytest.mark.parametrize("way", WAYS)
def test_a_cell_of_computed_weights_says_what_to_do(way: str) -> None:
    layer = make("lstm-haste", I, H)
    WAYS[way](layer)
    with pytest.raises(TypeError, match=r"weight_hh of layer 0 is computed .* or call the layer itself with T = 1"):
        layer.cell()
    if way == "prune":
        prune.remove(layer, "weight_hh_l0")
    else:
        parametrize.remove_parametrizations(layer, "weight_hh_l0")
    x = torch.randn(1, 2, I)
    assert_same(layer.eval().cell()(x[0])[0], layer(x)[0][0], rtol=1e-5, atol=1e-6)


def test_a_cell_takes_a_parametrization_itself() -> None:
    cell, x = make("gru-haste", I, H, cell=True), torch.randn(2, I)
    want = cell(x)
    parametrizations.weight_norm(cell, "weight_ih")
    assert_same(cell(x), want, rtol=1e-5, atol=1e-6)


def test_a_parametrized_weight_cannot_be_shared() -> None:
    layer = nn.utils.parametrizations.weight_norm(festina.GRU(I, H), "weight_hh_l0")
    with pytest.raises(TypeError, match="weight_hh of layer 0 is computed by a parametrization and cannot be shared"):
        layer.cell()


# Random masks


@pytest.mark.parametrize("variant", VARIANTS)
def test_random_masks_follow_the_seed_and_end_with_training(variant: str) -> None:
    rates: dict[str, Any] = {"zoneout": 0.3, "dropconnect": 0.3, **({"zoneout_cell": 0.3} if has_c(variant) else {})}
    layer = make(variant, I, H, 2, dropout=0.3, **rates, **F64)
    x = torch.randn(T, B, I, **F64)

    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return layer(x)[0]  # type: ignore[no-any-return]

    assert_same(run(1), run(1), 0, 0)
    assert not torch.allclose(run(1), run(2))
    layer.eval()
    assert_same(run(1), run(2), 0, 0)


def test_dropconnect_at_rate_1_drops_every_recurrent_weight() -> None:
    """Of each direction of each layer, and no other parameter."""
    layer = make("lstm-haste", I, H, 2, bidirectional=True, dropconnect=1.0, **F64)
    x = torch.randn(T, B, I, **F64)
    got = layer(x)
    layer.eval()
    assert not torch.allclose(layer(x)[0], got[0])
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name.startswith("weight_hh"):
                parameter.zero_()
    assert_same(got, layer(x))


def test_zoneout_at_rate_1_keeps_every_state() -> None:
    """Of each direction of each layer."""
    layer = make("lstm-haste", I, H, 2, bidirectional=True, zoneout=1.0, zoneout_cell=1.0, **F64)
    state = (torch.randn(4, B, H, **F64), torch.randn(4, B, H, **F64))
    for _ in range(2):
        assert_same(layer(torch.randn(T, B, I, **F64), state)[1], state)
        layer.eval()


def test_dropconnect_draws_one_mask_for_the_whole_sequence() -> None:
    """IndRNN, relu: with x = 1 and h_0 = 0 every unit counts the steps if its u is kept (scaled by 2), else is 1."""
    layer = festina.IndRNN(1, 2000, nonlinearity="relu", bias=False, dropconnect=0.5, **F64)
    nn.init.ones_(layer.weight_ih_l0)
    nn.init.constant_(layer.weight_hh_l0, 0.5)
    output = layer(torch.ones(T, B, 1, **F64))[0]
    counted = torch.arange(1, T + 1, **F64).view(T, 1, 1).expand_as(output)
    kept = output[-1] == T
    assert_same(output, torch.where(kept, counted, 1.0))
    assert (kept == kept[0]).all(), "one mask for every row"
    assert abs(kept[0].double().mean().item() - 0.5) < 0.05
    again = layer(torch.ones(T, B, 1, **F64))[0][-1] == T
    assert not torch.equal(again, kept), "another forward, another mask"
    layer.weight_hh_l0.grad = None
    layer(torch.ones(T, B, 1, **F64))[0].sum().backward()
    assert 0.4 < (layer.weight_hh_l0.grad == 0).double().mean().item() < 0.6


def test_zoneout_keeps_its_share_in_training_and_takes_the_expectation_otherwise() -> None:
    """One step: where the mask is True h and c are exactly the old ones, elsewhere exactly the new ones."""
    layer = make("lstm-haste", I, 50, zoneout=0.2, zoneout_cell=0.6, **F64)
    x, old = torch.randn(1, 400, I, **F64), (torch.ones(1, 400, 50, **F64), torch.full((1, 400, 50), 2.0, **F64))
    layer.zoneout = layer.zoneout_cell = 0.0
    new = layer(x, old)[1]
    layer.zoneout, layer.zoneout_cell = 0.2, 0.6
    got = layer(x, old)[1]
    for was, now, state, rate in zip(old, new, got, (0.2, 0.6)):
        kept = state == was
        assert_same(state, torch.where(kept, was, now))
        assert abs(kept.double().mean().item() - rate) < 0.02
    layer.eval()
    expected = layer(x, old)[1]
    assert_same(expected, tuple(r * was + (1 - r) * now for was, now, r in zip(old, new, (0.2, 0.6))))


# Hooks


def test_hooks_see_what_those_of_torch_nn_see() -> None:
    torch.manual_seed(0)
    theirs = nn.LSTM(I, H)
    ours = festina.LSTM(I, H)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(4, 2, I)
    seen: dict[str, list[Any]] = {"ours": [], "theirs": []}
    for name, layer in (("ours", ours), ("theirs", theirs)):
        log = seen[name]
        layer.register_forward_pre_hook(lambda module, args, log=log: log.append(args))
        layer.register_forward_hook(lambda module, args, output, log=log: log.append(output))
        layer.register_full_backward_hook(lambda module, d_input, d_output, log=log: log.append(d_output[0]))
        layer.weight_hh_l0.register_hook(lambda gradient, log=log: log.append(gradient))
        layer(x)[0].square().sum().backward()
    assert_same(seen["ours"], seen["theirs"], rtol=1e-4, atol=1e-5)
    assert len(seen["ours"]) == 4


def test_a_forward_hook_changes_the_output() -> None:
    layer, x = make("gru-haste", I, H), torch.randn(4, 2, I)
    want = layer(x)[0]
    layer.register_forward_hook(lambda module, args, output: (output[0] + 1, output[1]))
    assert_same(layer(x)[0], want + 1, rtol=0, atol=0)


# Threads and processes


def test_threads_share_a_module() -> None:
    layer = make("lstm-haste", I, H, 2, bidirectional=True, **F64)
    inputs = [torch.randn(2 + k % 5, B, I, **F64) for k in range(24)]

    def work(x: Tensor) -> tuple[Tensor, list[Tensor]]:
        output = layer(x, lengths=[len(x), 1, 0, 2])[0]
        return output, gradients(output, layer)

    want = [work(x) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        assert_same(list(pool.map(work, inputs)), want)


def _train_in_child(layer: Any, x: Tensor) -> None:
    torch.set_num_threads(1)  # as in a DataLoader's worker: a forked child has the thread count, but not the threads
    layer(x)[0].sum().backward()
    with torch.no_grad():
        layer.weight_hh_l0 -= layer.weight_hh_l0.grad


def test_a_forked_process_trains_shared_parameters_after_use() -> None:
    layer, x = make("lstm-haste", I, H), torch.randn(4, 2, I)
    want = copy.deepcopy(layer)
    layer.share_memory()
    assert layer.weight_hh_l0.is_shared()
    layer(x)[0].sum().backward()
    layer.zero_grad()
    child = torch.multiprocessing.get_context("fork").Process(target=_train_in_child, args=(layer, x))
    child.start()
    child.join(timeout=120)
    assert child.exitcode == 0
    want(x)[0].sum().backward()
    assert_same(layer.weight_hh_l0, want.weight_hh_l0 - want.weight_hh_l0.grad, rtol=1e-5, atol=1e-6)


class Features(Dataset[Tensor]):
    """The output of a frozen layer for each row."""

    def __init__(self, layer: Any, rows: Tensor) -> None:
        self.layer, self.rows = layer, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Tensor:
        with torch.no_grad():
            output: Tensor = self.layer(self.rows[index])[0]
        return output


def test_a_layer_works_in_the_forked_workers_of_a_data_loader() -> None:
    layer, rows = make("gru-haste", I, H), torch.randn(6, 4, I)
    want = torch.stack([layer(row)[0] for row in rows])
    loader = DataLoader(Features(layer, rows), batch_size=3, num_workers=1, multiprocessing_context="fork", timeout=120)
    assert_same(torch.cat(list(loader)), want.detach(), rtol=1e-5, atol=1e-6)
