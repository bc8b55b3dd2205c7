"""demo.png: validation curves of every model against training steps and against training seconds."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from festina.cli.demo.model import LAYERS
from festina.cli.demo.report import crossings
from festina.cli.demo.training import Race
from festina.output import replacing

# Okabe and Ito's colours, which differ for every kind of colour vision; line styles differ as well.
# If two curves coincide, the wide pale line of the first shows on both sides of the second.
STYLES = (
    {"color": "#56B4E9", "linewidth": 5.0, "linestyle": "-"},
    {"color": "#0B3C5D", "linewidth": 1.6, "linestyle": (0, (4, 2))},
    {"color": "#D55E00", "linewidth": 2.4, "linestyle": "-"},
    {"color": "#009E73", "linewidth": 2.0, "linestyle": "-."},
    {"color": "#CC79A7", "linewidth": 2.0, "linestyle": ":"},
    {"color": "#E69F00", "linewidth": 2.0, "linestyle": "--"},
    {"color": "#000000", "linewidth": 1.2, "linestyle": "-"},
)
GREY = "#5A5A5A"


def draw(race: Race, path: Path) -> None:
    """Write the picture. Before the first validation, the axes are empty."""
    with matplotlib.rc_context(
        {"font.size": 10, "axes.titlesize": 11, "axes.spines.top": False, "axes.spines.right": False}
    ):
        figure = Figure(figsize=(10, 4.4), dpi=160, layout="constrained")
        by_step, by_time = figure.subplots(1, 2, sharey=True)
        for racer in race.racers:
            style = STYLES[list(LAYERS).index(racer.name)]  # each model has the same style in every picture
            clock = [0.0, *accumulate(racer.record.step_seconds)]
            steps, bits = racer.record.validation_steps, racer.record.validation_bits
            by_step.plot(steps, bits, label=racer.name, solid_capstyle="round", **style)
            by_time.plot([clock[step] for step in steps], bits, solid_capstyle="round", **style)
        for axes, label in ((by_step, "steps"), (by_time, "seconds of training")):
            axes.set_xlabel(label)
            axes.set_xlim(left=0)
            axes.grid(color="#E4E4E4", linewidth=0.8)
            axes.set_axisbelow(True)
        by_step.set_ylabel("bits per character, held-out text")
        mark_goal(race, by_step)
        if by_step.lines:
            by_step.legend(frameon=False, loc="upper right")
        with replacing(path) as unfinished:
            figure.savefig(unfinished)


def mark_goal(race: Race, axes: Axes) -> None:
    """Draw a line at the first model's last value, and a mark where the last model first reached it."""
    found = [crossing for crossing in crossings(race) if crossing["model"] == race.racers[-1].name]
    if not found or found[0]["step"] is None or len(race.racers[0].record.validation_steps) < 3:
        return
    step, goal = found[0]["step"], found[0]["bits_per_character"]
    axes.axhline(goal, color=GREY, linewidth=0.9, linestyle=(0, (1, 2)))
    axes.plot([step], [goal], marker="o", markersize=6, color="white", markeredgecolor=GREY, zorder=5)
    axes.annotate(
        f"{found[0]['share']:.0%} of the steps",
        (step, goal),
        xytext=(-8, -16),
        textcoords="offset points",
        ha="right",
        color=GREY,
    )
