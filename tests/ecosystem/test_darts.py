"""darts' recurrent models, which look torch's classes up by name and train by Lightning; series are float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ways import QUIET, Adapt, Way, watcher

darts = pytest.importorskip("darts")
models = pytest.importorskip("darts.models")
lightning = pytest.importorskip("pytorch_lightning")

MODELS: dict[str, dict[str, Any]] = {
    "RNNModel": {"model": "LSTM", "hidden_dim": 8, "training_length": 14},
    "BlockRNNModel": {"model": "GRU", "hidden_dim": 8, "n_rnn_layers": 2, "output_chunk_length": 3},
    "TFTModel": {"hidden_size": 8, "output_chunk_length": 3, "add_relative_index": True},
}


@pytest.mark.parametrize("model", MODELS)
def test_their_models(way: Way, model: str, tmp_path: Path) -> None:
    series = darts.TimeSeries.from_values(np.sin(np.arange(60) / 3))

    def train(adapt: Adapt) -> list[float]:
        losses: list[float] = []
        trainer = QUIET | {"callbacks": [watcher(lightning.Callback, adapt, losses)]}
        made = getattr(models, model)(
            input_chunk_length=10, n_epochs=3, batch_size=16, dropout=0.0, random_state=0, work_dir=str(tmp_path),
            optimizer_kwargs={"lr": 0.01}, pl_trainer_kwargs=trainer, **MODELS[model],
        )  # fmt: skip
        made.fit(series)
        assert np.isfinite(made.predict(5).values()).all()
        return losses

    way.check(train, ratio=1e-12, names=["darts.models.forecasting.tft_model._LSTM"])
