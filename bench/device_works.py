"""What `bench/device.py` times: passes of Festina's layers and of their peers, and how they are timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from device_lines import brief
from torch import Tensor, nn

from festina import norms
from festina.cli.bench import DTYPES, Point, layers, trained
from festina.cli.measure import Work

SLOPE = (128, 1024)
"""The two lengths that a time per step comes from."""


def precision(name: str) -> None:
    """Products in float32 are done in "ieee" or in "tf32", by cuBLAS and by cuDNN."""
    torch.backends.cuda.matmul.fp32_precision = torch.backends.cudnn.rnn.fp32_precision = name


def tf32(work: Work) -> Work:
    """The work, with TF32."""

    def run() -> object:
        precision("tf32")
        try:
            return work()
        finally:
            precision("ieee")

    return run


def work_of(layer: nn.Module, x: Tensor, name: str) -> Work:
    """A pass of a layer; forward alone is to be called in inference mode."""
    if name == "forward":
        return partial(layer, x)
    x = x.detach().requires_grad_()
    return partial(trained, layer, x, torch.randn_like(layer(x)[0]))


def graphed(work: Work) -> Work:
    """The work, captured in a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = work()

    def replay() -> object:
        graph.replay()
        return kept

    return replay


def input_of(point: Point) -> Tensor:
    """The same numbers for every contestant."""
    torch.manual_seed(1)
    return torch.randn(point.T, point.B, point.I, device="cuda").to(DTYPES[point.dtype])


def contestants(point: Point, name: str) -> dict[str, Callable[[], Work]]:
    """What makes each contestant of a pass, Festina first."""
    layer, peer = layers(point, "cuda")
    x = input_of(point)
    makers: dict[str, Callable[[], Work]] = {
        "festina": lambda: work_of(layer, x, name),
        "nn": lambda: work_of(peer, x, name),
        "nn-graph": lambda: graphed(work_of(peer, x, name)),
    }
    if point.dtype == "float32":
        makers["festina-tf32"] = lambda: tf32(work_of(layer, x, name))
        makers["nn-tf32"] = lambda: tf32(work_of(peer, x, name))
    if point.dtype != "float16":
        half = replace(point, dtype="float16")
        makers["nn-float16"] = lambda: work_of(layers(half, "cuda")[1], input_of(half), name)
    return makers


def ready(makers: Mapping[str, Callable[[], Work]], left_out: dict[str, str]) -> dict[str, Work]:
    """The works, each run once; what fails goes to `left_out`. Festina must not fail."""
    works = {}
    for name, make in makers.items():
        try:
            work = make()
            work()
            torch.cuda.synchronize()
            works[name] = work
        except Exception as error:
            if name == "festina":
                raise
            left_out[name] = brief(error)
    return works


def time_us(work: Work, repeats: int = 1) -> float:
    """Microseconds a call, from an idle device to the end of the last one."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3 / repeats


def rounds_of(works: Mapping[Any, Work], seconds: float, least: int = 5, turn_us: float = 0.0) -> dict[Any, np.ndarray]:
    """Microseconds of each work, round by round; in a round each has a turn, and the order rotates.

    A turn is a call, or as many as take `turn_us`.
    """
    names = list(works)
    repeats = {name: max(1, int(turn_us / time_us(works[name], 2))) for name in names}
    times: dict[Any, list[float]] = {name: [] for name in names}
    end, done = time.perf_counter() + seconds, 0
    while done < least or time.perf_counter() < end:
        turn = done % len(names)
        for name in names[turn:] + names[:turn]:
            times[name].append(time_us(works[name], repeats[name]))
        done += 1
    return {name: np.array(values) for name, values in times.items()}


def slopes_of(times: Mapping[tuple[str, int], np.ndarray]) -> dict[str, np.ndarray]:
    """Microseconds a step of each contestant whose two lengths were both timed."""
    few, many = SLOPE
    names = dict.fromkeys(name for name, _ in times)
    return {
        name: (times[name, many] - times[name, few]) / (many - few)
        for name in names
        if (name, few) in times and (name, many) in times
    }


class LnLoop(nn.Module):
    """The LSTM of `norms.HASTE` as a loop in PyTorch, `block` steps to one function that may be compiled."""

    def __init__(self, layer: nn.Module, block: int, is_compiled: bool = True) -> None:
        super().__init__()
        self.layer, self.block = layer, block
        self.steps = torch.compile(ln_steps, dynamic=False) if is_compiled else ln_steps

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        p = {name.removesuffix("_l0"): tensor for name, tensor in self.layer.named_parameters()}
        width, eps = (len(p["gain_ih"]),), norms.HASTE.eps
        a = F.layer_norm(x @ p["weight_ih"].t(), width, p["gain_ih"], p["bias_ih"], eps)
        h = c = x.new_zeros(x.shape[1], width[0] // 4)
        outputs = []
        for part in a.split(self.block):
            output, h, c = self.steps(
                part, h, c, p["weight_hh"].t(), p["gain_hh"], p["bias_hh"], p["gain_c"], p["bias_c"]
            )
            outputs.append(output)
        return torch.cat(outputs), h


def ln_steps(
    a: Tensor, h: Tensor, c: Tensor, weight: Tensor, gain: Tensor, bias: Tensor, gain_c: Tensor, bias_c: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Steps from pre-activations `[steps, B, 4H]`, unrolled."""
    outputs = []
    for x in a.unbind():
        i, f, g, o = (x + F.layer_norm(h @ weight, gain.shape, gain, bias, norms.HASTE.eps)).chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(F.layer_norm(c, gain_c.shape, gain_c, bias_c, norms.HASTE.eps))
        outputs.append(h)
    return torch.stack(outputs), h, c


class TorchRL(nn.Module):
    """TorchRL's recurrent modules with their Triton backend."""

    def __init__(self, point: Point) -> None:
        super().__init__()
        from tensordict import TensorDict
        from torchrl import modules

        self.states = ["h", "c"] if point.cell == "lstm" else ["h"]
        kind = modules.LSTMModule if point.cell == "lstm" else modules.GRUModule
        keys = {"in_keys": ["x", *self.states], "out_keys": ["y", *(("next", name) for name in self.states)]}
        self.inner = kind(point.I, point.H, recurrent_backend="triton", device="cuda", **keys)
        self.inner = self.inner.to(DTYPES[point.dtype])
        self.mode, self.dict, self.H = modules.set_recurrent_mode, TensorDict, point.H

    def forward(self, x: Tensor) -> tuple[Tensor]:
        x = x.transpose(0, 1)
        B, T, _ = x.shape
        data = {"x": x, "is_init": torch.zeros(B, T, 1, dtype=torch.bool, device=x.device)}
        data |= {name: x.new_zeros(B, T, 1, self.H) for name in self.states}
        with self.mode(True):
            return (self.inner(self.dict(data, batch_size=[B, T]))["y"].transpose(0, 1),)


class FlashRNN(nn.Module):
    """FlashRNN's fused kernel, behind the input product."""

    def __init__(self, point: Point) -> None:
        super().__init__()
        from flashrnn import flashrnn

        gates, H, dtype = 4 if point.cell == "lstm" else 3, point.H, DTYPES[point.dtype]
        self.run = partial(flashrnn, function=point.cell, dtype=point.dtype, backend="cuda_fused")
        self.gates, self.H = gates, H
        self.w = nn.Parameter(torch.randn(point.I, gates * H, device="cuda", dtype=dtype) / 16)
        self.r = nn.Parameter(torch.randn(gates, 1, H, H, device="cuda", dtype=dtype) / H**0.5)
        self.b = nn.Parameter(torch.zeros(gates, 1, H, device="cuda", dtype=dtype))

    def forward(self, x: Tensor) -> tuple[Tensor]:
        a = (x.transpose(0, 1) @ self.w).unflatten(-1, (self.gates, 1, self.H))
        return (self.run(Wx=a.contiguous(), R=self.r, b=self.b)[0][0].reshape(*a.shape[:2], self.H).transpose(0, 1),)


OTHERS: dict[str, Callable[[Point], nn.Module]] = {"torchrl": TorchRL, "flashrnn": FlashRNN}
