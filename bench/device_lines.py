"""What `bench/device.py` writes: a JSON line for every result, sections that stop in time, a table."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from festina.cli.measure import Spread, Work
from festina.output import append


@dataclass
class Line:
    """One result: a number, a text, or [median, 20 %, 80 %] by contestant; and what else belongs to it."""

    what: str
    value: object
    unit: str = ""
    ratio: dict[str, list[float]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


Task = tuple[str, Callable[[], Iterable[Line]]]
"""A case in words, and what finds its lines."""


def listed(values: np.ndarray) -> list[float]:
    """Median, 20th and 80th percentile, to four digits."""
    found = Spread.of(values)
    return [float(f"{value:.4g}") for value in (found.median, found.p20, found.p80)]


def compared(what: str, times: Mapping[str, np.ndarray], unit: str, first: str = "festina", **facts: Any) -> Line:
    """The times of all, and the first one's ratio to each other's; under TF32 Festina is measured under TF32 too."""
    ratio = {}
    for name, values in times.items():
        ours = f"{first}-tf32" if name == "nn-tf32" else first
        if name not in (first, f"{first}-tf32") and ours in times:
            ratio[name] = listed(times[ours] / values)
    return Line(what, {name: listed(values) for name, values in times.items()}, unit, ratio, facts)


def brief(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {error}".replace("\n", " ")[:500]


def row_of(section: str, case: str, line: Line, around: Mapping[str, Any]) -> dict[str, Any]:
    """A line as it is written."""
    row = {"section": section, "case": case, "what": line.what, "value": line.value, "unit": line.unit}
    return {**row, **({"ratio": line.ratio} if line.ratio else {}), **line.facts, **around}


def write(path: Path, row: Mapping[str, Any]) -> None:
    """Append a line; it is on the disk before the next task begins, so nothing is lost."""
    append(path, json.dumps(row, default=str) + "\n")


def run_section(
    name: str, tasks: Iterable[Task], seconds: float, path: Path, around: Mapping[str, Any], release: Work = gc.collect
) -> None:
    """Write the lines of tasks until the time is spent; an error is a line too."""
    end = time.perf_counter() + seconds
    at = 0
    try:
        for at, (case, find) in enumerate(tasks):
            if time.perf_counter() > end:
                write(
                    path, row_of(name, "", Line("stopped", f"{seconds:.0f} s are spent before task {at + 1}"), around)
                )
                return
            try:
                for line in find():
                    write(path, row_of(name, case, line, around))
            except Exception as error:
                write(path, row_of(name, case, Line("error", brief(error)), around))
            release()
    except Exception as error:
        write(path, row_of(name, "", Line("error", f"after task {at}: {brief(error)}"), around))


def text_of(value: object, unit: str) -> str:
    """A value as the table has it: Festina's, or the first one's, of several."""
    if isinstance(value, Mapping):
        value = next(iter(value.values()), "")
    if isinstance(value, list):
        value = "{:.4g} ({:.4g}–{:.4g})".format(*value)
    elif isinstance(value, float):
        value = f"{value:.4g}"
    return f"{value} {unit}".strip()[:90]


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    """All lines, one below the other."""
    columns: list[list[str]] = [["section", "case", "what", "value", "ratio (20–80 %), tier"]]
    for row in rows:
        more = [f"{name} {text_of(ratio, '')}" for name, ratio in row.get("ratio", {}).items()]
        more += [row["tier"]] if "tier" in row else []
        more += ["WRONG"] if row.get("verified") is False else []
        columns.append([row["section"], row["case"], row["what"], text_of(row["value"], row["unit"]), ", ".join(more)])
    widths = [max(len(row[i]) for row in columns) for i in range(4)]
    return "\n".join("  ".join([*(v.ljust(w) for v, w in zip(row, widths)), row[4]]).rstrip() for row in columns)
