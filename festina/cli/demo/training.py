"""The race: every model takes the same step on the same batch, one after the other, round by round.

Side by side, a busy machine slows all of them alike, and the curves can be watched as they part. A model's seconds are
those of its own steps; validation and the other models are not in them.
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

CLIP = 1.0
"""The gradient norm that every model's gradients are scaled down to."""

VALIDATIONS = 20
"""How often the held-out text is read in a run, at equal distances. A multiple of 4: the quarters are among them."""

VALIDATION_CHARACTERS = 20_000
"""How much of it is read: bits per character to about 0.02, and the same text for every model and every time."""

MEMORY_STEPS = (3, 4, 5)
"""The steps whose memory is measured: the optimiser has its state by then. Their greatest peak counts."""


@dataclass(frozen=True)
class Settings:
    """What shapes the numbers of a run: two runs with equal settings on one machine give the same curves."""

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
    """What one model has done so far. Every list has one entry a step, except the `validation` ones."""

    bits: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    validation_steps: list[int] = field(default_factory=list)
    validation_bits: list[float] = field(default_factory=list)
    peak_bytes: int | None = None

    @property
    def ms_per_step(self) -> float | None:
        """The median: the first steps, and those the machine was busy in, do not move it."""
        return 1e3 * statistics.median(self.step_seconds) if self.step_seconds else None


class Racer:
    """One model with its optimiser, the state it carries from window to window, and its record."""

    def __init__(self, name: str, settings: Settings, characters: int, device: torch.device, world: World) -> None:
        torch.manual_seed(settings.seed)
        self.name, self.device, self.world = name, device, world
        self.model = CharacterModel(name, characters, settings.hidden, settings.layers).to(device)
        self.parallel = world.parallel(self.model)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=settings.lr)
        self.state: State | None = None
        self.record = Record()

    def step(self, inputs: Tensor, targets: Tensor) -> float:
        """One training step on this process's rows `[T, B]`; the loss in bits per character."""
        start = time.perf_counter()
        scores, state = self.parallel(inputs, self.state)
        loss = F.cross_entropy(scores.flatten(0, 1), targets.flatten())
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.state = map_state(Tensor.detach, state)
        bits = loss.item() / math.log(2)  # waits for the device, so the time is that of the work
        self.record.step_seconds.append(time.perf_counter() - start)
        return bits

    def measured_step(self, inputs: Tensor, targets: Tensor) -> float:
        """`step`, with a look at its memory."""
        bits: list[float] = []
        peak = peak_bytes(lambda: bits.append(self.step(inputs, targets)), self.device)
        if peak is not None:
            self.record.peak_bytes = max(peak, self.record.peak_bytes or 0)
        return bits[0]

    @torch.no_grad()
    def validate(self, windows: Windows) -> float:
        """Bits per character on held-out text, read from its start with the state carried on."""
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
        """Everything that the next step depends on, the state of all rows, and the record."""
        state = () if self.state is None else self.state if isinstance(self.state, tuple) else (self.state,)
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "state": [self.world.gather(part) for part in state],
            "record": asdict(self.record),
        }

    def load(self, saved: dict[str, Any]) -> None:
        """What `save` wrote, in a world of whatever size."""
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
        self.racers = [Racer(name, settings, len(corpus.characters), device, world) for name in settings.models]
        self.done = 0

    def warm_up(self) -> None:
        """One step of every model on copies thrown away: what is done once in a process is in nobody's time."""
        inputs, targets = (self.world.own(part).to(self.device) for part in self.train[0])
        for name in self.settings.models:
            Racer(name, self.settings, len(self.corpus.characters), self.device, self.world).step(inputs, targets)

    @property
    def validated_characters(self) -> int:
        """How much held-out text a validation reads: whole windows of it."""
        return len(self.held_out) * self.settings.batch * self.settings.length

    @property
    def is_finished(self) -> bool:
        return self.done == self.settings.steps

    def validates_at(self, step: int) -> bool:
        """True at `VALIDATIONS` steps spread evenly over the run, the last among them."""
        marks = VALIDATIONS * step // self.settings.steps
        return marks > VALIDATIONS * (step - 1) // self.settings.steps

    def round(self) -> None:
        """One step of every racer, and their validation where it is due."""
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
        """Write a checkpoint. A crash in the middle leaves the old one in place."""
        racers = {racer.name: racer.save() for racer in self.racers}
        if self.world.leads:
            unfinished = path.with_name(path.name + ".unfinished")
            torch.save({"conditions": self._conditions(), "done": self.done, "racers": racers}, unfinished)
            unfinished.replace(path)

    def load(self, path: Path) -> None:
        """Go on where a checkpoint stopped: the numbers are those of a run without a break.

        Raises:
            UsageError: it is no such checkpoint, or it was made under other settings or on another text.
        """
        try:
            saved = torch.load(path, map_location=self.device, weights_only=True)
            was, now = saved["conditions"], self._conditions()
            racers, done = saved["racers"], saved["done"]
        except Exception as error:  # torch.load raises whatever the bytes lead it to
            raise UsageError(f"--checkpoint {path} is not a checkpoint of this demo: {error}") from None
        differing = [f"{key} was {was.get(key)}, is {now[key]}" for key in now if was.get(key) != now[key]]
        if differing:
            raise UsageError(
                f"--checkpoint {path} belongs to another run: {'; '.join(differing)}. "
                "Give the same options to go on with it, or another file to start anew"
            )
        self.done = done
        for racer in self.racers:
            racer.load(racers[racer.name])


class Interrupt:
    """Whether the user, or the system, has asked for an end. A second Ctrl-C ends at once."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        # Under torchrun the terminal and the launcher may both send the signal; there, twice means once.
        if self.asked and "WORLD_SIZE" not in os.environ:
            raise KeyboardInterrupt
        self.asked = True


@contextmanager
def interruptible() -> Iterator[Interrupt]:
    """Within it, Ctrl-C and SIGTERM are noted and not obeyed, so that no step is left half-done."""
    interrupt = Interrupt()
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, interrupt) for number in numbers]
    try:
        yield interrupt
    finally:
        for number, handler in zip(numbers, before):
            signal.signal(number, handler)


def crossing(steps: Sequence[int], bits: Sequence[float], goal: float) -> float | None:
    """The step at which a falling curve first meets `goal`, read between two validations on a straight line.

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
