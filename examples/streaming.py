"""Streaming: many independent streams, one frame at a time, with the weights and the results of the layer.

A server listens to a batch of audio streams. Every 10 ms each stream delivers one frame; now and then a caller hangs up and
another one takes the place in the batch. The model, a stack of LayerNormLSTM layers with a linear head, detects speech. It is
trained on whole recordings with `lengths=`, and then

  - reads the first seconds of each stream at once with the layer, the fastest way if the frames are already there;
  - passes the layer's state to its cells and continues frame by frame, with `resets=` for the rows where a new caller begins;
  - passes the cells' state back to the layer to catch up with a backlog.

The state is a plain list of tensors outside the module, so one module serves any number of batches.

    python examples/streaming.py
    python examples/streaming.py --streams 32 --hidden 256
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import festina

BANDS = 16
State = list[tuple[Tensor, Tensor]]
"""(h, c), each `[B, H]`, of every layer of the stack."""


class Detector(nn.Module):
    """From frames `[B, T, BANDS]` to a score per frame: is there speech?"""

    def __init__(self, hidden: int, layers: int = 2) -> None:
        super().__init__()
        self.rnn = festina.LayerNormLSTM(BANDS, hidden, num_layers=layers, batch_first=True)
        self.score = nn.Linear(hidden, 1)

    def forward(
        self, frames: Tensor, hx: tuple[Tensor, Tensor] | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        output, state = self.rnn(frames, hx, lengths=lengths)
        return self.score(output).squeeze(-1), state


class Stream:
    """The detector, one frame at a time: the cells share the layer's parameters, this object holds the state."""

    def __init__(self, detector: Detector, rows: int) -> None:
        self.detector = detector
        self.cells = [detector.rnn.cell(layer) for layer in range(detector.rnn.num_layers)]
        zeros = torch.zeros(rows, detector.rnn.hidden_size)
        self.state: State = [(zeros, zeros) for _ in self.cells]

    @torch.inference_mode()
    def step(self, frame: Tensor, begins: Tensor | None = None) -> Tensor:
        """Scores `[B]` of one frame `[B, BANDS]`; rows where `begins [B]` is True start from a zero state."""
        x = frame
        for index, cell in enumerate(self.cells):
            self.state[index] = cell(x, self.state[index], resets=begins)
            x = self.state[index][0]
        scores: Tensor = self.detector.score(x).squeeze(-1)
        return scores

    @torch.inference_mode()
    def catch_up(self, frames: Tensor) -> Tensor:
        """Scores `[B, T]` of frames `[B, T, BANDS]` that are already there, at the layer's speed; `step` can continue."""
        h, c = (torch.stack(parts) for parts in zip(*self.state))
        scores, (h, c) = self.detector(frames, (h, c))
        self.state = list(zip(h.unbind(), c.unbind()))
        return scores  # type: ignore[no-any-return]


def recordings(rows: int, steps: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Synthetic audio `[B, T, BANDS]` and, for each frame, whether it contains speech.

    Speech is a slow melody over the bands that starts and stops; constant noise is as loud, so that a single frame says
    little and the last few say much.
    """
    turns = torch.rand(rows, steps, generator=generator) < 0.05
    first = torch.rand(rows, 1, generator=generator) < 0.5
    speaks = (turns.cumsum(1) + first) % 2 == 1
    pitch = torch.randn(rows, steps, generator=generator).cumsum(1) * 0.3 + BANDS / 2
    melody = torch.exp(-0.5 * (torch.arange(BANDS) - pitch.unsqueeze(-1) % BANDS).square())
    frames = torch.randn(rows, steps, BANDS, generator=generator) * 0.5 + melody * speaks.unsqueeze(-1)
    return frames, speaks.float()


def train(detector: Detector, steps: int, batch: int, frames: int, generator: torch.Generator) -> list[float]:
    """Train on recordings of different lengths, one batch per training step, and return the losses."""
    optimizer = torch.optim.Adam(detector.parameters(), lr=5e-3)
    losses = []
    for _ in range(steps):
        x, y = recordings(batch, frames, generator)
        lengths = torch.randint(frames // 2, frames + 1, (batch,), generator=generator)
        heard = torch.arange(frames) < lengths.unsqueeze(1)
        scores, _ = detector(x, lengths=lengths)
        loss = F.binary_cross_entropy_with_logits(scores[heard], y[heard])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@dataclass
class Report:
    """The results of `main`.

    Args:
        losses: training losses, one per training step.
        accuracy: share of streamed frames with a right score.
        difference: largest difference between a streamed score and that of the layer over the whole recording.
        us_per_frame: microseconds per step of the whole batch.
    """

    losses: list[float]
    accuracy: float
    difference: float
    us_per_frame: float


def main(argv: Sequence[str] | None = None) -> Report:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=8, help="rows of the batch")
    parser.add_argument("--hidden", type=int, default=48)
    parser.add_argument("--steps", type=int, default=40, help="training steps")
    parser.add_argument("--frames", type=int, default=60, help="frames of a recording")
    args = parser.parse_args(argv)
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)

    detector = Detector(args.hidden)
    losses = train(detector, args.steps, 16, args.frames, generator)
    detector.eval()
    print(f"trained {args.steps} steps: loss {losses[0]:.3f} to {losses[-1]:.3f}")

    # Each row gets one recording and then another; `begins` marks the first frame of the second caller.
    B, T = args.streams, 2 * args.frames
    parts = [recordings(B, args.frames, generator) for _ in range(2)]
    sound, speaks = (torch.cat(both, 1) for both in zip(*parts))
    begins = torch.zeros(B, T, dtype=torch.bool)
    begins[:, args.frames] = True

    stream, quarter = Stream(detector, B), args.frames // 4
    scores = [stream.catch_up(sound[:, :quarter])]  # layer
    start = time.perf_counter()
    for t in range(quarter, T - quarter):  # cell
        scores.append(stream.step(sound[:, t], begins[:, t]).unsqueeze(1))
    us = (time.perf_counter() - start) / (T - 2 * quarter) * 1e6
    scores.append(stream.catch_up(sound[:, T - quarter :]))  # layer
    streamed = torch.cat(scores, 1)

    with torch.inference_mode():
        output, _ = detector.rnn(sound, resets=begins)  # everything in one call
        whole = detector.score(output).squeeze(-1)
    report = Report(
        losses,
        accuracy=((streamed > 0) == (speaks > 0)).float().mean().item(),
        difference=(streamed - whole).abs().max().item(),
        us_per_frame=us,
    )
    print(f"streamed {T} frames of {B} callers: {report.accuracy:.1%} right, {us:.0f} µs a frame for all of them")
    print(f"largest difference to the layer over the whole recording: {report.difference:.1e}")
    return report


if __name__ == "__main__":
    main()
