"""The backends: an ordered list, one choice per call, a reason for every refusal.

`explain` tells the choice; `use` or the environment variable `FESTINA_BACKEND` forces one. A forced backend never falls
back in silence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, lru_cache
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from festina import environment
from festina.backends.cpu import CPU
from festina.backends.eager import EAGER
from festina.backends.support import BackendError as BackendError
from festina.backends.triton import TRITON
from festina.call import Call, Case, Outputs, Step, float32_becomes
from festina.spec import LayerSpec


class Backend(Protocol):
    """One way to carry out a `Call`; `festina/backends/eager.py` is the plainest example."""

    name: str

    def can_run(self, case: Case) -> str | None:
        """None, or the reason why not, as a phrase.

        Raises:
            BackendError: the environment asks for what this backend cannot give, so that no other may take the case.
        """

    def forward(self, call: Call) -> Outputs:
        """The outputs, in inference: nothing is saved."""

    def forward_train(self, call: Call) -> tuple[Outputs, list[Tensor]]:
        """The same outputs, and the tensors that `backward` needs besides the call and `output`."""

    def saved_like(self, call: Call) -> list[Tensor]:
        """Tensors of the shapes and dtypes that `forward_train` saves, for shape propagation; their values do not matter."""

    def backward(
        self,
        call: Call,
        output: Tensor,
        saved: Sequence[Tensor],
        d_outputs: Sequence[Tensor | None],
        wanted: Sequence[bool],
    ) -> list[Tensor | None]:
        """Gradients of input, h_0, c_0 (if the cell has a c) and every parameter, those that are `wanted`.

        `d_outputs` belong to output, h_n, c_n; None means zero. `output`, `saved` and the call are read, never written. Of
        `output` only what a later step started from is read: nothing if there is one step.
        """


class Stepper(Backend, Protocol):
    """A backend with a shorter way for one step of a cell, where checks would cost more than the kernel."""

    def step(
        self,
        *,
        layer: LayerSpec,
        parameters: Sequence[Tensor],
        input: Tensor,
        state: Sequence[Tensor],
        rates: tuple[float, float],
        is_training: bool,
        lead: tuple[int, ...] = (),
    ) -> Step | None:
        """The new states, or None, with nothing done, if this way does not serve the step.

        Args:
            layer, parameters: of the cell, one direction.
            input, state: `[B, I]`; `[B, P]` and, if the cell has a c, `[B, H]`. They are as the user gave them, unchecked.
            rates: of Zoneout on h and on c, by the expectation.
            is_training: what `backward` needs is saved, as by `forward_train`.
            lead: axes of the states before B, in and out: (1,) where they have that of the directions.
        """


class HasSpec(Protocol):
    """A layer or a cell."""

    spec: LayerSpec
    hidden_size: int
    output_size: int


class Describer(Backend, Protocol):
    """A backend that carries calls out in more than one way, and can say which one a call takes."""

    def way(self, case: Case, H: int, P: int, B: int, sizes: tuple[int, ...] | int) -> str:
        """How a call runs, and why, as a phrase; `sizes` are the rows of each step, or T if all have B rows."""


ON_REQUEST: dict[str, str] = (
    {"triton": "its kernels have not run on a ROCm device yet; backends.use('triton') asks for it"}
    if torch.version.hip
    else {}
)
"""Backends that run only where they are forced, each with the reason."""

_LISTED: tuple[Backend, ...] = (TRITON, CPU, EAGER)
_REGISTRY = {backend.name: backend for backend in _LISTED}

_forced = environment.BACKEND.choice()


def registry() -> dict[str, Backend]:
    """Every backend by name, best first. A new one is a name in `_LISTED`."""
    return _REGISTRY


@cache
def steppers(force: str = "") -> tuple[Stepper, ...]:
    """The backends that are `Stepper`s, best first; or `force` alone, if it is one."""
    asked = [backend for backend in registry().values() if force in ("", backend.name)]
    return tuple(backend for backend in asked if hasattr(backend, "step"))  # type: ignore[misc]


def names() -> tuple[str, ...]:
    """The names of the backends, best first."""
    return tuple(registry())


def get(name: str) -> Backend:
    """The backend called `name`.

    Raises:
        BackendError: there is none of that name.
    """
    try:
        return registry()[name]
    except KeyError:
        raise BackendError(f"there is no backend {name!r}; there are {', '.join(names())}") from None


def isa(name: str) -> str | None:
    """The instruction set that a backend's kernels use; None for a backend without such kernels."""
    of: Callable[[], str | None] | None = getattr(get(name), "isa", None)
    return of() if of else None


def reasons(case: Case, force: str = "") -> list[tuple[str, str | None]]:
    """Each backend, best first, with None or the reason why it is not taken for the case; the first None wins.

    A choice that the environment forces on a backend, and that cannot be had, is the reason of those after it too.

    Raises:
        BackendError: `force` is unknown.
    """
    if force:
        get(force)
    found: list[tuple[str, str | None]] = []
    unmet = None
    for name, backend in registry().items():
        if force not in ("", name):
            reason: str | None = f"{force} was asked for"
        elif unmet is not None:
            reason = unmet
        else:
            try:
                reason = backend.can_run(case) or (None if force else ON_REQUEST.get(name))
            except BackendError as error:
                reason = unmet = str(error)
        found.append((name, reason))
    return found


@lru_cache(maxsize=4096)
def select(case: Case, force: str = "") -> str:
    """The name of the backend that runs the case: the first that can, or `force` if it can.

    Raises:
        BackendError: `force` is unknown or cannot run the case, or the environment asks for what cannot be had.
    """
    found = reasons(case, force)
    if force and (reason := dict(found)[force]) is not None:
        raise BackendError(f"backend {force!r} was asked for but cannot run this case: {reason}")
    for name, reason in found:
        if reason is None:
            return name
    raise BackendError(found[-1][1])  # the last one runs every case, so that only a forced choice stands in its way


@lru_cache(maxsize=4096)
def _chosen(layer: LayerSpec, dtype: torch.dtype, device: torch.device, force: str) -> Backend:
    return get(select(Case(layer, dtype, device), force))


def choose(call: Call, force: str = "") -> Backend:
    """The backend that carries out a call: the best that can, or `force` if it can.

    Without units (H = 0, which `torch.nn`'s cells allow) there is nothing for a kernel to do, and the reference serves all.

    Raises:
        BackendError: `force` is unknown or cannot run the call.
    """
    if 0 in call.h_0.shape[2:]:
        return EAGER
    return _chosen(call.layer, call.input.dtype, call.input.device, force)


def forced() -> str:
    """The backend that `use` or `FESTINA_BACKEND` forces, or "" where the best one that can run a case is taken.

    Raises:
        BackendError: `FESTINA_BACKEND` names no backend.
    """
    if _forced and _forced not in _REGISTRY:
        raise BackendError(
            f"{environment.BACKEND.name} is {_forced!r}, but there are {', '.join(_REGISTRY)}; name one or unset it"
        )
    return _forced


@contextmanager
def use(name: str) -> Iterator[None]:
    """Force one backend inside a `with` block, in the whole process, as `torch.backends.cudnn.flags` does.

    The backward pass uses the backend that its forward pass used.

    Raises:
        BackendError: there is no such backend; or, at the call of a layer, it cannot run that case.

    >>> with use("eager"):
    ...     pass
    """
    global _forced
    get(name)
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def explain(layer: HasSpec, input: Tensor | PackedSequence) -> list[tuple[str, str | None]]:
    """Each backend with None if it runs `layer` on `input`, else with the reason why not; the first None is chosen.

    The one that is chosen may say more of itself behind its name: `("triton: team of 8, ...", None)`. The answer holds
    where this is called: inside `use`, under `FESTINA_BACKEND`, under autocast. A forced backend that cannot run the case,
    or a variable that asks for what cannot be had (docs/environment.md), leaves no None, and the layer raises.

    Raises:
        TypeError: `layer` is none of Festina's layers and cells.
        BackendError: `FESTINA_BACKEND` names no backend.

    >>> import festina, torch
    >>> explain(festina.LayerNormLSTM(3, 4), torch.zeros(5, 2, 3))[-1]
    ('eager', None)
    """
    spec = getattr(layer, "spec", None)
    if not isinstance(spec, LayerSpec):
        raise TypeError(f"layer must be one of Festina's layers or cells, got {type(layer).__name__}")
    tensor = input.data if isinstance(input, PackedSequence) else input
    dtype = float32_becomes(tensor.device.type) if tensor.dtype == torch.float32 else tensor.dtype
    case = Case(spec, dtype, tensor.device)
    found = reasons(case, forced())
    chosen = next((name for name, reason in found if reason is None), None)
    way: Callable[..., str] | None = getattr(get(chosen), "way", None) if chosen else None
    if way is None:
        return found
    told = way(case, layer.hidden_size, layer.output_size, *_rows(layer, input))
    return [(f"{name}: {told}" if name == chosen else name, reason) for name, reason in found]


def _rows(layer: HasSpec, input: Tensor | PackedSequence) -> tuple[int, tuple[int, ...] | int]:
    """The batch size of a layer's or cell's input, and the rows of each step, or T if all have as many."""
    if isinstance(input, PackedSequence):
        sizes = tuple(input.batch_sizes.tolist())
        return max(sizes, default=0), sizes
    is_batch_first = getattr(layer, "batch_first", None)
    if is_batch_first is None:  # a cell
        return (input.shape[0] if input.dim() == 2 else 1), 1
    if input.dim() == 2:
        return 1, input.shape[0]
    return input.shape[0 if is_batch_first else 1], input.shape[1 if is_batch_first else 0]
