"""The race: in each round every model takes one training step on the same batch.

Because the models take turns, a busy machine slows all of them alike, and the curves can be compared during the run. A
model's seconds are those of its own training steps, without validation and the other models.

A step is a training step in this file; a step of time is one character of a window.
"""

from __future__ import annotations

import math
import os
import signal
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from festina.cli import UsageError
from festina.cli.demo.memory import peak_bytes
from festina.cli.demo.model import CharacterModel, State, map_state
from festina.cli.demo.text import Corpus, Windows
from festina.cli.demo.world import World
from festina.output import replacing

CLIP = 1.0
"""The gradient norm that every model's gradients are clipped to."""

VALIDATIONS = 20
"""Number of validations in a run, evenly spaced. A multiple of 4, so that the quarters are among them."""

VALIDATION_CHARACTERS = 20_000
"""About as many held-out characters are read each time, the same for every model: bits per character to about 0.02."""

MEMORY_STEPS = (3, 4, 5)
"""The steps whose memory is measured: the optimiser has its state by then. Their highest peak is reported."""


@dataclass(frozen=True)
class Settings:
    """Everything that determines the curves: two runs with equal settings on one machine give the same ones."""

    models: tuple[str, ...]
    steps: int
    hidden: int
    layers: int
    batch: int
    length: int
    lr: float
    seed: int


@dataclass
class Record:
    """The history of one model. Every list has one entry per step, except the `validation` ones."""

    bits: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    validation_steps: list[int] = field(default_factory=list)
    validation_bits: list[float] = field(default_factory=list)
    peak_bytes: int | None = None

    @property
    def ms_per_step(self) -> float | None:
        """The median, which slow first steps and a busy machine hardly move."""
        return 1e3 * statistics.median(self.step_seconds) if self.step_seconds else None


class Racer:
    """One model with its optimiser, the state carried from window to window, and its record."""

    def __init__(self, name: str, settings: Settings, characters: int, device: torch.device, world: World) -> None:
        torch.manual_seed(settings.seed)
        self.name, self.device, self.world = name, device, world
        self.model = CharacterModel(name, characters, settings.hidden, settings.layers).to(device)
        self.parallel = world.parallel(self.model)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=settings.lr)
        self.state: State | None = None
        self.record = Record()

    def step(self, inputs: Tensor, targets: Tensor) -> float:
        """Take one training step on this process's rows `[T, B]` and return the loss in bits per character."""
        start = time.perf_counter()
        scores, state = self.parallel(inputs, self.state)
        loss = F.cross_entropy(scores.flatten(0, 1), targets.flatten())
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.state = map_state(Tensor.detach, state)
        bits = loss.item() / math.log(2)  # waits for the device, so that its work is timed
        self.record.step_seconds.append(time.perf_counter() - start)
        return bits

    def measured_step(self, inputs: Tensor, targets: Tensor) -> float:
        """`step`, with its peak memory recorded."""
        bits: list[float] = []
        peak = peak_bytes(lambda: bits.append(self.step(inputs, targets)), self.device)
        if peak is not None:
            self.record.peak_bytes = max(peak, self.record.peak_bytes or 0)
        return bits[0]

    @torch.no_grad()
    def validate(self, windows: Windows) -> float:
        """Bits per character on held-out text, read from its start with the state carried over."""
        self.model.eval()
        state: State | None = None
        total = 0.0
        for k in range(len(windows)):
            inputs, targets = (self.world.own(part).to(self.device) for part in windows[k])
            scores, state = self.model(inputs, state)
            total += F.cross_entropy(scores.flatten(0, 1), targets.flatten()).item()
        self.model.train()
        return self.world.mean([total / len(windows) / math.log(2)])[0]

    def save(self) -> dict[str, Any]:
        """Everything that the next step depends on, with the state of all rows, and the record."""
        state = () if self.state is None else self.state if isinstance(self.state, tuple) else (self.state,)
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "state": [self.world.gather(part) for part in state],
            "record": asdict(self.record),
        }

    def load(self, saved: dict[str, Any]) -> None:
        """Restore what `save` returned, in a world of any size."""
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        parts = tuple(self.world.own(part).to(self.device) for part in saved["state"])
        self.state = None if not parts else parts if len(parts) > 1 else parts[0]
        self.record = Record(**saved["record"])


class Race:
    """All racers at one step of the same text."""

    def __init__(self, settings: Settings, corpus: Corpus, device: torch.device, world: World) -> None:
        self.settings, self.corpus, self.device, self.world = settings, corpus, device, world
        self.train = Windows(corpus.train, settings.batch, settings.length)
        self.held_out = Windows(corpus.validation, settings.batch, settings.length, most=VALIDATION_CHARACTERS)
        self.racers = self._start()
        self.done = 0

    def _start(self) -> list[Racer]:
        """Every model at its start."""
        characters = len(self.corpus.characters)
        return [Racer(name, self.settings, characters, self.device, self.world) for name in self.settings.models]

    def warm_up(self) -> None:
        """One step of every model on a discarded copy, so that one-time costs of the process are not timed."""
        inputs, targets = (self.world.own(part).to(self.device) for part in self.train[0])
        for racer in self._start():
            racer.step(inputs, targets)

    @property
    def validated_characters(self) -> int:
        """Number of held-out characters that a validation reads, in whole windows."""
        return len(self.held_out) * self.settings.batch * self.settings.length

    @property
    def is_finished(self) -> bool:
        return self.done == self.settings.steps

    def validates_at(self, step: int) -> bool:
        """True at `VALIDATIONS` steps spread evenly over the run, including the last."""
        marks = VALIDATIONS * step // self.settings.steps
        return marks > VALIDATIONS * (step - 1) // self.settings.steps

    def round(self) -> None:
        """One step of every racer, and their validation if it is due."""
        window = self.done % len(self.train)
        inputs, targets = (self.world.own(part).to(self.device) for part in self.train[window])
        self.done += 1
        losses = []
        for racer in self.racers:
            if window == 0:
                racer.state = None  # the streams begin (again)
            step = racer.measured_step if self.done in MEMORY_STEPS else racer.step
            losses.append(step(inputs, targets))
        for racer, bits in zip(self.racers, self.world.mean(losses)):
            racer.record.bits.append(bits)
            if self.validates_at(self.done):
                racer.record.validation_steps.append(self.done)
                racer.record.validation_bits.append(racer.validate(self.held_out))

    def _conditions(self) -> dict[str, Any]:
        return {**asdict(self.settings), "models": list(self.settings.models), "text": self.corpus.sha256}

    def save(self, path: Path) -> None:
        """Write a checkpoint. A crash during the write leaves the old one in place.

        Raises:
            OSError: it cannot be written.
        """
        racers = {racer.name: racer.save() for racer in self.racers}
        if self.world.leads:
            with replacing(path) as unfinished:
                torch.save({"conditions": self._conditions(), "done": self.done, "racers": racers}, unfinished)

    def load(self, path: Path) -> None:
        """Resume from a checkpoint; the numbers are those of an uninterrupted run.

        Raises:
            UsageError: the file is no checkpoint of the demo, or has other settings or another text.
        """
        now = self._conditions()
        try:
            if not path.is_file():
                raise ValueError("it is no regular file")
            try:
                saved = torch.load(path, map_location=self.device, weights_only=True)
            except UnpicklingError:  # whose text says how to run what is in the file
                raise ValueError("it is damaged, or holds objects other than tensors and plain values") from None
            was = {key: saved["conditions"].get(key) for key in now}
            racers, done = saved["racers"], int(saved["done"])
        except Exception as error:  # on damaged files torch.load raises errors of many types
            raise not_of_this_demo(path, error) from None
        differing = [f"{key} was {was[key]}, is {now[key]}" for key in now if was[key] != now[key]]
        if differing:
            raise UsageError(
                f"--checkpoint {path} must be of a run with these settings, but {'; '.join(differing)}; "
                "give the same options to resume it, or another file to start a new run"
            )
        loaded = self._start()
        try:
            for racer in loaded:
                racer.load(racers[racer.name])
        except Exception as error:  # what is missing or of a wrong type, of many types too
            raise not_of_this_demo(path, error) from None
        self.racers, self.done = loaded, done


def not_of_this_demo(path: Path, error: Exception) -> UsageError:
    """The error for a checkpoint that cannot be read."""
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return UsageError(
        f"--checkpoint {path} is not a checkpoint of this demo: {reason}; give another file to start a new run"
    )


class Interrupt:
    """Signal handler: `asked` becomes True when the user or the system asks for the end. A second Ctrl-C ends at once."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        # Under torchrun the terminal and the launcher may both send the signal, so a second one does not count.
        if self.asked and "WORLD_SIZE" not in os.environ:
            raise KeyboardInterrupt
        self.asked = True


@contextmanager
def interruptible() -> Iterator[Interrupt]:
    """Context in which Ctrl-C and SIGTERM only set `Interrupt.asked`, so that the step in progress is completed."""
    interrupt = Interrupt()
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, interrupt) for number in numbers]
    try:
        yield interrupt
    finally:
        for number, handler in zip(numbers, before):
            signal.signal(number, handler)


def crossing(steps: Sequence[int], bits: Sequence[float], goal: float) -> float | None:
    """The step at which a falling curve first reaches `goal`, interpolated linearly between two validations.

    >>> crossing([10, 20, 30], [4.0, 3.0, 2.0], 2.5)
    25.0
    """
    for k, (step, value) in enumerate(zip(steps, bits)):
        if value <= goal:
            if k == 0:
                return float(step)
            share = (bits[k - 1] - goal) / (bits[k - 1] - value)
            return steps[k - 1] + share * (step - steps[k - 1])
    return None
