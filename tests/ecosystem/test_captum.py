"""captum's attributions of a recurrent classifier after training: by gradients, by hooks, by occlusion."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from ways import Adapt, Way, fit

attribution = pytest.importorskip("captum.attr")

T, B, WORDS = 7, 6, 11


class Classifier(nn.Module):
    """Of sentences, as in captum's tutorials."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 5)
        self.lstm = nn.LSTM(5, 8, batch_first=True, bidirectional=True)
        self.head = nn.Linear(16, 3)

    def forward(self, words: Tensor) -> Tensor:
        output, _ = self.lstm(self.embedding(words))
        return self.head(output.mean(1))


def test_their_attributions(way: Way) -> None:
    def train(adapt: Adapt) -> list[float]:
        model = Classifier().double()
        adapt(model)
        words, kinds = torch.randint(WORDS, (B, T)), torch.randint(3, (B,))
        losses = fit(model, lambda: nn.functional.cross_entropy(model(words), kinds))
        assert losses[-1] < losses[0]
        model.eval()
        found = [
            attribution.LayerIntegratedGradients(model, model.embedding).attribute(words, target=kinds, n_steps=5),
            attribution.LayerDeepLift(model, model.embedding).attribute(words, target=kinds),
            attribution.LayerGradientXActivation(model, model.lstm).attribute(
                words, kinds, attribute_to_layer_input=True
            ),
            attribution.NeuronGradient(model.head, model.head).attribute(
                model.lstm(model.embedding(words))[0].mean(1), 1
            ),
            attribution.Occlusion(model).attribute(words, sliding_window_shapes=(1,), target=kinds),
        ]
        return [*losses, *(attributed.abs().sum().item() for attributed in found)]

    way.check(train, ratio=1e-12, falls=False)
