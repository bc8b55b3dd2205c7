"""Lightning's own demo, a language model that carries its state from batch to batch, with its `Trainer`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader
from ways import QUIET, Adapt, Way, watcher

lightning = pytest.importorskip("lightning.pytorch")
demo = pytest.importorskip("lightning.pytorch.demos.lstm")

WORDS = 20


class Model(demo.LightningLSTM):  # type: ignore[misc, name-defined]
    """As theirs, but small, and without its download."""

    def __init__(self) -> None:
        super().__init__(WORDS)
        self.model = demo.SimpleLSTM(WORDS, ninp=12, nhid=16, nlayers=2, dropout=0.0)

    def prepare_data(self) -> None:
        pass


def test_their_language_model(way: Way, tmp_path: Path) -> None:
    def train(adapt: Adapt) -> list[float]:
        losses: list[float] = []
        text = (torch.arange(8 * 4 * 10) * 7 % WORDS).view(32, 10)
        batches = DataLoader(list(zip(text[:, :-1], text[:, 1:])), batch_size=4)
        trainer = lightning.Trainer(
            **QUIET, max_epochs=2, default_root_dir=tmp_path, callbacks=[watcher(lightning.Callback, adapt, losses)]
        )
        trainer.fit(Model(), batches)
        return losses

    way.check(train)
