"""What a backend is judged with: a case, the `Call` made from it, every number that call gives, and a comparison.

The parity tests and the benchmarks share it, and so can the author of a backend that lives elsewhere:

>>> from festina import backends, functional, norms, reference
>>> case = Case("lstm", norms.HASTE, T=3, H=8, features=("zoneout",))
>>> call, cotangents = case.build()
>>> want = evaluate(reference.run, widened(call), cotangents)
>>> with backends.use("eager"):
...     got = evaluate(functional.recurrence, call, cotangents)
>>> assert_close(got, want, TOLERANCES[case.dtype])
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from festina import call as calls
from festina.call import Call, Outputs
from festina.norms import NONE, NormPlan
from festina.spec import CELLS, LayerSpec

FEATURES = (
    "zoneout",  # a mask on h
    "zoneout_cell",  # a mask on c, of the cells that have one
    "expectation",  # no masks: rates on h, and on c if the cell has one
    "resets",
    "ragged",  # rows of different lengths
    "idle",  # the last row is never active
    "bidirectional",
    "nobias",
)
"""What a case can have beyond cell, plan, sizes and dtype."""

TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5}
"""The rms ratio up to which a backend agrees with the reference in float64, for T up to 12.

Measured over `tests/cases.py`: the worst right result and the mildest wrong equation stand in `tests/test_mutants.py`.
"""

# Below this rms a value is the rounding of a zero, as the gradient of a norm over one value: cotangents are of size 1.
ZERO = 1e-7
# Where the truth is 0 in float64 as well, a lower type may come so near: a product that is fused with a sum is not rounded.
EXACT_ZERO, NEARLY_ZERO = 1e-12, 1e-6

_DTYPE_NAMES = {torch.float32: "f32", torch.float64: "f64", torch.bfloat16: "bf16", torch.float16: "f16"}


@dataclass(frozen=True)
class Case:
    """One recurrence to try: everything but the numbers, and those follow from `seed`.

    Args:
        cell: a name of `festina.spec.CELLS`.
        plan: where its norms sit; it must fit the cell.
        T, B, I, H: steps, rows, input and hidden size.
        P: what h is projected to; 0 for no projection.
        dtype: of input, states and parameters.
        features: names of `FEATURES`.
        seed: of all random numbers. Of the first few, 3 makes the best conditioned cases.

    Raises:
        ValueError: an unknown feature, or one that the cell has nothing for, or the plan does not fit the cell.

    >>> from festina import norms
    >>> str(Case("lstm", norms.HASTE, T=3, I=5, H=17, features=("zoneout",)))
    'lstm-HASTE-T3B2I5H17-f32-zoneout'
    """

    cell: str
    plan: NormPlan = NONE
    T: int = 3
    B: int = 2
    I: int = 5
    H: int = 7
    P: int = 0
    dtype: torch.dtype = torch.float32
    features: tuple[str, ...] = ()
    seed: int = 3

    def __post_init__(self) -> None:
        unknown = set(self.features) - set(FEATURES)
        if unknown:
            raise ValueError(f"features must be among {', '.join(FEATURES)}, got {', '.join(sorted(unknown))}")
        if "zoneout_cell" in self.features and "c" not in CELLS[self.cell].states:
            raise ValueError(f"zoneout_cell needs a c, and the {self.cell} cell has none")
        if self.P and not CELLS[self.cell].projects:
            raise ValueError(f"P must be 0: the {self.cell} cell has no projection, got {self.P}")
        CELLS[self.cell].fit(self.plan)

    def __str__(self) -> str:
        sizes = f"T{self.T}B{self.B}I{self.I}H{self.H}" + (f"P{self.P}" if self.P else "")
        return "-".join((self.cell, plan_label(self.plan), sizes, _DTYPE_NAMES[self.dtype], *self.features))

    @property
    def layer(self) -> LayerSpec:
        """What is computed."""
        directions = 2 if "bidirectional" in self.features else 1
        return LayerSpec(CELLS[self.cell], self.plan, "nobias" not in self.features, self.P > 0, directions)

    def on(self, device: torch.device | str) -> calls.Case:
        """What a backend is chosen by, on a device."""
        return calls.Case(self.layer, self.dtype, torch.device(device))

    def build(self, device: torch.device | str = "cpu") -> tuple[Call, list[Tensor]]:
        """The call, and a cotangent for each of its outputs.

        Numbers are drawn on the CPU in float64 and rounded, so a case is the same on every device. Weights are scaled
        so that pre-activations are of size 1, gains lie around 1, biases and states are not zero.
        """
        layer, draw = self.layer, _Draw(self.seed, self.dtype, device)
        D, H, P = layer.directions, self.H, self.P or self.H
        sizes = self._batch_sizes()
        N = sum(sizes)
        has_c = "c" in layer.cell.states
        rate, rate_cell = (0.3, 0.2 if has_c else 0.0) if "expectation" in self.features else (0.0, 0.0)
        call = Call(
            layer=layer,
            input=draw.normal(N, self.I),
            h_0=draw.normal(D, self.B, P, scale=0.5),
            c_0=draw.normal(D, self.B, H, scale=0.5) if has_c else None,
            parameters=tuple(
                draw.parameter(name, shape)
                for _ in range(D)
                for name, shape in layer.parameter_shapes(self.I, H, P).items()
            ),
            batch_sizes=torch.tensor(sizes, device="cpu") if {"ragged", "idle"} & set(self.features) else None,
            resets=draw.mask(0.3, D, N) if "resets" in self.features else None,
            zoneout_mask=draw.mask(0.4, D, N, P) if "zoneout" in self.features else None,
            zoneout_cell_mask=draw.mask(0.4, D, N, H) if "zoneout_cell" in self.features else None,
            zoneout=rate,
            zoneout_cell=rate_cell,
        )
        cotangents = [draw.normal(N, D * P), draw.normal(D, self.B, P)]
        return call, [*cotangents, draw.normal(D, self.B, H)] if has_c else cotangents

    def _batch_sizes(self) -> list[int]:
        rows = self.B - ("idle" in self.features)
        if "ragged" not in self.features:
            return [rows] * self.T
        return [max(1, rows - t * rows // self.T) for t in range(self.T)]


def plan_label(plan: NormPlan) -> str:
    """The plan's name, or what it is made of, without eps and what is at its default.

    >>> plan_label(NormPlan("joint", groups="gate", kind="rms", eps=0.1))
    'joint+gate+rms'
    """
    if plan.name:
        return plan.name
    parts = [plan.placement, plan.groups, plan.cell, plan.kind, "inner" if plan.inner_bias else ""]
    parts += ["inner_hh" if plan.inner_bias_hh else "", plan.reset, f"clip{plan.clip}" if plan.clip else ""]
    return "+".join([parts[0], *(part for part in parts[1:] if part not in ("all", "none", "layer", "normed", ""))])


class _Draw:
    """Random tensors, one after the other from one seed."""

    def __init__(self, seed: int, dtype: torch.dtype, device: torch.device | str) -> None:
        self.generator = torch.Generator("cpu").manual_seed(seed)
        self.dtype, self.device = dtype, device

    def normal(self, *shape: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
        values = torch.randn(shape, generator=self.generator, dtype=torch.float64, device="cpu")
        return (mean + scale * values).to(self.dtype).to(self.device)

    def mask(self, rate: float, directions: int, *shape: int) -> Tensor:
        """True in `rate` of each direction's places and in one at least: a mask that is never set tests nothing."""
        size = math.prod(shape)
        order = torch.stack([torch.randperm(size, generator=self.generator, device="cpu") for _ in range(directions)])
        return (order < max(1, round(rate * size))).view(directions, *shape).to(self.device)

    def parameter(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if name.startswith("gain"):
            return self.normal(*shape, scale=0.2, mean=1.0)
        if name.startswith("bias"):
            return self.normal(*shape, scale=0.3)
        return self.normal(*shape, scale=1 / math.sqrt(shape[1]) if len(shape) == 2 else 0.7)


def widened(call: Call) -> Call:
    """The same call, number for number, in float64."""
    return call.with_tensors([tensor.double() for tensor in call.tensors()])


def result_names(call: Call) -> tuple[list[str], list[str]]:
    """What the outputs of a call are called, and the tensors gradients are taken of; `_reverse` marks direction 1."""
    states = call.layer.cell.states
    ends = ("", "_reverse")[: call.layer.directions]
    parameters = [name + end for end in ends for name in call.layer.parameter_names]
    return ["output", *(f"{state}_n" for state in states)], ["input", *(f"{state}_0" for state in states), *parameters]


def evaluate(
    run: Callable[[Call], Outputs],
    call: Call,
    cotangents: Sequence[Tensor],
    wanted: Sequence[bool] | None = None,
) -> dict[str, Tensor]:
    """Every number that `run` makes of a call: its outputs by name, and `d_<name>` for each of its tensors.

    Args:
        run: `festina.functional.recurrence`, or `festina.reference.run`.
        call: the call; its tensors are not changed.
        cotangents: what `Case.build` gives; gradients are those of Σ <output, cotangent>.
        wanted: of which of `call.tensors()` gradients are taken; None for all. Views are kept as they are.
    """
    outputs_named, inputs_named = result_names(call)
    wanted = [True] * len(inputs_named) if wanted is None else wanted
    leaves = [tensor.detach().requires_grad_(want) for tensor, want in zip(call.tensors(), wanted, strict=True)]
    outputs = [out for out in run(call.with_tensors(leaves)) if out is not None]
    pairs = [(out, ct.to(out.dtype)) for out, ct in zip(outputs, cotangents, strict=True) if out.requires_grad]
    asked = [(name, leaf) for name, leaf in zip(inputs_named, leaves, strict=True) if leaf.requires_grad]
    result = {name: out.detach() for name, out in zip(outputs_named, outputs, strict=True)}
    if asked:
        gradients = torch.autograd.grad(
            [out for out, _ in pairs], [leaf for _, leaf in asked], [ct for _, ct in pairs], materialize_grads=True
        )
        result.update({f"d_{name}": gradient for (name, _), gradient in zip(asked, gradients, strict=True)})
    return result


def rms_ratio(got: Tensor, want: Tensor) -> float:
    """rms(got − want) / rms(want), in float64; 0 between two roundings of zero, NaN where either holds one.

    >>> zero = torch.zeros(3)
    >>> rms_ratio(zero + 1e-7, zero), round(rms_ratio(zero + 1e-5, zero)), rms_ratio(zero + torch.nan, zero)
    (0.0, 100, nan)
    >>> round(rms_ratio(zero.double() + 1e-7, zero)), round(rms_ratio(zero, zero + 9e-7), 2)
    (1, 1.0)
    """
    if not want.numel():
        return 0.0
    want = want.double()
    difference = (got.double() - want).square().mean().sqrt().item()
    size = want.square().mean().sqrt().item()
    if size < EXACT_ZERO and difference < NEARLY_ZERO and got.dtype != torch.float64:
        return 0.0
    return difference / max(size, ZERO)


def assert_rms_close(name: str, got: Tensor, want: Tensor, ratio: float) -> None:
    """Raise unless `got` has the shape of `want` and differs by at most `ratio` of its rms; NaN never passes.

    Raises:
        AssertionError: it does not; the text has the name, the ratio found and the one allowed.
    """
    if got.shape != want.shape:
        raise AssertionError(f"{name} must be {list(want.shape)}, got {list(got.shape)}")
    found = rms_ratio(got, want)
    if not found <= ratio:
        raise AssertionError(f"{name} differs by {found:.2e} of its rms; {ratio:.0e} is allowed")


def assert_close(got: Mapping[str, Tensor], want: Mapping[str, Tensor], ratio: float) -> None:
    """`assert_rms_close` for each of the results in `got`; `want` may hold more.

    Raises:
        AssertionError: one of them differs, or `want` does not have it.
    """
    missing = set(got) - set(want)
    if missing:
        raise AssertionError(f"there is nothing to compare {', '.join(sorted(missing))} with")
    for name, tensor in got.items():
        assert_rms_close(name, tensor, want[name], ratio)


def worst(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> tuple[float, str]:
    """The largest rms ratio (infinity for NaN) and whose it is."""
    ratios = [(rms_ratio(tensor, want[name]), name) for name, tensor in got.items()]
    return max((math.inf if math.isnan(ratio) else ratio, name) for ratio, name in ratios)
