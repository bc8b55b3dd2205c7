"""The reference as a backend: any device, any dtype, any plan."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from festina import reference
from festina.call import Call, Case, Outputs


class Eager:
    """Runs `reference.py`. It saves nothing for backward, which runs the equations again under autograd."""

    name = "eager"

    def can_run(self, case: Case) -> str | None:
        return None

    def forward(self, call: Call) -> Outputs:
        with torch.autocast(call.input.device.type, enabled=False):
            return reference.run(call)

    def forward_train(self, call: Call) -> tuple[Outputs, list[Tensor]]:
        return self.forward(call), []

    def saved_like(self, call: Call) -> list[Tensor]:
        return []

    def backward(
        self,
        call: Call,
        output: Tensor,
        saved: Sequence[Tensor],
        d_outputs: Sequence[Tensor | None],
        wanted: Sequence[bool],
    ) -> list[Tensor | None]:
        with _autograd(), torch.autocast(call.input.device.type, enabled=False):
            leaves = [tensor.detach().requires_grad_(want) for tensor, want in zip(call.tensors(), wanted, strict=True)]
            return gradients(call.with_tensors(leaves), d_outputs, wanted, create_graph=False)


@contextmanager
def _autograd() -> Iterator[None]:
    """Enable autograd even below its dispatch key, where graphs made by AOT dispatch call operators."""
    include, exclude = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    exclude = exclude.remove(torch._C.DispatchKey.AutogradFunctionality).remove(torch._C.DispatchKey.ADInplaceOrView)
    with torch._C._ForceDispatchKeyGuard(include, exclude), torch.enable_grad():
        yield


def gradients(
    call: Call, d_outputs: Sequence[Tensor | None], wanted: Sequence[bool], create_graph: bool
) -> list[Tensor | None]:
    """The wanted gradients of a call, by autograd of the reference; differentiable again under `create_graph`."""
    pairs = [
        (out, d_out)
        for out, d_out in zip(reference.run(call), d_outputs)
        if out is not None and d_out is not None and out.requires_grad
    ]
    inputs = [tensor for tensor, want in zip(call.tensors(), wanted, strict=True) if want]
    if not pairs or not inputs:
        return [torch.zeros_like(tensor) if want else None for tensor, want in zip(call.tensors(), wanted, strict=True)]
    outs, d_outs = zip(*pairs)
    found = iter(
        torch.autograd.grad(outs, inputs, d_outs, create_graph=create_graph, allow_unused=True, materialize_grads=True)
    )
    return [next(found) if want else None for want in wanted]


EAGER = Eager()
