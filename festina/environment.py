"""The environment variables that Festina reads: all of them, read here and nowhere else. docs/environment.md is their table.

Importing festina raises for none of them. What a variable asks for is checked where it is first used, and is never replaced
by something else in silence.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Variable:
    """One environment variable.

    Args:
        name: as the shell knows it.
        meaning: what it sets, as a phrase.
        default: what holds where it is not set, as a phrase.
        check: what is refused, and when, as a phrase.
    """

    name: str
    meaning: str
    default: str
    check: str

    def value(self) -> str | None:
        """What the variable holds now; None if it is not set."""
        return os.environ.get(self.name)

    def choice(self) -> str:
        """The name that the variable holds; "" if it is not set or empty, which are the same for a name."""
        return self.value() or ""


BACKEND = Variable(
    "FESTINA_BACKEND",
    "the backend that runs every call, as `festina.backends.use` does; read when festina is imported",
    "the best one that can run the call",
    "an unknown name, and a call that this backend cannot run: the call raises `BackendError`",
)
CORE = Variable(
    "FESTINA_CORE",
    "the file of the compiled core, or the folder that it is in; read when the `cpu` backend is first needed",
    "the core that was installed with festina",
    "a file that is missing or cannot be used: every call that would take the `cpu` backend raises `BackendError`",
)
ISA = Variable(
    "FESTINA_ISA",
    "the instruction set of the compiled core; read when the `cpu` backend is first needed",
    "the best one that the CPU runs",
    "one that the core lacks or this CPU does not run: every call that would take the `cpu` backend raises `BackendError`",
)
POOL_MB = Variable(
    "FESTINA_POOL_MB",
    "the most memory in MB that the `cpu` backend keeps idle for later calls; 0 keeps none; read when festina is imported",
    "512",
    "anything but a finite number of at least 0: every call that would take the `cpu` backend raises `BackendError`",
)
VARIABLES = (BACKEND, CORE, ISA, POOL_MB)


def unknown() -> list[str]:
    """The variables that are set and named as if they were Festina's, and are not."""
    return sorted(
        {name for name in os.environ if name.startswith("FESTINA_")} - {variable.name for variable in VARIABLES}
    )


def pool_limit() -> tuple[int, str | None]:
    """The bytes that `FESTINA_POOL_MB` allows to lie idle, and None; or 0, and what is wrong with the variable."""
    text = POOL_MB.value()
    try:
        size = float(POOL_MB.default if text is None else text) * 2**20
    except ValueError:
        size = math.nan
    if 0 <= size < math.inf:
        return int(size), None
    wanted = f"must be a finite number of at least 0; unset it for {POOL_MB.default}"
    return 0, f"{POOL_MB.name} is {text!r}, but {wanted}"
