"""gluonts' estimators of DeepAR and TFT, with their own training by Lightning, and a forecast."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ways import QUIET, Adapt, Way, watcher

pytest.importorskip("gluonts.torch")
lightning = pytest.importorskip("lightning.pytorch")
pandas = pytest.importorskip("pandas")

ESTIMATORS: dict[str, dict[str, Any]] = {
    "DeepAREstimator": {"num_layers": 2, "hidden_size": 8, "lags_seq": [1, 2, 7], "dropout_rate": 0.0},
    "TemporalFusionTransformerEstimator": {"hidden_dim": 8, "num_heads": 2, "dropout_rate": 0.0},
}


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_their_estimators(way: Way, estimator: str, tmp_path: Path) -> None:
    import gluonts.torch
    from gluonts.dataset.common import ListDataset

    start = pandas.Period("2020-01-01", "D")
    series = [{"start": start, "target": 5 + np.sin(np.arange(60) / 3 + row)} for row in range(3)]

    def train(adapt: Adapt) -> list[float]:
        losses: list[float] = []
        trainer = QUIET | {"max_epochs": 2, "callbacks": [watcher(lightning.Callback, adapt, losses)]}
        del trainer["enable_checkpointing"]  # a callback of theirs saves
        made = getattr(gluonts.torch, estimator)(
            freq="D", prediction_length=4, context_length=8, batch_size=8, num_batches_per_epoch=8, lr=0.01,
            trainer_kwargs=trainer | {"default_root_dir": tmp_path}, **ESTIMATORS[estimator],
        )  # fmt: skip
        predictor = made.train(ListDataset(series, "D"))
        torch.manual_seed(0)
        forecasts = [forecast.mean for forecast in predictor.predict(ListDataset(series, "D"))]
        assert np.isfinite(forecasts).all()
        return losses

    way.check(train)
