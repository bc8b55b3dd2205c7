"""neuralforecast's recurrent models, which fit by Lightning and then forecast."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from ways import QUIET, Adapt, Way, watcher

neuralforecast = pytest.importorskip("neuralforecast")
models = pytest.importorskip("neuralforecast.models")
lightning = pytest.importorskip("pytorch_lightning")
pandas = pytest.importorskip("pandas")

MODELS: dict[str, dict[str, Any]] = {
    "LSTM": {"encoder_hidden_size": 8, "decoder_hidden_size": 8},
    "GRU": {"encoder_hidden_size": 8, "decoder_hidden_size": 8, "recurrent": True},
    "DilatedRNN": {"cell_type": "GRU", "encoder_hidden_size": 8, "decoder_hidden_size": 8, "dilations": [[1, 2]]},
    "DeepAR": {"lstm_hidden_size": 8, "lstm_dropout": 0.0},
}


@pytest.mark.parametrize("model", MODELS)
def test_their_models(way: Way, model: str) -> None:
    days = pandas.date_range("2020-01-01", periods=60)
    series = pandas.concat(
        pandas.DataFrame({"unique_id": row, "ds": days, "y": np.sin(np.arange(60) / 3 + row)}) for row in range(3)
    )

    def train(adapt: Adapt) -> list[float]:
        losses: list[float] = []
        made = getattr(models, model)(
            h=4, input_size=12, max_steps=8, batch_size=3, windows_batch_size=16, learning_rate=0.01, random_seed=0,
            callbacks=[watcher(lightning.Callback, adapt, losses)], **MODELS[model], **QUIET,
        )  # fmt: skip
        library = neuralforecast.NeuralForecast(models=[made], freq="D")
        library.fit(series)
        assert np.isfinite(library.predict()[made.alias or model]).all()
        return losses

    way.check(train, ratio=1e-6)  # their losses say little about the layer so early
