"""The figures of a run with their conditions: as data for demo.json, as text and tables for the terminal."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from dataclasses import asdict
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

import festina
from festina.cli.demo.model import backend_of
from festina.cli.demo.training import CLIP, Race, Racer, crossing
from festina.cli.info import processor

QUARTERS = (25, 50, 75, 100)
"""The columns of the table: validation at these percentages of the steps."""

SAME = 0.005
"""Curves closer than this, in bits, count as the same: rounding alone separates them by less."""

BLOCKS = "▁▂▃▄▅▆▇█"


def figures(race: Race, sample: dict[str, str] | None) -> dict[str, Any]:
    """The content of demo.json."""
    return {
        "finished": race.is_finished,
        "steps_done": race.done,
        "conditions": {
            **asdict(race.settings),
            "clip_gradient_norm": CLIP,
            "optimizer": "Adam",
            "text": race.corpus.conditions(),
            "validated_characters": race.validated_characters,
            "device": str(race.device),
            "threads": torch.get_num_threads(),
            "processes": race.world.size,
            "festina": festina.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "platform": platform.platform(),
            "processor": processor(),
            "cores": os.cpu_count(),
            "command": shlex.join(["festina", *sys.argv[1:]]),
        },
        "models": {racer.name: model_figures(race, racer) for racer in race.racers},
        "crossings": crossings(race),
        "sample": sample,
    }


def model_figures(race: Race, racer: Racer) -> dict[str, Any]:
    """The figures of one model; None for what could not be measured."""
    record = racer.record
    ms = record.ms_per_step
    return {
        "parameters": sum(p.numel() for p in racer.model.parameters()),
        "backend": backend_of(racer.model, race.device),
        "ms_per_step": ms,
        "tokens_per_second": ms and race.settings.batch * race.settings.length / ms * 1e3,
        "training_seconds": sum(record.step_seconds),
        "peak_mib": record.peak_bytes and record.peak_bytes / 2**20,
        "validation": {
            "step": record.validation_steps,
            "bits_per_character": record.validation_bits,
            "at_percent": {str(percent): at_percent(race, racer, percent) for percent in QUARTERS},
        },
        "training": {"bits_per_character": record.bits, "seconds": record.step_seconds},
    }


def at_percent(race: Race, racer: Racer, percent: int) -> float | None:
    """Validation bits per character after `percent` of the steps; None if the run did not get there."""
    step = -(-percent * race.settings.steps // 100)
    record = racer.record
    return dict(zip(record.validation_steps, record.validation_bits)).get(step)


def crossings(race: Race) -> list[dict[str, Any]]:
    """For every other model, the step at which it reached the first model's last validation value."""
    first, *others = race.racers
    if len(first.record.validation_bits) < 2:
        return []
    goal, last = first.record.validation_bits[-1], first.record.validation_steps[-1]
    found = []
    for racer in others:
        step = crossing(racer.record.validation_steps, racer.record.validation_bits, goal)
        share = None if step is None else step / last
        found.append(
            {"model": racer.name, "goal_of": first.name, "bits_per_character": goal, "step": step, "share": share}
        )
    return found


def largest_difference(one: Racer, other: Racer) -> float:
    """The largest difference between two validation curves."""
    pairs = zip(one.record.validation_bits, other.record.validation_bits, strict=True)
    return max((abs(a - b) for a, b in pairs), default=0.0)


def crossing_lines(race: Race) -> list[str]:
    """The crossings in words, or that a model has the same curve as the first."""
    lines = []
    for racer, found in zip(race.racers[1:], crossings(race)):
        first = race.racers[0]
        goal = f"the {found['bits_per_character']:.3f} bits of {first.name}"
        if (apart := largest_difference(first, racer)) < SAME:
            lines.append(f"{racer.name} and {first.name} are one curve (at most {apart:.1g} bits apart).")
        elif found["share"] is None:
            lines.append(f"{racer.name} did not reach {goal}.")
        else:
            lines.append(f"{racer.name} reached {goal} after {found['share']:.0%} of the steps.")
    return lines


def heading(race: Race) -> str:
    """A summary of the run in a few lines."""
    s, threads = race.settings, torch.get_num_threads()
    backends = ", ".join(f"{racer.name} by {backend_of(racer.model, race.device)}" for racer in race.racers)
    processes = f", {race.world.size} processes" if race.world.size > 1 else ""
    return (
        f"{race.corpus.name}\n"
        f"{len(race.corpus.train):,} characters of {len(race.corpus.characters)} kinds, "
        f"{s.steps / len(race.train):.0%} of them in {s.steps} steps of {s.batch} × {s.length}\n"
        f"{s.layers} layer{'s' * (s.layers > 1)} of {s.hidden}, Adam at {s.lr:g}, "
        f"{threads} thread{'s' * (threads > 1)} on {race.device}{processes}\n"
        f"{backends}"
    )


def number(value: float | None, form: str) -> str:
    """A figure for a table, or a dash for None."""
    return "–" if value is None else format(value, form)


def live(race: Race) -> RenderableType:
    """The view during the race."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("model")
    for name in ("bits per character", "held out", "ms a step", "seconds"):
        table.add_column(name, justify="right")
    table.add_column("")
    best = min(
        (racer.record.validation_bits[-1] for racer in race.racers if racer.record.validation_bits), default=None
    )
    for racer in race.racers:
        record = racer.record
        recent = record.bits[-20:]
        held_out = record.validation_bits[-1] if record.validation_bits else None
        table.add_row(
            racer.name,
            number(sum(recent) / len(recent) if recent else None, ".2f"),
            Text(number(held_out, ".3f"), "bold green" if held_out is not None and held_out == best else ""),
            number(record.ms_per_step, ".0f"),
            number(sum(record.step_seconds), ".0f"),
            Text(sparkline(record.validation_bits), "cyan"),
        )
    bar = Table.grid(padding=(0, 2))
    bar.add_row(
        f"step {race.done} of {race.settings.steps}",
        ProgressBar(total=race.settings.steps, completed=race.done, width=40),
        remaining(race),
    )
    return Group(bar, table)


def remaining(race: Race) -> str:
    """The remaining time, estimated from the median step times so far."""
    ms = sum(racer.record.ms_per_step or 0.0 for racer in race.racers)
    seconds = round(ms / 1e3 * (race.settings.steps - race.done))
    return f"{seconds // 60}:{seconds % 60:02d} to go" if race.done else ""


def sparkline(values: list[float]) -> str:
    """A curve in one line of text, scaled to its range.

    >>> sparkline([4.0, 3.0, 2.5, 2.0])
    '█▄▂▁'
    """
    low, high = min(values, default=0.0), max(values, default=0.0)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[int((value - low) * scale)] for value in values)


def line(race: Race) -> str:
    """The state of the race in one line, for a log."""
    parts = [f"{r.name} {r.record.validation_bits[-1]:.3f}" for r in race.racers if r.record.validation_bits]
    return f"step {race.done} of {race.settings.steps}: {', '.join(parts)}"


def final(race: Race) -> Table:
    """The table at the end; it fits 80 columns."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("held-out bits\nper character", vertical="bottom", no_wrap=True)
    for name in (*(f"at\n{percent} %" for percent in QUARTERS), "ms a\nstep", "characters\na second", "peak\nMiB"):
        table.add_column(name, justify="right")
    for racer in race.racers:
        found = model_figures(race, racer)
        table.add_row(
            racer.name,
            *(number(at_percent(race, racer, percent), ".3f") for percent in QUARTERS),
            number(found["ms_per_step"], ".1f"),
            number(found["tokens_per_second"], ",.0f"),
            number(found["peak_mib"], ".0f"),
        )
    return table


def show(console: Console, race: Race, sample: dict[str, str] | None) -> None:
    """Print the results of a run."""
    console.print(final(race))
    for text in crossing_lines(race):
        console.print(text, soft_wrap=True)
    if sample is not None:
        console.print(f"\n[bold]{sample['model']}[/bold], streamed through its cell one character at a time:\n")
        console.print(Text(sample["text"].strip("\n"), style="dim"), soft_wrap=True)
