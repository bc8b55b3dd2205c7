"""The base of layers and cells: options, parameters and their initialisation, the plan in the checkpoint."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy, Tracer

from festina import norms
from festina.backends import export
from festina.call import OWNERS, Call
from festina.checks import (
    as_count,
    as_rate,
    check_dtype,
    check_forget_bias,
    check_proj_size,
    check_zoneout_cell,
)
from festina.norms import NormPlan
from festina.sequences import Packing
from festina.spec import CellSpec, LayerSpec
from festina.tooling import Tooling

# Under this name of torch's a module saves more than tensors; here, its norm plan.
PLAN_KEY = "_extra_state"

PLAN_BYTES = 256
"""A saved plan is padded to a multiple of this, so that plans can be averaged, or loaded into one another's place, and the
error is that of `saved_plan`; the text itself has some 200 bytes."""

MOST_PLAN_BYTES = 4096
"""The longest plan that is read."""


class RecurrentBase(Tooling, nn.Module):
    """A module with the parameters of one recurrent cell for each layer and direction.

    Subclasses name their cell, and the default plan and forget bias. They inherit from `torch.nn`'s class of their name too,
    so that `isinstance` tells what they are, but use nothing of it. The last thing that their `__init__` does is to call
    `reset_parameters`, as in `torch.nn`: a subclass that has its own finds every option in place.

    Args:
        spec: the layer that every one of the stack is.
        suffixes: layer by layer, the suffix of each direction's parameter names.
        Others as in `festina.layers.Recurrent`.
    """

    cell_spec: CellSpec
    default_norm: ClassVar[NormPlan] = norms.NONE
    default_forget_bias: ClassVar[float] = 0.0
    least_size: ClassVar[int] = 1
    """Of input_size and hidden_size."""

    def __init__(
        self,
        *,
        input_size: int,
        hidden_size: int,
        proj_size: int,
        spec: LayerSpec,
        suffixes: list[list[str]],
        zoneout: float,
        zoneout_cell: float,
        dropconnect: float,
        forget_bias: float | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        nn.Module.__init__(self)
        input_size = as_count("input_size", input_size, self.least_size)
        hidden_size = as_count("hidden_size", hidden_size, self.least_size)
        proj_size = as_count("proj_size", proj_size, 0)
        check_proj_size(spec.cell, proj_size, hidden_size)
        check_dtype(dtype)
        check_forget_bias(spec.cell, forget_bias)
        warn_of_one_feature(spec, input_size, stacklevel=4)
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.proj_size = proj_size
        self.bias = spec.bias
        self.spec = spec
        self.zoneout = as_rate("zoneout", zoneout)
        self.zoneout_cell = as_rate("zoneout_cell", zoneout_cell)
        check_zoneout_cell(spec.cell, self.zoneout_cell)
        self.dropconnect = as_rate("dropconnect", dropconnect)
        self.forget_bias = self.default_forget_bias if forget_bias is None else float(forget_bias)
        self._names: list[list[str]] = []
        inputs = input_size
        for per_direction in suffixes:
            shapes = spec.parameter_shapes(inputs, hidden_size, self.output_size)
            for suffix in per_direction:
                for name, shape in shapes.items():
                    parameter = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
                    self.register_parameter(name + suffix, parameter)
            self._names.append([name + suffix for suffix in per_direction for name in shapes])
            inputs = self.output_size * len(per_direction)

    @property
    def output_size(self) -> int:
        """The width of h: proj_size, or hidden_size without a projection."""
        return self.proj_size or self.hidden_size

    @property
    def state_widths(self) -> tuple[int, int]:
        """(P, H), the widths of h and c."""
        return self.proj_size or self.hidden_size, self.hidden_size

    @property
    def norm(self) -> NormPlan:
        """Where the norms sit."""
        return self.spec.plan

    def reset_parameters(self) -> None:
        """Weights and plain biases as in `torch.nn.LSTM` and `GRU`: uniform in ±1/sqrt(hidden_size), drawn in the same order,
        so that the same seed gives the same values. Gains are 1 and the shifts of norms 0, as in `torch.nn.LayerNorm`.
        `forget_bias` is added to the forget gate's shift (Gers et al. 2000; 1 in haste) if the layer has biases.
        """
        bound = 1.0 / math.sqrt(max(self.hidden_size, 1))
        H, spec = self.hidden_size, self.spec
        for names in self._names:
            for full, name in zip(names, spec.parameter_names * spec.directions, strict=True):
                parameter = getattr(self, full)
                if name.startswith("gain"):
                    nn.init.ones_(parameter)
                else:
                    nn.init.uniform_(parameter, -bound, bound)
                if name in spec.norm_shifts:
                    nn.init.zeros_(parameter)
                if name == spec.shift and self.forget_bias:
                    with torch.no_grad():
                        parameter[spec.cell.rows("f", H)] += self.forget_bias

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        super().register_parameter(name, param)
        if param is not None:
            OWNERS[id(param)] = self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        OWNERS.update((id(parameter), self) for parameter in self.parameters(recurse=False))

    def layer_parameters(self, layer: int = 0) -> list[Tensor]:
        """The parameters of one layer in the order of a `Call`: direction by direction, each as `spec.parameter_names`."""
        try:
            return [*map(self._parameters.__getitem__, self._names[layer])]  # type: ignore[list-item]
        except KeyError:  # a parametrization or torch.nn.utils.weight_norm computes one of them
            return [getattr(self, name) for name in self._names[layer]]

    def _call(
        self,
        parameters: list[Tensor],
        steps: Tensor,
        state: Sequence[Tensor],
        *,
        batch_sizes: Tensor | None = None,
        is_active: Tensor | None = None,
        resets: Tensor | None = None,
    ) -> Call:
        """The call of one layer; in training, DropConnect's and Zoneout's masks are drawn here."""
        zoneout_mask = zoneout_cell_mask = None
        if self.training:
            if self.dropconnect:
                names = self.spec.parameter_names
                for index in range(names.index("weight_hh"), len(parameters), len(names)):
                    parameters[index] = F.dropout(parameters[index], self.dropconnect, training=True)
            if self.zoneout:
                zoneout_mask = self._mask(self.zoneout, steps, self.output_size)
            if self.zoneout_cell:
                zoneout_cell_mask = self._mask(self.zoneout_cell, steps, self.hidden_size)
        return Call(
            layer=self.spec,
            input=steps,
            h_0=state[0],
            c_0=state[1] if len(state) > 1 else None,
            parameters=tuple(parameters),
            batch_sizes=batch_sizes,
            is_active=is_active,
            resets=resets,
            zoneout_mask=zoneout_mask,
            zoneout_cell_mask=zoneout_cell_mask,
            zoneout=self.zoneout,
            zoneout_cell=self.zoneout_cell,
            owner=self,
        )

    def _packed_call(self, parameters: list[Tensor], steps: Tensor, state: Sequence[Tensor], packing: Packing) -> Call:
        """`_call` over packed sequences."""
        return self._call(
            parameters,
            steps,
            state,
            batch_sizes=packing.batch_sizes,
            is_active=packing.is_active,
            resets=packing.resets,
        )

    def _mask(self, rate: float, steps: Tensor, width: int) -> Tensor:
        """`[D, N, width]` bool, True at `rate`."""
        shape = (self.spec.directions, steps.shape[0], width)
        # Not in place: `torch.func.vmap` draws new numbers for each part into new memory only.
        return torch.bernoulli(torch.empty(shape, dtype=torch.bool, device=steps.device), rate)

    def _cell_options(self) -> dict[str, Any]:
        """What the constructor of this layer's cell takes beyond the arguments of every cell."""
        return {}

    def _slow_forward(self, *args: Any, **kwargs: Any) -> Any:
        """What `torch.nn.Module` calls while TorchScript traces: its ONNX exporter gives `lengths` by position, and the error
        should be that of `is_exporting`."""
        export.is_exporting()
        return super()._slow_forward(*args, **kwargs)  # type: ignore[no-untyped-call]

    def get_extra_state(self) -> Tensor:
        """The plan as a tensor. torch.distributed.checkpoint sends more than tensors only for modules with this method."""
        return plan_tensor(self.norm)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.norm.is_none:  # a plain layer's state dict is torch.nn's, key for key
            del destination[prefix + PLAN_KEY]

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
        """Load, unless the checkpoint was saved under another plan: then nothing of this module changes."""
        key = prefix + PLAN_KEY
        try:
            plan = saved_plan(state_dict, prefix)
            plan = plan and self.spec.cell.named(plan)
        except (TypeError, ValueError) as error:
            error_msgs.append(f"{key} must hold a norm plan as festina saves it, but it cannot be read: {error}")
            return
        if plan is None and strict and not self.norm.is_none:
            missing_keys.append(key)
        if plan is not None and plan != self.norm and not (plan.is_none and self.norm.is_none):
            error_msgs.append(
                f"{prefix or type(self).__name__}: the checkpoint was saved under the norm plan {plan}, this layer has "
                f"{self.norm}; the same weights make another function there. Build the layer with norm={plan!r}, or, "
                "to start from these weights all the same, load {**layer.state_dict(), **weights}"
            )
            return
        rest = {name: value for name, value in state_dict.items() if name != key}
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)

    def extra_repr(self) -> str:
        parts = [f"{self.input_size}, {self.hidden_size}"]
        options = {"proj_size": 0, "bias": True, **self._repr_defaults()}
        parts += [f"{name}={value}" for name in options if (value := getattr(self, name)) != options[name]]
        if not self.norm.is_none:
            parts.append(f"norm={self.norm!r}")
        rates = ("zoneout", "zoneout_cell", "dropconnect")
        parts += [f"{name}={value}" for name in rates if (value := getattr(self, name))]
        return ", ".join(parts)

    def _repr_defaults(self) -> dict[str, Any]:
        """Options and the values at which `repr` leaves them out."""
        return {}


def warn_of_one_feature(spec: LayerSpec, input_size: int, stacklevel: int) -> None:
    """Warn if the norm is on the product with a single feature alone."""
    if input_size == 1 and spec.plan.placement == "separate" and not spec.plan.inner_bias:
        warnings.warn(
            "a norm on the product with a single input feature removes its magnitude, N(w·x) = sign(x)·N(w): only "
            "sign(x) survives; put a linear layer in front, or choose a plan without a norm on the input, such as "
            "norms.NONE or a joint one",
            stacklevel=stacklevel,
        )


def leaf(module: nn.Module, input: Proxy, *args: Any, **kwargs: Any) -> Proxy:
    """A call of the module as one node of the graph that `torch.fx.symbolic_trace` makes, as those of `torch.nn` are."""
    tracer = input.tracer
    assert isinstance(tracer, Tracer)
    return tracer.create_proxy("call_module", tracer.path_of_module(module), (input, *args), kwargs)


def plan_tensor(plan: NormPlan) -> Tensor:
    """The plan as a checkpoint holds it, under `PLAN_KEY`: each bit of its JSON a float32, 0 or 1, on the CPU.

    State dicts are averaged, interpolated, cast and scaled as a whole. With weights that add up to 1 this leaves 0 as it is
    and 1 near 1, in any floating-point type, as long as all the plans are equal.
    """
    text = plan.to_json().encode()
    text = text.ljust(math.ceil(len(text) / PLAN_BYTES) * PLAN_BYTES, b"\0")
    return torch.from_numpy(np.unpackbits(np.frombuffer(text, np.uint8)).astype(np.float32))


def saved_plan(state_dict: dict[str, Any], prefix: str) -> NormPlan | None:
    """The plan of the layer saved under `prefix`; None if no layer was, or one with norms but without its plan.

    Weights without any gain are those of a plain layer: neither torch.nn nor Festina saves a plan for one.

    Raises:
        TypeError, ValueError: what is saved is no plan, or a mixture of different plans.
    """
    saved = state_dict.get(prefix + PLAN_KEY)
    if saved is not None:
        return NormPlan.from_json(_plan_bytes(saved).decode())
    is_plain = not any(name.startswith(prefix + "gain") for name in state_dict)
    return norms.NONE if is_plain and any(name.startswith(prefix + "weight_ih") for name in state_dict) else None


def _plan_bytes(saved: Any) -> bytes:
    """The text of a saved plan: of its bits, or of its bytes as uint8, as in old checkpoints.

    Raises:
        TypeError, ValueError: the tensor is of another type or shape, or its values are not near 0 or 1.
    """
    if not isinstance(saved, Tensor) or not (saved.is_floating_point() or saved.dtype == torch.uint8):
        got = saved.dtype if isinstance(saved, Tensor) else type(saved).__name__
        raise TypeError(f"a plan must be saved as a tensor of float32, or uint8 in old checkpoints, got {got}")
    length = 8 if saved.is_floating_point() else 1  # values for a byte
    if saved.is_meta or saved.layout != torch.strided or saved.dim() != 1 or saved.numel() > length * MOST_PLAN_BYTES:
        raise ValueError(
            f"a plan must have one axis of at most {MOST_PLAN_BYTES} bytes, or 8 values for each, got {list(saved.shape)}"
        )
    if saved.dtype == torch.uint8:
        return bytes(saved.tolist())
    values = saved.detach().cpu().double()
    # Weighted sums in a narrow type round 1, but never 0: there the smallest part of another plan shows.
    is_bit = torch.where(values > 0.5, (values - 1).abs() < 0.125, values.abs() < 1e-6)
    if not is_bit.all():
        raise ValueError(
            f"the values of a plan must be 0 or 1, got {values[~is_bit][0].item():.6g}; if this state dict is a mean or a "
            "weighted sum, combine only layers of one plan, with weights that add up to 1"
        )
    return np.packbits(values.numpy() > 0.5).tobytes().rstrip(b"\0")
