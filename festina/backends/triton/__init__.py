"""Triton: kernels for any GPU that Triton serves, NVIDIA and AMD. `docs/gpu.md` says what was tested, and how.

Two tiers: for small H, and for IndRNN, the whole recurrence is one launch (`loop_tier.py`); otherwise one launch a step
beside the product that torch computes (`step_tier.py`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec

import torch
from torch import Tensor

from festina.backends.support import missing_kernel
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
        elif case.device != "cuda":
            return f"it needs a CUDA or ROCm device, and the input is on {case.device}"
        from festina.backends.triton import cells  # noqa: PLC0415  triton is optional, and slow to import

        return missing_kernel(case.layer, cells.CELLS)

    def forward(self, call: Call) -> Outputs:
        from festina.backends.triton import recurrence  # noqa: PLC0415  triton is optional

        return recurrence.forward(call, None)

    def forward_train(self, call: Call) -> tuple[Outputs, list[Tensor]]:
        from festina.backends.triton import recurrence  # noqa: PLC0415  triton is optional

        saved = self.saved_like(call)
        return recurrence.forward(call, saved[0] if saved else None), saved

    def saved_like(self, call: Call) -> list[Tensor]:
        """c after every step: all that is kept beyond the output."""
        if call.c_0 is None:
            return []
        D, _, H = call.c_0.shape
        return [call.input.new_empty(D, len(call.input), H, dtype=torch.float32)]

    def backward(
        self,
        call: Call,
        outputs: Outputs,
        saved: Sequence[Tensor],
        d_outputs: Sequence[Tensor | None],
        wanted: Sequence[bool],
    ) -> list[Tensor | None]:
        from festina.backends.triton import recurrence  # noqa: PLC0415  triton is optional

        return recurrence.backward(call, outputs[0], saved[0] if saved else None, d_outputs, wanted)


TRITON = Triton()
