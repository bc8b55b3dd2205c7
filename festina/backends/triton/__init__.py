"""Triton: kernels for NVIDIA GPUs, and AMD's on request. `docs/gpu.md` says what was tested, and how.

kernels, from the inside     cells, norm, step: one step, told once; team, product: what programs do together, and products
launches                     one_launch, step_tier: many steps in one launch, or a launch a step
the host                     recurrence: both passes; direction, runs: one direction, and its steps; tiers: which tier;
                             setup, launch, device: what is made once and kept
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from festina.backends.support import missing_kernel
from festina.backends.triton.device import device_of
from festina.call import Call, Case, Outputs

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def is_interpreting() -> bool:
    """True if kernels run in Triton's interpreter, on CPU tensors: how they are tested without a GPU."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


class Triton:
    """Runs the kernels of this package; Triton is imported when the first one is needed."""

    name = "triton"

    def can_run(self, case: Case) -> str | None:
        if find_spec("triton") is None:
            return "triton is not installed; pip install 'festina[triton]'"
        if case.dtype not in DTYPES:
            return f"it serves {', '.join(str(dtype).removeprefix('torch.') for dtype in DTYPES)}, not {case.dtype}"
        if is_interpreting():
            if case.dtype == torch.bfloat16:
                return "Triton's interpreter rounds bfloat16 wrongly"
        elif case.device.type != "cuda":
            return f"it needs a CUDA or ROCm device, and the input is on {case.device.type}"
        else:
            gpu = device_of(case.device)
            least = 80 if case.dtype == torch.bfloat16 else 75
            if gpu.backend == "cuda" and gpu.capability < least:
                return (
                    f"{case.dtype} needs compute capability {least / 10}, and {case.device} has {gpu.capability / 10}"
                )
        return missing_kernel(case.layer, _module("cells").CELLS)

    def way(self, case: Case, H: int, P: int, B: int, sizes: tuple[int, ...] | int) -> str:
        """The tier that takes the steps of a call, and why; see `backends.Describer`."""
        tier = _module("setup").made(case.layer, case.dtype, case.device, H, P, B, sizes).tier
        return f"{tier.name}, {tier.why}"

    def forward(self, call: Call) -> Outputs:
        outputs: Outputs = _module("recurrence").forward(call)
        return outputs

    def forward_train(self, call: Call) -> tuple[Outputs, list[Tensor]]:
        saved = self.saved_like(call)
        return _module("recurrence").forward(call, *_c_and_statistics(call, saved)), saved

    def saved_like(self, call: Call) -> list[Tensor]:
        """c after every step, and room for the statistics of every norm, which a team keeps."""
        D, N, empty = call.layer.directions, call.input.shape[0], call.input.new_empty
        saved = [] if call.c_0 is None else [empty((D, N, call.c_0.shape[2]), dtype=torch.float32)]
        statistics = _module("setup").statistics_kept(call)
        if statistics:
            saved.append(empty((D, N, 2 * statistics), dtype=torch.float32))
        return saved

    def backward(
        self,
        call: Call,
        output: Tensor,
        saved: Sequence[Tensor],
        d_outputs: Sequence[Tensor | None],
        wanted: Sequence[bool],
    ) -> list[Tensor | None]:
        kept = _c_and_statistics(call, saved)
        gradients: list[Tensor | None] = _module("recurrence").backward(call, output, *kept, d_outputs, wanted)
        return gradients


@cache
def _module(name: str) -> ModuleType:
    """A module of this package, which imports Triton: it is optional, and slow to import.

    Kept, as an import statement in a function takes a microsecond each time.
    """
    return import_module(f"{__name__}.{name}")


def _c_and_statistics(call: Call, saved: Sequence[Tensor]) -> tuple[Tensor | None, Tensor | None]:
    """What `saved_like` lists: c, and the statistics; None for what it leaves out."""
    has_c = call.c_0 is not None
    return saved[0] if has_c else None, saved[has_c] if len(saved) > has_c else None


TRITON = Triton()
