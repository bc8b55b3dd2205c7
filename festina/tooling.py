"""What PyTorch's tools ask of a module: the unpickler, TorchScript's compiler, eager quantisation."""

from __future__ import annotations

import warnings
from typing import Any, NoReturn

from torch import nn

from festina.spec import CellSpec, LayerSpec


class Tooling:
    """A base of layers and cells, ahead of `nn.Module`: the answers to tools that would else go wrong, or say nothing."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A pickle, which `torch.load(weights_only=True)` may read from anybody, gives the attributes. What a kernel goes by
        must be a checked LayerSpec, not an object that has the names of one.

        Raises:
            TypeError: it is not.
        """
        for name, kind in (("spec", LayerSpec), ("cell_spec", CellSpec)):
            got = state.get(name, getattr(type(self), name, None))
            if not isinstance(got, kind):
                raise TypeError(
                    f"{name} of a pickled {type(self).__name__} must be a {kind.__name__}, got {type(got).__name__}"
                )
        nn.Module.__setstate__(self, state)  # type: ignore[arg-type]  # torch.nn.RNNBase's rewrites lists that are not here

    def __prepare_scriptable__(self) -> NoReturn:
        """`torch.jit.script` calls it.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            f"torch.jit.script cannot compile {type(self).__name__}: put torch.jit.trace(module, (input, hx)) in its place, "
            "which runs at any T and B and may be part of a scripted model, or use torch.compile or torch.export"
        )

    @property
    def qconfig(self) -> Any:
        """How `torch.ao.quantization` is to quantise the module. It sets this attribute on every module that it goes over and
        then leaves alone those without a quantised counterpart, such as this one: with a warning, at least."""
        try:
            return vars(self)["_qconfig"]
        except KeyError:
            raise AttributeError(f"{type(self).__name__} has no attribute 'qconfig'") from None

    @qconfig.setter
    def qconfig(self, value: Any) -> None:
        warnings.warn(
            f"{type(self).__name__} stays as it is: torch.ao.quantization has no counterpart for it; "
            "festina.freeze(model, weights='int8') makes one",
            stacklevel=3,
        )
        vars(self)["_qconfig"] = value

    @qconfig.deleter
    def qconfig(self) -> None:
        vars(self).pop("_qconfig", None)
