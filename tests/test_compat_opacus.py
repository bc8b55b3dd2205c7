"""Opacus over Festina's layers (`festina.compat.opacus`): per-sample gradients against a loop over samples."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from samples import assert_same, has_c, listed, make, random_state
from torch import Tensor, nn

import festina

pytest.importorskip("opacus", reason="opacus is not installed")

from opacus import GradSampleModule
from opacus.validators import ModuleValidator

from festina.compat.opacus import PerSample

T, B, I, H = 6, 4, 3, 5
F64: dict[str, Any] = {"dtype": torch.float64}
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


class Model(nn.Module):
    """A linear layer below and one above; the loss sees outputs and last states."""

    def __init__(self, rnn: nn.Module) -> None:
        super().__init__()
        self.below, self.rnn = nn.Linear(I, I, **F64), rnn

    def forward(self, x: Tensor, hx: Any = None, **given: Any) -> Tensor:
        output, state = self.rnn(self.below(x), hx, **given)
        axis = 0 if x.shape[0] == B else 1
        loss = output.square().flatten(2).sum([2, 1 - axis])
        return loss + sum((s * (1 + s)).sum([0, 2]) for s in listed(state))


def samples(model: nn.Module) -> list[Tensor]:
    """The per-sample gradients that Opacus has found, in the order of the parameters."""
    return [parameter.grad_sample for parameter in model.parameters()]


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("variant", ["lstm", "lstm-icefall", "gru-haste", "indrnn-haste"])
def test_per_sample_gradients_of_one_backward_are_those_of_a_loop(
    variant: str, reduction: str, batch_first: bool
) -> None:
    """Two layers, both directions, lengths, resets, initial states; the gradient of the last states counts."""
    proj: dict[str, Any] = {"proj_size": 2} if has_c(variant) else {}
    model = Model(make(variant, I, H, 2, bidirectional=True, batch_first=batch_first, **proj, **F64))
    axis = 0 if batch_first else 1
    x, hx, resets = torch.randn(B, T, I, **F64), random_state(model.rnn, 4, B), torch.rand(B, T) < 0.3
    x, resets = (x, resets) if batch_first else (x.transpose(0, 1), resets.t())
    lengths = [4, 6, 0, 1]

    fixed = GradSampleModule(ModuleValidator.fix(model), batch_first=batch_first, loss_reduction=reduction)
    losses = fixed(x, hx, lengths=lengths, resets=resets)
    assert_same(losses, model(x, hx, lengths=lengths, resets=resets))
    getattr(losses, reduction)().backward()
    found = samples(fixed)

    for b in range(B):
        row = tuple(s[:, b : b + 1] for s in listed(hx))
        output, state = model.rnn(
            model.below(x.narrow(axis, b, 1)),
            row if len(row) > 1 else row[0],
            lengths=[lengths[b]],
            resets=resets.narrow(axis, b, 1),
        )
        loss = output.square().sum() + sum((s * (1 + s)).sum() for s in listed(state))
        want = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)
        assert_same([gradient[b] for gradient in found], list(want))


@pytest.mark.parametrize("batch_first", [True, False])
def test_a_batch_of_one(batch_first: bool) -> None:
    layer, x = make("gru-haste", I, H, batch_first=batch_first, **F64), torch.randn(1, 1, I, **F64)
    fixed = GradSampleModule(ModuleValidator.fix(layer), batch_first=batch_first)
    fixed(x)[0].square().sum().backward()
    want = torch.autograd.grad(layer(x)[0].square().sum(), list(layer.parameters()))
    assert_same([gradient[0] for gradient in samples(fixed)], list(want))


class Loop(nn.Module):
    """A cell, stepped by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = make("lstm-haste", I, H, cell=True, **F64)

    def forward(self, x: Tensor, resets: Tensor) -> Tensor:
        state = None
        for step, reset in zip(x.unbind(1), resets.unbind(1)):
            state = self.cell(step, state, resets=reset)
        return state[0].sum(1) + state[1].square().sum(1)


def test_a_cell_in_a_loop_adds_up() -> None:
    model, x, resets = Loop(), torch.randn(B, T, I, **F64), torch.rand(B, T) < 0.3
    fixed = GradSampleModule(ModuleValidator.fix(model), loss_reduction="sum")
    fixed(x, resets).sum().backward()
    for b in range(B):
        want = torch.autograd.grad(model(x[b : b + 1], resets[b : b + 1]).sum(), list(model.parameters()))
        assert_same([gradient[b] for gradient in samples(fixed)], list(want))


def test_masks_are_those_of_the_pass_that_is_differentiated() -> None:
    """The same seed draws the same masks, and the loss changes with W_ih as the sum of the per-sample gradients says."""
    layer = make("lstm", I, H, zoneout=0.5, dropconnect=0.5, batch_first=True, **F64)
    fixed, x = GradSampleModule(PerSample(layer), loss_reduction="sum"), torch.randn(B, T, I, **F64)
    weights = layer.weight_ih_l0

    def loss(scale: float) -> Tensor:
        torch.manual_seed(1)
        with torch.no_grad():
            before = weights.clone()
            weights.mul_(scale)
        found: Tensor = fixed(x)[0].square().sum()
        if scale != 1:
            weights.data = before
        return found

    loss(1).backward()
    slope = (loss(1 + 1e-6) - loss(1 - 1e-6)).item() / 2e-6
    assert abs(slope) > 0.1
    torch.testing.assert_close((weights.grad_sample.sum(0) * weights).sum().item(), slope, rtol=1e-6, atol=1e-6)


def test_a_batch_may_be_empty_and_a_parameter_frozen() -> None:
    """Poisson sampling draws empty batches; a model may use the output or the last state."""
    layer = make("gru-haste", I, H, batch_first=True)
    layer.weight_hh_l0.requires_grad_(False)
    for used in range(2):
        fixed = GradSampleModule(ModuleValidator.fix(layer))
        fixed(torch.randn(0, T, I))[used].sum().backward()
        for name, parameter in fixed.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad_sample.shape == (0, *parameter.shape), name


def test_without_gradients_it_is_the_layer() -> None:
    layer, x = make("lstm-haste", I, H, batch_first=True), torch.randn(B, T, I)
    per_sample = PerSample(layer)
    want = layer(x, lengths=[6, 2, 0, 3])
    with torch.no_grad():
        assert_same(per_sample(x, lengths=[6, 2, 0, 3]), want, 0.0, 0.0)
    assert per_sample.layer is layer
    copied = copy.deepcopy(per_sample).eval()
    with torch.no_grad():
        copied.weights.weight_ih_l0.zero_()
    assert not copied.layer.weight_ih_l0.any()
    assert not copied.layer.training
    assert layer.weight_ih_l0.any()


def test_what_opacus_could_not_do_exactly_is_an_error() -> None:
    layer, x = festina.LSTM(I, H), torch.randn(T, B, I)
    assert "ModuleValidator.fix" in str(ModuleValidator.validate(nn.Sequential(layer))[0])
    unfixed = GradSampleModule(copy.deepcopy(layer), batch_first=False)
    with pytest.raises(ValueError, match=r"LSTM must be a festina\.compat\.opacus\.PerSample"):
        unfixed(x)[0].sum().backward()
    with pytest.raises(ValueError, match="batch_first of GradSampleModule must be that of the layers"):
        GradSampleModule(PerSample(copy.deepcopy(layer)))(x)[0].sum().backward()
    fixed = PerSample(layer)
    with pytest.raises(TypeError, match="must be a batch in one padded tensor"):
        fixed(nn.utils.rnn.pack_sequence([x[:, 0]]))
    with pytest.raises(ValueError, match=r"axis 1 of hx must have the B = 4 rows of the input, got \[1, 5, 5\]"):
        fixed(x, (torch.zeros(1, 5, H), torch.zeros(1, 5, H)))
    with pytest.raises(TypeError, match="must be one of Festina's layers or cells, got Linear"):
        PerSample(nn.Linear(1, 1))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="remove parametrizations"):
        PerSample(nn.utils.parametrizations.weight_norm(layer, "weight_hh_l0"))
