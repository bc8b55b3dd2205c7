"""Train a character language model with torch.nn.LSTM, festina.LSTM and festina.LayerNormLSTM, side by side.

All start from the same seed and take the same steps on the same batches of real text: the source of Python's standard
library, or --text FILE. The run ends with a table, demo.json with every figure and its conditions, demo.png with the
curves, and a sample of text.

Ctrl-C ends the run after the step in progress, saves all of these for the steps done, and exits with code 130.
Under torchrun (torchrun --nproc-per-node 2 -m festina demo) the processes share every batch, with the same result.
"""

from __future__ import annotations

import argparse
import json
from importlib.util import find_spec
from pathlib import Path

import torch

from festina.cli import UsageError, missing
from festina.cli.demo import model, text, world
from festina.cli.demo.training import Race, Settings, interruptible
from festina.cli.demo.world import World
from festina.output import check_target, replacing

INTERRUPTED = 130

PICTURE, FIGURES = RESULTS = ("demo.png", "demo.json")


def positive(value: str) -> int:
    """Parse an integer of at least 1."""
    number = int(value)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return number


def rate(value: str) -> float:
    """Parse a learning rate: finite and greater than 0."""
    number = float(value)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be greater than 0, got {value}")
    return number


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--text", type=Path, metavar="FILE", help="train on this UTF-8 text instead of the standard library"
    )
    parser.add_argument(
        "--models",
        nargs="+",
        choices=model.LAYERS,
        default=list(model.DEFAULT),
        metavar="MODEL",
        help=f"models to compare, of {', '.join(model.LAYERS)} (default: {' '.join(model.DEFAULT)})",
    )
    for name, default, what in (
        ("steps", 600, "training steps"),
        ("hidden", 128, "hidden size H"),
        ("layers", 1, "recurrent layers"),
        ("batch", 64, "batch size B, over all processes"),
        ("length", 32, "steps T per window; the state is carried to the next window"),
    ):
        parser.add_argument(
            f"--{name}", type=positive, default=default, metavar="N", help=f"{what} (default: {default})"
        )
    parser.add_argument(
        "--lr", type=rate, default=1e-2, metavar="X", help="Adam's learning rate (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of every model (default: 0)")
    parser.add_argument("--device", default="cpu", help="for example cuda (default: cpu)")
    parser.add_argument("--threads", type=positive, metavar="N", help="threads (default: torch's choice)")
    parser.add_argument(
        "--out", type=Path, default=Path(), metavar="DIR", help="results folder (default: the current one)"
    )
    parser.add_argument(
        "--checkpoint",
        type=Path,
        metavar="PATH",
        help="resume from this file if it exists, and write it at every validation and at the end",
    )


def run(args: argparse.Namespace) -> int:
    for package in ("rich", "matplotlib"):
        if find_spec(package) is None:
            raise missing(package, "demo")
    if len(set(args.models)) < len(args.models):
        raise UsageError(f"--models must name each model once, got {' '.join(args.models)}")
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        device = torch.device(args.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {args.device} cannot be used: {str(error).splitlines()[0]}") from None
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {args.out} must be a folder, and cannot be created: {error.strerror}") from None

    for path in (*(args.out / name for name in RESULTS), *([args.checkpoint] if args.checkpoint else [])):
        check_target(path)
    corpus = text.from_file(args.text) if args.text else text.standard_library()
    settings = Settings(
        models=tuple(args.models),
        steps=args.steps,
        hidden=args.hidden,
        layers=args.layers,
        batch=args.batch,
        length=args.length,
        lr=args.lr,
        seed=args.seed,
    )
    with world.join() as here:
        if args.batch % here.size:
            raise UsageError(f"--batch must be a multiple of the {here.size} processes, got {args.batch}")
        is_finished = demonstrate(args, settings, corpus, device, here)
    return 0 if is_finished else INTERRUPTED


def demonstrate(
    args: argparse.Namespace, settings: Settings, corpus: text.Corpus, device: torch.device, here: World
) -> bool:
    """Run the race and show it; True if it came to its end. The race goes with this function: see `world.join`."""
    race = Race(settings, corpus, device, here)
    if args.checkpoint and args.checkpoint.exists():
        race.load(args.checkpoint)
    race.warm_up()
    race_to_the_end(race, args.checkpoint)
    if here.leads:
        write(race, args.out)
    return race.is_finished


def race_to_the_end(race: Race, checkpoint: Path | None) -> None:
    """Run the rest of the race with a live view; end early if the user interrupts."""
    from rich.console import Console  # noqa: PLC0415  rich and matplotlib are optional
    from rich.live import Live  # noqa: PLC0415  rich and matplotlib are optional

    from festina.cli.demo import report  # noqa: PLC0415  rich and matplotlib are optional

    console = Console(quiet=not race.world.leads, highlight=False)
    console.print(report.heading(race), end="\n\n", soft_wrap=True)
    watched = Live(console=console, refresh_per_second=4, transient=True, get_renderable=lambda: report.live(race))
    with interruptible() as interrupt:
        if console.is_terminal:
            watched.start()
        try:
            while not race.is_finished:
                race.round()
                # All processes end at the same step: the one that got the signal tells the others.
                if sum(race.world.mean([float(interrupt.asked)])):
                    break
                if race.validates_at(race.done):
                    if not console.is_terminal:
                        console.print(report.line(race), soft_wrap=True)
                    if checkpoint:
                        race.save(checkpoint)
            if checkpoint:
                race.save(checkpoint)
        finally:
            watched.stop()


def write(race: Race, out: Path) -> None:
    """Save the picture and the figures, then print the results."""
    from rich.console import Console  # noqa: PLC0415  rich and matplotlib are optional

    from festina.cli.demo import picture, report  # noqa: PLC0415  rich and matplotlib are optional

    sample = generated(race)
    picture.draw(race, out / PICTURE)
    with replacing(out / FIGURES) as unfinished:
        unfinished.write_text(json.dumps(report.figures(race, sample), indent=1) + "\n", encoding="utf-8")
    console = Console(highlight=False)
    report.show(console, race, sample)
    stopped = "" if race.is_finished else f"stopped after step {race.done} of {race.settings.steps}; "
    console.print(f"\n{stopped}see {out / PICTURE} and {out / FIGURES}", soft_wrap=True)


def generated(race: Race) -> dict[str, str] | None:
    """Text generated by the last model that has cells."""
    for racer in reversed(race.racers):
        made = model.sample(
            racer.model, race.corpus.characters, race.corpus.prompt, length=400, seed=race.settings.seed
        )
        if made is not None:
            return {"model": racer.name, "prompt": race.corpus.prompt, "text": made}
    return None
