"""Who carries out a call (`festina.dispatch`): autocast, modes without gradients, backends by name."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from samples import VARIANTS, assert_same, gradients, make

import festina
from festina import backends
from festina.testing import Case

T, B, I, H = 6, 4, 3, 5
F64: dict[str, Any] = {"dtype": torch.float64}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


# Autocast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_autocast(variant: str, dtype: torch.dtype) -> None:
    """Outputs are of the low type, gradients float32 and near those of float32; backward runs inside the block or after it."""
    layer, x = make(variant, I, 16, 2), torch.randn(T, B, I)
    want_output = layer(x)[0]
    want = gradients(want_output, layer)
    for inside in (True, False):
        with torch.autocast("cpu", dtype=dtype):
            output, state = layer(x)
            assert {t.dtype for t in (output, *(state if isinstance(state, tuple) else (state,)))} == {dtype}
            if inside:
                got = gradients(output.float(), layer)
        if not inside:
            got = gradients(output.float(), layer)
        assert (output.float() - want_output).norm() < 0.03 * want_output.norm()
        assert {g.dtype for g in got} == {torch.float32}
        for mine, exact in zip(got, want):
            assert (mine - exact).norm() < 0.1 * exact.norm()


# Modes without gradients


def test_inference_mode_and_no_grad_give_the_same_numbers() -> None:
    layer, x = make("lstm-haste", I, H, **F64), torch.randn(T, B, I, **F64)
    want = layer(x)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            got = layer(x)
        assert_same(got, want)
        assert not got[0].requires_grad


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("variant", VARIANTS)
def test_modes_without_gradients_give_the_same_numbers(mode: Any, variant: str) -> None:
    layer, x = make(variant, I, H, num_layers=2, bidirectional=True), torch.randn(4, 2, I)
    want = layer(x, lengths=[2, 4])[0]
    with mode():
        got = layer(x, lengths=[2, 4])[0]
    assert want.requires_grad
    assert not got.requires_grad
    assert got.is_inference() == (mode is torch.inference_mode)
    assert_same(got, want.detach(), rtol=1e-6, atol=1e-7)


# Backends


def test_backend_by_name() -> None:
    with (
        pytest.raises(backends.BackendError, match=r"there is no backend 'cudnn'; there are .*eager"),
        backends.use("cudnn"),
    ):
        pass
    assert backends.forced() == ""


# The way of a warm call.


def frames(work: Callable[[], object]) -> int:
    """Calls of this package's own functions, comprehensions aside, that a warm call makes."""
    root, count = str(Path(festina.__file__).parent), 0

    def watch(frame: FrameType, event: str, _: object) -> None:
        nonlocal count
        code = frame.f_code
        count += event == "call" and code.co_filename.startswith(root) and not code.co_name.startswith("<")

    for _ in range(5):
        work()
    sys.setprofile(watch)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.skipif(backends.get("cpu").can_run(Case("lstm").on("cpu")) is not None, reason="there is no compiled core")
def test_a_call_takes_few_frames_of_python() -> None:
    """What a newcomer steps through, and most of what a small call costs; measured 34, 11, 35, 17 and 33 on Python 3.11."""
    layer, cell, x = festina.LayerNormLSTM(8, 8), festina.LayerNormLSTMCell(8, 8), torch.randn(5, 2, 8)
    state, kept = (torch.zeros(2, 8), torch.zeros(2, 8)), []
    output = layer(x)[0]
    parameters, cotangent = list(layer.parameters()), torch.ones_like(output)
    with torch.no_grad():
        assert frames(lambda: layer(x)) <= 40
        assert frames(lambda: cell(x[0], state)) <= 12
    assert frames(lambda: kept.append(layer(x))) <= 50
    assert frames(lambda: kept.append(cell(x[0], state))) <= 45
    assert frames(lambda: torch.autograd.grad(output, parameters, cotangent, retain_graph=True)) <= 30
