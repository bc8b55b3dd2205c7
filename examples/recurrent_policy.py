"""A recurrent policy that needs memory: the T-maze, learned by advantage actor-critic, with episodes inside the batch.

At the start of a corridor a sign points left or right. The agent walks an empty corridor, one step at a time, to the junction,
and only its turn there is rewarded: +1 in the direction of the sign, −1 in the other. Corridors differ in length, so episodes
end at different times in different rows of the batch, and the next episode of a row begins at once. Nothing is padded and no
sequence is cut: a rollout is `[T, B]` steps in the order they happened, and `resets=` marks the first step of each episode.
Memory never leaks from one episode into the next, neither in the forward pass nor in the gradient.

The agent acts with the cell, one step at a time without gradients, and learns with the layer, the whole rollout in one call.
Both have the same parameters and give the same results.

    python examples/recurrent_policy.py
    python examples/recurrent_policy.py --longest 20 --updates 400
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributions import Categorical

import festina

DISCOUNT, ENTROPY = 0.95, 0.01


class TMaze:
    """`B` corridors at once. An observation is (sign, junction): the sign is −1 or 1 at the first step and 0 afterwards."""

    observation_size, actions = 2, 2

    def __init__(self, B: int, longest: int) -> None:
        self.longest = longest
        self.sign = torch.zeros(B)
        self.left = torch.zeros(B, dtype=torch.int64)  # steps to the junction
        self.begins = torch.ones(B, dtype=torch.bool)
        self._begin(self.begins)

    def _begin(self, rows: Tensor) -> None:
        B = len(rows)
        self.sign = torch.where(rows, torch.randint(2, (B,)) * 2.0 - 1, self.sign)
        self.left = torch.where(rows, torch.randint(2, self.longest + 1, (B,)), self.left)
        self.begins = rows

    def observe(self) -> Tensor:
        """Observations `[B, 2]`."""
        return torch.stack([self.sign * self.begins, (self.left == 0).float()], 1)

    def step(self, action: Tensor) -> tuple[Tensor, Tensor]:
        """Rewards `[B]`, and which episodes are over; a new one begins in their rows."""
        over = self.left == 0
        right = (action * 2 - 1) == self.sign
        reward = torch.where(over, right * 2.0 - 1, 0.0)
        self.left = self.left - 1
        self._begin(over)
        return reward, over


class Policy(nn.Module):
    """From observations to a distribution over actions and an estimate of the return."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.inputs = nn.Linear(TMaze.observation_size, hidden)
        self.rnn = festina.LayerNormGRU(hidden, hidden)
        self.choice = nn.Linear(hidden, TMaze.actions)
        self.value = nn.Linear(hidden, 1)

    def forward(self, observations: Tensor, h_0: Tensor, begins: Tensor) -> tuple[Categorical, Tensor]:
        """Run a whole rollout: observations `[T, B, 2]`, h_0 `[1, B, H]`, begins `[T, B]`."""
        output, _ = self.rnn(self.inputs(observations).tanh(), h_0, resets=begins)
        return Categorical(logits=self.choice(output)), self.value(output).squeeze(-1)


@dataclass
class Rollout:
    """`T` steps of every row, `[T, B]` each; `h_0 [1, B, H]` is the memory before them."""

    observations: Tensor
    begins: Tensor
    actions: Tensor
    rewards: Tensor
    over: Tensor
    h_0: Tensor


class Actor:
    """Acts with the policy's cell; its memory carries over from rollout to rollout."""

    def __init__(self, policy: Policy, maze: TMaze) -> None:
        self.policy, self.maze, self.cell = policy, maze, policy.rnn.cell()
        self.h = torch.zeros(len(maze.sign), policy.rnn.hidden_size)

    @torch.no_grad()
    def act(self, T: int) -> Rollout:
        h_0, steps = self.h.unsqueeze(0), []
        for _ in range(T):
            observation, begins = self.maze.observe(), self.maze.begins
            self.h = self.cell(self.policy.inputs(observation).tanh(), self.h, resets=begins)
            action = Categorical(logits=self.policy.choice(self.h)).sample()
            steps.append((observation, begins, action, *self.maze.step(action)))
        names = ("observations", "begins", "actions", "rewards", "over")
        return Rollout(h_0=h_0, **{name: torch.stack(part) for name, part in zip(names, zip(*steps))})


def returns(rewards: Tensor, over: Tensor, last_value: Tensor) -> Tensor:
    """The discounted return from each step to the end of its episode; `last_value` estimates the return after the rollout.

    >>> returns(torch.tensor([[0.0], [1.0], [0.0]]), torch.tensor([[False], [True], [False]]), torch.tensor([2.0])).T
    tensor([[0.9500, 1.0000, 1.9000]])
    """
    found, ahead = [], last_value
    for reward, ends in zip(reversed(rewards), reversed(over)):
        ahead = reward + DISCOUNT * ahead * ~ends
        found.append(ahead)
    return torch.stack(found[::-1])


def learn(policy: Policy, optimizer: torch.optim.Optimizer, rollout: Rollout) -> None:
    """One optimiser step of advantage actor-critic."""
    choices, values = policy(rollout.observations, rollout.h_0, rollout.begins)
    won = returns(rollout.rewards, rollout.over, values[-1].detach())  # the last step's own value is close enough
    advantage = (won - values).detach()
    loss = -(choices.log_prob(rollout.actions) * advantage).mean()
    loss = loss + 0.5 * (won - values).square().mean() - ENTROPY * choices.entropy().mean()
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    optimizer.step()


def main(argv: Sequence[str] | None = None) -> list[float]:
    """Learn, print progress, and return the share of right turns in each rollout."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=150)
    parser.add_argument("--rows", type=int, default=64, help="number of corridors")
    parser.add_argument("--steps", type=int, default=20, help="steps of a rollout")
    parser.add_argument("--longest", type=int, default=6, help="largest number of steps from the sign to the junction")
    parser.add_argument("--hidden", type=int, default=32)
    args = parser.parse_args(argv)
    torch.manual_seed(0)

    policy = Policy(args.hidden)
    actor = Actor(policy, TMaze(args.rows, args.longest))
    optimizer = torch.optim.Adam(policy.parameters(), lr=5e-3)
    right = []
    for update in range(1, args.updates + 1):
        rollout = actor.act(args.steps)
        learn(policy, optimizer, rollout)
        right.append((rollout.rewards[rollout.over] > 0).float().mean().item())
        if update % max(1, args.updates // 10) == 0:
            print(f"after {update:4} rollouts: {right[-1]:6.1%} of the turns were right")
    return right


if __name__ == "__main__":
    main()
