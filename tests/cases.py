"""The one list of cases: cells × plans × sizes × dtypes × features. Tests and benchmarks take theirs from here.

`CASES` is short enough for every commit: each plan with each cell, each feature and each size with the plans that
differ most. `full` is the whole product.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, cycle, product
from typing import get_args

import torch

from festina import norms
from festina.norms import CellNorm, Groups, Kind, NormPlan
from festina.spec import CELLS, CellSpec
from festina.testing import FEATURES, Case

# An eps so large that one in the wrong place, or of the wrong size, moves every number: with 1e-5 it would move them by
# less than rounding does.
LOUD_EPS = 0.1

RAW_PLANS = [
    NormPlan(placement, groups, cell, kind, LOUD_EPS, inner_bias)
    for placement, groups, cell, kind, inner_bias in product(
        ("separate", "joint"), get_args(Groups), get_args(CellNorm), get_args(Kind), (False, True)
    )
] + [NormPlan("none", cell=cell, kind=kind, eps=LOUD_EPS) for cell in ("readout", "carried") for kind in get_args(Kind)]
"""Every combination of fields, whether a project uses it or not."""

RARE_PLANS = [
    *(
        NormPlan(placement, cell=cell, kind=kind, eps=LOUD_EPS, clip=0.4)
        for placement, cell, kind in (
            ("none", "none", "layer"),
            ("none", "carried", "rms"),
            ("separate", "readout", "layer"),
            ("joint", "carried", "layer"),
        )
    ),
    *(
        NormPlan(placement, groups, kind=kind, eps=LOUD_EPS, inner_bias=inner_bias, inner_bias_hh=True)
        for placement, groups, kind, inner_bias in (
            ("separate", "all", "layer", False),
            ("separate", "gate", "rms", True),
            ("joint", "gate", "layer", True),
        )
    ),
    NormPlan(reset="product"),
    *(
        NormPlan(
            placement,
            groups,
            kind=kind,
            eps=LOUD_EPS,
            inner_bias=inner_bias,
            inner_bias_hh=not inner_bias,
            reset=reset,
        )
        for reset, placement, groups, kind, inner_bias in (
            *product(("product",), ("separate", "joint"), ("gate", "gates|candidate"), get_args(Kind), (False, True)),
            ("state", "separate", "gate", "layer", False),
            ("state", "separate", "gates|candidate", "rms", True),
            ("state", "joint", "gate", "rms", False),
            ("state", "joint", "gates|candidate", "layer", True),
        )
    ),
]
"""Fields that few projects use, and that RAW_PLANS leave out; the clip is one that many values of c meet."""

TYPICAL = {
    "lstm": (norms.NONE, norms.HASTE, norms.FASTRNNS, norms.ICEFALL),
    "gru": (norms.NONE, norms.HASTE, norms.BA2016_GRU, norms.DREAMER),
    "indrnn": (norms.NONE, norms.HASTE),
    "indrnn_relu": (norms.HASTE,),
}
"""The plans that meet every size and every feature: each placement, each grouping, each seat of the norm on c."""

DTYPES = (torch.float32, torch.float64)

# T, B, I, H: odd ones, and a vector's width with one more and one less.
SIZES = [
    (1, 1, 5, 7),
    (1, 3, 3, 8),
    (3, 1, 7, 15),
    (2, 2, 16, 16),
    (5, 3, 15, 17),
    (4, 9, 8, 33),
    (2, 65, 33, 9),
    (12, 2, 3, 31),
    (3, 5, 100, 63),
]
WIDE = [(2, 3, 17, 257), (2, 2, 1000, 65), (1, 2, 9, 1023)]
NARROW = [(1, 1, 3, 1), (4, 3, 3, 1), (3, 2, 1, 7)]
# N(w·x) = sign(x)·N(w) where x is one number, up to eps: the gradient of x is all cancellation in float32 unless eps is
# loud. The same goes for h when H = 1.
NARROW_PLANS = {
    "lstm": (norms.NONE, norms.HASTE.with_eps(LOUD_EPS), norms.TORCHAUDIO.with_eps(LOUD_EPS)),
    "gru": (norms.NONE, norms.HASTE.with_eps(LOUD_EPS), norms.DREAMER.with_eps(LOUD_EPS)),
    "indrnn": (norms.NONE, norms.HASTE.with_eps(LOUD_EPS)),
}


def plans(cell: CellSpec) -> list[NormPlan]:
    """Every plan that fits the cell, once: of those that are one function there, the first."""
    fitting = [
        p
        for p in (*norms.PLANS.values(), *RAW_PLANS, *RARE_PLANS)
        if p.placement in cell.steps and p.groups in cell.groups
    ]
    return list({cell.fit(plan): plan for plan in reversed(fitting)}.values())[::-1]


def feature_sets(cell: CellSpec) -> Iterator[tuple[str, ...]]:
    """Each feature alone, then the pairs that can disturb each other, then all at once."""
    alone = [feature for feature in FEATURES if feature != "zoneout_cell" or "c" in cell.states]
    yield from ((feature,) for feature in alone)
    yield from combinations(("resets", "ragged", "idle", "bidirectional"), 2)
    masks = [feature for feature in ("zoneout", "zoneout_cell") if feature in alone]
    yield (*masks, "resets", "ragged", "bidirectional")
    yield ("expectation", "resets", "ragged", "idle", "bidirectional", "nobias")


def _by_plan() -> Iterator[Case]:
    """Each plan with each cell it fits; raw ones go through the features in turn."""
    for cell in CELLS.values():
        turns = cycle(feature_sets(cell))
        for plan in plans(cell):
            if plan.name:
                for dtype in DTYPES:
                    yield Case(cell.name, plan, B=3, H=17, dtype=dtype)
            else:
                yield Case(cell.name, plan, B=3, I=6, H=9)
                yield Case(cell.name, plan, T=4, B=4, H=9, features=next(turns))


def _by_feature() -> Iterator[Case]:
    for name, typical in TYPICAL.items():
        for plan, features, dtype in product(typical, feature_sets(CELLS[name]), DTYPES):
            yield Case(name, plan, T=4, B=4, H=9, dtype=dtype, features=features)
        if CELLS[name].projects:
            for plan, features in product(typical[:2], ((), *feature_sets(CELLS[name]))):
                yield Case(name, plan, T=4, B=4, H=9, P=5, features=features)


def _by_size() -> Iterator[Case]:
    for name, typical in TYPICAL.items():
        for plan, (T, B, I, H) in product(typical, SIZES):
            yield Case(name, plan, T, B, I, H)
    for name, (T, B, I, H) in product(("lstm", "gru"), WIDE):
        yield Case(name, norms.HASTE, T, B, I, H)
    for name, narrow in NARROW_PLANS.items():
        for plan, (T, B, I, H) in product(narrow, NARROW):
            yield Case(name, plan, T, B, I, H)


EVERY_PLAN: list[tuple[str, NormPlan]] = [(cell.name, plan) for cell in CELLS.values() for plan in plans(cell)]
"""Each cell with each of its `plans`."""

CASES: list[Case] = list(dict.fromkeys((*_by_plan(), *_by_feature(), *_by_size())))


def full(cell: str, plan: NormPlan) -> Iterator[Case]:
    """The product of everything else for one of `EVERY_PLAN`: hundreds of cases."""
    spec = CELLS[cell]
    for (T, B, I, H), dtype, features in product(SIZES, DTYPES, ((), *feature_sets(spec))):
        if B == 1 and "idle" in features:
            continue
        yield Case(cell, plan, T, B, I, H, dtype=dtype, features=features)
        if spec.projects:
            yield Case(cell, plan, T, B, I, H, P=H // 2, dtype=dtype, features=features)
