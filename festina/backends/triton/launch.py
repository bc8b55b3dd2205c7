"""Starting kernels: tile sizes, the number of programs, warps; and compiled kernels, kept."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from triton import knobs
from triton.runtime import driver

from festina.backends.triton.step import Plan

if TYPE_CHECKING:
    from festina.backends.triton.setup import Kernels


def power_of_two(n: int) -> int:
    """The least power of two that is not below `n`."""
    return 1 << (n - 1).bit_length() if n > 1 else 1


def block(width: int) -> int:
    """The width of a tile that holds rows of `width` values: a power of two, at least 16 as `tl.dot` requires."""
    return max(16, power_of_two(width))


def rows_per_program(tile: int, values: int = 512) -> int:
    """The number of rows, each `tile` wide, that make about `values` values; at least 1."""
    return max(1, values // tile)


WARP = 64 if torch.version.hip else 32
"""Threads of a warp."""


def warps_for(values: int) -> int:
    """Warps for a tile of `values` values, four to a thread.

    At most 8: more would leave each thread fewer registers than a backward step has numbers.
    """
    return min(8, max(1, values // (4 * WARP)))


def programs(rows: int, program_rows: int) -> int:
    """Programs needed for `rows` rows, `program_rows` rows each."""
    return -(-rows // program_rows)


class Compiled:
    """A compiled kernel, and how to start it without asking again what its arguments are."""

    __slots__ = ("constants", "function", "kernel", "metadata", "run")

    def __init__(self, kernel: Any, arguments: Sequence[object]) -> None:
        self.kernel = kernel  # without it, Triton may unload the function
        self.run, self.function, self.metadata = kernel.run, kernel.function, kernel.packed_metadata
        self.constants = [value for value in arguments if isinstance(value, Plan)]  # as long as its `id` is a key


Kept = dict[tuple[object, ...], Compiled]
"""Compiled kernels of one layer, dtype and device, by what else they were compiled for."""


LARGEST = 2**31 - 1
"""Beyond it Triton takes a number for 64 bits wide, and compiles another kernel."""


def is_watched() -> bool:
    """A profiler has asked Triton to tell it of every launch."""
    hook = knobs.runtime.launch_enter_hook
    return hook is not None and bool(getattr(hook, "calls", True))


def pattern(values: Sequence[Any]) -> tuple[object, ...]:
    """What a kernel is compiled for, apart from constants: which tensors there are, their dtypes, whether their addresses
    are multiples of 16, and on AMD whether 31 bits reach all of their bytes. A number counts by its type: a rate is known at
    run time only."""
    found: list[object] = []
    every_address = 0
    for v in values:
        if v is None:
            found.append(None)
        elif v.__class__ is float:
            found.append(float)
        else:
            found.append(v.dtype)
            every_address |= v.data_ptr()
    if every_address % 16:
        found += [isinstance(v, Tensor) and v.data_ptr() % 16 == 0 for v in values]
    if torch.version.hip:
        found += [isinstance(v, Tensor) and v.untyped_storage().nbytes() <= LARGEST for v in values]
    return tuple(found)


class Launch:
    """A kernel, ready to be started: with the arguments that stay, after those that move from one start to the next.

    The first start goes through Triton, which compiles; later ones go to the compiled kernel, whose launch takes a
    microsecond where Triton's own way takes twenty. The moving arguments are integers, on which no kernel is specialised.

    Args:
        kernels: the layer's, among them those that are compiled.
        kernel: takes the moving arguments first, then tensors, the plan, and other constants.
        grid: programs, along two axes.
        warps: of a program.
        parts: tuples of tensors, or None, or rates; a kernel takes a named tuple as one argument, and what is in others one
            by one.
        plan: the layer's constants; None for a kernel that takes none.
        constants: the others, and parts without a tensor.
        is_cooperative: all programs must run at once.
    """

    __slots__ = ("_arguments", "_compiled", "_grid", "_is_cooperative", "_kept", "_kernel", "_key", "_stream", "_warps")

    def __init__(
        self,
        kernels: Kernels,
        kernel: Any,
        grid: tuple[int, int],
        warps: int,
        parts: Sequence[tuple[Any, ...]],
        plan: Plan | None,
        constants: tuple[Hashable, ...],
        *,
        is_cooperative: bool = False,
    ) -> None:
        self._kept, self._kernel, self._grid, self._warps = kernels.kept, kernel, grid, warps
        arguments: list[Any] = []
        for part in parts:
            if part.__class__ is tuple:
                arguments += part
            else:
                arguments.append(part)
        self._arguments = (*arguments, *constants) if plan is None else (*arguments, plan, *constants)
        self._is_cooperative = is_cooperative
        self._key = (
            kernel.__name__,
            warps,
            id(plan),
            constants,
            pattern([*chain.from_iterable(parts)]),
        )  # what is kept keeps the plan
        self._compiled = kernels.kept.get(self._key)
        self._stream = 0 if kernels.index is None else driver.active.get_current_stream(kernels.index)

    def __call__(self, *moving: int) -> None:
        compiled = self._compiled
        if compiled is None or max(moving) > LARGEST or is_watched():
            self._start(moving)
            return
        x, y = self._grid
        compiled.run(
            x, y, 1, self._stream, compiled.function, compiled.metadata, None, None, None, *moving, *self._arguments
        )

    def _start(self, moving: tuple[int, ...]) -> None:
        options = {"launch_cooperative_grid": True} if self._is_cooperative else {}
        kernel = self._kernel[self._grid](
            *moving, *self._arguments, num_warps=self._warps, num_stages=1, enable_fp_fusion=True, **options
        )
        if kernel is not None and max(moving) <= LARGEST:  # the interpreter compiles nothing
            self._compiled = self._kept[self._key] = Compiled(kernel, self._arguments)
