"""How much memory a training step takes at its peak: the process's resident memory, beside torch.nn's layer.

  python bench/memory.py --batch 64 --hidden 512
  python bench/memory.py --layers 4                  where checkpointing layer by layer pays

Every contestant has a process of its own. What counts is how far the peak of two steps of forward and backward lies above
what the process held with layer, input and gradients' targets in place; the second step finds what the first gave back.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

CONTESTANTS = ("torch.nn.LSTM", "festina.LayerNormLSTM", "festina.LayerNormLSTM, checkpointed")


def resident(field: str) -> int:
    """Bytes, now (`VmRSS`) or at the peak (`VmHWM`)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(field))) << 10


def peak(contestant: str, T: int, B: int, I: int, H: int, L: int) -> int:
    """Bytes at the peak of two training steps above what was there before."""
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
    warm.backward(torch.ones_like(warm))  # threads, gradients, and what torch imports at the first such call are there
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
        "--contestant", choices=CONTESTANTS, help="measure this one here (the others start such processes)"
    )
    args = parser.parse_args()
    sizes = (args.steps, args.batch, args.input, args.hidden, args.layers)
    if args.contestant:
        print(peak(args.contestant, *sizes))
        return
    for contestant in CONTESTANTS:
        command = [sys.executable, __file__, *sys.argv[1:], "--contestant", contestant]
        got = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(json.dumps({"contestant": contestant, **dict(zip("TBIHL", sizes)), "peak_mib": round(got / 2**20, 1)}))


if __name__ == "__main__":
    main()
