"""`freeze`: copies of layers and cells for inference alone, whose weights are laid out once and may be rounded."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _is_any_autocast_enabled
from torch.fx import Proxy
from torch.nn.utils.rnn import PackedSequence

from festina import backends, dispatch, ops
from festina.backends.cpu import CPU, abi, new_outputs
from festina.backends.cpu.frozen import PANEL_TYPES, FrozenPanels
from festina.call import Call, Case, Outputs
from festina.cells import Cell, take_step
from festina.checks import Lengths, check_call
from festina.layers import Recurrent, run_stack
from festina.module import RecurrentBase, leaf
from festina.sequences import InitialState, Packing
from festina.swap import replace

WEIGHTS = ("float32", *PANEL_TYPES)
MOST = 127
"""The largest magnitude of an int8 weight."""
SCALE = "_scale"
"""Behind the name of an int8 weight: the name of its scales."""


class Frozen(RecurrentBase):
    """A layer or cell for inference alone; `freeze` makes it.

    The weights are buffers under the names that the parameters had, so that a state dict has them. Rounded ones are kept as
    they are: bfloat16, or int8 `[G·H, K]` with `<name>_scale` `[G·H]`, the float32 factor of each row. Biases, gains, shifts
    and a vector of recurrent weights stay as they were.

    Args:
        module: what is frozen.
        weights: the type of the matrices, None for that of the module.

    Raises:
        ValueError: `weights` does not fit the module, or no kernel serves it.
    """

    _options: tuple[str, ...] = (
        "input_size",
        "hidden_size",
        "proj_size",
        "bias",
        "cell_spec",
        "spec",
        "zoneout",
        "zoneout_cell",
    )

    def __init__(self, module: RecurrentBase, weights: str | None) -> None:
        nn.Module.__init__(self)
        for name in self._options:
            setattr(self, name, getattr(module, name))
        self.weights = weights
        self._names = [list(names) for names in module._names]
        self._description = f"{type(module).__name__}({module.extra_repr()})"
        self._panels: list[FrozenPanels] | None = None
        for index, names in enumerate(self._names):
            for name, parameter in zip(names, module.layer_parameters(index), strict=True):
                value = parameter.detach()
                if weights == "int8" and value.dim() == 2:
                    value, scale = rounded_to_int8(name, value)
                    self.register_buffer(name + SCALE, scale)
                elif weights == "bfloat16" and value.dim() == 2:
                    value = value.to(torch.bfloat16)
                else:
                    value = value.clone(memory_format=torch.contiguous_format)
                self.register_buffer(name, value)
        first = module.layer_parameters()[0]
        self._like = torch.empty(0, dtype=first.dtype)
        """Of the dtype and on the device of inputs and states."""
        self._lay_out()
        self.eval()

    def reset_parameters(self) -> None:
        raise RuntimeError(f"{self._what()} has fixed weights; call reset_parameters of the module it was made from")

    def _what(self) -> str:
        return f"a frozen {self._description.partition('(')[0]}"

    def layer_parameters(self, layer: int = 0) -> list[Tensor]:
        """As of any layer, in the type of its input: rounded weights are as large as those that they were made from."""
        return [self._value(name) for name in self._names[layer]]

    def _value(self, name: str) -> Tensor:
        value: Tensor = getattr(self, name)
        if value.dtype == torch.int8:
            scale: Tensor = getattr(self, name + SCALE)
            return value * scale.unsqueeze(1)
        return value.to(self._like.dtype)

    def _lay_out(self) -> list[FrozenPanels]:
        """The panels of every layer, from the buffers."""
        for name, value in self.named_buffers():
            if value.dtype == torch.int8 and value.numel():
                most = value.to(torch.int16).abs().amax(1)
                if not bool(((most == MOST) | (most == 0)).all()):
                    raise ValueError(
                        f"every row of {name} must reach {MOST} or -{MOST} or be zero, as freeze leaves them"
                    )
        panel_type = self.weights if self.weights in PANEL_TYPES else abi.WHOLE
        self._panels = [FrozenPanels(self.spec, self.layer_parameters(i), panel_type) for i in range(len(self._names))]
        return self._panels

    def _run(self, index: int, call: Call) -> Outputs:
        """Carry out the call of layer `index`, whose parameters it lacks. Nothing but the panels is read, unless PyTorch traces
        or watches the call, or it is to run on another backend: then the weights come as tensors, through the one door."""
        given = [call.input, *call.state]
        self._check_inference(given)
        if self._is_short(given):
            call.parameters = self._shapes(index)
            check_call(call, given)
            outputs = new_outputs(call)
            (self._panels or self._lay_out())[index].forward(call, outputs)
            return outputs
        call.parameters = tuple(self.layer_parameters(index))
        return dispatch.run(call)

    def _is_short(self, given: Sequence[Tensor]) -> bool:
        return not (
            ops.is_watched(given)
            or ops.is_lazy(given)
            or _is_any_autocast_enabled()
            or backends.forced() not in ("", CPU.name)
        )

    def _check_inference(self, given: Sequence[Tensor]) -> None:
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given):
            raise RuntimeError(
                f"{self._what()} has no gradients, but its input or state requires one: call it under torch.no_grad(); to "
                "train, use the module that it was made from and freeze that again"
            )

    def _shapes(self, index: int) -> tuple[Tensor, ...]:
        """Tensors of the parameters' shapes."""
        return tuple(getattr(self, name) for name in self._names[index])

    def train(self, mode: bool = True) -> Any:
        """Inference is its only mode.

        Raises:
            RuntimeError: `mode` is True.
        """
        if mode:
            raise RuntimeError(
                f"{self._what()} is for inference alone: train the module that it was made from, and freeze that again"
            )
        return super().train(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        if fn(self._like) is not self._like:
            raise RuntimeError(
                f"{self._what()} keeps its dtype, {self._like.dtype}, and runs on the CPU, which its weights are laid out for: "
                "move or cast the module that it was made from, and freeze that again"
            )
        for buffer in self.buffers():
            fn(buffer)  # `share_memory` works in place
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Without panels: their order belongs to one version of the core."""
        return {**self.__dict__, "_panels": None}

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Load what a module frozen in the same way has saved; else nothing of this one changes."""
        for name, value in self.named_buffers():
            saved = state_dict.get(prefix + name)
            if isinstance(saved, Tensor) and saved.dtype != value.dtype:
                error_msgs.append(
                    f"{prefix}{name} must be {value.dtype}, as a module with weights={self.weights!r} has saved it, got "
                    f"{saved.dtype}; load the checkpoint into the module that this one was made from, and freeze that again"
                )
                return
            if value.dtype == torch.int8 and (saved is None) != (prefix + name + SCALE not in state_dict):
                error_msgs.append(f"{prefix}{name} and {prefix}{name}{SCALE} must be loaded together, got one of them")
                return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self._panels = None

    def extra_repr(self) -> str:
        return self._description + (f", weights={self.weights!r}" if self.weights else "")


class FrozenLayer(Frozen):
    """A `festina.layers.Recurrent` for inference alone: `forward` has its arguments and gives its results."""

    _options = (*Frozen._options, "num_layers", "batch_first", "bidirectional")
    num_layers: int
    batch_first: bool
    bidirectional: bool

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: InitialState | None = None,
        *,
        lengths: Lengths | None = None,
        resets: Tensor | None = None,
    ) -> tuple[Any, Any]:
        """Run over a sequence, as `festina.layers.Recurrent.forward` does.

        Raises:
            RuntimeError: a gradient is asked for.
            TypeError, ValueError: as there.
        """
        if isinstance(input, Proxy):
            return leaf(self, input, hx, lengths=lengths, resets=resets)

        def run(index: int, steps: Tensor, state: list[Tensor], packing: Packing) -> Outputs:
            return self._run(index, self._packed_call([], steps, state, packing))

        return run_stack(self, input, hx, lengths, resets, like=self._like, run=run)


class FrozenCell(Frozen):
    """A `festina.cells.Cell` for inference alone: `forward` has its arguments and gives its results."""

    def forward(self, input: Tensor, hx: Any = None, *, resets: Tensor | None = None) -> Any:
        """Take one step, as `festina.cells.Cell.forward` does.

        Raises:
            RuntimeError: a gradient is asked for.
            TypeError, ValueError: as there.
        """
        if not isinstance(input, Tensor):
            if isinstance(input, Proxy):
                return leaf(self, input, hx, resets=resets)
            raise TypeError(f"input must be a Tensor, got {type(input).__name__}")
        state = hx if isinstance(hx, tuple) and len(hx) > 1 else (hx,)
        given = (input, *state)
        if resets is None and self._is_short(given) and self._panels:
            self._check_inference(given)
            new = self._panels[0].step(input, state, (self.zoneout, self.zoneout_cell))
            if new is not None:
                return tuple(new) if len(new) > 1 else new[0]

        def run(steps: Tensor, state: list[Tensor], resets: Tensor | None) -> Outputs:
            return self._run(0, self._call([], steps, state, resets=resets))

        return take_step(self, input, hx, resets, like=self._like, run=run)


def rounded_to_int8(name: str, weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 `[rows, columns]` and float32 `[rows]`, whose products are the weight, rounded; a row of zeros has the factor 0.

    Raises:
        ValueError: a weight is not finite.
    """
    if not bool(weight.isfinite().all()):
        raise ValueError(f"{name} must be finite to be rounded to int8, got NaN or infinity")
    scale = weight.abs().amax(1) / MOST if weight.shape[1] else weight.new_zeros(len(weight))
    steps = torch.where(scale.unsqueeze(1) > 0, weight / scale.unsqueeze(1), 0.0)
    return steps.round().clamp(-MOST, MOST).to(torch.int8), scale


def freeze(module: nn.Module, weights: str | None = None) -> nn.Module:
    """A copy of a layer, a cell or a model for inference alone, on the CPU: the counterpart of torch's `quantize_dynamic`.

    In the copy every recurrent module that Festina has, torch.nn's too, is frozen: its weights are laid out for the kernels
    once and never looked at again, and there are no parameters, gradients and random masks. `module` itself stays as it is.
    Calls and results are those of the module in evaluation; hooks of a frozen module are not copied.

    Args:
        module: the layer, cell or model.
        weights: what weight matrices are rounded to. None and, for a float32 module, "float32" leave them as they are: the
            results are the module's bit for bit. "bfloat16" and "int8" (symmetric, a scale for each row) need a half and a
            quarter of the memory, for float32 modules; input, state, products, norms and biases stay float32, and the results
            are those of the rounded weights. `docs/performance.md` has the errors.

    Raises:
        TypeError: `module` is no module.
        ValueError: there is nothing to freeze in it; `weights` is unknown, or rounded and the module not float32; the module is
            not on the CPU, or no kernel serves it (`festina.backends.explain`).

    >>> import festina
    >>> freeze(festina.LSTM(3, 5), weights="int8")
    FrozenLayer(LSTM(3, 5), weights='int8')
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    if weights is not None and weights not in WEIGHTS:
        raise ValueError(f"weights must be None or one of {', '.join(map(repr, WEIGHTS))}, got {weights!r}")
    if isinstance(module, RecurrentBase):
        if why := _why_not(module):
            raise ValueError(f"{type(module).__name__} cannot be frozen: {why}")
        return _frozen(type(module).__name__, module, weights)
    copied = copy.deepcopy(module)
    kept = replace(copied).kept
    found = {name: part for name, part in copied.named_modules() if isinstance(part, RecurrentBase)}
    kept = {name: why for name, why in kept.items() if name not in found}
    kept |= {name: why for name, part in found.items() if (why := _why_not(part))}
    made = {
        id(part): _frozen(name or type(part).__name__, part, weights)
        for name, part in found.items()
        if name not in kept
    }
    if not made:
        reasons = "; ".join(f"{name}: {why}" for name, why in kept.items()) or "there is no recurrent module in it"
        raise ValueError(f"there is nothing to freeze in {type(module).__name__}: {reasons}")
    for name, why in kept.items():
        warnings.warn(f"{name} is not frozen: {why}", stacklevel=2)
    for parent in list(copied.modules()):
        for key, child in parent._modules.items():
            if id(child) in made:
                parent._modules[key] = made[id(child)]
    return (made.get(id(copied)) or copied).eval()


def _why_not(module: RecurrentBase) -> str | None:
    """Why a module is not frozen, as a phrase; None if it is."""
    if isinstance(module, Frozen):
        return "it is frozen already"
    if type(module).forward not in (Recurrent.forward, Cell.forward):
        return f"the forward of {type(module).__name__} is its own, and would be lost"
    return None


def _frozen(name: str, module: RecurrentBase, weights: str | None) -> Frozen:
    """The frozen module of one.

    Raises:
        ValueError: it cannot be had.
    """
    if any(nn.parameter.is_lazy(parameter) for parameter in module.parameters()):
        raise ValueError(f"{name} has no weights yet; call it once before it is frozen")
    first = module.layer_parameters()[0]
    if weights is not None and first.dtype != torch.float32:
        raise ValueError(
            f"weights must be None for a module of {first.dtype}, as {name}, got {weights!r}; call .float() on it before"
        )
    if not module.hidden_size:
        raise ValueError(f"{name} cannot be frozen: it has no units")
    if reason := CPU.can_run(Case(module.spec, first.dtype, first.device)):
        raise ValueError(
            f"{name} cannot be frozen for the cpu backend: {reason.replace('the input is', 'its weights are')}"
        )
    return (FrozenLayer if isinstance(module, Recurrent) else FrozenCell)(module, weights)
