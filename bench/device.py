"""Try and measure the Triton backend on an NVIDIA GPU, in about ten minutes.

    python bench/device.py --out bench/results/h100.jsonl                     everything, then one table
    python bench/device.py --out more.jsonl --sections parity slopes --scale 2   two sections, with twice their time

It needs torch, triton, numpy and this repository. The sections, in this order:

  compile    the kernels of the sections below, in several processes, so that compiling costs those no time
  parity     against the reference in float64; 20 runs give the same bits
  exchange   µs for members of a team to tell each other two numbers of a row
  slopes     µs a step, (t(1024) − t(128)) / 896, beside torch.nn on cuDNN
  short      whole time at T = 50, host included, beside the same and other ways to a layer-normalised LSTM
  stress     20,000 steps beside matrix products on another stream; teams on two streams at once
  capture    a training step in a CUDA graph; a team that the device cannot start
  variants   µs a step with other warps, rows of a block and units of a member
  host       the calling thread's time for a call
  memory     peak memory of a training step

Each section runs in a process of its own, so that a fault or a hang in one does not end the others, and stops after the
task in which its time is spent. --out gets a JSON line for every result and every error. A ratio is Festina's time divided
by the other's, the median of paired rounds with 20th and 80th percentile; nothing is timed that was not verified before.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from device_lines import Line, Task, brief, compared, listed, row_of, run_section, table, write
from device_works import (
    OTHERS,
    SLOPE,
    LnLoop,
    contestants,
    graphed,
    input_of,
    precision,
    ready,
    rounds_of,
    slopes_of,
    time_us,
    work_of,
)  # fmt: skip
from torch import Tensor

import festina
from festina import backends, functional, norms, reference
from festina.backends.triton import one_launch, setup, tiers
from festina.backends.triton.device import device_of
from festina.backends.triton.setup import Setup, setup_of
from festina.backends.triton.step import Plan
from festina.backends.triton.team import HEAD, Team, exchange_of, share, sum_of
from festina.backends.triton.tiers import Tier
from festina.call import Call
from festina.cli.bench import ALLOWED, DTYPES, Loop, Point, layers, unverified
from festina.cli.measure import Work, commit, machine
from festina.output import check_target
from festina.testing import TOLERANCES, Case, evaluate, rms_ratio, widened, worst

GRACE = 150  # seconds beyond its time after which a section is taken to hang, compiling included
I = 256
PASSES = ("forward", "forward+backward")
SHORT = 50


def slope_points() -> list[Point]:
    """The cells of `slopes`, the most important first."""
    groups: list[tuple[tuple[int, ...], tuple[int, ...], tuple[str, ...]]] = [
        ((16,), (256, 512, 1024), ("float32", "bfloat16")),
        ((16,), (64, 128), ("float32", "bfloat16")),
        ((64,), (256, 512, 1024, 64, 128), ("float32", "bfloat16")),
        ((16, 64, 128), (256, 512, 1024, 64, 128, 768), ("float16", "float32", "bfloat16")),
    ]
    points = [
        Point(cell, "HASTE", SLOPE[1], B, I, H, dtype)
        for batches, widths, dtypes in groups
        for cell, B, H, dtype in product(("lstm", "gru"), batches, widths, dtypes)
    ]
    return list(dict.fromkeys(points))


def parity_cases() -> list[Case]:
    """The cases of `parity`: every batch size comes with every layer before the next one."""
    return [
        Case(cell, norms.HASTE, T=6, B=B, I=32, H=H, dtype=DTYPES[dtype])
        for B, H, dtype, cell in product(
            (16, 20, 64, 1), (256, 1024, 64, 512), ("float32", "bfloat16", "float16"), ("lstm", "gru")
        )
    ]


VARIED = [
    Point("lstm", "HASTE", SLOPE[1], B, I, H, dtype)
    for B, H, dtype in ((16, 256, "bfloat16"), (64, 512, "float32"), (16, 1024, "bfloat16"))
]


def units_of_a_member(units: int) -> Callable[..., Tier]:
    """A rule as `tiers.tier_of`, whose teams have members of so many units."""

    def tier_of(plan: Plan, B: int, directions: int, dtype: torch.dtype, device: Any, steps: float) -> Tier:
        ruled = tiers.tier_of(plan, B, directions, dtype, device, steps)
        K = -(-plan.H // units)
        most = device.processors // (K * directions)
        if not ruled.is_team or not most:
            return ruled
        forward, backward = (tiers.team_of(plan, K, units, dtype == torch.float32, back) for back in (False, True))
        return Tier(f"team of {K}", f"{units} units were asked for", forward, backward, min(-(-B // tiers.ROWS), most))

    return tier_of


VARIANTS: dict[str, tuple[Any, str, Any]] = {
    "as ruled": (one_launch, "TEAM_WARPS", one_launch.TEAM_WARPS),
    "4 warps": (one_launch, "TEAM_WARPS", 4),
    "8 warps": (one_launch, "TEAM_WARPS", 8),
    "16 rows": (tiers, "ROWS", 16),
    "32 rows": (tiers, "ROWS", 32),
    "8 units": (setup, "tier_of", units_of_a_member(8)),
    "16 units": (setup, "tier_of", units_of_a_member(16)),
    "32 units": (setup, "tier_of", units_of_a_member(32)),
}
"""What each variant changes: a name in a module, and its value."""


@contextmanager
def changed(module: Any, name: str, value: Any) -> Iterator[None]:
    """Inside, the backend goes by another constant or rule."""
    before = getattr(module, name)
    setattr(module, name, value)
    setup.forget()
    try:
        yield
    finally:
        setattr(module, name, before)
        setup.forget()


def setup_for(layer: festina.layers.Recurrent, x: Tensor) -> Setup:
    """What the backend keeps for a layer and an input."""
    zeros = x.new_zeros(1, x.shape[1], layer.hidden_size)
    c_0 = zeros if "c" in layer.spec.cell.states else None
    call = Call(
        layer=layer.spec, input=x.flatten(0, 1), h_0=zeros, c_0=c_0, parameters=tuple(layer.parameters())
    )  # fmt: skip
    return setup_of(call)


# Sections: each gives tasks


def compile_kernels() -> Iterator[Task]:
    points = list(dict.fromkeys(replace(point, T=4, B=16) for point in slope_points()))
    wide = [replace(point, B=64) for point in points if point.H == 1024]
    jobs: list[tuple[Point, str]] = [(point, "as ruled") for point in points + wide]
    jobs[12:12] = [(replace(point, T=4), variant) for variant in list(VARIANTS)[1:] for point in VARIED]
    pool = ProcessPoolExecutor(min(12, os.cpu_count() or 1), mp_context=get_context("spawn"))
    futures = {pool.submit(compile_one, *job): f"{job[0]} {job[1]}" for job in jobs}
    try:
        for future in as_completed(futures):
            yield futures[future], lambda done=future: [Line("compiled", done.result(), "s")]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def compile_one(point: Point, variant: str) -> float | str:
    """Both passes, in one chunk and in several: seconds, or why a variant cannot be. Triton keeps the kernels on disk."""
    start = time.perf_counter()
    try:
        _compile(point, variant)
    except Exception as error:
        if variant == "as ruled":
            raise
        return brief(error)
    return round(time.perf_counter() - start, 1)


def _compile(point: Point, variant: str) -> None:
    layer, _ = layers(point, "cuda")
    x = input_of(point)
    two_steps = 16 * 4 * point.H * 2 * point.B  # bytes of a chunk; the GRU's have two steps and a row or more
    with backends.use("triton"), changed(*VARIANTS[variant]):
        for chunk_bytes in (setup.CHUNK_BYTES, two_steps):
            with changed(setup, "CHUNK_BYTES", chunk_bytes):
                with torch.inference_mode():
                    layer(x)
                work_of(layer, x, "forward+backward")()
    torch.cuda.synchronize()


def parity() -> Iterator[Task]:
    for case in parity_cases():
        yield str(case), partial(parity_of, case)


def parity_of(case: Case) -> Iterator[Line]:
    call, cotangents = case.build("cuda")
    want = evaluate(reference.run, widened(call), cotangents)
    run = partial(evaluate, functional.recurrence, call, cotangents)
    got = run()
    found, name = worst(got, want)
    values = {"festina": found}
    allowed = TOLERANCES.get(case.dtype, 0.0)
    if not allowed:
        with backends.use("eager"):
            values["eager"], _ = worst(run(), want)
        allowed = 3 * values["eager"]
    same = all(torch.equal(tensor, got[name]) for _ in range(19) for name, tensor in run().items())
    tier = setup_of(call).tier
    facts = {"of": name, "allowed": allowed, "same_bits": same, "tier": tier.name, "why": tier.why}
    yield Line("worst rms ratio", values, facts={**facts, "verified": found <= allowed and same})


@triton.jit(do_not_specialize=["times"])
def exchanges(times, OUT, BOXES, plan: tl.constexpr):
    """Each member shares its number twice over, and takes from what it hears the number for the next exchange."""
    K: tl.constexpr = plan.team.K
    BM: tl.constexpr = plan.team.BM
    member, team = tl.program_id(0) % K, tl.program_id(0) // K
    offset = member.to(tl.float32) - (K - 1) / 2
    number = tl.zeros((BM, 1), tl.float32) + offset + (K - 1) / 2
    for tag in range(1, times + 1):
        tiles = share((number, number), 0, exchange_of(BOXES, team, member, tag, plan), plan, 2)
        number = sum_of(tiles, 1, 2) / K + offset
    row = tl.arange(0, BM)[:, None]
    tl.store(OUT + tl.program_id(0) * BM + row, number)


def exchange_plan(K: int) -> Plan:
    """The constants of `exchanges`."""
    layer = Case("lstm", norms.HASTE).layer
    return Plan.of(layer, 32 * K, 32 * K)._replace(team=Team(K, 16, 32, 32, False, words=2 * 16 * K))


def exchanged(K: int, teams: int, times: int, warps: int, device: str = "cuda") -> Tensor:
    """The number of every member and row after so many exchanges: the member's index."""
    plan = exchange_plan(K)
    out = torch.full((teams, K, plan.team.BM), torch.nan, device=device)
    boxes = torch.zeros(int(HEAD) + 2 * teams * plan.team.words, dtype=torch.int64, device=device)
    exchanges[(K * teams, 1)](times, out, boxes, plan, num_warps=warps, launch_cooperative_grid=True)
    return out


def exchange() -> Iterator[Task]:
    most = device_of(torch.device("cuda")).processors
    for warps, K in product((8, 4), (8, 16, 64, 128)):
        for teams in dict.fromkeys((1, most // K)):
            if teams:
                yield f"K{K}-teams{teams}-warps{warps}", partial(exchange_of_team, K, teams, warps)


def exchange_of_team(K: int, teams: int, warps: int) -> Iterator[Line]:
    few, many = 1000, 5000
    want = torch.arange(K, dtype=torch.float32, device="cuda")[None, :, None]
    right = bool((exchanged(K, teams, few, warps) == want).all())
    times = rounds_of({times: partial(exchanged, K, teams, times, warps) for times in (few, many)}, 0.3)
    yield Line("exchange", listed((times[many] - times[few]) / (many - few)), "µs", facts={"verified": right})


def slopes() -> Iterator[Task]:
    for point in slope_points():
        yield str(point), partial(slope_of, point)


def slope_of(point: Point) -> Iterator[Line]:
    verify(point)
    layer, _ = layers(point, "cuda")
    tier = setup_for(layer, input_of(point)).tier
    for name in PASSES:
        left_out: dict[str, str] = {}
        works: dict[tuple[str, int], Work] = {}
        with torch.inference_mode(name == "forward"):
            for T in SLOPE:
                for who, work in ready(contestants(replace(point, T=T), name), left_out).items():
                    works[who, T] = work
            times = rounds_of(works, 0.5)
        yield compared(
            name, slopes_of(times), "µs/step", tier=tier.name, left_out=left_out, runs=runs_of(times), verified=True
        )  # fmt: skip


def runs_of(times: Mapping[Any, np.ndarray]) -> int:
    return min(map(len, times.values()))


def verify(point: Point) -> None:
    """Compare a few steps with the reference in float64.

    Raises:
        ArithmeticError: they differ.
    """
    wrong = unverified(point, "cuda")
    if wrong:
        raise ArithmeticError(f"not measured, because it differs from the float64 reference: {wrong}")


def short() -> Iterator[Task]:
    for package in OTHERS:
        if find_spec(package) is None:
            yield package, lambda: [Line("peer", "not installed")]
    for index, point in enumerate(slope_points()):
        for name in PASSES:
            yield str(replace(point, T=SHORT)), partial(short_of, replace(point, T=SHORT), name, index < 2)


def short_of(point: Point, name: str, is_compiled: bool) -> Iterator[Line]:
    verify(point)
    layer, _ = layers(point, "cuda")
    x = input_of(point)
    makers = contestants(point, name)
    makers["festina-graph"] = lambda: graphed(work_of(layer, x, name))
    makers["eager"] = lambda: work_of(Loop(layer), x, name)
    for package, kind in OTHERS.items():
        if find_spec(package) is not None:
            makers[package] = lambda kind=kind: work_of(kind(point), x, name)
    if is_compiled and point.cell == "lstm":
        loop = LnLoop(layer, block=10)
        makers["compiled-graph"] = lambda: graphed(work_of(loop, x, name))
    left_out: dict[str, str] = {}
    with torch.inference_mode(name == "forward"):
        works = ready(makers, left_out)
        if "compiled-graph" in works and name == "forward":
            off = rms_ratio(loop(x)[0], layer(x)[0])
            if off > 2 * ALLOWED[x.dtype]:
                left_out["compiled-graph"] = f"it differs from the layer by {off:.1e}"
                del works["compiled-graph"]
        times = rounds_of(works, 0.4, turn_us=2000)
    tier = setup_for(layer, x).tier.name
    yield compared(name, times, "µs", tier=tier, left_out=left_out, runs=runs_of(times), verified=True)


def stress() -> Iterator[Task]:
    for dtype in ("bfloat16", "float32"):
        point = Point("lstm", "HASTE", 20_000, 16, 64, 256, dtype)
        yield str(point), partial(beside_products, point)
    for pair in (((64, 256, "bfloat16"), (64, 512, "float32")), ((16, 1024, "float32"), (16, 1024, "float32"))):
        points = [Point("lstm", "HASTE", 300, B, 64, H, dtype) for B, H, dtype in pair]
        yield " and ".join(map(str, points)), partial(two_streams, points)


def beside_products(point: Point) -> Iterator[Line]:
    layer, _ = layers(point, "cuda")
    x = input_of(point)
    a, b = torch.randn(2, 4096, 4096, device="cuda", dtype=torch.bfloat16)
    out, side = torch.empty_like(a), torch.cuda.Stream()
    with torch.inference_mode():
        alone = layer(x)[0]
        alone_us = time_us(partial(layer, x))
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(800):
                torch.mm(a, b, out=out)
        start = time.perf_counter()
        beside = layer(x)[0]
        is_done = finished(torch.cuda.current_stream())
    facts = {"verified": is_done and torch.equal(alone, beside) and bool(alone.isfinite().all())}
    yield Line("beside products", (time.perf_counter() - start) * 1e6, "µs", facts={**facts, "alone_us": alone_us})


def two_streams(points: Sequence[Point]) -> Iterator[Line]:
    works = [work_of(layers(point, "cuda")[0], input_of(point), "forward+backward") for point in points]
    alone = [work() for work in works]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in works]
    start = time.perf_counter()
    together: list[Any] = []
    for _ in range(10):
        together = []
        for work, stream in zip(works, streams):
            with torch.cuda.stream(stream):
                together.append(work())
    is_done = all(finished(stream) for stream in streams)
    same = is_done and all(torch.equal(one[name], two[name]) for one, two in zip(alone, together) for name in one)
    yield Line("two streams, 10 times", (time.perf_counter() - start) * 1e6, "µs", facts={"verified": same})


def finished(stream: torch.cuda.Stream, seconds: float = 60) -> bool:
    """Wait for a stream, but not for ever."""
    end = time.perf_counter() + seconds
    while not stream.query() and time.perf_counter() < end:
        time.sleep(0.001)
    return stream.query()


def capture() -> Iterator[Task]:
    sizes = ((64, "bfloat16"), (256, "bfloat16"), (256, "float32"), (1024, "bfloat16"))
    for (H, dtype), cell in product(sizes, ("lstm", "gru")):
        case = Case(cell, norms.HASTE, T=20, B=16, I=32, H=H, dtype=DTYPES[dtype])
        yield str(case), partial(captured, case)
    case = Case("lstm", norms.HASTE, T=3, B=6400, I=32, H=256)
    yield str(case), partial(refused, case)


def captured(case: Case) -> Iterator[Line]:
    call, cotangents = case.build("cuda")
    run = partial(evaluate, functional.recurrence, call, cotangents)
    want = {name: tensor.clone() for name, tensor in run().items()}
    replay = graphed(run)
    right = 0
    for _ in range(100):
        got = replay()
        right += all(torch.equal(tensor, want[name]) for name, tensor in got.items())  # type: ignore[attr-defined]
    facts = {"verified": right == 100, "tier": setup_of(call).tier.name}
    yield Line("replays with the same bits", right, "of 100", facts=facts)


def refused(case: Case) -> Iterator[Line]:
    """A device that seems to have more processors than it has: the driver must refuse the launch."""
    call, cotangents = case.build("cuda")
    want = evaluate(reference.run, widened(call), cotangents)
    larger = device_of(torch.device("cuda"))._replace(processors=100_000)
    with changed(setup, "device_of", lambda _: larger):
        ruled = setup_of(call).ruled.name
        off, _ = worst(evaluate(functional.recurrence, call, cotangents), want)
        tier, said = setup_of(call).tier, list(setup_of(call).kernels.refused.values())
    verified = ruled != tier.name == "step" and bool(said) and off <= TOLERANCES[case.dtype]
    yield Line("a grid too large", "; ".join(said), facts={"tier": tier.name, "off": off, "verified": verified})


def variants() -> Iterator[Task]:
    for point, name in product(VARIED, PASSES):
        yield str(point), partial(variants_of, point, name)


def variants_of(point: Point, name: str) -> Iterator[Line]:
    layer, _ = layers(point, "cuda")
    left_out: dict[str, str] = {}
    tier_names: dict[str, str] = {}
    for variant, change in VARIANTS.items():
        with changed(*change):
            try:
                tier_names[variant] = setup_for(layer, input_of(point)).tier.name
                verify(point)
            except Exception as error:
                if variant == "as ruled":
                    raise
                left_out[variant] = brief(error)
    times: dict[tuple[str, int], list[float]] = {}
    with torch.inference_mode(name == "forward"):
        works = {T: work_of(layer, input_of(replace(point, T=T)), name) for T in SLOPE}
        for _ in range(5):
            for variant, change in VARIANTS.items():
                if variant not in left_out:
                    with changed(*change):
                        for T, work in works.items():
                            work()  # after a change Triton finds the kernels anew
                            times.setdefault((variant, T), []).append(time_us(work))
    found = slopes_of({key: np.array(values) for key, values in times.items()})
    yield compared(name, found, "µs/step", first="as ruled", tiers=tier_names, left_out=left_out, verified=True)


def host() -> Iterator[Task]:
    sizes = ((16, 64), (16, 256), (128, 1024))
    for (B, H), T, cell, name in product(sizes, (1, SHORT), ("lstm", "gru"), PASSES):
        point = Point(cell, "HASTE", T, B, I, H, "bfloat16")
        yield str(point), partial(host_of, point, name)


def host_of(point: Point, name: str) -> Iterator[Line]:
    layer, peer = layers(point, "cuda")
    x = input_of(point)
    with torch.inference_mode(name == "forward"):
        works = {"festina": work_of(layer, x, name), "nn": work_of(peer, x, name)}
        times: dict[str, list[float]] = {who: [] for who in works}
        for turn in range(43):
            for who, work in works.items():
                torch.cuda.synchronize()  # the queue is empty, so no launch waits for room in it
                start = time.perf_counter()
                for _ in range(3):
                    work()
                if turn >= 3:
                    times[who].append((time.perf_counter() - start) / 3 * 1e6)
    found = {who: np.array(values) for who, values in times.items()}
    yield compared(name, found, "µs of the host", tier=setup_for(layer, x).tier.name)


def memory() -> Iterator[Task]:
    for (T, B, H), cell in product(((256, 16, 512), (256, 64, 1024)), ("lstm", "gru")):
        for dtype in ("float32", "bfloat16"):
            point = Point(cell, "HASTE", T, B, I, H, dtype)
            yield str(point), partial(memory_of, point)


def memory_of(point: Point) -> Iterator[Line]:
    layer, peer = layers(point, "cuda")
    x = input_of(point)
    found = {}
    for who, module in (("festina", layer), ("nn", peer), ("eager", Loop(layer))):
        work = work_of(module, x, "forward+backward")
        work()
        gc.collect()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        torch.cuda.synchronize()
        found[who] = np.array([(torch.cuda.max_memory_allocated() - before) / 2**20])
    yield compared("peak of a training step", found, "MiB")


SECTIONS: dict[str, tuple[Callable[[], Iterator[Task]], int]] = {
    "compile": (compile_kernels, 90),
    "parity": (parity, 70),
    "exchange": (exchange, 25),
    "slopes": (slopes, 170),
    "short": (short, 90),
    "stress": (stress, 30),
    "capture": (capture, 30),
    "variants": (variants, 60),
    "host": (host, 20),
    "memory": (memory, 20),
}
"""Each section and its seconds."""


# Lines, sections, the table


def conditions() -> dict[str, Any]:
    """What every line holds."""
    found = {
        "machine": machine("cuda"),
        "processors": device_of(torch.device("cuda")).processors,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "festina": festina.__version__,
    }
    return {**found, "commit": at} if (at := commit()) else found


def release() -> None:
    """Give memory back, so that a task does not find what another left."""
    gc.collect()
    torch.cuda.empty_cache()


def in_a_process(name: str, seconds: float, args: argparse.Namespace, around: Mapping[str, Any]) -> None:
    """Run a section in a process of its own, and end it if it hangs."""
    command = [sys.executable, __file__, "--out", str(args.out), "--alone", name, "--scale", str(args.scale)]
    print(f"{name}, {seconds:.0f} s", file=sys.stderr, flush=True)
    try:
        status = subprocess.run(command, timeout=seconds + GRACE, check=False).returncode
        trouble = f"the process ended with status {status}" if status else ""
    except subprocess.TimeoutExpired:
        trouble = f"it was ended after {seconds + GRACE:.0f} s"
    if trouble:
        write(args.out, row_of(name, "", Line("error", trouble), around))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="append JSON lines to this file")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="default: all")
    parser.add_argument("--scale", type=float, default=1.0, help="of the time of every section (default: 1)")
    parser.add_argument("--alone", choices=SECTIONS, help=argparse.SUPPRESS)  # a section, in this process
    args = parser.parse_args(argv)
    if not torch.cuda.is_available() or torch.version.hip:
        print(
            "bench/device.py needs an NVIDIA GPU, but torch sees none: install a CUDA build of torch", file=sys.stderr
        )
        return 2
    around = conditions()
    if args.alone:
        section, seconds = SECTIONS[args.alone]
        precision("ieee")
        with backends.use("triton"):
            run_section(args.alone, section(), seconds * args.scale, args.out, around, release)
        return 0
    args.out.parent.mkdir(parents=True, exist_ok=True)
    check_target(args.out)
    before = args.out.stat().st_size if args.out.exists() else 0
    for name in SECTIONS:
        if name in args.sections:
            in_a_process(name, SECTIONS[name][1] * args.scale, args, around)
    with args.out.open() as file:
        file.seek(before)
        rows = [json.loads(line) for line in file]
    print(", ".join(f"{key} {value}" for key, value in around.items()))
    print(table(rows))
    return 1 if any(row["what"] == "error" or row.get("verified") is False for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
