"""sb3-contrib's recurrent PPO on an environment whose episodes end in the middle of a rollout."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from ways import Adapt, Way

contrib = pytest.importorskip("sb3_contrib")
gymnasium = pytest.importorskip("gymnasium")
logger = pytest.importorskip("stable_baselines3.common.logger")


class Echo(gymnasium.Env):  # type: ignore[misc, name-defined]
    """The reward is 1 for the sign that was shown a step ago; an episode has 5 steps."""

    observation_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)

    def observe(self) -> Any:
        return self.np_random.choice([-1.0, 1.0], 2).astype(np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.left, self.seen = 5, self.observe()
        return self.seen, {}

    def step(self, action: Any) -> Any:
        reward = float((self.seen[0] > 0) == action)
        self.left, self.seen = self.left - 1, self.observe()
        return self.seen, reward, self.left == 0, False, {}


class Memory(logger.KVWriter):  # type: ignore[misc, name-defined]
    """Keeps what is logged."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def write(self, values: dict[str, Any], excluded: Any, step: int = 0) -> None:
        if "train/loss" in values:
            self.losses += [float(values[f"train/{name}"]) for name in ("loss", "value_loss", "entropy_loss")]

    def close(self) -> None:
        pass


def test_their_recurrent_ppo(way: Way) -> None:
    def train(adapt: Adapt) -> list[float]:
        agent = contrib.RecurrentPPO(
            "MlpLstmPolicy", Echo(), n_steps=32, batch_size=16, n_epochs=2, seed=0, device="cpu",
            policy_kwargs={"lstm_hidden_size": 12, "net_arch": [8], "enable_critic_lstm": True},
        )  # fmt: skip
        found = adapt(agent.policy)
        if found and found.new:
            agent.policy.optimizer.add_param_group({"params": list(found.new.values())})  # made in the constructor
        memory = Memory()
        agent.set_logger(logger.Logger(None, [memory]))
        agent.learn(128, log_interval=1)
        return memory.losses

    way.check(train, falls=False)
