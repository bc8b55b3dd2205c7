"""The Triton backend without a GPU: kernels in the interpreter, kernels compiled, launches counted.

With a GPU (marker `cuda`): the same cases on the device, a CUDA graph, and no waiting for the device.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from festina import backends, functional, norms, reference
from festina.backends import BackendError
from festina.backends.triton import TRITON, is_interpreting
from festina.spec import LayerSpec
from festina.testing import Case, evaluate, widened, worst

pytest.importorskip("triton", reason="triton is not installed (it needs Linux); pip install 'festina[triton]'")

from offline import TARGETS, compiling

from festina.backends.triton import direction, loop_tier, norm, step_tier
from festina.backends.triton.direction import Direction, chunked

if is_interpreting():
    pytest.skip("under TRITON_INTERPRET nothing can be compiled; see interpreted.py", allow_module_level=True)

HERE = Path(__file__).parent
PARTS = 4

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


def test_it_runs_only_on_request():
    case = LSTM.on("cuda")
    assert "backends.use('triton') asks for it" in dict(backends.reasons(case))["triton"]
    assert backends.select(case) != "triton"
    assert backends.select(case, force="triton") == "triton"


def test_forced_it_does_not_fall_back():
    with backends.use("triton"), pytest.raises(BackendError, match="cannot run this case: it needs a CUDA or ROCm"):
        functional.recurrence(LSTM.build()[0])


# The host's side


@pytest.mark.parametrize("most", [0, 1, 4, 7, 100])
@pytest.mark.parametrize("sizes", [[], [1], [3, 3, 3], [4, 3, 3, 1, 1, 1], [5, 4, 3, 2, 1]])
def test_chunks_hold_every_step_once(sizes, most):
    chunks = chunked(sizes, most)
    runs = [run for chunk in chunks for run in chunk]
    assert [run.rows for run in runs for _ in range(run.steps)] == sizes
    assert [run.start for run in runs] == [sum(r.rows * r.steps for r in runs[:i]) for i in range(len(runs))]
    assert [run.rows_before for run in runs[1:]] == [run.rows for run in runs[:-1]]
    assert [run.rows_after for run in runs[:-1]] == [run.rows for run in runs[1:]]
    for chunk in chunks:
        assert sum(run.rows * run.steps for run in chunk) <= max(most, chunk[0].rows)


@pytest.mark.parametrize("rows", [1, 5, 1000])
@pytest.mark.parametrize("features", [("bidirectional",), ("ragged", "idle", "bidirectional", "resets")], ids=str)
def test_states_before_each_step(features, rows, monkeypatch):
    """Against the reference: an IndRNN with relu that adds 1 to h at every step shows where h came from."""
    case = Case("indrnn_relu", T=5, B=4, I=1, H=3, features=features)
    call, _ = case.build()
    ones = {"weight_ih": 1.0, "weight_hh": 1.0, "bias_ih": 0.0}
    names = call.layer.parameter_names * 2
    parameters = tuple(torch.full_like(p, ones[name]) for name, p in zip(names, call.parameters))
    tensors = [torch.ones_like(call.input), call.h_0.abs().mul(100).floor(), *parameters]
    call = call.with_tensors(tensors)
    monkeypatch.setattr(direction, "CHUNK_BYTES", rows * 16 * 3)
    output = reference.run(call)[0]
    for d in range(2):
        of_direction = Direction(call, d)
        states = output[:, 3 * d : 3 * d + 3]
        for chunk in of_direction.chunks():
            start, end = min(run.start for run in chunk), max(run.end for run in chunk)
            before = of_direction.states_before(chunk, states, call.h_0[d], torch.full((end - start, 3), torch.nan))
            assert torch.equal(before, states[start:end] - 1)


@pytest.fixture
def launches(monkeypatch):
    """The names of the kernels launched; none is started."""
    names: list[str] = []
    for module in (direction, loop_tier, step_tier):
        monkeypatch.setattr(module, "launch", lambda kernel, *_, **__: names.append(kernel.__name__))
    return names


@pytest.mark.parametrize("T", [2, 9])
def test_one_launch_a_step(T, launches, monkeypatch):
    monkeypatch.setattr(direction, "LOOP_BYTES", 0)
    train(Case("lstm", norms.HASTE, T=T, H=9))
    assert launches.count("step_forward") == launches.count("step_backward") == T
    assert len(launches) - 2 * T == 5  # the norm of x, twice; and the gains of x, h and c


@pytest.mark.parametrize("case", [LSTM, Case("indrnn", norms.HASTE, T=5, H=700)], ids=str)
def test_one_launch_for_all_steps(case, launches):
    train(case)
    assert launches.count("loop_forward") == launches.count("loop_backward") == 1


def test_only_c_is_kept(launches):
    call, _ = LSTM.build()
    saved = TRITON.forward_train(call)[1]
    assert [tuple(tensor.shape) for tensor in saved] == [(1, len(call.input), 9)]
    assert TRITON.forward_train(Case("gru", norms.HASTE).build()[0])[1] == []


def train(case: Case) -> None:
    """Both passes; their results do not matter."""
    call, cotangents = case.build()
    outputs, saved = TRITON.forward_train(call)
    TRITON.backward(call, outputs, saved, (*cotangents, None)[:3], [True] * len(call.tensors()))


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

# Bytes spilled per thread, at the largest H of a tier; at smaller H none.
SPILLED_AT_MOST = 256

AROUND = ("zoneout", "zoneout_cell", "resets")
SMALL = [
    Case("lstm", norms.HASTE, T=2, H=64, dtype=torch.bfloat16, features=AROUND),
    Case("gru", norms.BA2016_GRU, T=2, H=512, features=("expectation",)),
    Case("indrnn", norms.HASTE, T=2, H=256, dtype=torch.float16, features=("resets",)),
]
LARGE = [
    Case("lstm", norms.HASTE, T=2, H=128, dtype=torch.bfloat16, features=AROUND),
    Case("lstm", norms.FASTRNNS, T=2, H=64),
    Case("lstm", norms.ICEFALL, T=2, H=64, P=32, dtype=torch.float16, features=("expectation",)),
    Case("lstm", norms.HASTE, T=2, H=1024, dtype=torch.bfloat16, features=AROUND),
    Case("lstm", norms.ICEFALL, T=2, H=512, P=200, features=("expectation",)),
    Case("lstm", norms.NONE, T=2, H=1000),
    Case("gru", norms.HASTE, T=2, H=128, dtype=torch.float16),
    Case("gru", norms.BA2016_GRU, T=2, H=17, features=("zoneout",)),
    Case("gru", norms.DREAMER, T=2, H=512, features=("resets",)),
    Case("gru", norms.HASTE, T=2, H=1024, dtype=torch.bfloat16),
    Case("indrnn_relu", norms.HASTE, T=2, H=1024),
]


def check_compiled(target: str, case: Case) -> None:
    with compiling(target) as found:
        train(case)
    kernels = {compiled.kernel for compiled in found}
    assert {"loop_backward", "step_backward"} & kernels
    shared = TARGETS[target][1]
    allowed = 0 if case in SMALL else SPILLED_AT_MOST
    for compiled in found:
        assert compiled.shared_bytes <= shared, compiled
        assert compiled.spilled_bytes <= allowed, compiled


@pytest.mark.parametrize("case", SMALL, ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_kernels_compile(target, case):
    check_compiled(target, case)


@pytest.mark.full
@pytest.mark.parametrize("case", LARGE, ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_large_kernels_compile(target, case):
    check_compiled(target, case)


def test_a_changed_cell_is_compiled_again():
    """Triton's cache on disk would not notice: it knows a function inside a constant by its name."""
    plan = Direction(LSTM.build()[0], 0).plan
    assert len(plan.source) == 64
    assert repr(plan) != repr(plan._replace(source="another"))


# On a device


def on_device(test):
    return pytest.mark.cuda(pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")(test))


@on_device
@pytest.mark.parametrize("case", [*SMALL, *LARGE], ids=str)
def test_parity_on_the_device(case):
    case = Case(**{**vars(case), "T": 6, "B": 5})
    call, cotangents = case.build("cuda")
    cpu_call, cpu_cotangents = case.build()
    want = evaluate(reference.run, widened(cpu_call), cpu_cotangents)
    with backends.use("triton"):
        got = {name: tensor.cpu() for name, tensor in evaluate(functional.recurrence, call, cotangents).items()}
    found, name = worst(got, want)
    eager, _ = worst(evaluate(reference.run, cpu_call, cpu_cotangents), want)
    assert found <= max(1e-5, 3 * eager), f"{name} differs by {found:.2e} of its rms, eager by {eager:.2e}"


@on_device
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_a_graph_captures_both_passes_and_waits_for_nothing(case):
    call, cotangents = case.build("cuda")

    def both() -> dict[str, torch.Tensor]:
        with backends.use("triton"):
            return evaluate(functional.recurrence, call, cotangents)

    want = {name: tensor.clone() for name, tensor in both().items()}
    torch.cuda.set_sync_debug_mode("error")
    try:
        both()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = both()
    graph.replay()
    assert all(torch.equal(tensor, want[name]) for name, tensor in got.items())


def test_the_norm_kernels_are_where_compiling_looks():
    """`offline.compiling` clears every kernel's cache; a kernel that it missed would keep another device's binary."""
    assert {"rows_forward", "rows_backward"} <= {name for name, k in vars(norm).items() if hasattr(k, "device_caches")}
