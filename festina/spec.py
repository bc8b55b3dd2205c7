"""What a cell and a layer are: gates, states, parameters. Nothing here computes; everything else asks here.

Sizes, everywhere: `T` steps, `B` batch, `I` input_size, `H` hidden_size, `G` gates, `P` width of h (proj_size, or H),
`D` directions, `L` layers, `N` valid steps of all rows together.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

from festina.norms import NONE, PLANS, NormPlan, parse_object


@dataclass(frozen=True)
class CellSpec:
    """One cell: the facts from which parameters, reference, kernels, tests and docs are derived.

    Args:
        name: its key in `CELLS`, and in tokens.
        gates: the blocks of `weight_ih`, in `torch.nn`'s order.
        states: the names of the states carried from step to step, h first.
        steps: the placements that this cell admits, each with the name of its step function in every telling. The function
            takes two pre-activations (from x and from h), or their one normalised sum if the placement is `joint`.
        groups: the `NormPlan.groups` that this cell admits.
        early_steps: the step functions for plans in which the reset gate acts before the norm, by `NormPlan.reset`; none for
            a cell without a reset gate.
        diagonal: the recurrent weight is a vector, `u ⊙ h`: no recurrent bias, no recurrent norm.
        projects: the cell can project h (`proj_size`).
    """

    name: str
    gates: tuple[str, ...]
    states: tuple[str, ...]
    steps: Mapping[str, str]
    groups: tuple[str, ...] = ("all", "gate")
    early_steps: Mapping[str, str] = field(default_factory=dict)
    diagonal: bool = False
    projects: bool = False

    def __hash__(self) -> int:
        return hash(self.name)

    def __reduce__(self) -> tuple[Any, ...]:
        return restore_cell, (self.name,)

    def rows(self, gate: str, hidden_size: int) -> slice:
        """The rows of `gate` in a `[G·H, ...]` parameter.

        >>> LSTM.rows("f", 8)
        slice(8, 16, None)
        """
        start = self.gates.index(gate) * hidden_size
        return slice(start, start + hidden_size)

    def fit(self, plan: NormPlan) -> NormPlan:
        """The plan without the fields that have nothing to act on in this cell: no c, no reset gate, no recurrent product.

        Raises:
            TypeError: `plan` is not a NormPlan.
            ValueError: the cell does not admit its placement or groups.
        """
        if not isinstance(plan, NormPlan):
            raise TypeError(
                f"norm must be a NormPlan, such as norms.HASTE, got {plan!r}; festina.norms has the named ones"
            )
        if plan.placement not in self.steps:
            raise ValueError(
                f"the norm plan {plan} does not fit the {self.name} cell: placement must be one of "
                f"{', '.join(map(repr, self.steps))}, got {plan.placement!r}"
            )
        if plan.groups not in self.groups:
            raise ValueError(
                f"the norm plan {plan} does not fit the {self.name} cell: groups must be one of "
                f"{', '.join(map(repr, self.groups))}, got {plan.groups!r}"
            )
        without: dict[str, Any] = {}
        if "c" not in self.states:
            without |= {"cell": "none", "clip": None}
        if self.diagonal:
            without |= {"inner_bias_hh": False}
        if not self.early_steps:
            without |= {"reset": "normed"}
        loses = any(getattr(plan, name) != value for name, value in without.items())
        return replace(plan, **without) if loses else plan

    def admits(self, plan: NormPlan) -> bool:
        """Whether `fit` takes the plan."""
        return plan.placement in self.steps and plan.groups in self.groups

    def named(self, plan: NormPlan) -> NormPlan:
        """A fitted plan under the first name in `norms.PLANS` that means the same for this cell.

        >>> GRU.named(GRU.fit(PLANS["FASTRNNS"]))
        norms.HASTE
        """
        known = (p for p in PLANS.values() if self.admits(p) and self.fit(p) == plan)
        return next((replace(plan, name=p.name) for p in known), plan)


LSTM = CellSpec(
    "lstm",
    gates=("i", "f", "g", "o"),
    states=("h", "c"),
    steps={"none": "lstm", "separate": "lstm", "joint": "lstm"},
    projects=True,
)
GRU = CellSpec(
    "gru",
    gates=("r", "z", "n"),
    states=("h",),
    steps={"none": "gru", "separate": "gru", "joint": "gru_joint"},
    groups=("all", "gate", "gates|candidate"),
    early_steps={"product": "gru_early", "state": "gru_state"},
)
INDRNN = CellSpec(
    "indrnn",
    gates=("h",),
    states=("h",),
    steps={"none": "indrnn", "separate": "indrnn"},
    diagonal=True,
)
INDRNN_RELU = replace(INDRNN, name="indrnn_relu", steps={"none": "indrnn_relu", "separate": "indrnn_relu"})

SAVED = 6
"""Version of what backends save for backward. torch.compile keeps graphs on disk, with the sizes of saved tensors in them;
this number is part of the `token`, so that a layer never meets the graph of another version."""

CELLS: dict[str, CellSpec] = {spec.name: spec for spec in (LSTM, GRU, INDRNN, INDRNN_RELU)}
"""Every cell by name; tests, benchmarks and docs go through this list."""


@dataclass(frozen=True)
class LayerSpec:
    """One layer: a cell, a norm plan that fits it, and which parameters it has. An operator takes it as its `token`.

    Args:
        cell: the cell.
        plan: where its norms sit.
        bias: the layer has biases, and its norms have shifts.
        projected: h is projected by `weight_hr`.
        directions: 1, or 2 for a bidirectional layer; the second runs from the last step to the first.

    Raises:
        TypeError: a field is of a wrong type.
        ValueError: the plan does not fit the cell, or `directions` is neither 1 nor 2.
    """

    cell: CellSpec
    plan: NormPlan = NONE
    bias: bool = True
    projected: bool = False
    directions: int = 1
    parameter_names: tuple[str, ...] = field(init=False, repr=False, compare=False)
    """The names of `parameter_shapes`, in order."""
    token: str = field(init=False, repr=False, compare=False)
    """The layer as one string, for operators; `LayerSpec.parse` reads it."""

    def __post_init__(self) -> None:
        if not isinstance(self.cell, CellSpec):
            raise TypeError(f"cell must be a CellSpec, such as spec.LSTM, got {self.cell!r}")
        for name in ("bias", "projected"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if isinstance(self.directions, bool) or not isinstance(self.directions, int):
            raise TypeError(f"directions must be an int, got {self.directions!r}")
        if self.directions not in (1, 2):
            raise ValueError(f"directions must be 1 or 2, got {self.directions}")
        # Every call asks for both. Not cached properties: torch.compile cannot trace their lock (Python < 3.12).
        object.__setattr__(self, "plan", self.cell.fit(self.plan))
        object.__setattr__(self, "parameter_names", tuple(self.parameter_shapes(1, 1, 1)))
        fields = {"plan": self.plan.to_dict(), "bias": self.bias, "projected": self.projected}
        token = json.dumps({"cell": self.cell.name, **fields, "directions": self.directions, "saved": SAVED})
        object.__setattr__(self, "token", token)

    def __hash__(self) -> int:
        return hash(self.token)  # a string keeps its hash, and every call asks for this one

    def __reduce__(self) -> tuple[Any, ...]:
        plan = self.plan
        return restore_layer, (self.cell.name, plan.to_dict(), plan.name, self.bias, self.projected, self.directions)

    def parameter_shapes(self, I: int, H: int, P: int) -> dict[str, tuple[int, ...]]:
        """Name and shape of every parameter of one direction, `torch.nn`'s first and in its order.

        >>> list(LayerSpec(GRU).parameter_shapes(3, 5, 5).items())
        [('weight_ih', (15, 3)), ('weight_hh', (15, 5)), ('bias_ih', (15,)), ('bias_hh', (15,))]
        """
        G = len(self.cell.gates)
        joint = self.plan.placement == "joint"
        separate = self.plan.placement == "separate"
        matrix = not self.cell.diagonal
        table: list[tuple[str, tuple[int, ...], bool]] = [
            ("weight_ih", (G * H, I), True),
            ("weight_hh", (G * H, P) if matrix else (H,), True),
            ("bias_ih", (G * H,), self.bias and not joint),
            ("bias_hh", (G * H,), self.bias and not joint and matrix),
            ("weight_hr", (P, H), self.projected),
            ("gain_ih", (G * H,), separate),
            ("gain_hh", (G * H,), separate and matrix),
            ("gain_joint", (G * H,), joint),
            ("bias_joint", (G * H,), joint and self.bias),
            ("bias_inner", (G * H,), self.plan.inner_bias and self.bias),
            ("bias_inner_hh", (G * H,), self.plan.inner_bias_hh and self.bias and matrix),
            ("gain_c", (H,), self.plan.cell != "none"),
            ("bias_c", (H,), self.plan.cell != "none" and self.bias),
        ]
        return {name: shape for name, shape, present in table if present}

    @property
    def norm_shifts(self) -> frozenset[str]:
        """The parameters added right after a norm."""
        products = {"none": (), "separate": ("bias_ih", "bias_hh"), "joint": ("bias_joint",)}[self.plan.placement]
        return frozenset((*products, "bias_c")) & frozenset(self.parameter_names)

    @property
    def shift(self) -> str | None:
        """The parameter added last to the pre-activations on the input side: the forget bias goes there."""
        return next((name for name in ("bias_ih", "bias_joint") if name in self.parameter_names), None)

    @property
    def step(self) -> str:
        """The name of this layer's step function."""
        return self.cell.early_steps.get(self.plan.reset) or self.cell.steps[self.plan.placement]

    @staticmethod
    @cache
    def parse(token: str) -> LayerSpec:
        """The layer with this `token`.

        Raises:
            ValueError: it is not the token of a layer.
        """
        try:
            fields = parse_object(token)
            del fields["saved"]
            return LayerSpec(**{**fields, "cell": CELLS[fields["cell"]], "plan": NormPlan.from_dict(fields["plan"])})
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"token must be that of a LayerSpec, got {reprlib.repr(token)}: {type(error).__name__}: {error}"
            ) from None


# Pickles hold no field of a spec, only the arguments of these functions, which check them: whoever wrote the pickle, kernels
# get a spec of which the fields agree.


def restore_cell(name: str) -> CellSpec:
    """The cell of this name, for pickles.

    Raises:
        ValueError: there is none.
    """
    if not isinstance(name, str) or name not in CELLS:
        raise ValueError(f"a pickled cell must be one of {', '.join(map(repr, CELLS))}, got {name!r}")
    return CELLS[name]


def restore_layer(
    cell: str, plan: dict[str, Any], name: str | None, bias: bool, projected: bool, directions: int
) -> LayerSpec:
    """The layer with these fields, for pickles; `name` is that of the plan, and is dropped if the plan is another one.

    Raises:
        TypeError, ValueError: they are not those of a layer.
    """
    spec = LayerSpec(restore_cell(cell), NormPlan.from_dict(plan), bias, projected, directions)
    named = PLANS.get(name) if isinstance(name, str) else None
    if named is not None and spec.cell.admits(named) and spec.cell.fit(named) == spec.plan:
        spec = replace(spec, plan=named)
    return spec
