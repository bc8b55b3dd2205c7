"""What PyTorch users do to any module every day: hooks, types, devices, forks, parametrizations, pruning, checkpointing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from samples import assert_same, make
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.data import DataLoader, Dataset

import festina
from festina import functional

I, H = 3, 5


def by_hand(layer: Any, x: Tensor, **changed: Tensor) -> Tensor:
    """The output of a one-layer `layer`, by the stateless entry point, with some parameters replaced."""
    parameters = {name: getattr(layer, name + "_l0") for name in layer.spec.parameter_names}
    output = functional.layer(layer.spec.cell.name, x, {**parameters, **changed}, norm=layer.norm)[0]
    assert isinstance(output, Tensor)
    return output


# State dicts


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


# Types, devices, memory


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
    assert layer(torch.empty(4, 2, I, device="meta"))[0].shape == (4, 2, H)  # shapes without a number
    layer.to_empty(device="cpu")
    torch.manual_seed(0)
    layer.reset_parameters()
    torch.testing.assert_close(dict(layer.state_dict()), dict(want.state_dict()), rtol=0, atol=0)

    layer = festina.LayerNormLSTM(I, H, num_layers=2, device="meta")
    layer.load_state_dict(want.state_dict(), assign=True)
    x = torch.randn(4, 2, I)
    assert torch.equal(layer(x)[0], want(x)[0])


def _train_in_child(layer: Any, x: Tensor) -> None:
    torch.set_num_threads(1)  # as a DataLoader's worker does: a child of a fork has its parent's threads in name only
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
    """What a frozen layer makes of each row."""

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


# Weights that are computed


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
    layer.eval()  # spectral_norm turns its own wheel in training
    got = layer(x)[0]
    effective = layer.weight_hh_l0
    assert not isinstance(effective, nn.Parameter)
    if way != "weight_norm":  # which begins with the weight as it was
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


# Hooks and modes


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
