"""skorch's `NeuralNetClassifier`, cloned by scikit-learn first, and pickled afterwards."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from ways import Adapt, Way

skorch = pytest.importorskip("skorch")
sklearn = pytest.importorskip("sklearn.base")

T, B = 6, 24


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(3, 8, 2, batch_first=True)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[1][-1])


def test_their_classifier(way: Way) -> None:
    x = np.random.default_rng(0).normal(size=(B, T, 3)).astype(np.float32)
    kinds = (x.sum((1, 2)) > 0).astype(np.int64)

    def train(adapt: Adapt) -> list[float]:
        model = Classifier()
        adapt(model)
        made: Any = skorch.NeuralNetClassifier(
            model, criterion=nn.CrossEntropyLoss, optimizer=torch.optim.Adam, lr=0.02, max_epochs=6, batch_size=8,
            train_split=None, verbose=0, iterator_train__shuffle=False,
        )  # fmt: skip
        net = sklearn.clone(made).fit(x, kinds)
        assert net.module_ is not model
        again = pickle.loads(pickle.dumps(net))
        assert type(again.module_.rnn) is type(model.rnn)
        np.testing.assert_array_equal(again.predict_proba(x), net.predict_proba(x))
        if way.models:
            way.models[-1] = net.module_  # the one that was trained
        return [float(loss) for loss in net.history[:, "train_loss"]]

    way.check(train)
