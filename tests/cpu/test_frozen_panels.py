"""Frozen panels: the kernels on rounded weights against the reference in float64 on the same rounded weights."""

from __future__ import annotations

import ctypes
import random
from dataclasses import replace

import pytest
import torch
from cases import CASES
from on_core import SPLIT, frozen_differs, needs_core
from test_kernels import BLOCKED
from wrong_calls import Right

from festina import norms
from festina.backends.cpu import CPU, abi, new_outputs
from festina.backends.cpu.frozen import PANEL_TYPES, FrozenPanels
from festina.testing import TOLERANCES, Case

pytestmark = needs_core

DRAWN = ("zoneout", "zoneout_cell")
PLAIN = [
    case
    for case in CASES
    if case.dtype == torch.float32 and not set(DRAWN) & set(case.features) and CPU.can_run(case.on("cpu")) is None
]


def allowed(case, panel_type):
    found, name = frozen_differs(case, panel_type)
    assert found <= TOLERANCES[torch.float32], f"{case}: {name} differs by {found:.2e}"


@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize(("first", "panel_type"), [*enumerate(PANEL_TYPES)])
def test_rounded_weights_give_what_the_reference_gives_with_them(first, panel_type, part):
    """A third of the cases in either type: plans, features but random masks, odd sizes."""
    for case in PLAIN[first::3][part::4]:
        allowed(case, panel_type)


@pytest.mark.parametrize("panel_type", [abi.WHOLE, *PANEL_TYPES])
@pytest.mark.parametrize("threads", [1, 3])
def test_threads_and_blocks_of_frozen_weights(threads, panel_type, use_threads):
    """Rows and units split among threads, and sizes beyond each block that products are cut into."""
    use_threads(threads)
    for case in (*SPLIT, *BLOCKED):
        features = tuple(feature for feature in case.features if feature not in DRAWN)
        allowed(replace(case, dtype=torch.float32, features=features), panel_type)


@pytest.mark.parametrize("panel_type", [1, 2])
def test_rounded_panels_are_for_inference_in_float32(panel_type):
    types, passes = abi.core().layout.values["type"], abi.core().layout.values["pass"]
    for which in passes:
        for name, type in types.items():
            right = Right(which)
            right.call.panel_type, right.call.type = panel_type, type
            if (which, name) == (abi.INFERENCE, "float32"):
                assert abi.core().run(ctypes.byref(right.call)) == 0
            else:
                assert (
                    right.refusal()
                    == f"festina's core: panel_type must be 0 (whole) in {which} in {name}, got {panel_type}"
                )


def test_weights_that_are_not_numbers_are_rounded_to_something():
    """The core takes weights on trust; freeze refuses these."""
    right = Right(abi.INFERENCE)
    right.call.panel_type = 2
    draw = random.Random(0)
    for name, buffer in right.buffers.items():
        if name.startswith("parameter"):
            values = buffer.view(torch.float32)
            for at in range(0, 512, 7):
                values[at] = draw.choice([torch.nan, torch.inf, -torch.inf, 1e-38, 1e-45, 3e38])
    assert abi.core().run(ctypes.byref(right.call)) == 0


@pytest.mark.parametrize("panel_type", PANEL_TYPES)
def test_a_row_that_holds_no_numbers_spoils_no_other(panel_type):
    """Words of several terms end behind the last one, where the next row begins."""
    call, _ = Case("lstm", norms.HASTE, T=1, B=3, I=5, H=9).build()
    panels, outputs = FrozenPanels(call.layer, call.parameters, panel_type), new_outputs(call)
    panels.forward(call, outputs)
    want = outputs.output.clone()
    call.input[1] = torch.nan
    panels.forward(call, outputs)
    assert torch.equal(outputs.output[::2], want[::2])
    assert outputs.output[1].isnan().all()
