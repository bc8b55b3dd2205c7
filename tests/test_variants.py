"""docs/variants.md matches the code: its tables are those that docs/variants.py makes."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from festina import convert, norms

DOCS = Path(__file__).parent.parent / "docs"


@pytest.fixture(scope="module")
def variants() -> ModuleType:
    found = importlib.util.spec_from_file_location("variants", DOCS / "variants.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules["variants"] = module  # dataclasses look up their module
    found.loader.exec_module(module)
    return module


def test_tables_are_up_to_date(variants: ModuleType) -> None:
    assert variants.page() == variants.PAGE.read_text("utf-8"), "run `python docs/variants.py`"


def test_every_plan_and_every_layer_norm_format_is_listed(variants: ModuleType) -> None:
    assert {v.plan.name for v in variants.VARIANTS} == norms.PLANS.keys() - {"NONE"}
    normed = {name for name in convert.names() if convert.table(name).plan not in (None, norms.NONE)}
    assert normed <= {name for v in variants.VARIANTS for name in v.formats}


def test_a_format_has_the_listed_plan(variants: ModuleType) -> None:
    options = {"keras.GRU": {"reset_after": False}}
    for v in variants.VARIANTS:
        for name in v.formats:
            table = convert.table(name, **options.get(name, {}))
            assert table.cell is v.cell
            # sheeprl's format has an inner bias only if the checkpoint has one
            assert table.plan == (norms.DREAMER_V2 if name == "sheeprl.LayerNormGRUCell" else v.plan)


def test_only_ba2016_equals_haste(variants: ModuleType) -> None:
    same = {v.plan.name for v in variants.VARIANTS if variants.distance(v.cell, v.plan) == "0"}
    assert same == {"HASTE", "BA2016"}
