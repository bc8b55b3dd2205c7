"""Every backend against the reference in float64, through the operators: outputs, final states, every gradient.

The tolerances are `festina.testing.TOLERANCES`. Over `CASES`, eager in float32 comes to 3.3e-6 at worst where 1e-5 is
allowed; `test_mutants.py` shows that wrong equations are far above it.

eager in float64 is the reference itself, so what it is tested for here is the operators: subsets of gradients, a graph
kept, a graph of the gradients.
"""

from __future__ import annotations

import random
from dataclasses import replace
from functools import lru_cache

import pytest
import torch
from cases import CASES, EVERY_PLAN, full
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

import festina
from festina import backends, functional, norms, reference
from festina.backends.triton import is_interpreting
from festina.call import Call
from festina.testing import TOLERANCES, Case, assert_close, evaluate, plan_label, result_names, widened, worst

# Through every path that a backend may have on its own: a plain cell, each placement, a projection, each feature.
REPRESENTATIVE = [
    Case("lstm", norms.NONE, T=4, B=3, H=9, features=("ragged", "bidirectional")),
    Case("lstm", norms.HASTE, T=4, B=3, H=9, features=("zoneout", "zoneout_cell", "resets")),
    Case("lstm", norms.ICEFALL, T=4, B=3, H=9, P=5, features=("expectation", "ragged", "idle")),
    Case("gru", norms.HASTE, T=4, B=3, H=9, features=("bidirectional", "resets")),
    Case("gru", norms.DREAMER, T=4, B=3, H=9, features=("zoneout", "ragged")),
    Case("indrnn", norms.HASTE, T=4, B=3, H=9, features=("expectation", "idle")),
]


def device_of(backend: str) -> str:
    return "cuda" if backend in ("cuda", "triton") and not is_interpreting() else "cpu"


def is_present(backend: str) -> bool:
    """There is a device of the kind that it runs on."""
    return device_of(backend) != "cuda" or torch.cuda.is_available()


# eager runs in float32 only: in float64 it is the oracle.
PAIRS = [
    (backend, case)
    for case in CASES
    for backend in filter(is_present, backends.names())
    if backend != "eager" or case.dtype != torch.float64
]


def refusal(case: Case, backend: str) -> str | None:
    """Why the backend cannot run the case; eager runs everything."""
    if backend == "eager":
        return None
    return backends.get(backend).can_run(case.on(device_of(backend)))


@lru_cache(maxsize=16)
def oracle(case: Case) -> dict[str, Tensor]:
    """What the reference makes of the case in float64."""
    call, cotangents = case.build()
    return evaluate(reference.run, widened(call), cotangents)


def build(case: Case, backend: str) -> tuple[Call, list[Tensor], dict[str, Tensor]]:
    """The call and cotangents on the backend's device, and the oracle's results; skips what the backend cannot run."""
    if reason := refusal(case, backend):
        pytest.skip(f"{backend}: {reason}")
    device = device_of(backend)
    return *case.build(device), {name: tensor.to(device) for name, tensor in oracle(case).items()}


@pytest.fixture(params=backends.names())
def backend(request: pytest.FixtureRequest) -> str:
    if not is_present(request.param):
        pytest.skip(f"{request.param}: there is no CUDA device")
    with backends.use(request.param):
        yield request.param


@pytest.fixture
def poisoned():
    """New memory holds NaN, so an element that is never written shows."""
    torch.set_deterministic_debug_mode("warn")  # use_deterministic_algorithms imports the compiler, for seconds
    yield
    torch.set_deterministic_debug_mode("default")


def test_poison_reaches_new_memory(poisoned):
    assert torch.empty(3).isnan().all()


@pytest.mark.parametrize(("backend", "case"), PAIRS, indirect=["backend"], ids=str)
def test_backend_matches_reference(backend, case, poisoned):
    call, cotangents, want = build(case, backend)
    got = evaluate(functional.recurrence, call, cotangents)
    assert got.keys() == want.keys()
    assert all(tensor.dtype == case.dtype for tensor in got.values())
    assert_close(got, want, TOLERANCES[case.dtype])
    with torch.no_grad():
        outputs = zip(result_names(call)[0], functional.recurrence(call))
        assert_close({name: out for name, out in outputs if out is not None}, want, TOLERANCES[case.dtype])


@pytest.mark.full
@pytest.mark.parametrize(("cell", "plan"), EVERY_PLAN, ids=lambda v: v if isinstance(v, str) else plan_label(v))
def test_the_whole_product_matches_reference(cell, plan, backend, poisoned):
    """Among so many cases some are ill-conditioned: there, thrice the error of eager in the same dtype is allowed."""
    for case in full(cell, plan):
        if refusal(case, backend) or (backend == "eager" and case.dtype == torch.float64):
            continue
        call, cotangents, want = build(case, backend)
        found, name = worst(evaluate(functional.recurrence, call, cotangents), want)
        if found > TOLERANCES[case.dtype]:
            eagers, _ = worst(evaluate(reference.run, *case.build()), oracle(case))
            assert found <= 3 * eagers, f"{case}: {name} differs by {found:.2e} of its rms, eager by {eagers:.2e}"


def strided(tensor: Tensor) -> Tensor:
    """The same numbers in every second place of a larger block, from an offset on; NaN between them."""
    block = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1] + 3), torch.nan)
    view = block[..., 3::2]
    view.copy_(tensor)
    return view


def transposed(tensor: Tensor) -> Tensor:
    """The same numbers with the last axis outermost in memory."""
    return tensor.movedim(-1, 0).contiguous().movedim(0, -1)


def negated(tensor: Tensor) -> Tensor:
    """The same numbers, their negatives in memory: PyTorch negates them when it reads them."""
    view = torch._neg_view(-tensor)
    assert view.is_neg()
    return view


def imaginary(tensor: Tensor) -> Tensor:
    """The imaginary part of a conjugate: negated when it is read, and in every second place."""
    view = torch.complex(torch.full_like(tensor, torch.nan), -tensor).conj().imag
    assert view.is_neg()
    return view


@pytest.mark.parametrize("layout", [strided, transposed, negated, imaginary])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", REPRESENTATIVE, ids=str)
def test_layout_in_memory_does_not_matter(case, dtype, layout, backend, poisoned):
    case = in_dtype(case, dtype)
    call, cotangents, want = build(case, backend)
    moved = call.with_tensors([layout(tensor) for tensor in call.tensors()])
    got = evaluate(functional.recurrence, moved, [layout(cotangent) for cotangent in cotangents])
    assert_close(got, want, TOLERANCES[dtype])


@pytest.mark.parametrize("layout", [transposed, negated, imaginary])
@pytest.mark.parametrize("case", REPRESENTATIVE, ids=str)
def test_layout_of_what_backward_is_given_does_not_matter(case, layout, backend, poisoned):
    """The forward pass saw nothing unusual."""
    call, cotangents, want = build(case, backend)
    got = evaluate(functional.recurrence, call, [layout(cotangent) for cotangent in cotangents])
    assert_close(got, want, TOLERANCES[case.dtype])


@pytest.mark.parametrize("case", REPRESENTATIVE, ids=str)
def test_layout_of_masks_does_not_matter(case, backend, poisoned):
    call, cotangents, want = build(case, backend)
    masks = ("resets", "zoneout_mask", "zoneout_cell_mask")
    held = {name: mask for name in masks if (mask := getattr(call, name)) is not None}
    moved = {name: mask.repeat_interleave(2, dim=-1)[..., ::2] for name, mask in held.items()}
    got = evaluate(functional.recurrence, replace(call, **moved), cotangents)
    assert_close(got, want, TOLERANCES[case.dtype])


@pytest.mark.parametrize("case", REPRESENTATIVE, ids=str)
def test_zeros_without_memory_are_zeros(case, backend, poisoned):
    """Each tensor, mask and cotangent in turn is one that PyTorch does not put into memory."""
    call, cotangents, _ = build(case, backend)
    count = len(call.tensors())

    def zeros(tensor, lazy):
        made = torch._efficientzerotensor if lazy else torch.zeros
        return made(tensor.shape, dtype=tensor.dtype, device=tensor.device)

    def with_zeros(at, lazy):
        """The call and cotangents with zeros in one place."""
        held = [*call.tensors(), *cotangents]
        if isinstance(at, str):
            return replace(call, **{at: zeros(getattr(call, at), lazy)}), cotangents
        held[at] = zeros(held[at], lazy)
        return call.with_tensors(held[:count]), held[count:]

    masks = [name for name in ("resets", "zoneout_mask", "zoneout_cell_mask") if getattr(call, name) is not None]
    for at in (0, 1, count - 1, *range(count, count + len(cotangents)), *masks):
        got, want = (evaluate(functional.recurrence, *with_zeros(at, lazy)) for lazy in (True, False))
        assert_close(got, want, TOLERANCES[case.dtype])


def in_dtype(case: Case, dtype: torch.dtype) -> Case:
    return Case(**{**vars(case), "dtype": dtype})


@pytest.mark.parametrize("case", REPRESENTATIVE, ids=str)
def test_each_subset_of_gradients(case, backend, poisoned):
    """Each tensor alone, all but it, some subsets at random: a gradient does not depend on who else is asked for."""
    call, cotangents, want = build(case, backend)
    names = result_names(call)[1]
    everyone = range(len(names))
    draw = random.Random(0)
    subsets = [{i} for i in everyone] + [set(everyone) - {i} for i in everyone]
    subsets += [set(draw.sample(everyone, draw.randint(2, len(names) - 1))) for _ in range(6)]
    for subset in subsets:
        got = evaluate(functional.recurrence, call, cotangents, [i in subset for i in everyone])
        assert {f"d_{names[i]}" for i in subset} == {name for name in got if name.startswith("d_")}
        assert_close(got, want, TOLERANCES[case.dtype])


@pytest.mark.parametrize("case", REPRESENTATIVE, ids=str)
def test_each_output_alone_has_its_gradients(case, backend, poisoned):
    """Where nothing comes back through an output its gradient is None, not zero, to a backend."""
    call, cotangents, _ = build(case, backend)
    on_cpu, cpu_cotangents = case.build()
    outputs, inputs = result_names(call)
    for i, name in enumerate(outputs):
        got, want = (
            gradients_of(run, given, [ct if j == i else None for j, ct in enumerate(cts)])
            for run, given, cts in (
                (functional.recurrence, call, cotangents),
                (reference.run, widened(on_cpu), cpu_cotangents),
            )
        )
        for of, gradient, true in zip(inputs, got, want, strict=True):
            assert_close({f"d_{of} of {name}": gradient.cpu()}, {f"d_{of} of {name}": true}, TOLERANCES[case.dtype])


def gradients_of(run, call: Call, cotangents: list[Tensor | None]) -> tuple[Tensor, ...]:
    leaves = [tensor.detach().requires_grad_() for tensor in call.tensors()]
    outputs = [out for out in run(call.with_tensors(leaves)) if out is not None]
    pairs = [(out, ct.to(out.dtype)) for out, ct in zip(outputs, cotangents, strict=True) if ct is not None]
    outs, given = zip(*pairs)
    return torch.autograd.grad(outs, leaves, given, materialize_grads=True)


@pytest.mark.parametrize("case", REPRESENTATIVE, ids=str)
def test_backward_twice_gives_the_same(case, backend, poisoned):
    """Nothing that was saved is overwritten: bit for bit."""
    call, cotangents, _ = build(case, backend)
    leaves = [tensor.detach().requires_grad_() for tensor in call.tensors()]
    before = [leaf.detach().clone() for leaf in leaves]
    outputs = [out for out in functional.recurrence(call.with_tensors(leaves)) if out is not None]
    kept = [out.detach().clone() for out in outputs]
    first = [g.clone() for g in torch.autograd.grad(outputs, leaves, cotangents, retain_graph=True)]
    second = torch.autograd.grad(outputs, leaves, cotangents)
    for name, one, two in zip(result_names(call)[1], first, second, strict=True):
        assert torch.equal(one, two), f"d_{name} changed from one backward to the next"
    assert all(torch.equal(leaf, was) for leaf, was in zip(leaves, before, strict=True))
    assert all(torch.equal(out, was) for out, was in zip(outputs, kept, strict=True))


@pytest.mark.parametrize("case", REPRESENTATIVE, ids=str)
def test_two_graphs_at_once_do_not_meet(case, backend, poisoned):
    """A backend that lends its buffers must not lend them twice."""
    call, cotangents, want = build(case, backend)
    other = Case(**{**vars(case), "seed": case.seed + 1}).build(device_of(backend))[0]
    leaves = [tensor.detach().requires_grad_() for tensor in call.tensors()]
    outputs = [out for out in functional.recurrence(call.with_tensors(leaves)) if out is not None]
    functional.recurrence(other.with_tensors([tensor.detach().requires_grad_() for tensor in other.tensors()]))
    gradients = torch.autograd.grad(outputs, leaves, cotangents)
    got = {f"d_{name}": gradient for name, gradient in zip(result_names(call)[1], gradients, strict=True)}
    assert_close(got, want, TOLERANCES[case.dtype])


@pytest.mark.parametrize("case", REPRESENTATIVE, ids=str)
def test_second_order_gradients(case, backend):
    """Under create_graph the gradients of Σ |gradient|² are those of the reference."""
    call, cotangents, _ = build(case, backend)
    on_cpu, cpu_cotangents = case.build()
    got = second_order(functional.recurrence, call, cotangents)
    want = second_order(reference.run, widened(on_cpu), cpu_cotangents)
    names = [f"second order of {name}" for name in result_names(call)[1]]
    assert_close(
        {name: tensor.cpu() for name, tensor in zip(names, got, strict=True)},
        dict(zip(names, want, strict=True)),
        10 * TOLERANCES[case.dtype],
    )


def second_order(run, call: Call, cotangents: list[Tensor]) -> tuple[Tensor, ...]:
    leaves = [tensor.detach().requires_grad_() for tensor in call.tensors()]
    outputs = [out for out in run(call.with_tensors(leaves)) if out is not None]
    cotangents = [cotangent.to(out.dtype) for cotangent, out in zip(cotangents, outputs, strict=True)]
    first = torch.autograd.grad(outputs, leaves, cotangents, create_graph=True)
    return torch.autograd.grad(sum(gradient.square().sum() for gradient in first), leaves, materialize_grads=True)


def test_explain_says_what_a_call_would_do():
    layer, x = festina.LayerNormLSTM(3, 4), torch.randn(5, 2, 3)

    def taken(of=x) -> str | None:
        return next((name for name, reason in backends.explain(layer, of) if reason is None), None)

    usual = taken()
    assert taken(pack_padded_sequence(x, [5, 2])) == usual
    with backends.use("eager"):
        assert taken() == "eager"
        assert dict(backends.explain(layer, x))["triton"] == "eager was asked for"
    with torch.autocast("cpu", torch.float16):
        assert taken() == usual
    with backends.use("cpu"):
        assert taken(x.to(torch.float8_e5m2)) is None
        assert taken() == ("cpu" if usual == "cpu" else None)
    with pytest.raises(TypeError, match="layer must be one of Festina's layers or cells, got LSTM"):
        backends.explain(torch.nn.LSTM(3, 4), x)


def test_a_backend_that_is_wrong_is_found_out(backend):
    """The comparison can fail: the same numbers, one of them moved by 1e-4 of its rms."""
    case = REPRESENTATIVE[0]
    call, cotangents, want = build(case, backend)
    got = evaluate(functional.recurrence, call, cotangents)
    for name, tensor in got.items():
        rms = tensor.square().mean().sqrt()
        with pytest.raises(AssertionError, match=f"{name} differs by 1.00e-04"):
            assert_close({name: tensor + 1e-4 * rms}, want, TOLERANCES[case.dtype])
        with pytest.raises(AssertionError, match=f"{name} differs by nan"):
            assert_close({name: torch.full_like(tensor, torch.nan)}, want, TOLERANCES[case.dtype])
        with pytest.raises(AssertionError, match=f"{name} must be"):
            assert_close({name: tensor[:0]}, want, TOLERANCES[case.dtype])
