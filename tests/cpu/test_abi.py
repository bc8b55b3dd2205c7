"""The library: how it is found, refused and read, and the one OpenMP that it shares with torch."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cases import EVERY_PLAN
from on_core import ROOT, compiled, needs_core
from threadpoolctl import threadpool_info

from festina import call as calls
from festina import norms
from festina.backends.cpu import CPU, RARE_KERNELS, abi
from festina.backends.support import missing_kernel
from festina.spec import CELLS, LayerSpec
from festina.testing import Case

pytestmark = needs_core


def refusal(**environment: str) -> str:
    """Why there is no core, in a process with this environment."""
    code = "from festina.backends.cpu import abi; print(abi.library().reason)"
    environment = {**os.environ, **environment}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    ("names", "why"),
    [((), "undefined symbol"), (abi.SIGNATURES, "the compiled core is of version 0, this package of")],
)
def test_a_library_of_another_version_is_refused(names, why, tmp_path):
    (tmp_path / "core.cc").write_text("\n".join(f'extern "C" int {name}() {{ return 0; }}' for name in names))
    compiled("-shared", str(tmp_path / "core.cc"), "-o", str(tmp_path / abi.LIBRARY))
    reason = refusal(FESTINA_CORE=str(tmp_path))
    assert why in reason
    assert reason.startswith(f"FESTINA_CORE={tmp_path} cannot be had: ")
    assert "name another file or unset FESTINA_CORE" in reason


def test_one_openmp_serves_torch_and_the_core():
    torch.zeros(1000, 1000).sum()
    CPU.forward(Case("lstm", norms.HASTE, T=2, B=3, H=9).build()[0])
    libraries = {Path(info["filepath"]).resolve() for info in threadpool_info() if info["user_api"] == "openmp"}
    assert len(libraries) == 1


TEXT = """\
version 5
size FestinaCall 40
field FestinaCall pass i64 0 1
field FestinaCall eps f64 8 1
field FestinaCall input pointer 16 1
field FestinaCall parameters pointer 24 2
value status ok 0
value status stale 2
parameter weight_ih 0
parameter weight_hh 1
constant most_threads 256
kernel lstm separate readout
"""


def test_the_layout_is_read_from_text():
    layout = abi.read_layout(TEXT)
    call = layout.structs["FestinaCall"](eps=0.5, **{"pass": 2})
    call.parameters[1] = 7
    assert bytes(call) == struct.pack("=qdQQQ", 2, 0.5, 0, 0, 7)
    assert layout.version == 5
    assert layout.words == {"FestinaCall": {"pass": 0, "eps": 1, "input": 2, "parameters": 3}}
    assert layout.values == {"status": {"ok": 0, "stale": 2}}
    assert layout.parameters == {"weight_ih": 0, "weight_hh": 1}
    assert layout.constants == {"most_threads": 256}
    assert layout.kernels == {("lstm", "separate", "readout")}


@pytest.mark.parametrize(
    ("was", "now"),
    [
        ("eps f64 8 1", "eps f64 16 1"),
        ("pass i64 0 1\nfield FestinaCall eps f64 8 1", "pass i64 8 1\nfield FestinaCall eps f64 0 1"),
        ("FestinaCall 40", "FestinaCall 48"),
        ("pointer 24 2", "pointer 24 3"),
        ("eps f64", "eps f16"),
        ("version 5\n", ""),
        ("parameter weight_hh 1", "parameter weight_hh"),
    ],
)
def test_a_layout_that_contradicts_itself_is_refused(was, now):
    """A field elsewhere, two swapped, another size or count, a type that is not known, an entry that lacks something."""
    assert was in TEXT
    with pytest.raises((ValueError, KeyError, IndexError)):
        abi.read_layout(TEXT.replace(was, now))


def test_the_core_has_a_kernel_for_every_plan_but_those_it_names():
    for name, plan in EVERY_PLAN:
        layer = LayerSpec(CELLS[name], plan)
        reason = CPU.can_run(calls.Case(layer, torch.float32, torch.device("cpu")))
        assert reason == missing_kernel(layer, abi.core().layout.values["cell"], RARE_KERNELS), f"{name} under {plan}"


def test_what_the_core_does_not_know_is_refused(monkeypatch):
    core = abi.core()
    layer = LayerSpec(CELLS["lstm"], norms.HASTE)

    def reason(dtype=torch.float32, **changed):
        monkeypatch.setattr(core, "layout", replace(known, **changed))
        return CPU.can_run(calls.Case(layer, dtype, torch.device("cpu")))

    known = core.layout
    assert reason() is None
    assert reason(torch.float8_e5m2) == "it has no float8_e5m2; use float32, float64, bfloat16, float16"
    refused = "it has no kernel for the lstm step under the plan HASTE"
    assert reason(kernels=known.kernels - {("lstm", "separate", "readout")}) == refused
    assert reason(parameters={name: at for name, at in known.parameters.items() if name != "gain_c"}) == refused
    assert reason(values={**known.values, "groups": {"gate": 1}}) == refused
