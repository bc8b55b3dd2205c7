"""The compiled core, seen from Python: where the library is, its argument struct, its functions.

`csrc/festina.h` is the other side of this file; its version is asked for once.
"""

from __future__ import annotations

import ctypes
import os
import sys
from ctypes import POINTER, c_char_p, c_double, c_int, c_int64, c_uint64, c_void_p
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

import torch  # noqa: F401  its OpenMP must be in the process before the core asks for one, so that they share it

VERSION = 5
LIBRARY = "libfestina_core.so"
INFERENCE, TRAINING, BACKWARD = range(3)

PARAMETERS = (
    "weight_ih",
    "weight_hh",
    "bias_ih",
    "bias_hh",
    "weight_hr",
    "gain_ih",
    "gain_hh",
    "gain_joint",
    "bias_joint",
    "bias_inner",
    "gain_c",
    "bias_c",
)
Pointers = c_void_p * (2 * len(PARAMETERS))
Sizes = c_uint64 * (2 * len(PARAMETERS))


class FestinaCall(ctypes.Structure):
    """The one argument of the core."""

    _fields_ = [
        *(
            (name, c_int64)
            for name in (
                *("pass", "type", "cell", "placement", "groups", "cell_norm", "rms", "directions", "threads"),
                *("T", "B", "I", "H", "P", "N"),
            )
        ),
        *((name, c_double) for name in ("eps", "zoneout", "zoneout_cell")),
        *((name, c_int64) for name in ("has_zoneout", "has_zoneout_cell")),
        *(
            (name, c_void_p)
            for name in (
                *("batch_sizes", "resets", "zoneout_mask", "zoneout_cell_mask"),
                *("input", "h_0", "c_0"),
            )
        ),
        ("parameters", Pointers),
        *((name, c_void_p) for name in ("output", "h_n", "c_n", "panels")),
        ("has_panels", c_int64),
        *(
            (name, c_void_p)
            for name in (
                *("saved", "workspace", "d_output", "d_h_n", "d_c_n"),
                *("d_input", "d_h_0", "d_c_0"),
            )
        ),
        ("d_parameters", Pointers),
    ]


class FestinaBytes(ctypes.Structure):
    """How much memory a call needs."""

    _fields_ = [(name, c_uint64) for name in ("panels", "saved_fixed", "saved_per_row", "workspace")]


SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "festina_version": (c_int, []),
    "festina_layout": (c_char_p, []),
    "festina_bytes": (c_int, [POINTER(FestinaCall), POINTER(FestinaBytes)]),
    "festina_run": (c_int, [c_void_p]),
    "festina_run_panels": (c_int, [c_void_p, c_void_p, c_int, c_uint64]),
    "festina_allocate": (c_void_p, [c_uint64]),
    "festina_free": (None, [c_void_p]),
    "festina_fingerprint": (c_uint64, [POINTER(FestinaCall), Sizes, c_int]),
    "festina_error": (c_char_p, []),
    "festina_isa": (c_char_p, []),
    "festina_isas": (c_char_p, [c_int]),
}
"""What each function returns and takes."""


@dataclass(frozen=True)
class Library:
    """The loaded core, or the reason why there is none."""

    functions: ctypes.CDLL | None
    reason: str | None


@lru_cache(maxsize=1)
def library() -> Library:
    """The core: the file that `FESTINA_CORE` names, else the one beside this package."""
    named = os.environ.get("FESTINA_CORE")
    # An editable install keeps compiled files in a folder of its own, which is on the package's path too.
    folders = [named] if named else [str(resources.files("festina")), *sys.modules["festina"].__path__]
    places = [Path(folder) / LIBRARY if Path(folder).is_dir() else Path(folder) for folder in folders]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        reason = f"the compiled core is missing: there is no {places[0]}; install festina with a C++17 compiler"
        return Library(None, reason)
    try:
        core = ctypes.CDLL(str(path))
        declare(core)
    except OSError as error:
        return Library(None, f"the compiled core cannot be loaded: {error}")
    except AttributeError as error:
        return Library(None, f"the compiled core is of another version than this package: {error}; reinstall festina")
    if core.festina_version() != VERSION:
        return Library(
            None,
            f"the compiled core is of version {core.festina_version()}, this package of {VERSION}; reinstall festina",
        )
    if core.festina_isa() is None:
        return Library(None, core.festina_error().decode())
    return Library(core, None)


def declare(core: ctypes.CDLL) -> None:
    """Tell ctypes what the functions take and return.

    Raises:
        AttributeError: the library lacks one.
    """
    for name, (result, arguments) in SIGNATURES.items():
        function = getattr(core, name)
        function.restype, function.argtypes = result, arguments


@lru_cache(maxsize=1)
def functions() -> ctypes.CDLL:
    """The core's functions.

    Raises:
        RuntimeError: there is no core.
    """
    core = library()
    if core.functions is None:
        raise RuntimeError(core.reason)
    return core.functions


def isa() -> str:
    """The instruction set in use; `FESTINA_ISA` forces one."""
    return str(functions().festina_isa().decode())


def isas(runnable: bool = False) -> list[str]:
    """The instruction sets compiled in, best first; only those that this CPU runs, if so asked."""
    return str(functions().festina_isas(int(runnable)).decode()).split()


def check(status: int) -> None:
    """Raise what the core had to say.

    Raises:
        RuntimeError: `status` is not 0.
    """
    if status:
        raise RuntimeError(f"festina's core: {functions().festina_error().decode()}")
