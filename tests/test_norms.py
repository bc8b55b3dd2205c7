"""Plans as data (`festina.norms`): what a plan refuses, equality, names, JSON. Which plan fits which cell: test_spec.py."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from cases import RAW_PLANS

from festina import norms, reference
from festina.norms import PLANS, NormPlan
from festina.testing import Case, plan_label

# Fields.


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"placement": "both"}, "NormPlan placement must be one of 'none', 'separate', 'joint', got 'both'"),
        ({"groups": "gates"}, "NormPlan groups must be one of 'all', 'gate', 'gates|candidate', got 'gates'"),
        ({"cell": "state"}, "NormPlan cell must be one of 'none', 'readout', 'carried', got 'state'"),
        ({"kind": "batch"}, "NormPlan kind must be one of 'layer', 'rms', got 'batch'"),
        ({"eps": 0.0}, "NormPlan eps must be finite and greater than 0 (it is added to the variance), got 0.0"),
        ({"eps": -1e-5}, "NormPlan eps must be finite and greater than 0 (it is added to the variance), got -1e-05"),
        (
            {"eps": float("nan")},
            "NormPlan eps must be finite and greater than 0 (it is added to the variance), got nan",
        ),
    ],
    ids=lambda v: "-".join(f"{key}={value}" for key, value in v.items()) if isinstance(v, dict) else "",
)
def test_a_plan_checks_itself(fields, text):
    with pytest.raises(ValueError, match="NormPlan") as raised:
        NormPlan(**{"placement": "separate", **fields})
    assert str(raised.value) == text


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"placement": "both"}, r"NormPlan placement must be one of 'none', 'separate', 'joint', got 'both'"),
        ({"placement": "joint", "groups": 4}, r"NormPlan groups must be one of .*, got 4"),
        ({"cell": "h"}, r"NormPlan cell must be one of 'none', 'readout', 'carried', got 'h'"),
        ({"kind": "batch"}, r"NormPlan kind must be one of 'layer', 'rms', got 'batch'"),
        ({"eps": 0.0}, r"NormPlan eps must be finite and greater than 0 .*, got 0.0"),
        ({"eps": float("nan")}, r"NormPlan eps must be finite and greater than 0 .*, got nan"),
        ({"groups": "gate"}, r"placement is 'none'; choose 'separate' or 'joint'"),
    ],
)
def test_plan(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        NormPlan(**fields)


WRONG: list[tuple[dict[str, Any], type[Exception]]] = [
    *(({name: value}, TypeError) for name in ("eps", "clip") for value in (True, "1e-5", [1e-5], 1j)),
    ({"eps": None}, TypeError),
    *(({name: float(value)}, ValueError) for name in ("eps", "clip") for value in ("inf", "-inf", "nan", "-1", "0")),
    *(({name: 10**400}, ValueError) for name in ("eps", "clip")),
    *(({name: value}, TypeError) for name in ("inner_bias", "inner_bias_hh") for value in ("no", 0, 1, None)),
    *(
        ({name: value}, ValueError)
        for name in ("placement", "groups", "cell", "kind", "reset")
        for value in (None, True, 0, "", ["none"], {})
    ),
    ({"name": 7}, TypeError),
]


@pytest.mark.parametrize(("fields", "error"), WRONG, ids=str)
def test_fields_of_wrong_types_and_ranges(fields, error):
    """At construction, by `replace`, and from JSON."""
    (name,) = fields
    with pytest.raises(error, match=f"NormPlan {name} must be"):
        NormPlan(**{"placement": "separate", **fields})
    with pytest.raises(error, match=f"NormPlan {name} must be"):
        replace(norms.HASTE, **fields)
    if name != "name" and not isinstance(fields[name], complex):
        with pytest.raises(error, match=f"NormPlan {name} must be"):
            NormPlan.from_json(json.dumps({**norms.HASTE.to_dict(), **fields}))


def test_numbers_are_floats():
    """Otherwise two plans that are equal would have two tokens."""
    plan = NormPlan("separate", eps=1, clip=3)
    assert (type(plan.eps), type(plan.clip)) == (float, float)
    assert plan.to_json() == NormPlan("separate", eps=1.0, clip=3.0).to_json()


@pytest.mark.parametrize(
    ("text", "error", "match"),
    [
        ("separate", ValueError, "Expecting value"),
        ("[]", TypeError, "must be an object, got list"),
        ("[" * 100_000, ValueError, "nested too deeply"),
        ('{"epsilon": 1}', ValueError, "must have the fields placement, .* alone, got 'epsilon'"),
        ('{"placement": "joint", "name": "HASTE"}', ValueError, "alone, got 'name'"),
    ],
)
def test_json_that_is_no_plan(text, error, match):
    with pytest.raises(error, match=match):
        NormPlan.from_json(text)


@pytest.mark.parametrize("fields", [{"groups": "gate"}, {"inner_bias": True}], ids=str)
def test_fields_with_nothing_to_act_on(fields):
    with pytest.raises(ValueError, match="belong to a norm on the products, but placement is 'none'; choose"):
        NormPlan("none", **fields)


def test_a_plan_cannot_be_changed():
    with pytest.raises(AttributeError):
        norms.HASTE.eps = 1.0


# Named plans.

# The named plans that are equal; any other two must differ.
SAME_FUNCTION = [{"HASTE", "BA2016"}, {"DREAMER", "SHEEPRL"}]


def test_named_plans_are_distinct_or_known_to_be_the_same():
    for a, b in product(PLANS, PLANS):
        if a < b:
            assert (PLANS[a] == PLANS[b]) == any({a, b} <= names for names in SAME_FUNCTION), (a, b)
    assert all(getattr(norms, name) is plan for name, plan in PLANS.items())


def test_named_plans_of_the_lstm_are_different_functions():
    """The same weights compute other numbers under another plan; therefore plans have names."""
    for same_parameters in (("HASTE", "FASTRNNS", "TFA"), ("TORCHAUDIO", "TF_CONTRIB")):
        calls = [Case("lstm", PLANS[name], dtype=torch.float64).build()[0] for name in same_parameters]
        outputs = [reference.run(call)[0] for call in calls]
        for i, output in enumerate(outputs):
            for other in outputs[:i]:
                assert (output - other).abs().max() > 1e-4


def test_none_is_the_plan_of_no_norm():
    assert [name for name, plan in PLANS.items() if plan.is_none] == ["NONE"]
    assert not NormPlan(cell="readout").is_none
    assert NormPlan() == norms.NONE


def test_with_eps_is_another_plan_without_a_name():
    plan = norms.HASTE.with_eps(1e-3)
    assert (plan.name, plan.eps) == (None, 1e-3)
    assert plan != norms.HASTE
    assert plan.with_eps(1e-5) == norms.HASTE


# JSON.


@pytest.mark.parametrize("plan", [*PLANS.values(), *RAW_PLANS], ids=plan_label)
def test_plans_through_json(plan):
    read = NormPlan.from_json(plan.to_json())
    assert read == plan
    assert hash(read) == hash(plan)
    assert NormPlan(**json.loads(plan.to_json())) == plan


def test_json_gives_names_back():
    """If two named plans are equal, JSON gives the first name."""
    first = {"BA2016": "HASTE", "SHEEPRL": "DREAMER"}
    assert {name: NormPlan.from_json(plan.to_json()).name for name, plan in PLANS.items()} == {
        name: first.get(name, name) for name in PLANS
    }
    assert NormPlan.from_json(norms.HASTE.with_eps(0.5).to_json()).name is None
    assert repr(norms.HASTE) == "norms.HASTE"
    assert eval(repr(norms.HASTE.with_eps(0.5))) == norms.HASTE.with_eps(0.5)
