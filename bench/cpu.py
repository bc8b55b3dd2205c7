"""The CPU core against torch.nn: both in one process and in turn, so that a ratio survives a busy machine.

    python bench/cpu.py --threads 1 --cpu-time 16,128,128 64,512,512

Each triple is B,I,H. Parity is what tests are for; run them first.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

import festina

LAYERS: dict[str, tuple[Callable[[int, int], torch.nn.Module], Callable[[int, int], torch.nn.Module]]] = {
    "LayerNormLSTM": (festina.LayerNormLSTM, torch.nn.LSTM),
    "LayerNormGRU": (festina.LayerNormGRU, torch.nn.GRU),
    "LSTM": (festina.LSTM, torch.nn.LSTM),
    "GRU": (festina.GRU, torch.nn.GRU),
}


def paired(ours: Callable[[], object], theirs: Callable[[], object], clock: Callable[[], float], seconds: float) -> str:
    """Median times in ms, and the median of the ratios of neighbouring runs."""
    pairs: list[tuple[float, float]] = []
    end = time.perf_counter() + seconds
    ours(), theirs()
    while len(pairs) < 5 or time.perf_counter() < end:
        start = clock()
        ours()
        middle = clock()
        theirs()
        pairs.append((middle - start, clock() - middle))
    one, two = (statistics.median(times) * 1e3 for times in zip(*pairs))
    return f"{one:8.2f} {two:8.2f} {statistics.median(a / b for a, b in pairs):5.2f}"


def measure(name: str, T: int, B: int, I: int, H: int, clock: Callable[[], float], seconds: float) -> str:
    """Forward, then forward and backward: ours, theirs, ratio."""
    x = torch.randn(T, B, I)
    wanted = x.clone().requires_grad_()
    given = torch.randn(T, B, H)

    def forward(layer: torch.nn.Module) -> Callable[[], object]:
        def run() -> object:
            with torch.no_grad():
                return layer(x)

        return run

    def train(layer: torch.nn.Module) -> Callable[[], object]:
        return lambda: torch.autograd.grad(layer(wanted)[0], [wanted, *layer.parameters()], given)

    layers = [make(I, H) for make in LAYERS[name]]
    return " | ".join(paired(*map(kind, layers), clock, seconds) for kind in (forward, train))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="*", default=["1,128,128", "16,128,128", "32,256,256", "64,256,256"])
    parser.add_argument("--layer", choices=LAYERS, default="LayerNormLSTM")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument(
        "--cpu-time", action="store_true", help="CPU time of the process: for one thread, on a busy machine"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clock = time.process_time if args.cpu_time else time.perf_counter
    print(
        f"{args.layer}, float32, T={args.steps}, {args.threads} threads: ms ours, torch.nn's, ratio; forward | training"
    )
    for size in args.sizes:
        B, I, H = map(int, size.split(","))
        print(f"{size:>14}", measure(args.layer, args.steps, B, I, H, clock, args.seconds), flush=True)


if __name__ == "__main__":
    main()
