"""Tensors in files: safetensors, PyTorch's .pt, NumPy's .npz, Keras' .h5.

A file is not trusted: nothing in it is executed, and every size that it states is compared with the file before memory is
allocated. A file is written whole or not at all.
"""

from __future__ import annotations

import io
import math
import os
import stat
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from festina.convert import pickled
from festina.convert.pickled import ForeignError, Storage, StoredTensor, Unsupported
from festina.output import check_target, replacing

MOST_TIMES = 64
"""A file's tensors may take this many times its size: trained weights hardly compress, and models in which modules share
parameters name them a few times. `LEAST_LIMIT` bytes are always allowed: a few zeros compress well."""

LEAST_LIMIT = 16 * 2**20

MOST_NESTED = 100
"""The most mappings or groups within one another."""

MOST_NAMES = 200_000
"""The most names of nested mappings or groups; a few that hold one another several times make names without end."""


class FileError(ValueError):
    """A file cannot be read or written. The text says why and what to do."""


def read(path: str | Path, prefix: str = "") -> dict[str, Tensor]:
    """The tensors in a file by name; names of nested mappings are joined by dots, other values are skipped.

    Args:
        path: the file; its suffix selects the format.
        prefix: read only the tensors whose names start with it.

    Raises:
        FileError: the suffix is unknown, `path` is no regular file, the file is damaged, states sizes that it cannot hold,
            holds objects other than tensors and plain values, or one of the tensors is not dense (sparse, nested,
            quantised) or has no values (meta); or the package for the format is missing.
        OSError: the file does not exist or cannot be opened.
    """
    path = Path(path)
    form = _by_suffix(path)
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        what = "folder" if stat.S_ISDIR(mode) else "device, pipe or socket"
        raise FileError(f"{path} must be a file, but is a {what}")
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        try:
            if not size:
                raise ValueError("it is empty")
            return form.read(file, size, prefix)
        except _Refusal as error:
            raise FileError(f"{path} {error}") from None
        except FileError:
            raise
        except Exception as error:  # a damaged file makes the readers raise errors of many types
            raise FileError(f"{path} must be {form.kind}: {_brief(error)}") from error


def write(path: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors by name, in the format of the suffix. After an error, a file that was there is as before.

    Raises:
        FileError: the suffix is unknown or only read, a tensor is not dense or has no values, the format cannot hold its
            dtype, or the package for the format is missing.
        OSError: the file cannot be written (see `festina.output.replacing`).
    """
    path = Path(path)
    save = _writer(path)
    for name, tensor in tensors.items():
        if problem := unusable(tensor):
            raise FileError(f"{path}: {name} must be a dense tensor with values, but {problem}")
    held = {name: tensor.detach().cpu().resolve_conj().resolve_neg().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as unfinished:
        try:
            save(unfinished, held)
        except (OSError, ValueError):
            raise
        except Exception as error:  # of each library its own, such as RuntimeError and SafetensorError on a full disk
            raise OSError(f"{path} cannot be written: {_brief(error)}") from error


def check_output(path: str | Path) -> None:
    """Raise unless tensors could be written to `path`, so that a long task does not fail at its end.

    Raises:
        FileError: the suffix is unknown or only read.
        OSError: as `festina.output.check_target`.
    """
    _writer(Path(path))
    check_target(path)


def unusable(tensor: Tensor) -> str | None:
    """Why a tensor is no dense block of numbers, in words; None if it is one."""
    if tensor.is_nested:
        return pickled.NESTED
    if tensor.layout != torch.strided:
        return pickled.SPARSE
    if tensor.is_quantized:
        return pickled.QUANTISED
    return pickled.META if tensor.is_meta else None


class _Refusal(Exception):
    """A statement about the file, which reads on after its name."""


def _brief(error: Exception) -> str:
    """The first line of an error."""
    return (str(error).splitlines() or [""])[0][:300] or type(error).__name__


def _check_total(nbytes: int, size: int) -> None:
    """Raise if all tensors together take more memory than a file of `size` bytes may ask for."""
    limit = max(MOST_TIMES * size, LEAST_LIMIT)
    if nbytes > limit:
        raise _Refusal(
            f"has {size} bytes, but its tensors would take {nbytes}, more than the {limit} that are allowed; if you trust "
            "the file, load it where it was made, and save contiguous copies of its tensors without compression"
        )


# Zip archives, which .npz and .pt are.


@contextmanager
def _archive(file: IO[bytes], size: int) -> Iterator[tuple[zipfile.ZipFile, dict[str, zipfile.ZipInfo]]]:
    """An archive and its members by name, none encrypted, all of sizes that such a file may have."""
    with zipfile.ZipFile(file) as archive:
        members = {info.filename: info for info in archive.infolist()}
        if len(members) < len(archive.infolist()):
            raise ValueError("two of its members have the same name")
        for name, info in members.items():
            if info.flag_bits & 1:
                raise _Refusal(f"must not be encrypted, but its member {name} is; decrypt it first")
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise _Refusal(
                    f"must be stored or deflated, but its member {name} is compressed by method {info.compress_type} of zip"
                )
            if info.compress_type == zipfile.ZIP_STORED and info.compress_size != info.file_size:
                raise ValueError(f"its member {name} is stored with two sizes")
        _check_total(sum(info.file_size for info in members.values()), size)
        yield archive, members


# safetensors.


def _safetensors() -> Any:
    try:
        import safetensors.torch  # noqa: PLC0415  safetensors is optional
    except ImportError:
        raise FileError(
            "a .safetensors file needs the package safetensors, which is not installed; install it with: "
            "pip install 'festina[convert]'"
        ) from None
    return safetensors


def _read_safetensors(file: IO[bytes], size: int, prefix: str) -> dict[str, Tensor]:
    with _safetensors().safe_open(
        file.name, framework="pt", device="cpu"
    ) as held:  # it compares all sizes with the file
        return {name: held.get_tensor(name) for name in held.keys() if name.startswith(prefix)}  # noqa: SIM118


def _write_safetensors(path: Path, tensors: dict[str, Tensor]) -> None:
    _safetensors().torch.save_file(tensors, path)


# PyTorch.


def _read_torch(file: IO[bytes], size: int, prefix: str) -> dict[str, Tensor]:
    is_archive = file.read(4) == b"PK\x03\x04"
    file.seek(0)
    try:
        return (_read_torch_archive if is_archive else _read_torch_legacy)(file, size, prefix)
    except ForeignError as error:
        raise _Refusal(
            f"must hold only tensors and plain values, but holds {_brief(error)} or the like, and unpickling can run any "
            "code; where the project is installed, save the state dict alone: torch.save(model.state_dict(), path)"
        ) from None


def _read_torch_archive(file: IO[bytes], size: int, prefix: str) -> dict[str, Tensor]:
    with _archive(file, size) as (archive, members):
        structures = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(structures) != 1:
            raise ValueError(f"it must have one data.pkl, but has {len(structures)}")
        folder = structures[0].removesuffix("data.pkl")
        held, _ = pickled.load(io.BytesIO(archive.read(structures[0])))
        is_swapped = folder + "byteorder" in members and archive.read(folder + "byteorder") != b"little"

        def data(storage: Storage) -> bytes:
            member = f"{folder}data/{storage.key}"
            if member not in members or members[member].file_size != storage.length * storage.dtype.itemsize:
                raise ValueError(f"its member {member} must hold {storage.length} elements of {storage.dtype}")
            if is_swapped:
                raise _Refusal("is big-endian; save it again on a little-endian machine")
            return archive.read(member)

        return _materialised(held, data, size, prefix)


MAGIC = 0x1950A86A20F9469CFC6C
"""The first number in a file of torch.save before PyTorch 1.6."""


def _read_torch_legacy(file: IO[bytes], size: int, prefix: str) -> dict[str, Tensor]:
    stream = io.BytesIO(file.read())
    if pickled.load(stream)[0] != MAGIC:
        raise ValueError("it does not begin as one")
    pickled.load(stream)  # the version of the format
    pickled.load(stream)  # sizes of C's types where it was saved
    held, storages = pickled.load(stream)
    keys, _ = pickled.load(stream)
    found: dict[str, bytes] = {}
    for key in keys:  # type: ignore[attr-defined]
        storage = storages[key]
        nbytes = storage.length * storage.dtype.itemsize
        length = int.from_bytes(stream.read(8), "little")
        if length != storage.length or stream.tell() + nbytes > size:
            raise ValueError(f"it must hold {storage.length} elements of storage {key}")
        found[key] = stream.read(nbytes)
    return _materialised(held, lambda storage: found[storage.key], size, prefix)


def _materialised(held: object, data: Callable[[Storage], bytes], size: int, prefix: str) -> dict[str, Tensor]:
    """The tensors that a pickle describes; `data` reads a storage. Tensors of one storage share its memory."""
    stored: dict[str, StoredTensor] = {}
    for name, value in _flat(held):
        if name.startswith(prefix):
            if isinstance(value, Unsupported):
                raise _Refusal(f"must hold dense tensors with values, but {name} {value.what}")
            value.check()
            stored[name] = value
    _check_total(sum(tensor.nbytes for tensor in stored.values()), size)
    contents: dict[str, Tensor] = {}
    found: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        key = tensor.storage.key
        if key not in contents:
            content = data(tensor.storage)
            contents[key] = (
                torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else torch.empty(0, device="cpu")
            )
        found[name] = tensor.view(contents[key])
    return found


def _flat(held: object) -> Iterator[tuple[str, StoredTensor | Unsupported]]:
    """The tensors in nested mappings, names joined by dots."""
    rest: list[tuple[str, object, int]] = [("", held, 0)]
    count = 0
    while rest:
        names, value, depth = rest.pop()
        count += 1
        if depth > MOST_NESTED or count > MOST_NAMES:
            raise _Refusal(
                f"must nest mappings at most {MOST_NESTED} deep, with {MOST_NAMES} names, but nests more, or one holds itself"
            )
        if isinstance(value, dict):
            prefix = f"{names}." if depth else ""
            rest += [(f"{prefix}{name}", inner, depth + 1) for name, inner in reversed(value.items())]
        elif isinstance(value, StoredTensor | Unsupported) and depth:
            yield names, value


def _write_torch(path: Path, tensors: dict[str, Tensor]) -> None:
    torch.save(tensors, path)


# NumPy.

_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def _read_npz(file: IO[bytes], size: int, prefix: str) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    with _archive(file, size) as (archive, members):
        for member, info in members.items():
            if not member.endswith(".npy"):
                raise ValueError(f"its member {member} is no .npy file")
            name = member.removesuffix(".npy")
            if not name.startswith(prefix):
                continue
            with archive.open(info) as content:
                version = np.lib.format.read_magic(content)
                if version not in _HEADERS:
                    raise ValueError(f"its member {member} is of version {version} of the format")
                shape, _, dtype = _HEADERS[version](content)
                if dtype.hasobject:
                    raise ValueError(f"its member {member} holds Python objects")
                nbytes = math.prod(shape) * dtype.itemsize
                if content.tell() + nbytes != info.file_size:
                    raise ValueError(f"its member {member} must have {nbytes} bytes for the shape {list(shape)}")
            if dtype.kind in "fiubc":  # others are texts and dates
                with archive.open(info) as content:
                    array = np.lib.format.read_array(content, allow_pickle=False)
                found[name] = torch.from_numpy(array.astype(dtype.newbyteorder("="), copy=False))
    return found


def _write_npz(path: Path, tensors: dict[str, Tensor]) -> None:
    arrays: dict[str, np.ndarray] = {}
    for name, tensor in tensors.items():
        try:
            arrays[name] = tensor.numpy()
        except TypeError:
            low = ", ".join(sorted(other for other, of in tensors.items() if of.dtype == tensor.dtype))
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise FileError(f"NumPy has no {dtype}, the dtype of {low}; write .safetensors or .pt") from None
    with zipfile.ZipFile(path, "w") as archive:  # np.savez takes some names for arguments of its own
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


# HDF5. What its library opens is this file alone: no link is followed, and no filter loaded.


def _read_hdf5(file: IO[bytes], size: int, prefix: str) -> dict[str, Tensor]:
    """Datasets of numbers; names of groups are joined by slashes."""
    try:
        import h5py  # noqa: PLC0415  h5py is optional
    except ImportError:
        raise FileError(
            "an .h5 file needs the package h5py, which is not installed; install it with: pip install 'festina[convert]'"
        ) from None
    found: dict[str, Tensor] = {}
    with h5py.File(file.name, "r", locking=False) as held:
        datasets = dict(_datasets(h5py, held, prefix))
        _check_total(sum(_bytes_of_dataset(dataset) for dataset in datasets.values()), size)
        for name, dataset in datasets.items():
            array = np.asarray(dataset[()])
            found[name] = torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))
    return found


def _datasets(h5py: Any, held: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """The datasets of numbers whose names start with `prefix`, if the file holds them as they are."""
    rest: list[tuple[str, Any, int]] = [("", held, 0)]
    count = 0
    while rest:
        folder, group, depth = rest.pop()
        for part in group:
            name = f"{folder}{part}"
            count += 1
            if depth > MOST_NESTED or count > MOST_NAMES:
                raise _Refusal(
                    f"must nest groups at most {MOST_NESTED} deep, with {MOST_NAMES} names, but nests more, or one holds itself"
                )
            if not (name.startswith(prefix) or prefix.startswith(f"{name}/")):
                continue
            if not isinstance(group.get(part, getlink=True), h5py.HardLink):
                raise _Refusal(f"must hold all values itself, but {name} is a link")
            value = group[part]
            if isinstance(value, h5py.Group):
                rest.append((f"{name}/", value, depth + 1))
            elif isinstance(value, h5py.Dataset) and name.startswith(prefix) and value.dtype.kind not in "OS":  # texts
                if problem := _problem_of_dataset(value):
                    raise _Refusal(f"must hold plain numbers, but {name} {problem}")
                yield name, value


def _problem_of_dataset(dataset: Any) -> str | None:
    """Why a dataset is not read, in words, or None."""
    layout = dataset.id.get_create_plist()
    if dataset.is_virtual or layout.get_external_count():
        return "has its values in another file"
    if layout.get_nfilters():
        return "is compressed or filtered; h5repack -f NONE in.h5 out.h5 makes a plain copy"
    if dataset.shape is None:
        return "has no values"
    return None if dataset.dtype.kind in "fiubc" else f"is of the type {dataset.dtype}"


def _bytes_of_dataset(dataset: Any) -> int:
    """What reading it takes; values in chunks are read chunk by chunk."""
    size: int = max(math.prod(dataset.shape), math.prod(dataset.chunks or ())) * dataset.dtype.itemsize
    return size


@dataclass(frozen=True)
class _Format:
    """What files with these suffixes are, and how they are read, and written if they are."""

    kind: str
    suffixes: Collection[str]
    read: Callable[[IO[bytes], int, str], dict[str, Tensor]]
    write: Callable[[Path, dict[str, Tensor]], None] | None


_FORMATS = {
    suffix: form
    for form in (
        _Format("a safetensors file", [".safetensors"], _read_safetensors, _write_safetensors),
        _Format("a file of torch.save", [".pt", ".pth", ".bin", ".ckpt"], _read_torch, _write_torch),
        _Format("an .npz file of plain arrays", [".npz"], _read_npz, _write_npz),
        _Format("an HDF5 file, as Keras saves weights", [".h5", ".hdf5"], _read_hdf5, None),
    )
    for suffix in form.suffixes
}
"""The format by suffix."""


def _by_suffix(path: Path) -> _Format:
    if path.suffix not in _FORMATS:
        raise FileError(f"{path} must end in {', '.join(_FORMATS)}: the suffix selects the format")
    return _FORMATS[path.suffix]


def _writer(path: Path) -> Callable[[Path, dict[str, Tensor]], None]:
    if (write := _by_suffix(path).write) is not None:
        return write
    written = ", ".join(suffix for suffix, form in _FORMATS.items() if form.write is not None)
    raise FileError(f"{path} must end in {written}: files in {path.suffix} are only read")
