"""`bench/device.py` where there is no GPU: the order of its cases, its lines and its table, and that it says what it needs."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed (it needs Linux); pip install 'festina[triton]'")

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import device
import device_lines
import device_works
from device_lines import Line, Task
from offline import compiling

import festina
from festina import backends, norms
from festina.backends.triton import is_interpreting, one_launch, setup, tiers
from festina.backends.triton.device import INTERPRETER
from festina.backends.triton.step import Plan
from festina.testing import Case, assert_rms_close

AROUND = {"machine": "a card", "torch": "2"}


def test_the_most_important_cells_come_first() -> None:
    points = device.slope_points()
    assert len(points) == len(set(points)) == 3 * 6 * 2 * 3
    assert {(p.B, p.H, p.dtype) for p in points[:12]} == {
        (16, H, dtype) for H in (256, 512, 1024) for dtype in ("float32", "bfloat16")
    }
    assert {(p.B, p.H) for p in points[12:20]} == {(16, 64), (16, 128)}
    assert {p.B for p in points[20:40]} == {64}
    assert [str(p) for p in points[:2]] == [f"lstm-HASTE-T1024B16I256H256-{d}" for d in ("float32", "bfloat16")]


def test_parity_tries_every_layer_with_one_batch_size_first() -> None:
    cases = device.parity_cases()
    assert len(set(map(str, cases))) == 96
    assert {(c.B, c.H) for c in cases[:24]} == {(16, H) for H in (64, 256, 512, 1024)}


def test_every_section_lists_its_tasks() -> None:
    """Those that ask the device for nothing."""
    for section in (
        device.parity,
        device.slopes,
        device.short,
        device.stress,
        device.capture,
        device.host,
        device.memory,
    ):
        names = [name for name, _ in section()]
        assert names
        assert all(isinstance(name, str) for name in names)


@pytest.mark.parametrize(("units", "members"), [(8, 64), (16, 32), (32, 16)])
def test_a_variant_sets_the_units_of_a_member(units: int, members: int) -> None:
    layer = Case("lstm", norms.HASTE).layer
    rule = device.units_of_a_member(units)
    tier = rule(Plan.of(layer, 512, 512), 16, 1, torch.bfloat16, INTERPRETER, np.inf)
    assert tier.name == f"team of {members}"
    assert tier.forward.HS == tier.backward.HS == units
    small = (Plan.of(layer, 64, 64), 16, 1, torch.bfloat16, INTERPRETER, np.inf)
    assert rule(*small) == tiers.tier_of(*small)


def test_a_variant_ends() -> None:
    before = one_launch.TEAM_WARPS, tiers.ROWS, setup.tier_of
    for change in device.VARIANTS.values():
        with pytest.raises(KeyError), device.changed(*change):
            raise KeyError
        assert (one_launch.TEAM_WARPS, tiers.ROWS, setup.tier_of) == before


def test_slopes_need_both_lengths() -> None:
    few, many = device_works.SLOPE
    times = {("festina", few): np.array([1.0, 2.0]), ("festina", many): np.array([1.0, 2.0]) + many - few}
    found = device_works.slopes_of({**times, ("nn", few): np.ones(2)})
    assert list(found) == ["festina"]
    np.testing.assert_allclose(found["festina"], 1.0)


def test_ratios_compare_like_with_like() -> None:
    times = {"festina": 6.0, "nn": 12.0, "festina-tf32": 4.0, "nn-tf32": 2.0}
    line = device_lines.compared("forward", {name: np.full(3, v) for name, v in times.items()}, "µs", runs=3)
    assert line.ratio == {"nn": [0.5] * 3, "nn-tf32": [2.0] * 3}
    assert line.value["festina"] == [6.0] * 3
    assert line.facts == {"runs": 3}


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_an_error_is_a_line_and_the_rest_goes_on(tmp_path: Path) -> None:
    def wrong() -> Iterator[Line]:
        yield Line("first", 1.5, "µs", {"nn": [0.5, 0.4, 0.6]}, {"verified": True})
        raise ValueError("no\nsuch thing")

    def tasks() -> Iterator[Task]:
        yield "a", wrong
        yield "b", lambda: [Line("second", {"festina": [1.0, 0.5, 2.0]}, "MiB")]
        raise RuntimeError("no more tasks")

    device_lines.run_section("memory", tasks(), 60, tmp_path / "out", AROUND)
    rows = lines_of(tmp_path / "out")
    assert [(row["case"], row["what"]) for row in rows] == [
        ("a", "first"),
        ("a", "error"),
        ("b", "second"),
        ("", "error"),
    ]
    assert rows[0] == {
        "section": "memory", "case": "a", "what": "first", "value": 1.5, "unit": "µs", "ratio": {"nn": [0.5, 0.4, 0.6]},
        "verified": True, **AROUND,
    }  # fmt: skip
    assert rows[1]["value"] == "ValueError: no such thing"
    assert rows[3]["value"] == "after task 1: RuntimeError: no more tasks"


def test_a_section_stops_when_its_time_is_spent(tmp_path: Path) -> None:
    tasks = [(name, lambda: [Line("done", 1)]) for name in "abc"]
    device_lines.run_section("slopes", tasks, -1, tmp_path / "out", AROUND)
    assert [(row["what"], row["value"]) for row in lines_of(tmp_path / "out")] == [
        ("stopped", "-1 s are spent before task 1")
    ]


def test_the_table_shows_values_ratios_and_what_is_wrong() -> None:
    lines = [
        Line("forward", {"festina": [5.123456, 5.0, 5.5], "nn": [1, 1, 1]}, "µs/step", {"nn": [0.5, 0.4, 0.6]}),
        Line("worst rms ratio", {"festina": 2e-4}, "", {}, {"tier": "loop", "verified": False}),
        Line("error", "a text"),
    ]
    text = device_lines.table(device_lines.row_of("slopes", "case", line, AROUND) for line in lines)
    head, *rows = text.splitlines()
    assert head.split()[:3] == ["section", "case", "what"]
    assert "5.123 (5–5.5) µs/step" in rows[0]
    assert rows[0].endswith("nn 0.5 (0.4–0.6)")
    assert rows[1].endswith("loop, WRONG")
    assert rows[2].endswith("a text")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert device.main(["--out", str(tmp_path / "out")]) == 2
    assert "needs an NVIDIA GPU" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_loop_that_is_compiled_is_the_layer() -> None:
    torch.manual_seed(0)
    layer, x = festina.LayerNormLSTM(5, 8, norm=norms.HASTE), torch.randn(7, 3, 5)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name.startswith(("bias", "gain")):
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    with backends.use("eager"):
        want = layer(x)[0]
    assert_rms_close("output", device_works.LnLoop(layer, 3, is_compiled=False)(x)[0], want, 1e-5)


@pytest.mark.skipif(is_interpreting(), reason="under TRITON_INTERPRET nothing can be compiled")
@pytest.mark.parametrize("members", [8, 128])
def test_the_exchange_compiles(members: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device.exchanges, "device_caches", defaultdict(device.exchanges.create_binder))
    with compiling("sm_90") as found:
        device.exchanged(members, 1, 10, 8, "cpu")
    assert [(compiled.kernel, compiled.spilled_bytes) for compiled in found] == [("exchanges", 0)]
