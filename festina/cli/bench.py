"""Measure layers against torch.nn and against a Python loop.

First, outputs and all gradients of every case are compared with the float64 reference; a case that fails is not timed.
Then the contestants take turns in one process. A ratio is festina's time divided by the other's, the median of paired
rounds: below 1, festina is faster. --out gets one JSON line per case and pass. The passes:

  forward, forward+backward   the layer over T steps, against torch.nn's
  ragged                      forward+backward over rows of T/8 to T steps, against torch.nn with a PackedSequence and
                              festina over all T steps of every row ("full"); --steps 200 --batch 64 is the usual case
  resets                      forward+backward with a reset about every 50 steps, against torch.nn's layer, and festina
                              without resets ("plain")
  step                        one step of a cell in inference, against torch.nn's cell
  stepping                    forward+backward of a cell called step by step, and a write to its weights, as an optimizer's,
                              against torch.nn's cell; --steps 8 is the usual case

  festina bench                                       a few cases, half a minute
  festina bench --grid haste --threads 2              haste's grid, 80 cases per cell and pass
  festina bench --passes step --batch 1               one step
  festina bench --cells gru --batch 1 32 --hidden 256 --plan HASTE NONE
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import festina
from festina import backends, reference
from festina.call import Call, Case
from festina.cli import UsageError, missing
from festina.cli.measure import Race, Work, commit, gemm_peak, machine, race
from festina.norms import PLANS
from festina.output import append, check_target
from festina.testing import TOLERANCES, assert_close

CELLS: dict[str, tuple[type[festina.layers.Recurrent], Callable[..., nn.RNNBase]]] = {
    "lstm": (festina.LSTM, nn.LSTM),
    "gru": (festina.GRU, nn.GRU),
}
"""The cells that torch.nn also has."""

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}

# In a low-precision type every product rounds; a wrong norm or gate is off by a tenth or more.
ALLOWED = {**TOLERANCES, torch.bfloat16: 5e-2, torch.float16: 1e-2}

GRIDS: dict[str, dict[str, list[int]]] = {
    "quick": {"batch": [1, 32], "input": [256], "hidden": [256]},
    "haste": {"batch": [1, 16, 32, 64, 128], "input": [64, 128, 256, 512], "hidden": [128, 256, 512, 1024]},
}


FORWARD_ONLY = frozenset(("forward", "step"))
"""The passes without backward, which run in inference mode."""


@dataclass(frozen=True)
class Point:
    """One case: cell, plan, sizes, dtype."""

    cell: str
    plan: str
    T: int
    B: int
    I: int
    H: int
    dtype: str

    def __str__(self) -> str:
        return f"{self.cell}-{self.plan}-T{self.T}B{self.B}I{self.I}H{self.H}-{self.dtype}"

    def gflop(self, name: str) -> float:
        """GFLOP of a pass's matrix products: 2·G·H·(I + H) per row and step forward, twice as many backward."""
        gates = len(festina.spec.CELLS[self.cell].gates)
        steps = {"step": self.B, "ragged": sum(self.lengths())}.get(name, self.T * self.B)
        return 2e-9 * steps * gates * self.H * (self.I + self.H) * (1 if name in FORWARD_ONLY else 3)

    def lengths(self) -> list[int]:
        """Row lengths of the ragged batch, spread evenly over T/8 to T."""
        shortest = max(1, self.T // 8)
        return [shortest + (self.T - shortest) * row // max(1, self.B - 1) for row in range(self.B)]


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--grid", choices=GRIDS, default="quick", help="sizes to measure (default: quick)")
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=["lstm"])
    parser.add_argument("--plan", nargs="+", choices=PLANS, default=["HASTE"], help="where the norms sit")
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=["forward", "forward+backward"])
    for name in ("batch", "input", "hidden"):
        parser.add_argument(f"--{name}", nargs="+", type=int, metavar="N", help=f"{name} sizes instead of the grid's")
    parser.add_argument("--steps", type=int, default=50, metavar="T")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    parser.add_argument(
        "--loop", action="store_true", help="forward, forward+backward: time a Python loop over the reference too"
    )
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each case and pass (default: 1)")
    parser.add_argument("--out", type=Path, help="append JSON lines to this file")


def run(args: argparse.Namespace) -> int:
    try:
        from rich.console import Console  # noqa: PLC0415  rich is optional
        from rich.table import Table  # noqa: PLC0415  rich is optional
    except ImportError:
        raise missing("rich", "cli") from None
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            "--device cuda needs a CUDA device, but torch sees none; leave the option out to measure the CPU"
        )
    if args.out:
        check_target(args.out, may_be_device=True)
    if args.threads:
        torch.set_num_threads(args.threads)
    console = Console()
    if not console.is_terminal:
        console.width = 140
    dtype = DTYPES[args.dtype]
    conditions = {
        "machine": machine(args.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "festina": festina.__version__,
        "commit": commit(),
        "peak_gflops": round(gemm_peak(dtype, args.device), 1),
    }
    console.print(", ".join(f"{key} {value}" for key, value in conditions.items()))
    table = Table(title="time of festina and its ratio to others (median, 20–80 %)")
    for column in ("case", "pass", "µs", "/ torch.nn", "/ other", "GFLOP/s", "% of GEMM"):
        table.add_column(column, no_wrap=True, justify="left" if column in ("case", "pass") else "right")
    failures = 0
    with console.status("") as status:
        for point in points(args):
            status.update(str(point))
            wrong = unverified(point, args.device)
            if wrong:
                failures += 1
                console.print(
                    f"[red]{point}: not measured, because it differs from the float64 reference: {wrong}[/red]"
                )
                continue
            for name in args.passes:
                works = contestants(point, name, args.device, args.loop)
                with torch.inference_mode(name in FORWARD_ONLY):
                    found = race(works, args.seconds, args.device)
                row = record(point, name, args.device, found, conditions)
                table.add_row(*cells_of(row))
                if args.out:
                    append(args.out, json.dumps(row) + "\n")
    console.print(table)
    return 1 if failures else 0


def points(args: argparse.Namespace) -> Iterator[Point]:
    """The cases that the arguments select."""
    grid = GRIDS[args.grid]
    sizes = [getattr(args, name) or grid[name] for name in ("batch", "input", "hidden")]
    for cell, plan, B, I, H in itertools.product(args.cells, args.plan, *sizes):
        yield Point(cell=cell, plan=plan, T=args.steps, B=B, I=I, H=H, dtype=args.dtype)


def layers(point: Point, device: str) -> tuple[festina.layers.Recurrent, nn.RNNBase]:
    """Festina's and torch.nn's layer from the same seed."""
    ours, theirs = CELLS[point.cell]
    options: dict[str, Any] = {"device": device, "dtype": DTYPES[point.dtype]}
    torch.manual_seed(0)
    layer = ours(point.I, point.H, norm=PLANS[point.plan], **options)
    torch.manual_seed(0)
    return layer, theirs(point.I, point.H, **options)


def trained(layer: nn.Module, x: Tensor, cotangent: Tensor, **options: Any) -> dict[str, Tensor]:
    """Output and the gradients of input and parameters."""
    y = layer(x, **options)[0]
    names, parameters = zip(*layer.named_parameters())
    gradients = torch.autograd.grad(y, [x, *parameters], cotangent)
    return {"output": y.detach(), **{f"d_{name}": gradient for name, gradient in zip(("input", *names), gradients)}}


def unverified(point: Point, device: str, steps: int = 4) -> str | None:
    """Compare a few steps at full sizes with the float64 reference; return the difference in words, or None."""
    layer, _ = layers(point, device)
    dtype = DTYPES[point.dtype]
    x = torch.randn(steps, point.B, point.I, device=device).to(dtype)
    cotangent = torch.randn(steps, point.B, point.H, device=device).to(dtype)
    got = trained(layer, x.clone().requires_grad_(), cotangent)
    with backends.use("eager"):
        want = trained(copy.deepcopy(layer).double(), x.double().requires_grad_(), cotangent.double())
    try:
        assert_close(got, want, ALLOWED[dtype])
    except AssertionError as error:
        return str(error)
    return None


def contestants(point: Point, name: str, device: str, loop: bool) -> dict[str, Work]:
    """The contestants of a pass: festina first, then its peers."""
    layer, peer = layers(point, device)
    x = torch.randn(point.T, point.B, point.I, device=device).to(DTYPES[point.dtype])
    work = PASSES[name](point, layer, peer, x)
    if loop and name in LOOPED:
        work["loop"] = LOOPED[name](Loop(layer), x)
    return work


class Loop(nn.Module):
    """The reference, called directly: a Python loop over the steps under plain autograd."""

    def __init__(self, layer: festina.layers.Recurrent) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        T, B, _ = x.shape
        zeros = x.new_zeros(1, B, self.layer.hidden_size)
        c_0 = zeros if "c" in self.layer.spec.cell.states else None
        call = Call(
            layer=self.layer.spec, input=x.flatten(0, 1), h_0=zeros, c_0=c_0, parameters=tuple(self.layer.parameters())
        )
        output, h_n, _ = reference.run(call)
        return output.view(T, B, -1), h_n


def _training(layer: nn.Module, x: Tensor, **options: Any) -> Work:
    x = x.detach().requires_grad_()
    cotangent = torch.randn_like(layer(x, **options)[0])
    return lambda: trained(layer, x, cotangent, **options)


def _forward(point: Point, layer: nn.Module, peer: nn.Module, x: Tensor) -> dict[str, Work]:
    return {"festina": partial(layer, x), "torch.nn": partial(peer, x)}


def _forward_backward(point: Point, layer: nn.Module, peer: nn.Module, x: Tensor) -> dict[str, Work]:
    return {"festina": _training(layer, x), "torch.nn": _training(peer, x)}


class Packing(nn.Module):
    """A torch.nn layer on ragged rows: pack the input, pad the output."""

    def __init__(self, layer: nn.Module, lengths: list[int]) -> None:
        super().__init__()
        self.layer = layer
        self.lengths = torch.tensor(lengths)

    def forward(self, x: Tensor) -> tuple[Tensor, Any]:
        output, state = self.layer(nn.utils.rnn.pack_padded_sequence(x, self.lengths, enforce_sorted=False))
        return nn.utils.rnn.pad_packed_sequence(output)[0], state


def _ragged(point: Point, layer: nn.Module, peer: nn.Module, x: Tensor) -> dict[str, Work]:
    lengths = point.lengths()
    return {
        "festina": _training(layer, x, lengths=lengths),
        "torch.nn": _training(Packing(peer, lengths), x),
        "full": _training(layer, x),
    }


def _resets(point: Point, layer: nn.Module, peer: nn.Module, x: Tensor) -> dict[str, Work]:
    resets = torch.rand(point.T, point.B, device=x.device) < 0.02
    return {"festina": _training(layer, x, resets=resets), "torch.nn": _training(peer, x), "plain": _training(layer, x)}


def _cells(point: Point, layer: nn.Module, peer: nn.Module, x: Tensor) -> tuple[nn.Module, nn.Module, Any]:
    """The layer's cell, torch.nn's, and a state."""
    cells = {nn.LSTM: nn.LSTMCell, nn.GRU: nn.GRUCell}
    peer_cell = cells[type(peer)](point.I, point.H, device=x.device, dtype=x.dtype)
    h = x.new_zeros(point.B, point.H)
    return layer.cell(), peer_cell, (h, h.clone()) if isinstance(peer_cell, nn.LSTMCell) else h  # type: ignore[operator]


def _step(point: Point, layer: nn.Module, peer: nn.Module, x: Tensor) -> dict[str, Work]:
    cell, peer_cell, state = _cells(point, layer, peer, x)
    return {"festina": partial(cell, x[0], state), "torch.nn": partial(peer_cell, x[0], state)}


class Stepping(nn.Module):
    """A cell called step by step."""

    def __init__(self, cell: nn.Module, state: Any) -> None:
        super().__init__()
        self.cell, self.state = cell, state

    def forward(self, x: Tensor) -> tuple[Tensor, Any]:
        state, outputs = self.state, []
        for x_t in x:
            state = self.cell(x_t, state)
            outputs.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(outputs), state


def _stepping(point: Point, layer: nn.Module, peer: nn.Module, x: Tensor) -> dict[str, Work]:
    cell, peer_cell, state = _cells(point, layer, peer, x)

    def round_of(cell: nn.Module) -> Work:
        train = _training(Stepping(cell, state), x)

        def work() -> Any:
            found = train()
            with torch.no_grad():
                for parameter in cell.parameters():
                    parameter.mul_(1)
            return found

        return work

    return {"festina": round_of(cell), "torch.nn": round_of(peer_cell)}


PASSES: dict[str, Callable[[Point, nn.Module, nn.Module, Tensor], dict[str, Work]]] = {
    "forward": _forward,
    "forward+backward": _forward_backward,
    "ragged": _ragged,
    "resets": _resets,
    "step": _step,
    "stepping": _stepping,
}


LOOPED: dict[str, Callable[[nn.Module, Tensor], Work]] = {"forward": partial, "forward+backward": _training}
"""The passes that a Python loop can join."""


def record(point: Point, name: str, device: str, found: Race, conditions: dict[str, Any]) -> dict[str, Any]:
    """One line of results: a measurement with its conditions."""
    ours = found.time_us["festina"]
    layer, _ = layers(point, "meta")
    gflops = point.gflop(name) / (ours.median * 1e-6)
    backend = backends.select(Case(layer.spec, DTYPES[point.dtype], torch.device(device)), backends.forced())
    return {
        "case": str(point),
        "pass": name,
        "backend": backend,
        "isa": backends.isa(backend),
        "median_us": round(ours.median, 1),
        "p20_us": round(ours.p20, 1),
        "p80_us": round(ours.p80, 1),
        "runs": found.rounds,
        "ratio": {peer: [round(v, 4) for v in (s.median, s.p20, s.p80)] for peer, s in found.ratio.items()},
        "gflops": round(gflops, 1),
        "percent_of_peak": round(100 * gflops / conditions["peak_gflops"], 1),
        "verified": True,
        **conditions,
    }


def cells_of(row: dict[str, Any]) -> list[str]:
    """The cells of a result's table row."""
    ratios = {peer: "{:.2f} ({:.2f}–{:.2f})".format(*ratio) for peer, ratio in row["ratio"].items()}
    return [
        row["case"],
        row["pass"],
        f"{row['median_us']:.0f}",
        ratios.pop("torch.nn"),
        ", ".join(f"{peer} {ratio}" for peer, ratio in ratios.items()),
        f"{row['gflops']:.1f}",
        f"{row['percent_of_peak']:.0f}",
    ]
