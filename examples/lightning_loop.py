"""A Lightning loop with a layer-normalised layer and sequences of different lengths.

The task is the adding problem: the sum of the two marked numbers of a sequence. Lightning needs nothing special for
Festina: the layer is a module, and the lengths come with the batch.

    pip install lightning
    python examples/lightning_loop.py
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import lightning
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import festina


def adding_problem(rows: int, steps: int) -> TensorDataset:
    """Frames (number, mark) `[rows, steps, 2]`, lengths, and the sum of the two marked numbers."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.rand(rows, steps, generator=generator)
    lengths = torch.randint(steps // 2, steps + 1, (rows,), generator=generator)
    order = torch.rand(rows, steps, generator=generator)
    order[torch.arange(steps) >= lengths.unsqueeze(1)] = -1  # no mark past a row's end
    marks = torch.zeros(rows, steps).scatter(1, order.topk(2).indices, 1.0)
    return TensorDataset(torch.stack([numbers, marks], 2), lengths, (numbers * marks).sum(1))


class Adder(lightning.LightningModule):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.rnn = festina.LayerNormLSTM(2, hidden, batch_first=True)
        self.head = nn.Linear(hidden, 1)
        self.losses: list[float] = []
        self.sums: list[float] = []

    def training_step(self, batch: Sequence[Tensor], index: int) -> Tensor:
        frames, lengths, want = batch
        _, (h_n, _) = self.rnn(frames, lengths=lengths.cpu())  # each row's state after its last valid step
        loss = F.mse_loss(self.head(h_n[-1]).squeeze(1), want)
        self.sums.append(loss.item())
        return loss

    def on_train_epoch_end(self) -> None:
        self.losses.append(sum(self.sums) / len(self.sums))
        self.sums.clear()

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def main(argv: Sequence[str] | None = None) -> list[float]:
    """Train and return the mean loss of each epoch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--rows", type=int, default=512)
    args = parser.parse_args(argv)
    lightning.seed_everything(0, verbose=False)
    model = Adder(hidden=24)
    trainer = lightning.Trainer(
        max_epochs=args.epochs, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, gradient_clip_val=1.0, log_every_n_steps=1,
    )  # fmt: skip
    trainer.fit(model, DataLoader(adding_problem(args.rows, steps=12), batch_size=16, shuffle=True))
    print("mean squared error, epoch by epoch:", ", ".join(f"{loss:.3f}" for loss in model.losses))
    return model.losses


if __name__ == "__main__":
    main()
