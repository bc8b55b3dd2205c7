"""The host's time on a GPU's path, without a GPU: kernels are compiled, and a driver starts none of them.

    python bench/launch.py --out bench/results/<machine>-gpu-host.jsonl

A layer in the loop tier and in the team tier, forward and with backward, beside a backend that computes nothing. Two steps:
the CPU computes the products over time here, and in these tiers the host does the same for any number of steps. Then what
one more step costs in the step tier, with its product (T = 40 and 120, one row, H = 16). Contestants take turns in rounds;
a line gives the median, 20th and 80th percentile of µs of the thread's CPU time.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import triton
from torch import Tensor

import festina
from festina import backends, norms
from festina.backends.triton import TRITON, setup, tiers
from festina.cli.measure import commit, machine
from festina.output import replacing
from festina.testing import Case

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "tests")]
from offline import compiling  # noqa: E402  beside the tests
from overhead import Null  # noqa: E402

ROUNDS, CALLS, T = 60, 10, 2


def both_passes(layer: festina.layers.Recurrent, x: Tensor) -> None:
    output, _ = layer(x)
    output.backward(torch.ones_like(output))
    layer.zero_grad()


def forward(layer: festina.layers.Recurrent, x: Tensor) -> None:
    with torch.no_grad():
        layer(x)


def race(contestants: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """µs a call of each contestant, round by round."""
    gc.collect()
    gc.freeze()
    gc.disable()
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for round in range(ROUNDS + 5):
        for name, work in contestants.items():
            start = time.thread_time()
            for _ in range(CALLS):
                work()
            if round >= 5:
                times[name].append((time.thread_time() - start) / CALLS * 1e6)
    return times


def using(backend: str, work: Callable[[], object]) -> None:
    with backends.use(backend):
        work()


def layers() -> dict[str, list[float]]:
    backends.registry()["null"] = Null()
    contestants: dict[str, Callable[[], object]] = {}
    for cell in (festina.LayerNormLSTM, festina.LayerNormGRU):
        for H in (64, 128):
            layer, x = cell(2, H), torch.randn(T, 1, 2)
            for what, work in (("forward", forward), ("both passes", both_passes)):
                for backend in ("triton", "null"):
                    name = f"{cell.__name__} H={H} {what}: {backend}"
                    contestants[name] = partial(using, backend, partial(work, layer, x))
    return race(contestants)


def steps() -> dict[str, list[float]]:
    setup.tier_of = lambda *_: tiers.Tier("step", "it is measured")  # type: ignore[assignment]
    setup.forget()
    works: dict[str, Callable[[], object]] = {}
    for T in (40, 120):
        call, cotangents = Case("lstm", norms.HASTE, T=T, B=1, I=1, H=16).build()
        outputs, saved = TRITON.forward_train(call)
        wanted = [True] * len(call.tensors())
        works[f"forward {T}"] = partial(TRITON.forward, call)
        works[f"backward {T}"] = partial(TRITON.backward, call, outputs, saved, cotangents, wanted)
    with torch.no_grad():
        times = race(works)
    return {
        f"a step, {what}": [(long - short) / 80 for short, long in zip(times[f"{what} 40"], times[f"{what} 120"])]
        for what in ("forward", "backward")
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="a file for JSON lines")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    TRITON.can_run = lambda case: None  # type: ignore[method-assign]
    with compiling("sm_90"):
        measured = {**layers(), **steps()}
    facts = {"machine": machine("cpu"), "torch": torch.__version__, "triton": triton.__version__, "commit": commit()}
    lines = []
    for name, times in measured.items():
        p20, median, p80 = (round(value, 1) for value in np.percentile(times, [20, 50, 80]))
        print(f"{name:<50} {median:7.1f} {p20:7.1f} {p80:7.1f}")
        lines.append(json.dumps({"what": name, "median_us": median, "p20_us": p20, "p80_us": p80, **facts}))
    if args.out:
        with replacing(args.out) as unfinished:
            unfinished.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
