"""A Hugging Face Accelerate loop with a layer-normalised layer: classify noisy waves by their frequency.

`accelerate launch examples/accelerate_loop.py` runs the same file on several processes or GPUs; `--mixed-precision bf16`
computes the products in bfloat16, while norms, gates and c stay in float32.

    pip install accelerate
    python examples/accelerate_loop.py
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import festina

CLASSES, STEPS = 3, 16


def waves(rows: int) -> TensorDataset:
    """Two noisy channels, sine and cosine, `[rows, STEPS, 2]`, and the class of each row's frequency."""
    generator = torch.Generator().manual_seed(0)
    kind = torch.randint(CLASSES, (rows,), generator=generator)
    phase = torch.rand(rows, 1, generator=generator) * 6.3
    angle = phase + 0.3 * (kind.unsqueeze(1) + 1) * torch.arange(STEPS)
    clean = torch.stack([angle.sin(), angle.cos()], 2)
    return TensorDataset(clean + 0.3 * torch.randn(clean.shape, generator=generator), kind)


class Classifier(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.rnn = festina.LayerNormGRU(2, hidden, batch_first=True, bidirectional=True, zoneout=0.05)
        self.head = nn.Linear(2 * hidden, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        _, h_n = self.rnn(x)
        scores: Tensor = self.head(torch.cat([h_n[0], h_n[1]], 1))
        return scores


def main(argv: Sequence[str] | None = None) -> list[float]:
    """Train and return the mean loss of each epoch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--mixed-precision", choices=("no", "bf16"), default="no")
    args = parser.parse_args(argv)
    set_seed(0)
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision=args.mixed_precision)
    model = Classifier(hidden=16)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    loader = DataLoader(waves(args.rows), batch_size=16, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    epochs = []
    for _ in range(args.epochs):
        losses = []
        for x, kind in loader:
            loss = F.cross_entropy(model(x), kind)
            optimizer.zero_grad()
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
        epochs.append(sum(losses) / len(losses))
    accelerator.print("cross entropy, epoch by epoch:", ", ".join(f"{loss:.3f}" for loss in epochs))
    return epochs


if __name__ == "__main__":
    main()
