"""Long calls and signals: Ctrl-C ends a call soon, and what comes after it is right."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from on_core import ROOT, needs_core

from festina import backends, functional, norms, reference
from festina.backends.cpu import CPU, new_outputs, plans, signals
from festina.testing import Case

pytestmark = needs_core

SCRIPT = """
import signal, sys, time
from dataclasses import replace
sys.path[:0] = ["tests", "tests/cpu"]
import torch
from test_signals import LONG, backward, training, zeros
from festina.backends.cpu import CPU, new_outputs

def interrupted(work, error):
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    try:
        work()
    except error:
        return time.monotonic() - sent[-1]
    raise AssertionError(f"{work} was not interrupted")

def handler(number, frame):
    sent.append(time.monotonic())
    if len(sent) % 2:
        raise TimeoutError
    signal.raise_signal(signal.SIGINT)

torch.set_num_threads(int(sys.argv[1]))
signal.signal(signal.SIGALRM, handler)
call = zeros(LONG)
for name, work in {"forward": CPU.forward, "training": training, "backward": backward}.items():
    sent = []
    for error in (TimeoutError, KeyboardInterrupt):
        took = interrupted(lambda: work(call), error)
        assert took < 2, f"{name} took {took} s more"
    assert not CPU._panels._found, "of a call that did not end"

sent = []
signal.signal(signal.SIGALRM, lambda *_: sent.append(1))
call = replace(call, input=torch.randn(200, LONG.I))
want = CPU.forward(call)
signal.setitimer(signal.ITIMER_REAL, 0.005, 0.005)
got = CPU.forward(call)
signal.setitimer(signal.ITIMER_REAL, 0)
assert sent and all(map(torch.equal, got, want)), "a handler that does not raise lets the call go on"
print("done")
"""

LONG = Case("lstm", norms.HASTE, T=10_000, B=1, I=1024, H=1024)
"""Some tenths of a second at least on any machine, and seconds on most."""


def zeros(case):
    """A call of these sizes, all its tensors zero, which are made in no time."""
    call = replace(case, T=1, B=1).build()[0]
    states = [torch.zeros(h.shape[0], case.B, h.shape[2]) for h in (call.h_0, call.c_0) if h is not None]
    parameters = [torch.zeros_like(p) for p in call.parameters]
    call = call.with_tensors([torch.zeros(case.T * case.B, case.I), *states, *parameters])
    return replace(call, zoneout_mask=None, zoneout_cell_mask=None)


def training(call):
    parameters = dict(zip(call.layer.parameter_names, (p.requires_grad_() for p in call.parameters)))
    with backends.use("cpu"):
        functional.layer("lstm", call.input[:, None], parameters, norm=LONG.plan)[0].sum().backward()


def backward(call):
    """Of a forward pass that is not made: what it saved would be as large."""
    outputs, (saved,) = new_outputs(call), CPU.saved_like(call)
    return CPU.backward(call, outputs.output, [saved], [*outputs], [True] * len(call.tensors()))


def test_a_signal_ends_a_long_call_soon():
    """Forward, backward and training: with KeyboardInterrupt on Ctrl-C, and with what a handler of the user's raises."""
    done = subprocess.run([sys.executable, "-c", SCRIPT, "2"], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.stdout == "done\n", done.stderr
    assert done.stderr == ""


ENDED = [
    Case("lstm", norms.ICEFALL, T=300, B=2, I=9, H=150, P=70, features=("bidirectional", "zoneout_cell")),
    Case("lstm", norms.HASTE, T=30, B=70, I=200, H=90),
    Case("gru", norms.HASTE, T=600, B=2, I=9, H=150),
    Case("indrnn", norms.HASTE, T=300, B=70, I=9, H=70, features=("bidirectional",)),
    Case("gru", norms.NONE, T=2, B=2500, I=1, H=450),
]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("case", ENDED, ids=str)
def test_all_threads_end_together(case, threads, use_threads, monkeypatch):
    """As soon as the caller is first asked: within a few steps, the input products or a step that is multiplied in pieces."""
    use_threads(threads)
    asked = []

    def stop(caught):
        yield 1
        asked.append(1)

    call = zeros(case)
    with monkeypatch.context() as patch:
        patch.setattr(signals, "handled", stop)
        patch.setattr(plans, "LONG", 1)
        for work in (CPU.forward, CPU.forward_train, backward):
            before = len(asked)
            with pytest.raises(KeyboardInterrupt):
                work(call)
            assert len(asked) == before + 1
    plans.make_plan.cache_clear()
    small = replace(case, T=2, B=2).build()[0]
    torch.testing.assert_close(CPU.forward(small)[0], reference.run(small)[0], rtol=1e-4, atol=1e-5)


def test_only_the_main_thread_lets_signals_in(monkeypatch):
    """Python handles them nowhere else."""
    call, _ = Case("gru", norms.HASTE).build()
    want, asked, handled = CPU.forward(call), [], signals.handled
    monkeypatch.setattr(plans, "LONG", 1)
    monkeypatch.setattr(signals, "handled", lambda caught: asked.append(1) or handled(caught))
    plans.make_plan.cache_clear()
    torch.testing.assert_close(CPU.forward(call), want, rtol=0, atol=0)
    assert asked == [1]
    with ThreadPoolExecutor(1) as threads:
        torch.testing.assert_close(threads.submit(CPU.forward, call).result(), want, rtol=0, atol=0)
    assert asked == [1]
    plans.make_plan.cache_clear()
