"""What the tests of the compiled core share: the backend without operators, its error, cases, instruction sets."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from festina import norms, reference
from festina.backends.cpu import CPU, abi, new_outputs
from festina.backends.cpu.frozen import FrozenPanels
from festina.call import Call
from festina.frozen import rounded_to_int8
from festina.testing import Case, evaluate, result_names, widened, worst

needs_core = pytest.mark.skipif(abi.library().core is None, reason=str(abi.library().reason))
ROOT = Path(__file__).parents[2]
MARGIN = 10


class Recurrence(torch.autograd.Function):
    """The backend under autograd, without the operators."""

    @staticmethod
    def forward(ctx, call, *tensors):
        outputs, saved = CPU.forward_train(call.with_tensors(tensors))
        ctx.call = call.with_tensors(tensors)
        ctx.output, ctx.saved = outputs.output, saved
        return tuple(out for out in outputs if out is not None)

    @staticmethod
    def backward(ctx, *d_outputs):
        d_outputs = (*d_outputs, None)[:3]
        return None, *CPU.backward(ctx.call, ctx.output, ctx.saved, d_outputs, ctx.needs_input_grad[1:])


def run(call: Call):
    outputs = Recurrence.apply(call, *call.tensors())
    return (*outputs, None)[:3]


def differs(case: Case) -> tuple[float, str]:
    call, cotangents = case.build()
    return worst(evaluate(run, call, cotangents), evaluate(reference.run, widened(call), cotangents))


def errors(case: Case) -> tuple[float, float, str]:
    """The worst error against float64, eager's own worst, and the name of what ours is in."""
    call, cotangents = case.build()
    want = evaluate(reference.run, widened(call), cotangents)
    ours, name = worst(evaluate(run, call, cotangents), want)
    return ours, worst(evaluate(reference.run, call, cotangents), want)[0], name


RESET_STATE = norms.NormPlan("separate", "gates|candidate", inner_bias_hh=True, reset="state")
INNER = next(plan for plan in norms.PLANS.values() if plan.inner_bias and not plan.inner_bias_hh)

# Rows and units enough to be split among threads in either way, and not evenly.
SPLIT = [
    Case("lstm", norms.HASTE, T=5, B=3, I=9, H=70, features=("zoneout", "resets")),
    Case("lstm", norms.HASTE, T=5, B=37, I=9, H=40, features=("ragged", "resets", "bidirectional")),
    Case("lstm", norms.HASTE, T=5, B=101, I=9, H=40, features=("ragged", "resets")),
    Case("lstm", norms.ICEFALL, T=5, B=2, I=9, H=70, P=33, features=("bidirectional", "zoneout_cell")),
    Case("lstm", norms.FASTRNNS, T=5, B=17, I=9, H=33, features=("expectation", "idle", "ragged")),
    Case("lstm", norms.NONE, T=4, B=1, I=9, H=70, P=5),
    Case("gru", norms.HASTE, T=5, B=3, I=9, H=70, features=("ragged", "zoneout")),
    Case("gru", norms.NONE, T=5, B=131, I=9, H=33, features=("bidirectional",)),
    Case("gru", norms.DREAMER, T=5, B=3, I=9, H=70, features=("resets",)),
    Case("indrnn", norms.HASTE, T=5, B=3, I=9, H=70, features=("resets", "bidirectional")),
    Case("indrnn_relu", norms.NONE, T=5, B=17, I=9, H=33),
    Case("gru", norms.ICEFALL_GRU, T=5, B=37, I=9, H=70, features=("ragged", "resets", "bidirectional", "zoneout")),
    Case("gru", replace(norms.NEMATUS_STATE, reset="product", name=None), T=5, B=3, I=9, H=70, features=("resets",)),
    Case("lstm", replace(norms.SOCKEYE, clip=0.4, name=None), T=5, B=3, I=9, H=70, P=33, features=("ragged",)),
    Case("gru", norms.RESET_BEFORE, T=5, B=3, I=9, H=70, features=("ragged", "zoneout")),
    Case("gru", RESET_STATE, T=5, B=37, I=9, H=70, features=("ragged", "resets", "bidirectional", "expectation")),
    Case("gru", norms.LINGVO_GRU, T=5, B=17, I=9, H=33, features=("ragged", "resets", "zoneout", "idle")),
]


def isas() -> list[str]:
    """The instruction sets that this machine runs."""
    core = abi.library().core
    return core.isas(runnable=True) if core else []


def compiled(*arguments: str) -> None:
    """Run g++ on these arguments, with what every part of the core is compiled with."""
    if (compiler := shutil.which("g++")) is None:
        pytest.skip("there is no g++")
    subprocess.run([compiler, "-std=gnu++17", "-fno-math-errno", "-fno-trapping-math", *arguments], check=True)


def interrupt() -> None:
    """What Python does on Ctrl-C, at `disturbed_at`."""
    raise KeyboardInterrupt


def disturbed_at(work: Callable[[], Any], where: ModuleType, instruction: int, disturb: Callable[[], Any]) -> bool:
    """Do some work, and call `disturb` before the instruction of that number of those in a module or package. False if there
    are fewer. A KeyboardInterrupt ends here."""
    folder = str(Path(where.__file__ or "").parent) if hasattr(where, "__path__") else where.__file__
    before, seen = sys.gettrace(), 0

    def trace(frame, event, _):
        nonlocal seen
        if not frame.f_code.co_filename.startswith(folder):
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            seen += 1
            if seen == instruction:
                disturb()
        return trace

    sys.settrace(trace)
    try:
        work()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
    return seen >= instruction


def rounded(tensor: torch.Tensor, panel_type: str) -> torch.Tensor:
    """A parameter as frozen panels hold it."""
    if tensor.dim() != 2 or panel_type == abi.WHOLE:
        return tensor
    if panel_type == "bfloat16":
        return tensor.bfloat16().float()
    values, scale = rounded_to_int8("weight", tensor)
    return values * scale.unsqueeze(1)


def frozen_differs(case: Case, panel_type: str) -> tuple[float, str]:
    """The worst error of inference on frozen panels against the reference in float64, which has the same weights."""
    call, _ = case.build()
    call.parameters = tuple(rounded(parameter, panel_type) for parameter in call.parameters)
    panels, outputs = FrozenPanels(call.layer, call.parameters, panel_type), new_outputs(call)
    for output in outputs:
        if output is not None:
            output.fill_(torch.nan)
    panels.forward(call, outputs)
    names, wanted = result_names(call)[0], reference.run(widened(call))
    got, want = ({name: out for name, out in zip(names, of) if out is not None} for of in (outputs, wanted))
    return worst(got, want)
