"""The Triton backend without a GPU: kernels in the interpreter, kernels compiled, launches counted.

With a GPU (marker `cuda`): the same cases on the device, a CUDA graph, and no waiting for the device.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import festina
from festina import backends, functional, norms
from festina.backends import BackendError
from festina.backends.triton import TRITON, is_interpreting
from festina.spec import LayerSpec
from festina.testing import Case

pytest.importorskip("triton", reason="triton is not installed (it needs Linux); pip install 'festina[triton]'")

from offline import TARGETS, compiling
from torch.nn.utils.rnn import pack_padded_sequence
from triton import knobs
from triton.runtime.errors import OutOfResources

from festina.backends.triton import direction, launch, norm, one_launch, setup, tiers
from festina.backends.triton.device import Device
from festina.backends.triton.direction import Direction
from festina.backends.triton.launch import Launch
from festina.backends.triton.runs import chunked
from festina.backends.triton.step import Plan

if is_interpreting():
    pytest.skip("under TRITON_INTERPRET nothing can be compiled; see interpreted.py", allow_module_level=True)

HERE = Path(__file__).parent
PARTS = 8

LSTM = Case("lstm", norms.HASTE, T=5, B=3, H=9)


def refusal(case: Case, device: str = "cpu") -> str | None:
    return TRITON.can_run(case.on(device))


def test_it_says_why_it_does_not_run():
    assert refusal(LSTM) == "it needs a CUDA or ROCm device, and the input is on cpu"
    assert refusal(LSTM, "cuda") is None
    wide = Case(**{**vars(LSTM), "dtype": torch.float64})
    assert refusal(wide, "cuda") == "it serves float32, bfloat16, float16, not torch.float64"
    reason = "it has no kernel for a plan where a bias sits inside the recurrent norm"
    assert refusal(Case("lstm", norms.SOCKEYE), "cuda") == reason


def test_a_cell_without_a_kernel_is_refused():
    layer = LayerSpec(replace(LSTM.layer.cell, name="peephole", steps={"none": "peephole"}))
    case = LSTM.on("cuda")._replace(layer=layer)
    assert TRITON.can_run(case) == "it has no kernel for the peephole step"


def test_nothing_imports_triton_before_a_kernel_runs():
    code = (
        "import sys, torch, festina; from festina import backends;"
        "backends.explain(festina.LSTM(2, 3), torch.zeros(4, 1, 2)); assert 'triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_it_is_taken_on_a_gpu():
    case = LSTM.on("cuda")
    assert dict(backends.reasons(case))["triton"] is None
    assert backends.select(case) == "triton"


def test_on_rocm_it_runs_on_request(monkeypatch):
    monkeypatch.setattr(backends, "ON_REQUEST", {"triton": "it is asked for by name"})
    case = LSTM.on("cuda:7")  # a choice is remembered, so a case of its own
    assert dict(backends.reasons(case))["triton"] == "it is asked for by name"
    assert backends.select(case) != "triton"
    assert backends.select(case, force="triton") == "triton"


@pytest.mark.parametrize(
    ("capability", "dtype", "reason"),
    [
        (70, torch.float32, "torch.float32 needs compute capability 7.5, and cuda has 7.0"),
        (75, torch.bfloat16, "torch.bfloat16 needs compute capability 8.0, and cuda has 7.5"),
        (75, torch.float16, None),
        (120, torch.bfloat16, None),
    ],
)
def test_an_old_gpu_is_refused(capability, dtype, reason, monkeypatch):
    monkeypatch.setattr("festina.backends.triton.device_of", lambda _: Device("cuda", capability, 40, 64 << 10))
    assert TRITON.can_run(replace(LSTM, dtype=dtype).on("cuda")) == reason


def test_forced_it_does_not_fall_back():
    with backends.use("triton"), pytest.raises(BackendError, match="cannot run this case: it needs a CUDA or ROCm"):
        functional.recurrence(LSTM.build()[0])


# The host's side


@pytest.mark.parametrize("most", [0, 1, 4, 7, 100])
@pytest.mark.parametrize("sizes", [[], [1], [3, 3, 3], [4, 3, 3, 1, 1, 1], [5, 4, 3, 2, 1], 5, 0])
def test_chunks_hold_every_step_once(sizes, most):
    chunks = chunked(sizes, 3, most)
    sizes = [3] * sizes if isinstance(sizes, int) else sizes
    runs = [run for chunk in chunks for run in chunk]
    assert [run.rows for run in runs for _ in range(run.steps)] == sizes
    assert [run.start for run in runs] == [sum(r.rows * r.steps for r in runs[:i]) for i in range(len(runs))]
    assert [run.rows_before for run in runs[1:]] == [run.rows for run in runs[:-1]]
    assert [run.rows_after for run in runs[:-1]] == [run.rows for run in runs[1:]]
    for chunk in chunks:
        assert sum(run.rows * run.steps for run in chunk) <= max(most, chunk[0].rows)


@pytest.fixture
def launches(monkeypatch):
    """The names of the kernels launched; none is started."""
    names: list[str] = []

    class Counted:
        def __init__(self, kernels, kernel, *_, **__):
            self.name = kernel.__name__

        def __call__(self, *_):
            names.append(self.name)

    for module in (direction, one_launch):
        monkeypatch.setattr(module, "Launch", Counted)
    yield names
    setup.forget()


@pytest.mark.parametrize("T", [2, 9])
def test_one_launch_a_step(T, launches, monkeypatch):
    monkeypatch.setattr(setup, "tier_of", lambda *_: tiers.Tier("step", "a test asked for it"))
    setup.forget()
    train(Case("lstm", norms.HASTE, T=T, H=9))
    assert launches.count("step_forward") == launches.count("step_backward") == T
    assert sorted(set(launches)) == ["rows_backward", "rows_forward", "states_before", "step_backward", "step_forward"]
    assert len(launches) - 2 * T == 4  # the norm of x, twice; the states before each step; and all gains and shifts


ONE_LAUNCH = [
    LSTM,
    Case("indrnn", norms.HASTE, T=5, H=700),
    Case("lstm", norms.HASTE, T=5, H=300),
    Case("lstm", norms.HASTE, T=5, H=300, features=("bidirectional",)),
]


@pytest.mark.parametrize("case", ONE_LAUNCH, ids=str)
def test_one_launch_for_all_steps(case, launches):
    train(case)
    assert launches.count("loop_forward") == launches.count("loop_backward") == 1


RULE = [  # H, B, dtype, target, tier
    (64, 16, torch.float32, "sm_90", "loop"),
    (128, 16, torch.float32, "sm_90", "team of 4"),
    (128, 16, torch.bfloat16, "sm_90", "loop"),
    (128, 16, torch.bfloat16, "gfx942", "step"),
    (256, 16, torch.bfloat16, "sm_90", "team of 8"),
    (512, 64, torch.bfloat16, "sm_90", "team of 16"),
    (512, 16, torch.float32, "sm_90", "team of 32"),
    (1024, 16, torch.float32, "sm_90", "team of 128"),
    (1024, 16, torch.float32, "sm_80", "step"),
    (1024, 64, torch.float32, "sm_90", "step"),
    (1024, 64, torch.bfloat16, "sm_90", "team of 64"),
    (1024, 128, torch.bfloat16, "sm_90", "step"),
    (64, 16, torch.float16, "sm_75", "team of 2"),
    (256, 16, torch.float16, "sm_75", "team of 32"),
]


@pytest.mark.parametrize(("H", "B", "dtype", "target", "tier"), RULE, ids=str)
def test_the_tier_of_each_size(H, B, dtype, target, tier):
    """The table of docs/gpu.md: programs of a grid fit the device, and weights its shared memory."""
    plan = Plan.of(replace(LSTM, H=H).layer, H, H)
    found = tiers.tier_of(plan, B, 1, dtype, TARGETS[target][1], 50.0)
    assert found.name == tier, found.why
    if found.is_team:
        assert found.teams * found.forward.K <= TARGETS[target][1].processors


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("target", ["sm_75", "sm_80", "sm_90"])
def test_weights_fit_at_every_size(target, dtype):
    """Padded as the kernels keep them, with 8 KB for what else a team needs."""
    device = TARGETS[target][1]
    size = (4 if dtype == torch.float32 else 2) * (2 if target == "sm_75" else 1)
    for H in range(17, 1300):
        found = tiers.tier_of(Plan.of(replace(LSTM, H=H).layer, H, H), 16, 1, dtype, device, 50.0)
        for team in (found.forward, found.backward) if found.is_team else ():
            assert team.HP * team.HS * team.GP * size + (8 << 10) <= device.shared_bytes, (H, team)


@pytest.mark.parametrize(
    ("case", "runs", "why"),
    [
        (Case("lstm", norms.HASTE, H=512, P=100), 50.0, "the layer has a projection"),
        (Case("lstm", norms.HASTE, H=512), 2.0, "lengths change too often for a launch each"),
    ],
    ids=str,
)
def test_what_no_team_takes(case, runs, why):
    plan = Plan.of(case.layer, case.H, case.P or case.H)
    assert tiers.tier_of(plan, 16, 1, torch.float32, TARGETS["sm_90"][1], runs) == tiers.Tier("step", why)


def test_explain_names_the_tier(monkeypatch):
    layer, x = festina.LayerNormLSTM(3, 256), torch.zeros(5, 2, 3)
    monkeypatch.setattr(TRITON, "can_run", lambda case: None)
    taken = backends.explain(layer, x)[0]
    assert taken == ("triton: team of 8, 8 programs of 32 units share the weights", None)
    assert backends.explain(layer.cell(), x[0])[0] == taken
    lengths = pack_padded_sequence(x, [5, 1])
    assert backends.explain(layer, lengths)[0][0].startswith("triton: step, lengths change too often")


@pytest.mark.parametrize(
    ("case", "kept"),
    [
        (LSTM, [(1, 15, 9), (1, 15, 4)]),
        (Case("gru", norms.HASTE), [(1, 6, 2)]),
        (Case("lstm", norms.ICEFALL, P=3), [(1, 6, 7)]),
        (replace(LSTM, H=300), [(1, 15, 300), (1, 15, 4)]),
        (Case("gru", norms.BA2016_GRU, H=300), [(1, 6, 4)]),
        (Case("gru", norms.NONE, H=300), []),
    ],
    ids=str,
)
def test_c_is_kept_and_statistics_of_a_team(case, kept, launches):
    call, _ = case.build()
    saved = TRITON.forward_train(call)[1]
    assert [tuple(tensor.shape) for tensor in saved] == kept
    elsewhere = call.with_tensors([tensor.to("meta") for tensor in call.tensors()])
    assert [tuple(tensor.shape) for tensor in TRITON.saved_like(elsewhere)] == kept


def train(case: Case) -> None:
    """Both passes; their results do not matter."""
    call, cotangents = case.build()
    outputs, saved = TRITON.forward_train(call)
    TRITON.backward(call, outputs.output, saved, (*cotangents, None)[:3], [True] * len(call.tensors()))


# Kept launches


@pytest.fixture
def started(monkeypatch):
    """The kernels that Triton's own launcher starts; with a stand-in for an H100."""
    names: list[str] = []
    start = Launch._start

    def recorded(self, moving):
        names.append(self._kernel.__name__)
        start(self, moving)

    monkeypatch.setattr(Launch, "_start", recorded)
    with compiling("sm_90"):
        yield names


KEPT = [Case("gru", norms.NONE, T=2, H=16), Case("gru", norms.NONE, T=2, H=16, P=0, features=("bidirectional",))]


@pytest.mark.parametrize("case", KEPT, ids=str)
def test_a_second_call_goes_past_tritons_launcher(case, started):
    train(case)
    assert started
    started.clear()
    train(replace(case, T=3, B=5))
    assert not started


def test_another_alignment_is_another_kernel(started):
    """Kernels are compiled for addresses that are multiples of 16; others must not reach them."""
    call, _ = KEPT[0].build()
    TRITON.forward(call)
    started.clear()
    TRITON.forward(replace(call, h_0=unaligned(call.h_0)))
    assert started == ["loop_forward"]
    started.clear()
    TRITON.forward(replace(call, h_0=unaligned(call.h_0)))
    TRITON.forward(call)
    assert not started


def unaligned(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers at an address that is no multiple of 16."""
    room = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:]
    return room.view(tensor.shape).copy_(tensor)


def test_large_numbers_and_profilers_take_tritons_launcher(started, monkeypatch):
    call, _ = KEPT[0].build()
    TRITON.forward(call)
    monkeypatch.setattr(Launch, "_start", lambda self, moving: started.append(moving))
    started.clear()
    of_direction = Direction(call, setup.setup_of(call), 0)
    of_direction.launch(norm.rows_forward, 1, 16, ((call.input, None, None, call.input),), 1, 16)(2**31)
    assert started == [(2**31,)]
    monkeypatch.setattr(launch, "is_watched", lambda: True)
    TRITON.forward(call)
    assert len(started) == 2


def test_a_rate_may_be_a_whole_number(started):
    TRITON.forward(replace(KEPT[0].build()[0], zoneout=1))
    assert "loop_forward" in started


def test_a_profiler_is_noticed():
    assert not launch.is_watched()
    hook = knobs.runtime.launch_enter_hook
    hook.add(print)
    try:
        assert launch.is_watched()
    finally:
        hook.remove(print)


TOO_MANY = RuntimeError("Triton Error [CUDA]: too many blocks in cooperative launch")


@pytest.mark.parametrize(
    ("case", "tier", "error"),
    [
        (Case("lstm", norms.HASTE, T=5, H=300), "team of 10", TOO_MANY),
        (Case("lstm", norms.HASTE, T=5, H=9), "loop", OutOfResources(300, 200, "shared memory")),
    ],
    ids=str,
)
def test_a_refused_launch_falls_back(case, tier, error, monkeypatch):
    """The device may have less than it says: the step tier takes over, from then on, and says why."""

    class Starts:
        def __init__(self, kernels, kernel, *_, **__):
            self.name = kernel.__name__

        def __call__(self, *_):
            names.append(self.name)
            if self.name == "loop_forward":
                raise error

    names: list[str] = []
    for module in (direction, one_launch):
        monkeypatch.setattr(module, "Launch", Starts)
    setup.forget()
    call, _ = case.build()
    train(case)
    assert names.count("loop_forward") == 1
    assert names.count("loop_backward") == 0
    assert names.count("step_forward") == names.count("step_backward") == 5
    taken = setup.setup_of(call).tier
    assert taken.name == "step"
    assert f"did not start the {tier}" in taken.why
    setup.forget()


def test_an_error_of_another_kind_is_not_taken_for_a_refusal(monkeypatch):
    class Fails:
        def __init__(self, *_, **__): ...

        def __call__(self, *_):
            raise RuntimeError("an illegal memory access was encountered")

    call, _ = Case("lstm", norms.NONE, T=5, H=300).build()
    monkeypatch.setattr(one_launch, "Launch", Fails)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        TRITON.forward(call)
    setup.forget()


# The kernels, interpreted


@pytest.mark.parametrize("part", range(PARTS))
def test_parity_in_the_interpreter(part):
    interpret("interpreted.py", f"{part}/{PARTS}", "-m", "not full", "-k", "test_parity")


def test_wrong_kernels_and_chunks_in_the_interpreter():
    interpret("interpreted.py", "0/1", "-m", "not full", "-k", "not test_parity")


@pytest.mark.full
@pytest.mark.parametrize("part", range(PARTS))
def test_the_whole_product_in_the_interpreter(part):
    interpret("interpreted.py", f"{part}/{PARTS}", "-m", "full")


@pytest.mark.full
def test_the_suite_of_all_backends_in_the_interpreter():
    interpret("test_backends.py", "0/1", "-k", "triton")


def interpret(file: str, part: str, *arguments: str) -> None:
    """Run a file of tests in a process with Triton's interpreter."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:xdist",
        "-p",
        "no:cacheprovider",
        *arguments,
        HERE / file,
    ]
    env = {**os.environ, "TRITON_INTERPRET": "1", "FESTINA_PART": part, "OMP_NUM_THREADS": "1"}
    env.pop("PYTEST_ADDOPTS", None)
    done = subprocess.run(command, env=env, cwd=HERE.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


# The kernels, compiled

AROUND = ("zoneout", "zoneout_cell", "resets")
bfloat16, float16, float32 = torch.bfloat16, torch.float16, torch.float32


def lstm(H: int, dtype: torch.dtype, **options: Any) -> Case:
    return Case("lstm", options.pop("plan", norms.HASTE), T=8, B=16, H=H, dtype=dtype, **options)


def gru(H: int, dtype: torch.dtype, **options: Any) -> Case:
    return Case("gru", options.pop("plan", norms.HASTE), T=8, B=16, H=H, dtype=dtype, **options)


STEP = [
    gru(512, float32, plan=norms.BA2016_GRU, features=("expectation",)),
    lstm(512, float32, plan=norms.ICEFALL, P=200, features=("expectation",)),
]
INDRNN = [Case("indrnn", norms.HASTE, T=2, H=256, dtype=float16, features=("resets",))]
# What is compiled. Under some versions of Triton a thread spills a few registers, before the loop.
SPILLED_SOMEWHERE = 32
COMPILED = {
    "sm_75": [lstm(64, float16), gru(32, float32)],
    "sm_80": [lstm(64, bfloat16, features=AROUND), lstm(256, float32)],
    "sm_90": [lstm(64, float32), lstm(256, bfloat16, features=AROUND), *INDRNN],
    "gfx942": [lstm(64, bfloat16, features=AROUND), *STEP, *INDRNN],
}
# Every size of the table in docs/gpu.md, and the plans that differ most: a thread may spill a little, before the loop mostly.
SPILLED_AT_MOST = 128
SIZES = [
    *[lstm(H, bfloat16) for H in (64, 128, 256, 512, 768, 1024)],
    *[lstm(H, float32) for H in (128, 256, 512, 1024)],
    lstm(256, bfloat16, features=("bidirectional",)),
    lstm(256, float32, plan=norms.FASTRNNS, features=AROUND),
    lstm(128, float32, plan=norms.NONE),
    lstm(64, float16, plan=norms.ICEFALL, P=32, features=("expectation",)),
    gru(256, bfloat16),
    gru(256, float16, plan=norms.BA2016_GRU),
    gru(512, float32, plan=norms.DREAMER, features=("resets",)),
    gru(17, float32, plan=norms.BA2016_GRU, features=("zoneout",)),
    Case("indrnn_relu", norms.HASTE, T=2, H=1024),
]


def check_compiled(target: str, case: Case, spilled: int) -> None:
    with compiling(target) as found:
        train(case)
        assert not setup.setup_of(case.build()[0]).kernels.refused
    kernels = {compiled.kernel for compiled in found}
    assert {"loop_backward", "step_backward"} & kernels
    for compiled in found:
        assert compiled.shared_bytes <= TARGETS[target][1].shared_bytes, compiled
        assert compiled.spilled_bytes <= spilled, compiled


@pytest.mark.parametrize(
    ("target", "case"), [(target, case) for target, cases in COMPILED.items() for case in cases], ids=str
)
def test_kernels_compile(target, case):
    check_compiled(target, case, SPILLED_SOMEWHERE)


@pytest.mark.full
@pytest.mark.parametrize("case", SIZES, ids=str)
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_kernels_of_all_sizes_compile(target, case):
    check_compiled(target, case, SPILLED_AT_MOST)


@pytest.mark.parametrize("case", [lstm(64, bfloat16), gru(64, float32), lstm(256, bfloat16)], ids=str)
def test_weights_are_read_before_the_first_step(case):
    """In Triton's intermediate code: W_hh is loaded, and by nothing inside a loop."""
    with compiling("sm_90"):
        train(case)
        codes = [
            compiled.asm["ttgir"]
            for kernel in (one_launch.loop_forward, one_launch.loop_backward)
            for compiled in kernel.device_caches[0][0].values()
        ]
    assert len(codes) == 2
    for code in codes:
        loads = loads_of(code, "%w.hh")
        assert loads
        assert not any(is_inside for is_inside in loads)


def loads_of(code: str, argument: str) -> list[bool]:
    """For each load by way of a pointer argument, whether it is inside a loop."""
    base: dict[str, str] = {}
    found, loops, depth = [], [], 0
    for line in code.splitlines():
        named = re.match(r"\s*(%[\w.#]+)(?::\d+)? = ", line)
        pointer = re.search(
            r" = (?:tt\.(?:addptr|splat|broadcast|expand_dims|load)|ttg\.convert_layout) (%[\w.]+)", line
        )
        if named and pointer:
            base[named[1]] = base.get(pointer[1], pointer[1])
            if "tt.load" in line and base[named[1]] == argument:
                found.append(bool(loops))
        opened = line.count("{") - line.count("}")
        if re.search(r"= scf\.(for|while)|^\s*scf\.(for|while)", line):
            loops.append(depth)
        depth += opened
        while loops and depth <= loops[-1] and opened < 0:
            loops.pop()
    return found


def test_a_changed_cell_is_compiled_again():
    """Triton's cache on disk would not notice: it knows a function inside a constant by its name."""
    plan = Plan.of(LSTM.layer, 9, 9)
    assert len(plan.source) == 64
    assert repr(plan) != repr(plan._replace(source="another"))
