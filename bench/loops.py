"""Training loops of five kinds with torch.nn's recurrent modules, with Festina's in their place, and normalised.

    python bench/loops.py --threads 1
    python bench/loops.py --only decoder --out bench/results/....jsonl

A contestant is the whole step: forward, loss, backward, optimizer. The models are written for torch.nn; `festina.replace`
makes the others, so that all three run the same code. The losses of the first two are compared before anything is timed.
The ratio is time divided by that with torch.nn: below 1, Festina is faster.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import festina
from festina import norms
from festina.cli.measure import commit, machine, race
from festina.output import append, check_target


class LanguageModel(nn.Module):
    """Two LSTM layers over 35 steps of 20 rows with dropout, as in PyTorch's word_language_model; the state is carried on."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(2000, 200)
        self.rnn = nn.LSTM(200, 200, 2, dropout=0.2)
        self.out = nn.Linear(200, 2000)
        self.words = torch.randint(2000, (36, 20))
        self.state: tuple[Tensor, Tensor] | None = None

    def forward(self) -> Tensor:
        output, state = self.rnn(self.embed(self.words[:-1]), self.state)
        self.state = (state[0].detach(), state[1].detach())
        return F.cross_entropy(self.out(output).flatten(0, 1), self.words[1:].flatten())


class Forecaster(nn.Module):
    """Three LSTM layers of 40 units over 72 steps of 64 series, and a normal distribution a step, as in DeepAR."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(12, 40, 3, batch_first=True)
        self.mean, self.scale = nn.Linear(40, 1), nn.Linear(40, 1)
        self.series, self.target = torch.randn(64, 72, 12), torch.randn(64, 72, 1)

    def forward(self) -> Tensor:
        output, _ = self.rnn(self.series)
        scale = F.softplus(self.scale(output)) + 1e-3
        return F.gaussian_nll_loss(self.mean(output), self.target, scale.square())


class Policy(nn.Module):
    """An LSTM of 256 units over 64 steps of 8 environments whose episodes end meanwhile: a call a step, as in sb3-contrib."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(64, 256)
        self.head = nn.Linear(256, 5)
        self.seen = torch.randn(64, 8, 64)
        self.goes_on = (torch.rand(64, 8) > 0.02).float()

    def forward(self) -> Tensor:
        h = c = torch.zeros(1, 8, 256)
        outputs = []
        for seen, goes_on in zip(self.seen, self.goes_on):
            mask = goes_on.view(1, -1, 1)
            output, (h, c) = self.rnn(seen[None], (mask * h, mask * c))
            outputs.append(output)
        return -F.log_softmax(self.head(torch.cat(outputs)), -1)[..., 0].mean()


class Decoder(nn.Module):
    """An LSTM cell of 512 units over 30 steps of 32 rows that is fed what it has chosen, and a sum over the encoded steps."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(100, 256), nn.Linear(512 + 256, 100)
        self.cell, self.query = nn.LSTMCell(512, 512), nn.Linear(512, 256)
        self.encoded = torch.randn(32, 60, 256)

    def forward(self) -> Tensor:
        symbol, context, state = torch.zeros(32, dtype=torch.long), self.encoded.mean(1), None
        losses = []
        for _ in range(30):
            h, _ = state = self.cell(torch.cat([self.embed(symbol), context], -1), state)
            weights = torch.einsum("bte,be->bt", self.encoded, self.query(h)).softmax(-1)
            context = torch.einsum("bt,bte->be", weights, self.encoded)
            logits = self.out(torch.cat([h, context], -1))
            symbol = logits.argmax(-1)
            losses.append(F.cross_entropy(logits, torch.full_like(symbol, 7)))
        return torch.stack(losses).sum()


class WorldModel(nn.Module):
    """A GRU cell of 512 units over 50 steps of 16 rows between dense layers, which imagines its next input, as in Dreamer."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.cell, self.prior = nn.Linear(32 + 6, 512), nn.GRUCell(512, 512), nn.Linear(512, 32)
        self.actions = torch.randn(50, 16, 6)

    def forward(self) -> Tensor:
        h, z, total = torch.zeros(16, 512), torch.zeros(16, 32), torch.zeros(())
        for action in self.actions:
            h = self.cell(F.silu(self.into(torch.cat([z, action], -1))), h)
            z = torch.tanh(self.prior(h))
            total = total + z.square().mean()
        return total


LOOPS: dict[str, type[nn.Module]] = {
    "language model": LanguageModel,
    "forecaster": Forecaster,
    "policy": Policy,
    "decoder": Decoder,
    "world model": WorldModel,
}


def step(model: nn.Module) -> Callable[[], Tensor]:
    """One step of training, which gives the loss."""
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)

    def work() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = model()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return work


def contestants(kind: type[nn.Module]) -> dict[str, Callable[[], Tensor]]:
    """One step with torch.nn's modules, with Festina's, and normalised ones.

    Raises:
        AssertionError: the first two differ.
    """
    torch.manual_seed(0)
    theirs = kind()
    ours, normalised = copy.deepcopy(theirs), copy.deepcopy(theirs)
    festina.replace(ours)
    festina.replace(normalised, norms.HASTE)
    found = {"torch.nn": step(theirs), "festina": step(ours), "festina, normalised": step(normalised)}
    losses = []
    for who in ("festina", "torch.nn"):
        torch.manual_seed(1)
        losses.append(torch.stack([found[who]() for _ in range(3)]))
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", choices=LOOPS, nargs="+", default=[*LOOPS], metavar="LOOP", help=", ".join(LOOPS))
    parser.add_argument("--seconds", type=float, default=20.0, help="for each loop (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="append a JSON line for each loop")
    args = parser.parse_args(argv)
    if args.out:
        check_target(args.out)
    torch.set_num_threads(args.threads)
    for name in args.only:
        found = race(contestants(LOOPS[name]), args.seconds)
        ratios = {who: (1 / r.median, 1 / r.p80, 1 / r.p20) for who, r in found.ratio.items()}
        row = {
            "case": name,
            "median_us": {who: round(spread.median, 1) for who, spread in found.time_us.items()},
            "ratio_to_torch": {who: [round(value, 4) for value in ratio] for who, ratio in ratios.items()},
            "runs": found.rounds,
            "threads": args.threads,
            "machine": machine("cpu"),
            "torch": torch.__version__,
            "festina": festina.__version__,
            "commit": commit(),
        }
        shown = ", ".join(f"{who} {ratio[0]:.2f} ({ratio[1]:.2f}-{ratio[2]:.2f})" for who, ratio in ratios.items())
        print(f"{name:16}torch.nn {found.time_us['torch.nn'].median / 1e3:7.1f} ms a step; {shown}", flush=True)
        if args.out:
            append(args.out, json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
