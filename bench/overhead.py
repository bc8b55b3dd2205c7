"""Overhead of a call, almost without arithmetic: T = 1, B = 1, H = 8, against torch.nn.LSTM and LSTMCell.

    python bench/overhead.py                 with the best backend that can run
    python bench/overhead.py --backend null  with one that computes nothing: only Festina's own Python is measured

The result is µs of the calling thread's CPU time, the median of rounds in which the contestants take turns, so that other
programs disturb it less. One thread, float32; backward is torch.autograd.grad of the output for all parameters.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

import festina
from festina import backends
from festina.call import Call, Case, Outputs

H, REPEATS = 8, 100


class Null:
    """A backend that computes nothing: a lower bound for all others."""

    name = "null"

    def can_run(self, case: Case) -> str | None:
        return None

    def forward(self, call: Call) -> Outputs:
        D, _, P = call.h_0.shape
        c_n = None if call.c_0 is None else torch.empty_like(call.c_0)
        return Outputs(call.input.new_empty(call.input.shape[0], D * P), torch.empty_like(call.h_0), c_n)

    def forward_train(self, call: Call) -> tuple[Outputs, list[Tensor]]:
        return self.forward(call), []

    def saved_like(self, call: Call) -> list[Tensor]:
        return []

    def backward(
        self,
        call: Call,
        output: Tensor,
        saved: Sequence[Tensor],
        d_outputs: Sequence[Tensor | None],
        wanted: Sequence[bool],
    ) -> list[Tensor | None]:
        return [torch.empty_like(tensor) if want else None for tensor, want in zip(call.tensors(), wanted)]


def forward(module: nn.Module, *inputs: Any) -> Callable[[], object]:
    def work() -> None:
        with torch.inference_mode():
            module(*inputs)

    return work


def forward_backward(module: nn.Module, *inputs: Any) -> Callable[[], object]:
    parameters = list(module.parameters())
    cotangent = torch.ones_like(module(*inputs)[0])
    return lambda: torch.autograd.grad(module(*inputs)[0], parameters, cotangent)


def race(works: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """µs per call."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(rounds + 3):
        for name, work in works.items():
            start = time.thread_time()
            for _ in range(REPEATS):
                work()
            if turn >= 3:
                times[name].append((time.thread_time() - start) / REPEATS * 1e6)
    return {name: statistics.median(values) for name, values in times.items()}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", help="force this backend (default: the best that can run)")
    parser.add_argument("--rounds", type=int, default=51)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    backends.registry()["null"] = Null()
    x, state = torch.randn(1, H), (torch.zeros(1, H), torch.zeros(1, H))
    modules: list[tuple[Any, ...]] = [
        *((kind(H, H), x[None]) for kind in (nn.LSTM, festina.LSTM, festina.LayerNormLSTM)),
        *((kind(H, H), x, state) for kind in (nn.LSTMCell, festina.LSTMCell, festina.LayerNormLSTMCell)),
    ]
    with backends.use(args.backend) if args.backend else nullcontext():
        found = [
            race(
                {f"{type(m).__module__.split('.')[0]}.{type(m).__name__}": run(m, *inputs) for m, *inputs in modules},
                args.rounds,
            )
            for run in (forward, forward_backward)
        ]
    print(f"torch {torch.__version__}, backend {args.backend or backends.explain(modules[2][0], x)}")
    print(f"{'µs a call':28}{'forward':>10}{'forward+backward':>20}")
    for name in found[0]:
        print(f"{name:28}{found[0][name]:10.1f}{found[1][name]:20.1f}")


if __name__ == "__main__":
    main()
