"""What a library's model is trained with: torch's layers, and Festina's in each of the three ways that users have.

Each test gives a function `train` that makes a library's model, passes it to `adapt` before an optimizer knows of it, trains it
for a few steps and returns the losses. `way.check` calls it with torch's layers and with Festina's, and compares.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import festina
from festina import norms
from festina.module import RecurrentBase
from festina.swap import Replacement

Adapt = Callable[[nn.Module], Replacement | None]
Train = Callable[[Adapt], list[float]]

CLASSES = ("LSTM", "GRU", "LSTMCell", "GRUCell")


def recurrent(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, nn.RNNBase | nn.RNNCellBase)]


@dataclass
class Way:
    """One way to bring Festina's layers into a library's model.

    Args:
        name: `replaced`: by `festina.replace`; `patched`: with the names in `torch.nn` changed while the library makes its
            model; `normalised`: by `festina.replace` with a norm.
    """

    name: str
    models: list[nn.Module] = field(default_factory=list)

    def adapt(self, model: nn.Module) -> Replacement | None:
        """Make the model's layers Festina's, if they are not; every recurrent module must be."""
        norm = norms.HASTE if self.name == "normalised" else None
        found = None if self.name == "patched" else festina.replace(model, norm)
        layers = recurrent(model)
        assert layers, "the model has no recurrent module"
        assert all(isinstance(layer, RecurrentBase) for layer in layers), found
        self.models.append(model)
        return found

    def check(self, train: Train, ratio: float = 1e-5, falls: bool = True, names: Iterable[str] = ()) -> None:
        """Train with torch's layers and in this way, and compare; with a norm, see that the gains and the loss move.

        Args:
            train: makes the model, passes it to its argument, trains, returns the losses.
            ratio: how far the losses may differ, relative to torch's. Measured: up to 2e-7 in float32, 9e-7 at Lightning's
                learning rate of 20, 4e-16 in float64; above `ratio` everywhere if outputs are wrong by a thousandth.
            falls: False: the loss of this model need not fall, as in reinforcement learning.
            names: where the library keeps torch's classes under names of its own, from `from torch.nn import ...`.
        """
        plain = run(train, keep)
        with pytest.MonkeyPatch.context() as patch:
            if self.name == "patched":
                for name in [*(f"torch.nn.{kind}" for kind in CLASSES), *names]:
                    patch.setattr(name, getattr(festina, name.rpartition(".")[2].lstrip("_")))
            losses = run(train, self.adapt)
        assert self.models
        assert len(losses) == len(plain) >= 2
        assert all(map(math.isfinite, plain + losses))
        if self.name != "normalised":
            got, want = torch.tensor(losses, dtype=torch.float64), torch.tensor(plain, dtype=torch.float64)
            torch.testing.assert_close(got, want, rtol=ratio, atol=0)
            return
        assert losses[0] != pytest.approx(plain[0], rel=1e-4)
        gains = {name: p for name, p in self.models[-1].named_parameters() if "gain_" in name}
        assert gains
        assert all((gain != 1).any() for gain in gains.values())
        if falls:
            half = len(losses) // 2
            assert median(losses[half:]) < median(losses[:half])  # of several steps, as batches differ


def keep(model: nn.Module) -> None:
    """Leave the model as it is, with torch's layers."""
    layers = recurrent(model)
    assert layers
    assert not any(isinstance(layer, RecurrentBase) for layer in layers)


def run(train: Train, adapt: Adapt) -> list[float]:
    """The losses, with the same random numbers each time."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    return train(adapt)


def watcher(callback: type[Any], adapt: Adapt, losses: list[float]) -> Any:
    """A callback of Lightning's that changes a model before its optimizer is made, and notes the loss of each step.

    Args:
        callback: the class `Callback` of the Lightning that the library uses: there are two packages of that name.
        adapt: what to do with the model.
        losses: takes the losses.
    """

    class Watcher(callback):  # type: ignore[misc]
        def setup(self, trainer: Any, module: nn.Module, stage: str) -> None:
            if stage == "fit":
                adapt(module)

        def on_train_batch_end(self, trainer: Any, module: nn.Module, outputs: Any, *_: Any) -> None:
            losses.append(outputs["loss"].item())

    return Watcher()


QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
"""Arguments of Lightning's `Trainer`: no files, no output."""


def fit(model: nn.Module, loss: Callable[[], Tensor], steps: int = 5) -> list[float]:
    """The losses of a few steps of Adam."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses
