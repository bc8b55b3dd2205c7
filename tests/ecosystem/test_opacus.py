"""opacus' private training: of a recurrent layer, with its per-sample gradients, and of a head above one that is frozen.

opacus has no sampler for a layer whose output is a tuple, and offers its own `DPLSTM` in place of `nn.LSTM`. For Festina's
layers `sampler` is one; "plain" here is `DPLSTM`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from ways import Adapt, Way, keep

import festina

opacus = pytest.importorskip("opacus")
grad_sample = pytest.importorskip("opacus.grad_sample")

T, B = 6, 12
OURS = [festina.LSTM, festina.LayerNormLSTM]


def sampler(layer: nn.Module, activations: list[Tensor], d_output: Tensor) -> dict[nn.Parameter, Tensor]:
    """The gradient of every sample, by `vmap` over them, for layers with `batch_first` whose state no loss depends on."""
    parameters: dict[str, Any] = dict(layer.named_parameters())

    def loss(values: dict[str, Tensor], x: Tensor, d_output: Tensor) -> Tensor:
        with torch.nn.utils.stateless._reparametrize_module(layer, values):
            output, _ = layer.forward(x[None])  # not by `layer(...)`, whose hooks are opacus'
        return (output[0] * d_output).sum()

    found = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, activations[0], d_output)
    return {parameters[name]: gradient for name, gradient in found.items()}


@pytest.fixture
def registered() -> Iterator[None]:
    grad_sample.register_grad_sampler(OURS)(sampler)
    yield
    for kind in OURS:
        del grad_sample.GradSampleModule.GRAD_SAMPLERS[kind]


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 8, batch_first=True)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


def train_privately(model: nn.Module) -> list[float]:
    x = torch.randn(B, T, 3, generator=torch.Generator().manual_seed(1))  # DPLSTM draws weights of its own
    rows = torch.utils.data.TensorDataset(x, (x.sum((1, 2)) > 0).long())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model, optimizer, batches = opacus.PrivacyEngine().make_private(
        module=model, optimizer=optimizer, data_loader=torch.utils.data.DataLoader(rows, batch_size=6),
        noise_multiplier=0.0, max_grad_norm=1.0, poisson_sampling=False,
    )  # fmt: skip
    losses = []
    for _ in range(6):
        for x, kinds in batches:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), kinds)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


@pytest.mark.usefixtures("registered")
def test_private_training_with_a_sampler(way: Way) -> None:
    def train(adapt: Adapt) -> list[float]:
        model = Classifier()
        adapt(model)
        if adapt is keep:
            model = opacus.validators.ModuleValidator.fix(model)
        assert not opacus.validators.ModuleValidator.validate(model)
        return train_privately(model)

    way.check(train)


@pytest.mark.parametrize("way", ["replaced", "patched"], indirect=True)
def test_private_training_above_a_frozen_layer(way: Way) -> None:
    def train(adapt: Adapt) -> list[float]:
        model = Classifier()
        adapt(model)
        model.lstm.requires_grad_(False)
        return train_privately(model)

    way.check(train)


def test_without_a_sampler_private_training_raises() -> None:
    model = Classifier()
    festina.replace(model)
    with pytest.raises(TypeError):
        train_privately(model)
