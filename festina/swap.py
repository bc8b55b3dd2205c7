"""`replace`: a model written with `torch.nn`'s LSTM and GRU runs on Festina's, in place, and back."""

from __future__ import annotations

import types
import warnings
from dataclasses import dataclass, field
from functools import cache
from typing import Any, cast

import torch
from torch import nn

from festina import cells, layers
from festina.module import RecurrentBase
from festina.norms import NormPlan

OURS: dict[type[nn.Module], tuple[type[Any], type[Any]]] = {
    nn.LSTM: (layers.LSTM, layers.LayerNormLSTM),
    nn.GRU: (layers.GRU, layers.LayerNormGRU),
    nn.LSTMCell: (cells.LSTMCell, cells.LayerNormLSTMCell),
    nn.GRUCell: (cells.GRUCell, cells.LayerNormGRUCell),
}
"""Festina's class without and with norms for each of torch's."""

OTHERS = (nn.RNNBase, nn.RNNCellBase)
HARMLESS = frozenset(vars(type("", (), {}))) | {
    *("__init__", "__annotations__", "__annotate_func__", "__annotations_cache__", "__parameters__", "__orig_bases__"),
    *("__abstractmethods__", "_abc_impl", "__firstlineno__", "__static_attributes__", "__qualname__"),
}
"""What every class has, and what does nothing to a module that is made already."""
ARGUMENTS = ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional", "proj_size")


@dataclass(eq=False)
class Replacement:
    """What `replace` has done; `undo` takes it back. Its `str` is a line for each recurrent module of the model.

    Args:
        replaced: by the name of each module in the model, what it is now.
        kept: by name, why a recurrent module was left as it was.
        new: the parameters that the model had not before (gains, shifts of norms), by name: an optimizer needs them.
        removed: the parameters that it has no longer, as the two biases under a joint norm.
    """

    replaced: dict[str, nn.Module] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    new: dict[str, nn.Parameter] = field(default_factory=dict)
    removed: dict[str, nn.Parameter] = field(default_factory=dict)
    _former: list[_Former] = field(default_factory=list, repr=False)

    def undo(self) -> None:
        """Make each module what it was, with the values that its parameters have now. Only the first call does something."""
        while self._former:
            self._former.pop().restore()

    def __str__(self) -> str:
        lines = [f"{name or '(the model)'}: now {module}" for name, module in self.replaced.items()]
        lines += [f"{name or '(the model)'}: kept, {why}" for name, why in self.kept.items()]
        return "\n".join(lines) or "no recurrent module of torch.nn found"


@dataclass(eq=False)
class _Former:
    """A module of torch's before it was replaced: its class, what Festina's class has taken out, what that has put in."""

    module: RecurrentBase
    kind: type[nn.Module]
    attributes: dict[str, Any]
    removed: dict[str, nn.Parameter | None]
    added: set[str]

    def restore(self) -> None:
        module: Any = self.module
        weight = module.layer_parameters()[0]
        for bias in self.removed.values():
            if bias is not None:  # what the model has become meanwhile
                bias.data = bias.data.to(weight)
        for name in self.added:
            module.__dict__.pop(name, None)
            module._parameters.pop(name, None)
        module.__class__ = self.kind
        module.__dict__.update(self.attributes)
        module._parameters.update(self.removed)
        if isinstance(module, nn.RNNBase):
            module._init_flat_weights()  # of the parameters that there are now


def replace(model: nn.Module, norm: NormPlan | None = None) -> Replacement:
    """Make every `torch.nn.LSTM`, `GRU`, `LSTMCell` and `GRUCell` of a model Festina's.

    Modules change in place, and so does the model itself if it is one of them: hooks, `training`, parameters and all
    references to a module stay. A subclass of torch's that adds to it and overrides nothing becomes a subclass of Festina's
    too. Without `norm` the model computes what it did and its state dict has the same keys and tensors; an optimizer goes
    on with the same parameters.

    With `norm` each of them is normalised under that plan, plain layers and cells of Festina's as well, and the model is
    another function. Weights and biases are kept; gains are 1, new shifts 0. Parameters change: make the optimizer, DDP or
    FSDP afterwards.

    Args:
        model: the model.
        norm: a plan of `festina.norms`, or None.

    Returns:
        What was replaced, what was not and why, and `undo`.

    Raises:
        TypeError: `model` is no module, or `norm` no plan.
        ValueError: the plan does not fit a module. Then nothing has changed.

    >>> model = nn.Sequential(nn.Linear(3, 4), nn.GRU(4, 5))
    >>> print(replace(model))
    1: now GRU(4, 5)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if norm is not None and not isinstance(norm, NormPlan):
        raise TypeError(f"norm must be a NormPlan, such as norms.HASTE, or None, got {norm!r}")
    if norm is not None and norm.is_none:
        norm = None
    found = Replacement()
    plans: dict[str, tuple[nn.Module, RecurrentBase]] = {}
    for name, module in model.named_modules():
        if (why := _why_not(module, norm)) is not None:
            found.kept[name] = why
        elif isinstance(module, OTHERS):
            plans[name] = module, _like(module, norm)
    for name, (module, ours) in plans.items():
        former = _become(module, ours)
        found._former.append(former)
        found.replaced[name] = module
        dot = f"{name}." if name else ""
        found.new |= {dot + key: module.get_parameter(key) for key in former.added & module._parameters.keys()}
        found.removed |= {dot + key: bias for key, bias in former.removed.items() if bias is not None}
    return found


def _why_not(module: nn.Module, norm: NormPlan | None) -> str | None:
    """Why a recurrent module is kept; None for one that can be replaced, and for all others."""
    if not isinstance(module, OTHERS):
        return None
    kind = type(module).__name__
    if isinstance(module, RecurrentBase):
        if norm is None:
            return "it is Festina's already"
        if not module.norm.is_none:
            return f"it has a norm already, {module.norm}"
        return None if _pair(module) else "it is a class of its own"
    if isinstance(module, nn.RNN | nn.RNNCell):
        return "Festina has no plain RNN"
    if _pair(module) is None:
        return f"{kind} is a class of its own, and none of those that Festina has"
    twin, ours = _twin(_base(module), module), _like(module, norm)
    taken = {*dir(twin), *vars(twin), *dir(ours), *vars(ours)}
    added = (each for each in type(module).__mro__ if each not in type(twin).__mro__)
    if changed := sorted(taken & {name for each in added for name in vars(each).keys() - HARMLESS}):
        return f"{kind} is a class of its own, which overrides {', '.join(changed)} of torch's or of Festina's"
    own = {*vars(module), *module._modules, *module._buffers} - {*vars(twin), *twin._parameters}
    if changed := sorted(taken & own):
        return f"it has {', '.join(changed)} of its own, in the place of torch's or of Festina's"
    if _base(module) is not type(module):
        try:
            _mixed(cast(Any, type(module)), cast(Any, type(ours)))
        except TypeError as error:
            return f"{kind} is a class of its own that allows no subclass with Festina's: {error}"
    return None


def _base(module: nn.Module) -> type[Any]:
    """The class of torch's, or of Festina's, that a module has or inherits from."""
    if isinstance(module, RecurrentBase):
        return type(module)
    return next((kind for kind in type(module).__mro__ if kind in OURS), type(module))


def _pair(module: nn.Module) -> tuple[type[Any], type[Any]] | None:
    """Festina's class without and with norms for a module of torch's, or of Festina's without norms."""
    kind = _base(module)
    return OURS.get(kind) or next((pair for pair in OURS.values() if pair[0] is kind), None)


@cache
def _mixed(own: Any, ours: Any) -> Any:
    """The class that is both: what `own` adds to torch's class, over Festina's."""

    def reduce(self: Any, protocol: Any) -> Any:
        return _unpickled, (own, ours), vars(self)  # the class has no name that a pickle could give

    body = {"__module__": own.__module__, "__doc__": own.__doc__, "__reduce_ex__": reduce}
    return types.new_class(own.__name__, (own, ours), exec_body=lambda names: names.update(body))


def _unpickled(own: Any, ours: Any) -> Any:
    kind = _mixed(own, ours)
    return kind.__new__(kind)


def _twin(kind: type[Any], module: nn.Module, **options: Any) -> Any:
    """A module of this class with the arguments of torch's that `module` has, on the meta device."""
    given: dict[str, Any] = {name: getattr(module, name) for name in ARGUMENTS if getattr(module, name, 0)}
    given["bias"] = module.bias
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="dropout")  # torch.nn has warned already
        return kind(**given, **options, device="meta")


def _like(module: nn.Module, norm: NormPlan | None) -> RecurrentBase:
    """A module of Festina's with the same arguments, on the meta device."""
    pair = _pair(module)
    assert pair is not None
    more: dict[str, Any] = {}
    if isinstance(module, RecurrentBase):
        more = {name: getattr(module, name) for name in ("zoneout", "zoneout_cell", "dropconnect", "forget_bias")}
    made: RecurrentBase = _twin(pair[norm is not None], module, norm=norm, **more)
    return made


def _become(module: nn.Module, ours: RecurrentBase) -> _Former:
    """Give a module the class and the attributes of `ours`, and the parameters that it lacks."""
    machinery = vars(nn.Module()).keys()
    options = {name: value for name, value in vars(ours).items() if name not in machinery}
    twin = _twin(_base(module), module)
    former = {name: value for name, value in vars(module).items() if name in vars(twin).keys() - machinery}
    like = getattr(module, ours._names[0][0])  # not one of `parameters()`, where all of them are computed
    fresh = [name for name in ours._parameters if not hasattr(module, name)]
    gone = [name for name in module._parameters if name in twin._parameters and not hasattr(ours, name)]
    kind, removed = type(module), {name: module._parameters.pop(name) for name in gone}

    for name in former.keys() - options.keys():
        del module.__dict__[name]
    module.__class__ = type(ours) if _base(module) is kind else _mixed(cast(Any, kind), cast(Any, type(ours)))
    module.__dict__.update(options)
    for name in fresh:
        fill = torch.ones_like if name.startswith("gain") else torch.zeros_like
        parameter = nn.Parameter(fill(ours.get_parameter(name), dtype=like.dtype, device=like.device))
        module.register_parameter(name, parameter)
    return _Former(cast(RecurrentBase, module), kind, former, removed, {*fresh, *options.keys() - former.keys()})
