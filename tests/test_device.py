"""The Triton backend on a GPU: parity, equal bits, CUDA graphs, streams, compilers, autocast, several devices.

`pytest -m cuda` runs it; where there is no CUDA device it is skipped.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import festina
from festina import backends, functional, norms, reference
from festina.backends.triton import is_interpreting
from festina.call import Call
from festina.cli.bench import trained
from festina.testing import TOLERANCES, Case, evaluate, rms_ratio, widened, worst

pytest.importorskip("triton", reason="triton is not installed (it needs Linux); pip install 'festina[triton]'")

from festina.backends.triton import setup
from festina.backends.triton.device import device_of
from festina.backends.triton.setup import setup_of

if is_interpreting():
    pytest.skip("under TRITON_INTERPRET kernels run on the CPU", allow_module_level=True)

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available() or bool(torch.version.hip), reason="no CUDA device"),
]

T, B, I = 12, 20, 32

LAYERS: dict[str, Callable[..., festina.layers.Recurrent]] = {
    "loop": lambda **options: festina.LayerNormLSTM(I, 64, **options),
    "team": lambda **options: festina.LayerNormLSTM(I, 256, **options),
    "team of a gru": lambda **options: festina.LayerNormGRU(I, 256, **options),
    "team, both directions": lambda **options: festina.LayerNormLSTM(I, 256, bidirectional=True, **options),
    "step": lambda **options: festina.LayerNormLSTM(I, 512, proj_size=128, **options),
}
"""Layers by the tier that takes them on sm_80 and later."""

ROUNDING = 1e-6
"""The rms ratio up to which two kernels agree in float32 that compute the same, but are compiled for other arguments."""

every_layer = pytest.mark.parametrize("name", LAYERS)


@pytest.fixture(autouse=True)
def by_triton() -> Iterator[None]:
    torch.manual_seed(0)
    with backends.use("triton"):
        yield


def made(name: str, device: str = "cuda", **options: Any) -> tuple[festina.layers.Recurrent, Tensor, Tensor]:
    """A layer, an input that requires a gradient, and a cotangent of the output; the same numbers on every device."""
    torch.manual_seed(0)
    layer = LAYERS[name](**options)
    x = torch.randn(T, B, I)
    with torch.no_grad(), backends.use("eager"):
        cotangent = torch.randn_like(layer(x)[0])
    return layer.to(device), x.to(device).requires_grad_(), cotangent.to(device)


def assert_same_bits(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    assert [name for name in want if not torch.equal(got[name], want[name])] == []


@contextmanager
def no_waiting() -> Iterator[None]:
    """Inside, waiting for the device is an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


# Numbers

AROUND = ("zoneout", "zoneout_cell", "resets")
SMALL = [
    Case("lstm", norms.HASTE, H=64, dtype=torch.bfloat16, features=AROUND),
    Case("gru", norms.BA2016_GRU, H=512, features=("expectation",)),
    Case("indrnn", norms.HASTE, H=256, dtype=torch.float16, features=("resets",)),
    Case("lstm", norms.HASTE, H=256, features=AROUND),
    Case("gru", norms.HASTE, H=256, dtype=torch.bfloat16, features=("bidirectional",)),
]
LARGE = [
    Case("lstm", norms.HASTE, H=128, dtype=torch.bfloat16, features=AROUND),
    Case("lstm", norms.FASTRNNS, H=64),
    Case("lstm", norms.ICEFALL, H=64, P=32, dtype=torch.float16, features=("expectation",)),
    Case("lstm", norms.HASTE, H=1024, dtype=torch.bfloat16, features=AROUND),
    Case("lstm", norms.ICEFALL, H=512, P=200, features=("expectation",)),
    Case("lstm", norms.NONE, H=1000),
    Case("gru", norms.HASTE, H=128, dtype=torch.float16),
    Case("gru", norms.BA2016_GRU, H=17, features=("zoneout",)),
    Case("gru", norms.DREAMER, H=512, features=("resets",)),
    Case("gru", norms.HASTE, H=1024, dtype=torch.bfloat16),
    Case("indrnn_relu", norms.HASTE, H=1024),
    *(Case(cell, norms.HASTE, H=H) for cell in ("lstm", "gru") for H in (64, 256, 300, 1024)),
    Case("lstm", norms.FASTRNNS, H=256, features=("bidirectional", "nobias")),
    Case("lstm", norms.HASTE, H=256, features=("ragged", "idle", "resets")),
]


def sized(case: Case, rows: int) -> Case:
    return Case(**{**vars(case), "T": 6, "B": rows})


@pytest.mark.parametrize(("name", "tier"), [("loop", "loop"), ("team", "team of"), ("step", "step")])
def test_the_layers_here_take_the_tiers_that_they_are_named_after(name: str, tier: str) -> None:
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("processors before sm_80 have less memory")
    layer, x, _ = made(name)
    zeros = x.new_zeros(1, B, layer.proj_size or layer.hidden_size)
    call = Call(
        layer=layer.spec, input=x.detach().flatten(0, 1), h_0=zeros, c_0=x.new_zeros(1, B, layer.hidden_size),
        parameters=tuple(layer.parameters()),
    )  # fmt: skip
    assert setup_of(call).tier.name.startswith(tier)


@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("case", [*SMALL, *LARGE], ids=str)
def test_parity_on_the_device(case: Case, rows: int) -> None:
    if rows == 1 and "idle" in case.features:
        pytest.skip("its only row is idle")
    case = sized(case, rows)
    call, cotangents = case.build("cuda")
    cpu_call, cpu_cotangents = case.build()
    want = evaluate(reference.run, widened(cpu_call), cpu_cotangents)
    got = {name: tensor.cpu() for name, tensor in evaluate(functional.recurrence, call, cotangents).items()}
    found, name = worst(got, want)
    eager, _ = worst(evaluate(reference.run, cpu_call, cpu_cotangents), want)
    assert found <= max(1e-5, 3 * eager), f"{name} differs by {found:.2e} of its rms, eager by {eager:.2e}"


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_every_run_gives_the_same_bits(case: Case) -> None:
    call, cotangents = sized(case, 40).build("cuda")
    want = evaluate(functional.recurrence, call, cotangents)
    for _ in range(9):
        assert_same_bits(evaluate(functional.recurrence, call, cotangents), want)


@every_layer
def test_inference_gives_what_training_gives(name: str) -> None:
    layer, x, _ = made(name)
    want = layer(x)[0].detach()
    with torch.inference_mode():
        assert rms_ratio(layer(x.detach())[0], want) < ROUNDING


@every_layer
def test_gradients_of_two_backward_passes_add_up(name: str) -> None:
    layer, x, cotangent = made(name)
    parts = [trained(layer, part.detach().requires_grad_(), cotangent) for part in (x, -x)]
    for part in (x, -x):
        layer(part.detach())[0].backward(cotangent)
    for key, parameter in layer.named_parameters():
        assert torch.equal(parameter.grad, parts[0][f"d_{key}"] + parts[1][f"d_{key}"]), key


@every_layer
def test_autocast(name: str) -> None:
    """As a layer in bfloat16, but gradients of parameters are float32."""
    layer, x, cotangent = made(name)
    with torch.autocast("cuda", torch.bfloat16):
        output = layer(x)[0]
    assert output.dtype == torch.bfloat16
    output.backward(cotangent.bfloat16())
    want = trained(copy.deepcopy(layer).bfloat16(), x.detach().bfloat16().requires_grad_(), cotangent.bfloat16())
    assert rms_ratio(output.detach(), want["output"]) < 0.02
    for key, parameter in layer.named_parameters():
        assert parameter.grad.dtype == torch.float32
        assert rms_ratio(parameter.grad, want[f"d_{key}"]) < 0.05, key
    assert x.grad.dtype == torch.float32


# CUDA graphs, and waiting for nothing


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_a_graph_captures_both_passes_and_waits_for_nothing(case: Case) -> None:
    call, cotangents = sized(case, 20).build("cuda")
    want = {name: tensor.clone() for name, tensor in evaluate(functional.recurrence, call, cotangents).items()}
    with no_waiting():
        evaluate(functional.recurrence, call, cotangents)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = evaluate(functional.recurrence, call, cotangents)
    for _ in range(3):
        graph.replay()
        assert_same_bits(got, want)


@every_layer
def test_no_call_waits_for_the_device(name: str) -> None:
    layer, x, cotangent = made(name)
    resets = torch.rand(T, B, device="cuda") < 0.1

    def calls() -> None:
        trained(layer, x, cotangent)
        trained(layer, x, cotangent, resets=resets)
        with torch.inference_mode():
            layer(x)

    calls()
    with no_waiting():
        calls()


@every_layer
def test_a_graph_of_a_training_step(name: str) -> None:
    """Three replays on new input end with the weights that three plain steps give."""
    layer, x, cotangent = made(name)
    x = x.detach()
    plain = copy.deepcopy(layer)

    def step(module: nn.Module, optimizer: torch.optim.Optimizer, input: Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        (module(input)[0] * cotangent).sum().backward()
        optimizer.step()

    def stepper(module: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(module.parameters(), lr=1e-3)

    before = copy.deepcopy(layer.state_dict())
    optimizer, side = stepper(layer), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step(layer, optimizer, x)
    torch.cuda.current_stream().wait_stream(side)
    layer.load_state_dict(before)
    optimizer.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(layer, optimizer, x)
    plain_optimizer = stepper(plain)
    for factor in (1.0, -0.5, 0.25):
        x.copy_(factor * torch.randn_like(x))
        graph.replay()
        step(plain, plain_optimizer, x)
    assert_same_bits(layer.state_dict(), plain.state_dict())


@every_layer
def test_graphed_callables(name: str) -> None:
    layer, x, cotangent = made(name)
    plain = copy.deepcopy(layer)
    graphed = torch.cuda.make_graphed_callables(layer, (x.detach().clone().requires_grad_(),))
    for factor in (1.0, -0.5):
        input = (factor * x).detach().requires_grad_()
        got, want = trained(graphed, input, cotangent), trained(plain, input, cotangent)
        assert got.keys() == want.keys()
        assert [key for key, tensor in want.items() if not rms_ratio(got[key], tensor) < ROUNDING] == []


@pytest.mark.slow
@pytest.mark.parametrize("is_training", [False, True])
@pytest.mark.parametrize("name", ["loop", "team", "step"])
def test_compiled_with_graphs_it_carries_its_state(name: str, is_training: bool) -> None:
    """A graph writes its outputs over those of the call before, so what is carried on is cloned, as PyTorch asks."""
    layer, x, cotangent = made(name)
    x = x.detach()
    torch._dynamo.reset()
    compiled = torch.compile(layer, mode="reduce-overhead")
    zeros = [x.new_zeros(1, B, width) for width in (layer.proj_size or layer.hidden_size, layer.hidden_size)]
    state, want_state = tuple(zeros), tuple(zero.clone() for zero in zeros)
    parameters = list(layer.parameters())
    with torch.set_grad_enabled(is_training):
        for call in range(5):
            torch.compiler.cudagraph_mark_step_begin()
            input = x * (call + 1) / 5
            output, state = compiled(input, state)
            want, want_state = layer(input, want_state)
            assert rms_ratio(output.detach(), want.detach()) < 1e-5
            if is_training:
                got_grads, want_grads = (torch.autograd.grad(out, parameters, cotangent) for out in (output, want))
                assert all(rms_ratio(one, two) < 1e-4 for one, two in zip(got_grads, want_grads))
            state = tuple(s.detach().clone() for s in state)
            want_state = tuple(s.detach() for s in want_state)
            assert all(rms_ratio(one, two) < 1e-5 for one, two in zip(state, want_state))
    torch._dynamo.reset()


# Streams, devices, processes


@pytest.mark.parametrize("names", [("team", "team of a gru"), ("team", "team"), ("loop", "team, both directions")])
def test_two_streams_at_once(names: tuple[str, str]) -> None:
    """Teams wait for their members, so two of them must not keep each other from starting."""
    works = [made(name) for name in names]
    want = [trained(*work) for work in works]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in works]
    got: list[list[dict[str, Tensor]]] = [[], []]
    for _ in range(10):
        for index, (work, stream) in enumerate(zip(works, streams)):
            with torch.cuda.stream(stream):
                got[index].append(trained(*work))
    torch.cuda.synchronize()
    for results, wanted in zip(got, want):
        for result in results:
            assert_same_bits(result, wanted)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
@every_layer
def test_a_device_that_is_not_the_current_one(name: str) -> None:
    want = trained(*made(name, "cuda:0"))
    got = trained(*made(name, "cuda:1"))
    assert torch.cuda.current_device() == 0
    assert {str(tensor.device) for tensor in got.values()} == {"cuda:1"}
    assert all(rms_ratio(tensor.cpu(), want[key].cpu()) < 1e-5 for key, tensor in got.items())


@every_layer
def test_ddp_in_one_process(name: str, tmp_path: Path) -> None:
    layer, x, cotangent = made(name)
    want = trained(layer, x, cotangent)
    kind = "nccl" if dist.is_nccl_available() else "gloo"
    dist.init_process_group(kind, init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        parallel = DistributedDataParallel(layer, device_ids=[torch.cuda.current_device()])
        for _ in range(2):
            parallel.zero_grad()
            parallel(x)[0].backward(cotangent)
        torch.cuda.synchronize()
        assert all(torch.equal(p.grad, want[f"d_{key}"]) for key, p in layer.named_parameters())
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_a_team_that_the_device_refuses_falls_back(cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device seems to have more processors than it has, so the rule takes more programs than can run at once."""
    larger = device_of(torch.device("cuda"))._replace(processors=100_000)
    call, cotangents = Case(cell, norms.HASTE, T=3, B=6400, I=8, H=256).build("cuda")
    monkeypatch.setattr(setup, "device_of", lambda _: larger)
    setup.forget()
    try:
        found = setup_of(call)
        if not found.ruled.is_team:
            pytest.skip(found.ruled.why)
        got = evaluate(functional.recurrence, call, cotangents)
        assert "the device did not start" in found.kernels.refused[found.ruled]
        assert found.tier.name == "step"
    finally:
        setup.forget()
    off, name = worst(got, evaluate(reference.run, widened(call), cotangents))
    assert off <= TOLERANCES[torch.float32], name
