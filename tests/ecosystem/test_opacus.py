"""opacus' private training: of a recurrent layer, with its per-sample gradients, and of a head above one that is frozen.

opacus takes no `nn.LSTM` and offers its own `DPLSTM`, which is "plain" here; `festina.compat.opacus` does that for Festina's.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from ways import Adapt, Way, keep

import festina

pytest.importorskip("opacus")

import opacus

from festina.compat.opacus import PerSample

T, B = 6, 12


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


def test_private_training(way: Way) -> None:
    def train(adapt: Adapt) -> list[float]:
        model = Classifier()
        adapt(model)
        model = opacus.validators.ModuleValidator.fix(model)
        assert not opacus.validators.ModuleValidator.validate(model)
        if adapt is not keep:
            assert isinstance(model.lstm, PerSample)
            way.models[-1] = model  # a copy
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


def test_private_training_of_what_is_not_fixed_says_what_to_do() -> None:
    model = Classifier()
    festina.replace(model)
    with pytest.raises(opacus.validators.errors.UnsupportedModuleError, match=r"ModuleValidator\.fix\(model\)"):
        train_privately(model)
