"""The compiled core as Python sees it: where the library is, its structs, its names for things, its functions.

`csrc/festina.h` is the other side of this file. The library describes itself in the text of `festina_layout()`: structs,
enums, parameters and kernels are read from there, and no list of them stands here.
"""

from __future__ import annotations

import ctypes
import sys
from collections import defaultdict
from collections.abc import Callable
from ctypes import c_char_p, c_double, c_int, c_int64, c_uint64, c_void_p
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

import torch  # noqa: F401  its OpenMP must be in the process before the core asks for one, so that they share it

from festina import environment

VERSION = 9
LIBRARY = "libfestina_core.so"
INFERENCE, TRAINING, BACKWARD = "inference", "training", "backward"
WHOLE = "whole"
"""The type of panels that are not rounded."""

SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "festina_version": (c_int, []),
    "festina_layout": (c_char_p, []),
    "festina_bytes": (c_int, [c_void_p, c_void_p]),
    "festina_run": (c_int, [c_void_p]),
    "festina_run_panels": (c_int, [c_void_p, c_int, c_uint64]),
    "festina_allocate": (c_void_p, [c_uint64]),
    "festina_free": (None, [c_void_p]),
    "festina_fingerprint": (c_uint64, [c_void_p, c_int]),
    "festina_error": (c_char_p, []),
    "festina_isa": (c_char_p, []),
    "festina_isas": (c_char_p, [c_int]),
}
"""What each function returns and takes."""

FIELD_TYPES: dict[str, Any] = {"i64": c_int64, "u64": c_uint64, "f64": c_double, "pointer": c_void_p}
WORD = 8
"""Bytes of every field, or of every element of one: a struct is also an array of words."""


@dataclass(frozen=True)
class Layout:
    """What `festina_layout()` says.

    Args:
        version: of the ABI.
        structs: a `ctypes.Structure` for each struct.
        words: of each struct, the word at which each of its fields begins.
        values: of each enum, the integer of each name.
        parameters: where each parameter stands among those of one direction.
        constants: limits by name.
        kernels: each step with each placement and norm on c that it has a kernel for.
    """

    version: int
    structs: dict[str, Any]
    words: dict[str, dict[str, int]]
    values: dict[str, dict[str, int]]
    parameters: dict[str, int]
    constants: dict[str, int]
    kernels: frozenset[tuple[str, str, str]]


def read_layout(text: str) -> Layout:
    """What the text of `festina_layout()` says.

    Raises:
        ValueError: it contradicts itself, or cannot be read.
    """
    entries: dict[str, list[list[str]]] = defaultdict(list)
    for line in text.splitlines():
        kind, *words = line.split(" ")
        entries[kind].append(words)
    fields: dict[str, list[tuple[str, Any, int]]] = defaultdict(list)
    for struct, name, type_name, offset, count in entries["field"]:
        field = FIELD_TYPES[type_name]
        fields[struct].append((name, field if count == "1" else field * int(count), int(offset)))
    values: dict[str, dict[str, int]] = defaultdict(dict)
    for enum, name, value in entries["value"]:
        values[enum][name] = int(value)
    return Layout(
        version=int(entries["version"][0][0]),
        structs={name: _structure(name, int(size), fields[name]) for name, size in entries["size"]},
        words={struct: {name: offset // WORD for name, _, offset in fields[struct]} for struct in fields},
        values=dict(values),
        parameters={name: int(at) for name, at in entries["parameter"]},
        constants={name: int(value) for name, value in entries["constant"]},
        kernels=frozenset((step, placement, cell_norm) for step, placement, cell_norm in entries["kernel"]),
    )


def _structure(name: str, size: int, fields: list[tuple[str, Any, int]]) -> Any:
    """A struct of that size with `(name, type, offset)` fields.

    Raises:
        ValueError: ctypes places a field elsewhere.
    """
    made = type(name, (ctypes.Structure,), {"_fields_": [(field, kind) for field, kind, _ in fields]})
    placed = [(field, getattr(made, field).offset) for field, _, _ in fields]
    if ctypes.sizeof(made) != size or placed != [(field, offset) for field, _, offset in fields]:
        raise ValueError(
            f"the core lays {name} out in {size} bytes as {fields}, ctypes in {ctypes.sizeof(made)} as {placed}"
        )
    return made


class Core:
    """The loaded core: its functions, without their prefix, and what `Layout` says.

    Args:
        functions: the library.
        layout: what it says of itself.
    """

    def __init__(self, functions: ctypes.CDLL, layout: Layout) -> None:
        self.bytes: Callable[..., int] = functions.festina_bytes
        self.run: Callable[..., int] = functions.festina_run
        self.run_panels: Callable[..., int] = functions.festina_run_panels
        self.fingerprint: Callable[..., int] = functions.festina_fingerprint
        self.allocate: Callable[..., int | None] = functions.festina_allocate
        self.free: Callable[..., None] = functions.festina_free
        self._error = functions.festina_error
        self._isa, self._isas = functions.festina_isa, functions.festina_isas
        self.layout = layout
        self.call: Any = layout.structs["FestinaCall"]
        """The argument of `run`."""
        self.need: Any = layout.structs["FestinaBytes"]
        """What `bytes` fills in."""
        self.words: Any = c_uint64 * (ctypes.sizeof(self.call) // WORD)
        """The same memory as a `call`, word by word."""
        self.at = layout.words["FestinaCall"]
        """The word at which each field of a `call` begins."""
        self.stale, self.ended = layout.values["status"]["stale"], layout.values["status"]["ended"]

    def error(self) -> RuntimeError:
        """What to raise after a status other than ok."""
        return RuntimeError(f"festina's core: {self._error().decode()}")

    def isa(self) -> str:
        """The instruction set in use; `FESTINA_ISA` forces one."""
        return str(self._isa().decode())

    def isas(self, runnable: bool = False) -> list[str]:
        """The instruction sets compiled in, best first; only those that this CPU runs, if so asked."""
        return str(self._isas(int(runnable)).decode()).split()


@dataclass(frozen=True)
class Library:
    """The loaded core, or the reason why there is none.

    Args:
        is_forced: the environment asks for a core that cannot be had, so that no other backend may stand in for it.
    """

    core: Core | None
    reason: str | None
    is_forced: bool = False


@lru_cache(maxsize=1)
def library() -> Library:
    """The core: the file that `FESTINA_CORE` names, else the one beside this package."""
    _, wrong = environment.pool_limit()
    if wrong:
        return Library(None, wrong, is_forced=True)
    try:
        return Library(_load(), None)
    except OSError as error:
        reason = str(error)
    forced = [f"{choice.name}={choice.choice()}" for choice in (environment.CORE, environment.ISA) if choice.choice()]
    if forced:
        reason = f"{' and '.join(forced)} cannot be had: {reason}"
    return Library(None, reason, is_forced=bool(forced))


def _load() -> Core:
    """The core.

    Raises:
        OSError: there is none that can be used, and why.
    """
    named = environment.CORE.choice()
    # An editable install keeps compiled files in a folder of its own, which is on the package's path too.
    folders = [named] if named else [str(resources.files("festina")), *sys.modules["festina"].__path__]
    places = [Path(folder) / LIBRARY if Path(folder).is_dir() else Path(folder) for folder in folders]
    path = next((place for place in places if place.is_file()), None)
    advice = "name another file or unset FESTINA_CORE" if named else "reinstall festina"
    if path is None:
        if named:
            raise OSError(f"there is no {places[0]}; {advice}")
        raise OSError(f"the compiled core is missing: there is no {places[0]}; install festina with a C++17 compiler")
    try:
        functions = ctypes.CDLL(str(path))
        declare(functions)
    except OSError as error:
        raise OSError(f"the compiled core cannot be loaded: {error}; {advice}") from error
    except AttributeError as error:
        raise OSError(f"the compiled core is of another version than this package: {error}; {advice}") from error
    if (version := functions.festina_version()) != VERSION:
        raise OSError(f"the compiled core is of version {version}, this package of {VERSION}; {advice}")
    try:
        layout = read_layout(functions.festina_layout().decode())
    except (KeyError, IndexError, ValueError) as error:
        raise OSError(f"the compiled core describes itself in a way not understood: {error!r}; {advice}") from error
    if functions.festina_isa() is None:
        runnable = functions.festina_isas(1).decode().replace(" ", ", ")
        raise OSError(f"of the core's instruction sets this CPU runs {runnable}; name one of them or unset FESTINA_ISA")
    return Core(functions, layout)


def declare(functions: ctypes.CDLL) -> None:
    """Tell ctypes what the functions take and return.

    Raises:
        AttributeError: the library lacks one.
    """
    for name, (result, arguments) in SIGNATURES.items():
        function = getattr(functions, name)
        function.restype, function.argtypes = result, arguments


@lru_cache(maxsize=1)
def core() -> Core:
    """The core.

    Raises:
        RuntimeError: there is none.
    """
    found = library()
    if found.core is None:
        raise RuntimeError(found.reason)
    return found.core
