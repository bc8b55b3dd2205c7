"""pfrl's recurrent DQN, which packs pieces of episodes of several lengths."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn
from ways import Adapt, Way

pfrl = pytest.importorskip("pfrl")

ROWS = 3


def test_their_recurrent_dqn(way: Way) -> None:
    def train(adapt: Adapt) -> list[float]:
        model = pfrl.nn.RecurrentSequential(
            nn.Linear(2, 6), nn.LSTM(6, 8), nn.GRU(8, 8), nn.Linear(8, 2), pfrl.q_functions.DiscreteActionValueHead()
        )
        adapt(model)
        explorer = pfrl.explorers.ConstantEpsilonGreedy(0.3, lambda: random.randrange(2))
        agent = pfrl.agents.DoubleDQN(
            model, torch.optim.Adam(model.parameters(), lr=0.01), pfrl.replay_buffers.EpisodicReplayBuffer(1000), 0.9, explorer,
            replay_start_size=20, minibatch_size=4, update_interval=2, target_update_interval=10,
            recurrent=True, episodic_update_len=5,
        )  # fmt: skip
        numbers = np.random.default_rng(0)
        losses: list[float] = []
        seen = numbers.normal(size=(ROWS, 2)).astype(np.float32)
        for step in range(1, 41):
            actions = agent.batch_act(list(seen))
            rewards = [float((row[0] > 0) == action) for row, action in zip(seen, actions)]
            seen = numbers.normal(size=(ROWS, 2)).astype(np.float32)
            ends = [step % length == 0 for length in (3, 4, 7)]
            agent.batch_observe(list(seen), rewards, ends, [False] * ROWS)
            losses.append(dict(agent.get_statistics())["average_loss"])
        return [loss for loss in losses if loss == loss]  # NaN before the first update

    way.check(train, falls=False)
