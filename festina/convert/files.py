"""Tensors in files: safetensors, PyTorch's .pt, NumPy's .npz. Only tensors are ever unpickled."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


class FileError(ValueError):
    """A file cannot be read or written. The text says why and what to do."""


def read(path: str | Path) -> dict[str, Tensor]:
    """Every tensor in a file by name; names of nested mappings are joined by dots, other values are skipped.

    Raises:
        FileError: the suffix is unknown, the file is damaged or holds objects other than tensors and plain values, or the
            package for the format is missing.
        OSError: the file does not exist or cannot be read.
    """
    path = Path(path)
    return _by_suffix(path)[0](path)


def write(path: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors by name, in the format of the suffix.

    Raises:
        FileError: the suffix is unknown, the format cannot hold a dtype, or the package for it is missing.
        OSError: the file cannot be written.
    """
    path = Path(path)
    _by_suffix(path)[1](path, {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})


def _safetensors() -> Any:
    try:
        import safetensors.torch  # noqa: PLC0415  safetensors is optional
    except ImportError:
        raise FileError(
            "a .safetensors file needs the package safetensors, which is not installed; install it with: "
            "pip install 'festina[convert]'"
        ) from None
    return safetensors.torch


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    reader = _safetensors()
    try:
        found: dict[str, Tensor] = reader.load_file(path)
    except OSError:
        raise
    except Exception as error:  # safetensors has an error type for damaged files
        raise FileError(f"{path} must be a safetensors file: {error}") from None
    return found


def _write_safetensors(path: Path, tensors: dict[str, Tensor]) -> None:
    _safetensors().save_file(tensors, path)


def _read_torch(path: Path) -> dict[str, Tensor]:
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise FileError(
            f"{path} must hold only tensors and plain values, but holds other objects, and unpickling can run any code; "
            "where the project is installed, save the state dict alone: torch.save(model.state_dict(), path)"
        ) from None
    except (EOFError, RuntimeError) as error:
        raise FileError(f"{path} must be a file of torch.save: {error}") from None
    return _flat(held)


def _flat(held: object) -> dict[str, Tensor]:
    """The tensors in nested mappings, names joined by dots."""
    if not isinstance(held, Mapping):
        return {}
    found: dict[str, Tensor] = {}
    for name, value in held.items():
        if isinstance(value, Tensor):
            found[str(name)] = value
        else:
            found.update({f"{name}.{rest}": tensor for rest, tensor in _flat(value).items()})
    return found


def _write_torch(path: Path, tensors: dict[str, Tensor]) -> None:
    torch.save(tensors, path)


def _read_npz(path: Path) -> dict[str, Tensor]:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (ValueError, EOFError, AttributeError) as error:
        raise FileError(f"{path} must be an .npz file of plain arrays: {error}") from None
    return {name: torch.from_numpy(array) for name, array in arrays.items() if array.dtype.kind in "fiub"}


def _write_npz(path: Path, tensors: dict[str, Tensor]) -> None:
    low = sorted(name for name, tensor in tensors.items() if tensor.dtype == torch.bfloat16)
    if low:
        raise FileError(f"NumPy has no bfloat16, the dtype of {', '.join(low)}; write .safetensors or .pt")
    np.savez(path, **{name: tensor.numpy() for name, tensor in tensors.items()})  # type: ignore[arg-type]


_FORMS: dict[str, tuple[Callable[[Path], dict[str, Tensor]], Callable[[Path, dict[str, Tensor]], None]]] = {
    ".safetensors": (_read_safetensors, _write_safetensors),
    ".pt": (_read_torch, _write_torch),
    ".pth": (_read_torch, _write_torch),
    ".bin": (_read_torch, _write_torch),
    ".ckpt": (_read_torch, _write_torch),
    ".npz": (_read_npz, _write_npz),
}
"""Reader and writer by suffix."""


def _by_suffix(path: Path) -> tuple[Callable[[Path], dict[str, Tensor]], Callable[[Path, dict[str, Tensor]], None]]:
    if path.suffix not in _FORMS:
        raise FileError(f"{path} must end in {', '.join(_FORMS)}: the suffix selects the format")
    return _FORMS[path.suffix]
