"""pytorch-forecasting's recurrent models: their LSTM and GRU are subclasses of torch's with a mixin in front."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from ways import QUIET, Adapt, Way, fit, keep, watcher

import festina

theirs = pytest.importorskip("pytorch_forecasting")
lightning = pytest.importorskip("lightning.pytorch")
pandas = pytest.importorskip("pandas")

RNN = "pytorch_forecasting.models.nn.rnn"
MODELS: dict[str, dict[str, Any]] = {
    "RecurrentNetwork": {"cell_type": "GRU", "hidden_size": 8, "dropout": 0.0},
    "DeepAR": {"cell_type": "LSTM", "hidden_size": 8, "dropout": 0.0},
    "TemporalFusionTransformer": {"hidden_size": 8, "hidden_continuous_size": 4, "dropout": 0.0},
}


def data(shortest: int) -> Any:
    """Three series, cut into pieces of several lengths; the shortest has `shortest` steps to encode."""
    t, row = np.tile(np.arange(24), 3), np.repeat(np.arange(3), 24)
    frame = pandas.DataFrame({"row": row.astype(str), "t": t, "y": np.sin(t / 3 + row)})
    return theirs.TimeSeriesDataSet(
        frame, time_idx="t", target="y", group_ids=["row"], time_varying_unknown_reals=["y"], time_varying_known_reals=["t"],
        max_encoder_length=6, min_encoder_length=shortest, max_prediction_length=3, randomize_length=(0.2, 0.2),
        target_normalizer=theirs.GroupNormalizer(groups=["row"]),
    )  # fmt: skip


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("way", ["patched", "normalised"], indirect=True)
def test_their_models(way: Way, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lstm, gru = theirs.LSTM, theirs.GRU
    norm = way.name == "normalised"

    class LSTM(lstm, festina.LayerNormLSTM if norm else festina.LSTM):  # type: ignore[misc, valid-type]
        """Their methods, Festina's kernels."""

    class GRU(gru, festina.LayerNormGRU if norm else festina.GRU):  # type: ignore[misc, valid-type]
        """Their methods, Festina's kernels."""

    def train(adapt: Adapt) -> list[float]:
        losses: list[float] = []
        series = data(shortest=0 if model == "TemporalFusionTransformer" else 1)  # the others refuse 0
        with monkeypatch.context() as patch:
            if adapt is not keep:
                patch.setattr(f"{RNN}.LSTM", LSTM)
                patch.setattr(f"{RNN}.GRU", GRU)
                patch.setattr("pytorch_forecasting.models.temporal_fusion_transformer._tft.LSTM", LSTM)
            made = getattr(theirs, model).from_dataset(series, learning_rate=0.01, log_interval=-1, **MODELS[model])
        trainer = lightning.Trainer(**QUIET, max_epochs=2, callbacks=[watcher(lightning.Callback, adapt, losses)])
        trainer.fit(made, series.to_dataloader(batch_size=8, num_workers=0))
        return losses

    way.check(train)


def test_replace_keeps_their_classes_and_says_why() -> None:
    model = theirs.RecurrentNetwork.from_dataset(data(1), cell_type="LSTM")
    found = festina.replace(model)
    assert not found.replaced
    assert "a class of its own, which overrides forward" in found.kept["rnn"]
    assert type(model.rnn) is theirs.LSTM


def test_their_second_transformer(way: Way) -> None:
    from pytorch_forecasting.models.temporal_fusion_transformer._tft_v2 import TFT

    def train(adapt: Adapt) -> list[float]:
        sizes = {"max_encoder_length": 6, "max_prediction_length": 3, "encoder_cont": 2, "encoder_cat": 0}
        model = TFT(nn.MSELoss(), hidden_size=8, attention_head_size=2, dropout=0.0,
                    metadata=sizes | {"decoder_cont": 1, "decoder_cat": 0})  # fmt: skip
        adapt(model)
        seen = {"encoder_cont": torch.randn(4, 6, 2), "decoder_cont": torch.randn(4, 3, 1)}
        target = torch.randn(4, 3, 1)
        return fit(model, lambda: (model(seen)["prediction"] - target).square().mean())

    way.check(train)
