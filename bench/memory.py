"""Peak resident memory of a training step, against torch.nn's layer.

  python bench/memory.py --batch 64 --hidden 512
  python bench/memory.py --layers 4                  checkpointing layer by layer pays here

Every contestant runs in a separate process. The result is the peak of two training steps (forward and backward) above the
memory held with layers, input and output gradient in place; the second step can reuse what the first released.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

CONTESTANTS = ("torch.nn.LSTM", "festina.LayerNormLSTM", "festina.LayerNormLSTM, checkpointed")


def resident(field: str) -> int:
    """Resident bytes, now (`VmRSS`) or at the peak (`VmHWM`)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(field))) << 10


def peak(contestant: str, T: int, B: int, I: int, H: int, L: int) -> int:
    """Peak bytes of two training steps above the memory held before them."""
    import torch
    from torch.utils.checkpoint import checkpoint

    import festina

    torch.set_num_threads(2)
    kind = torch.nn.LSTM if contestant.startswith("torch") else festina.LayerNormLSTM
    layers = [kind(H if l else I, H) for l in range(L)]
    x, cotangent = torch.randn(T, B, I, requires_grad=True), torch.randn(T, B, H)

    def run(x: torch.Tensor) -> torch.Tensor:
        for layer in layers:
            x = (checkpoint(layer, x, use_reentrant=False) if contestant.endswith("checkpointed") else layer(x))[0]
        return x

    small = torch.randn(2, 1, I, requires_grad=True)
    warm = run(small)
    warm.backward(torch.ones_like(warm))  # creates threads and gradients, and makes torch import what it needs
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = resident("VmRSS")
    for _ in range(2):
        run(x).backward(cotangent)
    return resident("VmHWM") - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, size in (("steps", 50), ("batch", 64), ("input", 256), ("hidden", 512), ("layers", 1)):
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument(
        "--contestant", choices=CONTESTANTS, help="measure this one in this process (default: all, each in its own)"
    )
    args = parser.parse_args()
    sizes = {"T": args.steps, "B": args.batch, "I": args.input, "H": args.hidden, "L": args.layers}
    if args.contestant:
        print(peak(args.contestant, **sizes))
        return
    for contestant in CONTESTANTS:
        command = [sys.executable, __file__, *sys.argv[1:], "--contestant", contestant]
        got = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(json.dumps({"contestant": contestant, **sizes, "peak_mib": round(got / 2**20, 1)}))


if __name__ == "__main__":
    main()
