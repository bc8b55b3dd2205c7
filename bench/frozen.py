"""Frozen modules: one step beside torch.nn's cell, quantize_dynamic and onnxruntime; layers; and what rounding costs.

    python bench/frozen.py --threads 1
    python bench/frozen.py --accuracy

One step of `LayerNormLSTMCell` in inference, input and state given, called one by one in turns: median and 99th percentile of
the time in µs, and the median's ratio to `nn.LSTMCell`'s. Then layers over T = 1 and 50 steps beside `quantize_dynamic`.
`--accuracy` trains the demo's models, and measures the held-out bits per character with frozen weights instead, and how far
outputs over 100 steps are from those of float32.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import festina
from festina.cli.measure import commit, machine
from festina.output import append, check_target

KINDS = (None, "bfloat16", "int8")
SIZES = [(H, B) for H in (128, 256, 512, 1024) for B in (1, 4)]


def onnx_step(H: int, x: torch.Tensor, state: tuple[torch.Tensor, torch.Tensor]) -> Callable[[], object]:
    """One step of `nn.LSTM` by onnxruntime."""
    import onnxruntime

    import festina.onnx

    layer, rows = festina.LSTM(H, H), torch.zeros(1, 2, H)
    program = festina.onnx.export(layer, (torch.zeros(2, 2, H), (rows, rows)))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), options)
    values = [x[None].numpy(), *(part[None].numpy() for part in state)]
    given = dict(zip((entry.name for entry in session.get_inputs()), values, strict=True))
    return lambda: session.run(None, given)


def steps(H: int, B: int) -> dict[str, Callable[[], object]]:
    x, state = torch.randn(B, H), (torch.randn(B, H), torch.randn(B, H))
    cell = festina.LayerNormLSTMCell(H, H).eval()
    quantized = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.LSTMCell(H, H)), {nn.LSTMCell}, torch.qint8)[0]
    modules: dict[str, Any] = {"nn.LSTMCell": nn.LSTMCell(H, H), "cell": cell, "quantize_dynamic": quantized}
    modules |= {f"frozen {weights or 'float32'}": festina.freeze(cell, weights) for weights in KINDS}
    found: dict[str, Callable[[], object]] = {name: lambda m=m: m(x, state) for name, m in modules.items()}
    if find_spec("onnxruntime") and find_spec("onnxscript"):
        found["onnxruntime"] = onnx_step(H, x, state)
    return found


def layers(T: int, H: int) -> dict[str, Callable[[], object]]:
    x, layer = torch.randn(T, 1, H), festina.LayerNormLSTM(H, H).eval()
    quantized = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.LSTM(H, H)), {nn.LSTM}, torch.qint8)[0]
    modules: dict[str, Any] = {"nn.LSTM": nn.LSTM(H, H), "layer": layer, "quantize_dynamic": quantized}
    modules |= {f"frozen {weights or 'float32'}": festina.freeze(layer, weights) for weights in KINDS}
    return {name: lambda m=m: m(x) for name, m in modules.items()}


def times(works: dict[str, Callable[[], object]], seconds: float) -> dict[str, np.ndarray]:
    """µs of each call, in turns of 20 calls."""
    found: dict[str, list[float]] = {name: [] for name in works}
    for work in works.values():
        work()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(found.values()))) < 200:
        for name, work in works.items():
            work()  # its weights come back into the caches
            for _ in range(20):
                start = time.perf_counter_ns()
                work()
                found[name].append((time.perf_counter_ns() - start) / 1e3)
    return {name: np.array(values) for name, values in found.items()}


def speed(args: argparse.Namespace) -> None:
    cases: list[tuple[str, Callable[[], dict[str, Callable[[], object]]]]] = [
        *((f"step H={H} B={B}", partial(steps, H, B)) for H, B in SIZES),
        *((f"layer T={T} B=1 H={H}", partial(layers, T, H)) for T in (1, 50) for H in (256, 1024)),
    ]
    for case, make in cases:
        works = make()
        with torch.inference_mode():
            found = times(works, args.seconds)
        base = np.median(next(iter(found.values())))
        print(case)
        row: dict[str, Any] = {"case": case, "threads": torch.get_num_threads(), "machine": machine("cpu")}
        row |= {"torch": torch.__version__, "festina": festina.__version__, "commit": commit()}
        for name, values in found.items():
            p50, p99 = (round(float(value), 1) for value in np.percentile(values, (50, 99)))
            row[name] = {"p50_us": p50, "p99_us": p99, "runs": len(values)}
            print(f"  {name:20} p50 {p50:9.1f}  p99 {p99:9.1f}  ratio {p50 / base:5.2f}", flush=True)
        if args.out:
            append(args.out, json.dumps(row) + "\n")


def bits(model: nn.Module, windows: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Bits per character over windows, with the state carried on."""
    state, total = None, 0.0
    for k in range(len(windows)):
        inputs, targets = windows[k]
        scores, state = model(inputs, state)
        total += F.cross_entropy(scores.flatten(0, 1), targets.flatten()).item()
    return total / len(windows) / math.log(2)


def accuracy(args: argparse.Namespace) -> None:
    from festina.cli.demo import text, world
    from festina.cli.demo.training import Race, Settings

    names = ("festina.LSTM", "festina.LayerNormLSTM", "festina.GRU", "festina.LayerNormGRU")
    settings = Settings(names, args.steps, hidden=128, layers=1, batch=64, length=32, lr=1e-2, seed=0)
    with world.join() as here:
        race = Race(settings, text.standard_library(), torch.device("cpu"), here)
    inputs = torch.cat([race.held_out[k][0] for k in range(4)])[:100]
    for racer in race.racers:
        for k in range(args.steps):
            racer.step(*race.train[k % len(race.train)])
        with torch.no_grad():
            model = racer.model.eval()
            whole, exact = bits(model, race.held_out), model.recurrent(model.embedding(inputs))[0]
            print(f"{racer.name}: {whole:.4f} bits per character")
            for weights in KINDS[1:]:
                frozen = festina.freeze(model, weights)
                more = bits(frozen, race.held_out) - whole
                output = frozen.recurrent(frozen.embedding(inputs))[0]
                error = (output - exact).square().mean().sqrt() / exact.square().mean().sqrt()
                print(f"  {weights}: {more:+.4f} bits, relative rms error of the output {error:.1e}", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=5.0, help="for each line (default: %(default)s)")
    parser.add_argument("--accuracy", action="store_true", help="measure what rounding costs, and no time")
    parser.add_argument("--steps", type=int, default=600, help="of training, for --accuracy (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="append a JSON line for each case")
    args = parser.parse_args(argv)
    if args.out:
        check_target(args.out)
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    (accuracy if args.accuracy else speed)(args)


if __name__ == "__main__":
    main()
