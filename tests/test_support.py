"""Backends refuse layers that they have no kernels for, each with a reason, and the reference runs those."""

from __future__ import annotations

import pytest
import torch

from festina import backends, functional, norms, reference
from festina.backends.cpu import abi
from festina.backends.support import missing_kernel
from festina.call import Call, Case
from festina.norms import NONE, NormPlan
from festina.spec import CELLS, GRU, LSTM, CellSpec, LayerSpec

KNOWN = {"lstm", "gru", "gru_joint"}
LEAKY = CellSpec("leaky", gates=("h",), states=("h",), steps={"none": "leaky", "separate": "leaky"})


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (LayerSpec(LSTM, norms.HASTE), None),
        (LayerSpec(GRU, norms.DREAMER), None),
        (
            LayerSpec(GRU, NormPlan("joint", "gate", reset="product")),
            "a plan where the reset gate acts before the norm",
        ),
        (
            LayerSpec(GRU, NormPlan("joint", "gate", reset="state")),
            "a plan where the reset gate acts before the product",
        ),
        (LayerSpec(LSTM, NormPlan("separate", clip=1.0)), "a plan where c is clipped"),
        (
            LayerSpec(LSTM, NormPlan("separate", inner_bias_hh=True)),
            "a plan where a bias sits inside the recurrent norm",
        ),
        (LayerSpec(LSTM, NormPlan("separate", inner_bias_hh=True), bias=False), None),
        (LayerSpec(LEAKY), "the leaky step"),
    ],
    ids=str,
)
def test_a_missing_kernel_has_a_reason(layer, reason):
    assert missing_kernel(layer, KNOWN) == (reason and f"it has no kernel for {reason}")


@pytest.mark.skipif(abi.library().core is None, reason="the core's absence is a reason that comes first")
@pytest.mark.parametrize("plan", [NONE, norms.HASTE], ids=str)
def test_a_cell_that_has_a_reference_step_alone_runs_on_eager(plan, monkeypatch):
    def step(pre, state):
        return 0.9 * state[0] + 0.1 * torch.tanh(sum(p[:, 0] for p in pre))

    monkeypatch.setitem(CELLS, "leaky", LEAKY)
    monkeypatch.setitem(reference.STEPS, "leaky", step)
    layer = LayerSpec(LEAKY, plan)
    parameters = tuple(torch.randn(shape, requires_grad=True) for shape in layer.parameter_shapes(3, 5, 5).values())
    call = Call(layer=layer, input=torch.randn(4, 3), h_0=torch.randn(1, 2, 5), parameters=parameters)
    reasons = dict(backends.reasons(Case.of(call)))
    assert reasons["cpu"] == "it has no kernel for the leaky step"
    assert reasons["eager"] is None
    with pytest.raises(backends.BackendError, match="it has no kernel for the leaky step"):
        backends.select(Case.of(call), "cpu")
    outputs, want = functional.recurrence(call), reference.run(call)
    torch.testing.assert_close(outputs, want)
    got, expected = (torch.autograd.grad(out.output.sum(), parameters) for out in (outputs, want))
    torch.testing.assert_close(got, expected)
