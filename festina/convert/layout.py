"""The layout of a foreign tensor in terms of Festina's parameters: blocks, concatenated, stacked or transposed.

A layout works in both directions: `split` divides a foreign tensor into blocks, `join` composes it from them. Both are torch
operations, so autograd works through them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Shape = tuple[int, ...]


class Layout(ABC):
    """The composition of a foreign tensor."""

    @abstractmethod
    def blocks(self) -> Iterator[Block]:
        """The blocks, in order."""

    @abstractmethod
    def shape(self, size: Callable[[Block], Shape]) -> Shape:
        """The shape of the foreign tensor, from the shapes of its blocks."""

    @abstractmethod
    def split(self, tensor: Tensor, size: Callable[[Block], Shape]) -> Iterator[tuple[Block, Tensor]]:
        """Each block with its part of the foreign tensor."""

    @abstractmethod
    def join(self, get: Callable[[Block], Tensor]) -> Tensor:
        """The foreign tensor from its blocks."""


@dataclass(frozen=True)
class Block(Layout):
    """One of Festina's parameters, or some of its gates.

    Args:
        name: the parameter, as in `LayerSpec.parameter_shapes`.
        gates: the gates, one letter each, in the order of the foreign tensor; empty: all gates, in the table's order.
        plus: a constant that the project adds before use: Festina's value is the stored value + plus.
        plus_gates: the gates that `plus` is added to; empty: all.
        fold: another of Festina's parameters with the same effect, which the project lacks: 0 on load, added to this one on
            dump.
        unused: the project stores this block but never reads it. `load` skips it, `dump` fills it with `plus`.
    """

    name: str
    gates: str = ""
    plus: float = 0.0
    plus_gates: str = ""
    fold: str | None = None
    unused: bool = False

    def blocks(self) -> Iterator[Block]:
        yield self

    def shape(self, size: Callable[[Block], Shape]) -> Shape:
        return size(self)

    def split(self, tensor: Tensor, size: Callable[[Block], Shape]) -> Iterator[tuple[Block, Tensor]]:
        yield self, tensor

    def join(self, get: Callable[[Block], Tensor]) -> Tensor:
        return get(self)


@dataclass(frozen=True)
class Flip(Layout):
    """A transposed matrix: projects that compute x @ W store [in, out]."""

    part: Layout

    def blocks(self) -> Iterator[Block]:
        return self.part.blocks()

    def shape(self, size: Callable[[Block], Shape]) -> Shape:
        return self.part.shape(size)[::-1]

    def split(self, tensor: Tensor, size: Callable[[Block], Shape]) -> Iterator[tuple[Block, Tensor]]:
        return self.part.split(tensor.t(), size)

    def join(self, get: Callable[[Block], Tensor]) -> Tensor:
        return self.part.join(get).t()


@dataclass(frozen=True)
class Join(Layout):
    """Layouts concatenated along an axis: 0 for rows, 1 for columns."""

    axis: int
    parts: tuple[Layout, ...]

    def blocks(self) -> Iterator[Block]:
        return (block for part in self.parts for block in part.blocks())

    def shape(self, size: Callable[[Block], Shape]) -> Shape:
        joined, *others = (list(part.shape(size)) for part in self.parts)
        joined[self.axis] += sum(other[self.axis] for other in others)
        return tuple(joined)

    def split(self, tensor: Tensor, size: Callable[[Block], Shape]) -> Iterator[tuple[Block, Tensor]]:
        pieces = tensor.split([part.shape(size)[self.axis] for part in self.parts], self.axis)
        return (found for part, piece in zip(self.parts, pieces) for found in part.split(piece, size))

    def join(self, get: Callable[[Block], Tensor]) -> Tensor:
        return torch.cat([part.join(get) for part in self.parts], self.axis)


@dataclass(frozen=True)
class Stack(Layout):
    """Layouts of one shape, stacked along a new first axis."""

    parts: tuple[Layout, ...]

    def blocks(self) -> Iterator[Block]:
        return (block for part in self.parts for block in part.blocks())

    def shape(self, size: Callable[[Block], Shape]) -> Shape:
        return (len(self.parts), *self.parts[0].shape(size))

    def split(self, tensor: Tensor, size: Callable[[Block], Shape]) -> Iterator[tuple[Block, Tensor]]:
        return (found for part, piece in zip(self.parts, tensor.unbind(0)) for found in part.split(piece, size))

    def join(self, get: Callable[[Block], Tensor]) -> Tensor:
        return torch.stack([part.join(get) for part in self.parts])


Described = str | Layout
"""A layout, or the name of a parameter that is stored unchanged."""


def layout(part: Described) -> Layout:
    """The layout of a description."""
    return Block(part) if isinstance(part, str) else part


def _all(parts: Sequence[Described]) -> tuple[Layout, ...]:
    return tuple(layout(part) for part in parts)


def rows(*parts: Described) -> Layout:
    """Parts concatenated by rows."""
    return Join(0, _all(parts))


def columns(*parts: Described) -> Layout:
    """Parts concatenated by columns."""
    return Join(1, _all(parts))


def stack(*parts: Described) -> Layout:
    """Parts stacked along a new first axis."""
    return Stack(_all(parts))


def flip(part: Described) -> Layout:
    """A transposed part."""
    return Flip(layout(part))
