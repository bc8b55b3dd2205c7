"""Text as numbers: its source, the held-out part, and the batches that every model sees."""

from __future__ import annotations

import hashlib
import sysconfig
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from festina.cli import UsageError

HELD_OUT = 0.05
"""The share of the text that is held out from training."""

MOST_CHARACTERS = 1000
"""Largest number of known characters. Others, and those that occur fewer than `RARE` times in training, become `UNKNOWN`."""

RARE = 10
UNKNOWN = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class Corpus:
    """A text, split and encoded.

    Args:
        name: its source.
        sha256: hash of the whole text, to check that two runs read the same text.
        characters: the vocabulary; character k has number k, and `UNKNOWN` has number 0.
        train: numbers of the training text, `[N]` int64.
        validation: numbers of the held-out text.
        prompt: the start of the generated sample.
    """

    name: str
    sha256: str
    characters: str
    train: Tensor
    validation: Tensor
    prompt: str

    @classmethod
    def of(cls, name: str, train: str, validation: str, prompt: str) -> Corpus:
        """Encode two texts in the vocabulary of the first."""
        common = [c for c, count in Counter(train).most_common(MOST_CHARACTERS) if count >= RARE and c != UNKNOWN]
        if not common:
            raise UsageError(f"the text is too short: no character occurs {RARE} times in it; give a longer one")
        characters = UNKNOWN + "".join(sorted(common))
        return cls(
            name=name,
            sha256=hashlib.sha256((train + validation).encode()).hexdigest(),
            characters=characters,
            train=encode(train, characters),
            validation=encode(validation, characters),
            prompt=prompt,
        )

    def conditions(self) -> dict[str, object]:
        """The facts about the text that belong to every figure."""
        return {
            "name": self.name,
            "sha256": self.sha256,
            "vocabulary": len(self.characters),
            "training_characters": len(self.train),
            "validation_characters": len(self.validation),
        }


def encode(text: str, characters: str) -> Tensor:
    """The number of every character of a text.

    >>> encode("abxa", UNKNOWN + "ab")
    tensor([1, 2, 0, 1])
    """
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    number = np.zeros(0x110000, np.int64)
    number[[ord(c) for c in characters]] = np.arange(len(characters))
    return torch.from_numpy(number[codes])


def standard_library() -> Corpus:
    """The source of Python's standard library: its top-level modules, a few whole modules held out.

    Modules are ordered by a hash of their names: mixed, and the same on every machine with the same Python.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    files = sorted(folder.glob("*.py"), key=lambda path: hashlib.sha256(path.name.encode()).digest())
    if not files:
        raise UsageError(f"{folder} must hold the standard library's source, but has no .py file; give --text FILE")
    texts = [path.read_text("utf-8", errors="replace") for path in files]
    total, held, count = sum(map(len, texts)), 0, 0
    while held < HELD_OUT * total:
        held += len(texts[count])
        count += 1
    name = f"{len(files)} modules of the standard library of Python {sysconfig.get_python_version()}"
    return Corpus.of(name, train="".join(texts[count:]), validation="".join(texts[:count]), prompt="\ndef ")


def from_file(path: Path) -> Corpus:
    """A UTF-8 text file; its end is held out, and the sample begins with the first held-out line."""
    try:
        text = path.read_text("utf-8")
    except OSError as error:
        raise UsageError(f"--text {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"--text {path} must be text in UTF-8, but byte {error.start} is not") from None
    cut = len(text) - int(HELD_OUT * len(text))
    return Corpus.of(path.name, text[:cut], text[cut:], prompt=text[cut:].lstrip().partition("\n")[0][:40])


class Windows:
    """A text as `rows` parallel streams, cut into consecutive windows of `length` steps.

    Window k is a pair of inputs and targets `[length, rows]`, the targets one character ahead. Each row continues in the
    next window, so the state can be carried over; at window 0 every stream begins. The streams are spread over the whole
    text; about `most` characters of them are read in all.
    """

    def __init__(self, numbers: Tensor, rows: int, length: int, most: int | None = None) -> None:
        steps = (len(numbers) - 1) // rows
        self.length, self.count = length, steps // length
        if most is not None:
            self.count = min(self.count, max(1, most // (rows * length)))
        if self.count == 0:
            raise UsageError(
                f"the text is too short: {rows} rows of {length} steps (--batch, --length) need {rows * length + 1} "
                f"characters in the training part and in the held-out part, but one of them has {len(numbers)}; "
                "give a longer text or lower --batch or --length"
            )
        self.inputs = numbers[: rows * steps].view(rows, steps).t()
        self.targets = numbers[1 : rows * steps + 1].view(rows, steps).t()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, k: int) -> tuple[Tensor, Tensor]:
        here = slice(k * self.length, (k + 1) * self.length)
        return self.inputs[here], self.targets[here]
