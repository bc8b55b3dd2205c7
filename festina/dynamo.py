"""What lets `torch.compile` trace Festina's layers, each of them one operator.

Dynamo stops at every instance of `torch.nn.LSTM` and `torch.nn.GRU` unless `torch._dynamo.config.allow_rnn` is set, because
it would unroll them step by step. Festina's layers are such instances; for them alone the setting is made. Dynamo takes
more than a second to import, so this waits until something else imports it.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

BUILDER = "torch._dynamo.variables.builder"
"""Dynamo's module whose `VariableBuilder.wrap_module` decides how a module is traced."""


class _OnImport(MetaPathFinder):
    """Calls `then` with the module `name` once it is imported; asks the other finders for the module itself."""

    def __init__(self, name: str, then: Callable[[ModuleType], None]) -> None:
        self.name, self.then = name, then

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                self.then(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def admit(layers: type) -> None:
    """Let Dynamo trace instances of `layers`, now or when it is imported. Other modules stay as the configuration says."""

    def patch(builder: Any) -> None:
        wrap_module = builder.VariableBuilder.wrap_module

        def wrap(self: Any, value: Any) -> Any:
            if not isinstance(value, layers):
                return wrap_module(self, value)
            with builder.config.patch(allow_rnn=True):
                return wrap_module(self, value)

        builder.VariableBuilder.wrap_module = wrap

    if BUILDER in sys.modules:
        patch(sys.modules[BUILDER])
    else:
        sys.meta_path.insert(0, _OnImport(BUILDER, patch))
