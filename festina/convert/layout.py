"""How a foreign tensor is laid out in terms of our parameters: blocks, side by side, stacked or transposed.

A layout is read in both directions: `split` takes a foreign tensor apart into blocks, `join` puts it together from them. Both
are torch operations that autograd follows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Shape = tuple[int, ...]


class Layout(ABC):
    """What a foreign tensor is made of."""

    @abstractmethod
    def blocks(self) -> Iterator[Block]:
        """The blocks, in order."""

    @abstractmethod
    def shape(self, size: Callable[[Block], Shape]) -> Shape:
        """The shape of the foreign tensor, from the shapes of its blocks."""

    @abstractmethod
    def split(self, tensor: Tensor, size: Callable[[Block], Shape]) -> Iterator[tuple[Block, Tensor]]:
        """Each block with its part of a foreign tensor."""

    @abstractmethod
    def join(self, get: Callable[[Block], Tensor]) -> Tensor:
        """The foreign tensor from its blocks."""


@dataclass(frozen=True)
class Block(Layout):
    """One of our parameters, or some of its gates.

    Args:
        name: the parameter, as `LayerSpec.parameter_shapes` names it.
        gates: the gates, a letter each, in the order of the foreign tensor; empty: all of them, in the table's order.
        plus: what the project adds to the tensor before it is used: ours is theirs + plus.
        plus_gates: the gates that `plus` is added to; empty: all.
        fold: another of our parameters with the same effect, which the project has not: 0 when loaded, added in when dumped.
        unused: the project stores this and never reads it. It is not loaded; dumped, it is `plus` everywhere.
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
    """A matrix, transposed: projects that compute x @ W store [in, out]."""

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
    """Layouts one after the other along an axis: 0 for rows, 1 for columns."""

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
    """Layouts of one shape, each a slice of a new first axis."""

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
"""A layout, or the name of a parameter that stands there as it is."""


def layout(part: Described) -> Layout:
    """The layout that is described."""
    return Block(part) if isinstance(part, str) else part


def _all(parts: Sequence[Described]) -> tuple[Layout, ...]:
    return tuple(layout(part) for part in parts)


def rows(*parts: Described) -> Layout:
    """Parts below each other."""
    return Join(0, _all(parts))


def columns(*parts: Described) -> Layout:
    """Parts beside each other."""
    return Join(1, _all(parts))


def stack(*parts: Described) -> Layout:
    """Parts along a new first axis."""
    return Stack(_all(parts))


def flip(part: Described) -> Layout:
    """A part, transposed."""
    return Flip(layout(part))
