"""Files that are damaged, made to harm, or of something else: `festina convert` says so in a line, and changes nothing."""

from __future__ import annotations

import itertools
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

import festina
from festina import cli, convert
from festina.convert import files
from festina.module import PLAN_KEY, plan_tensor
from festina.norms import HASTE
from festina.norms import PLANS as PLANS_BY_NAME
from festina.spec import CELLS, LayerSpec

TIB = 2**40
Make = Callable[[Path], Any]


def weights() -> dict[str, Tensor]:
    """A state dict of haste's GRU."""
    torch.manual_seed(0)
    return convert.dump("haste.GRU", festina.GRU(3, 5))


# Bytes of files.


def saved(content: Any, path: Path) -> None:
    torch.save(content, path)


def with_weight(change: Callable[[Tensor], Any], path: Path) -> None:
    """A .pt whose bias is changed."""
    state = weights()
    torch.save({**state, "bias": change(state["bias"])}, path)


def legacy(path: Path) -> None:
    torch.save(weights(), path, _use_new_zipfile_serialization=False)


def cut(make: Make, end: Callable[[int], int], path: Path) -> None:
    """The beginning of a good file."""
    make(path)
    content = path.read_bytes()
    path.write_bytes(content[: end(len(content))])


def replaced(make: Make, old: bytes, new: bytes, path: Path) -> None:
    """A good file, its bytes `old` replaced."""
    make(path)
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new))


def good(path: Path) -> None:
    files.write(path, weights())


def text(path: Path) -> None:
    path.write_text("no weights here\n" * 9)


def zipped(members: dict[str, bytes], path: Path, method: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def twice(name: str, content: bytes, path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, content)
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr(name, content)


def patched(make: Make, offset: int, value: int, path: Path) -> None:
    """An archive in whose directory and members a field of 16 bits is changed; `offset` as in the members' headers."""
    make(path)
    content = bytearray(path.read_bytes())
    for mark, at in ((b"PK\3\4", offset), (b"PK\1\2", offset + 2)):
        place = content.find(mark)
        while place >= 0:
            struct.pack_into("<H", content, place + at, value)
            place = content.find(mark, place + 1)
    path.write_bytes(content)


FLAGS, METHOD = 6, 8


def npy(shape: str, data: bytes = b"", descr: str = "'<f4'", version: bytes = b"\1\0") -> bytes:
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY" + version + struct.pack("<H", len(header)) + header + data


def array(content: bytes, path: Path) -> None:
    zipped({"kernel.npy": content}, path)


def claiming(path: Path) -> None:
    """An .npz with a member that the directory, too, says to be of 4 TiB."""
    content = npy(f"({TIB},)", bytes(64))
    zipped({"kernel.npy": content}, path, zipfile.ZIP_DEFLATED)
    raw = bytearray(path.read_bytes())
    at = raw.find(b"PK\1\2")
    struct.pack_into("<I", raw, at + 24, 0xFFFFFFFE)
    path.write_bytes(raw)


def arrays(change: Callable[[np.ndarray], Any], path: Path) -> None:
    held = {name: tensor.numpy() for name, tensor in weights().items()}
    np.savez(path, **{**held, "bias": change(held["bias"])})


def set_to(value: float, tensor: Any) -> Any:
    changed = tensor.copy() if isinstance(tensor, np.ndarray) else tensor.clone()
    changed[1] = value
    return changed


def archive_of(structure: bytes, path: Path, method: int = zipfile.ZIP_STORED, **members: bytes) -> None:
    """A .pt whose structure is this pickle."""
    zipped({"a/data.pkl": structure, "a/data/0": bytes(16), **members}, path, method)


def tensor_of(shape: bytes, stride: bytes = b"K\1\x85", length: bytes = b"K\4", offset: bytes = b"K\0") -> bytes:
    """The pickle of {"kernel": a tensor}, its sizes as opcodes."""
    storage = b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\x000X\3\0\0\0cpu" + length + b"tQ"
    rebuilt = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + offset + shape + stride + b"\x89}tR"
    return b"\x80\2}X\6\0\0\0kernel" + rebuilt + b"s."


def long(value: int) -> bytes:
    return b"\x8a\x08" + struct.pack("<q", value)


def legacy_of(structure: bytes, path: Path) -> None:
    parts = [files.MAGIC, 1001, {}]
    path.write_bytes(b"".join(pickle.dumps(part, 2) for part in parts) + structure + pickle.dumps(["0"], 2) + bytes(24))


def called(name: bytes, argument: bytes) -> bytes:
    """The pickle of a call."""
    return b"\x80\2}X\1\0\0\0wc" + name + argument + b"\x85Rs."


def cyclic(path: Path) -> None:
    held: dict[str, Any] = {}
    held["self"] = held
    torch.save(held, path)


def branching(path: Path) -> None:
    """31 mappings that make 2^30 names."""
    held: dict[str, Any] = {"weight": torch.ones(1)}
    for _ in range(30):
        held = {"a": held, "b": held}
    torch.save(held, path)


def nested(levels: int, path: Path) -> None:
    archive_of(b"\x80\2" + b"}X\1\0\0\0a" * levels + b"}" + b"s" * levels + b".", path)


def safetensors(header: str, data: bytes, path: Path, length: int | None = None) -> None:
    raw = header.encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)


def one(dtype: str = "F32", shape: str = "[4]", offsets: str = "[0, 16]") -> str:
    return f'{{"kernel": {{"dtype": "{dtype}", "shape": {shape}, "data_offsets": {offsets}}}}}'


PT: dict[str, Make] = {
    "text": text,
    "empty": Path.touch,
    "half": partial(cut, good, lambda n: n // 2),
    "but a byte": partial(cut, good, lambda n: n - 1),
    "four bytes": partial(cut, good, lambda n: 4),
    "legacy half": partial(cut, legacy, lambda n: n // 2),
    "legacy but a byte": partial(cut, legacy, lambda n: n - 1),
    "legacy 4 TiB": partial(legacy_of, tensor_of(long(TIB) + b"\x85", length=long(TIB)).replace(b"tQ", b"NtQ")),
    "legacy magic": lambda path: path.write_bytes(pickle.dumps(7, 2)),
    "storage of 4 TiB": partial(archive_of, tensor_of(long(TIB) + b"\x85", length=long(TIB))),
    "shape of 4 TiB": partial(archive_of, tensor_of(long(TIB) + b"\x85")),
    "stride 0 to 4 TiB": partial(archive_of, tensor_of(long(TIB) + b"\x85", b"K\0\x85")),
    "expanded": partial(with_weight, lambda t: t[:1].expand(TIB)),
    "offset": partial(archive_of, tensor_of(b"K\4\x85", offset=b"K\1")),
    "negative stride": partial(archive_of, tensor_of(b"K\4\x85", b"J\xff\xff\xff\xff\x85")),
    "negative shape": partial(archive_of, tensor_of(b"J\xff\xff\xff\xff\x85")),
    "overflow": partial(archive_of, tensor_of(long(2**61) + b"K\x08\x86", b"K\x08K\1\x86")),
    "strides": partial(archive_of, tensor_of(b"K\4\x85", b")")),
    "shape of text": partial(archive_of, tensor_of(b"X\1\0\0\0a\x85")),
    "axes": partial(archive_of, tensor_of(b"(" + b"K\1" * 1000 + b"t", b"(" + b"K\1" * 1000 + b"t")),
    "Tensor(2^40)": partial(archive_of, called(b"torch\nTensor\n", long(TIB))),
    "bytearray(2^40)": partial(archive_of, called(b"builtins\nbytearray\n", long(TIB))),
    "os.system": partial(archive_of, called(b"os\nsystem\n", b"X\4\0\0\0true")),
    "eval": partial(archive_of, called(b"builtins\neval\n", b"X\1\0\0\x001")),
    "no stop": partial(archive_of, b"\x80\2}"),
    "nothing on the stack": partial(archive_of, b"\x80\2s."),
    "no mark": partial(archive_of, b"\x80\2u."),
    "memo": partial(archive_of, b"\x80\2h\7."),
    "memo of 2^32": partial(archive_of, b"\x80\2}r\xff\xff\xff\xffh\1."),
    "append to a dict": partial(archive_of, b"\x80\2}K\1a."),
    "call of a dict": partial(archive_of, b"\x80\2})R."),
    "text of 4 GiB": partial(archive_of, b"\x80\2X\xff\xff\xff\xffabc."),
    "protocol 4": lambda path: archive_of(pickle.dumps({"kernel": "w" * 99}, 4), path),
    "deep tuple as a key": partial(archive_of, b"\x80\2})" + b"\x85" * 200_000 + b"K\1s."),
    "shared tuple as a key": partial(archive_of, b"\x80\2})" + b"q\0h\0\x86" * 40 + b"K\1s."),
    "shared lists called": partial(archive_of, b"\x80\2}X\1\0\0\0a]" + b"q\0]h\0ah\0a" * 30 + b")Rs."),
    "storage called": partial(archive_of, called(b"torch.storage\nUntypedStorage\n", long(2**38))),
    "cyclic": cyclic,
    "branching": branching,
    "10,000 deep": partial(nested, 10_000),
    "structure bomb": lambda path: archive_of(b"\x80\2" + b"}0" * 10_000_000, path, zipfile.ZIP_DEFLATED),
    "encrypted": partial(patched, partial(saved, {"w": torch.ones(1)}), FLAGS, 1),
    "no structure": partial(zipped, {"a/data/0": bytes(16)}),
    "two structures": partial(zipped, {"a/data.pkl": tensor_of(b"K\4\x85"), "b/data.pkl": tensor_of(b"K\4\x85")}),
    "no storage": partial(zipped, {"a/data.pkl": tensor_of(b"K\4\x85")}),
    "short storage": partial(zipped, {"a/data.pkl": tensor_of(b"K\4\x85"), "a/data/0": bytes(12)}),
    "checksum": lambda path: replaced(partial(saved, {"kernel": torch.arange(4.0)}), b"\0\0@@", b"\0\0@A", path),
    "big-endian": partial(zipped, {"a/data.pkl": tensor_of(b"K\4\x85"), "a/data/0": bytes(16), "a/byteorder": b"big"}),
    "module": lambda path: torch.save(nn.GRU(3, 5), path),
    "scripted": lambda path: torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path),
    "meta": partial(with_weight, lambda t: t.to("meta")),
    "sparse": partial(with_weight, lambda t: t.to_sparse()),
    "sparse rows": partial(with_weight, lambda t: t[None].to_sparse_csr()),
    "nested tensor": partial(with_weight, lambda t: torch.nested.nested_tensor([t, t])),
    "jagged": partial(archive_of, called(b"torch.nested._internal.nested_tensor\nNestedTensor\n", b"K\1")),
    "quantised": partial(with_weight, lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8)),
    "complex": partial(with_weight, lambda t: t.to(torch.complex64)),
    "conjugated": partial(with_weight, lambda t: t.to(torch.complex64).conj()),
    "negated": partial(with_weight, lambda t: t.to(torch.complex64).conj().imag),
    "bool": partial(with_weight, lambda t: t > 0),
    "float8": partial(with_weight, lambda t: t.to(torch.float8_e4m3fn)),
    "no axes": partial(with_weight, lambda t: t[0]),
    "no elements": partial(with_weight, lambda t: t.new_empty(TIB, 0)),
    "nan": partial(with_weight, partial(set_to, float("nan"))),
    "infinity": partial(with_weight, partial(set_to, float("inf"))),
    "a list": lambda path: torch.save([torch.ones(2)], path),
    "a tensor": lambda path: torch.save(torch.ones(2), path),
}

NPZ: dict[str, Make] = {
    "text": text,
    "empty": Path.touch,
    "half": partial(cut, good, lambda n: n // 2),
    "but a byte": partial(cut, good, lambda n: n - 1),
    "no members": partial(zipped, {}),
    "encrypted": partial(patched, good, FLAGS, 1),
    "bzip2": partial(zipped, {"kernel.npy": npy("(4,)", bytes(16))}, method=zipfile.ZIP_BZIP2),
    "lzma": partial(zipped, {"kernel.npy": npy("(4,)", bytes(16))}, method=zipfile.ZIP_LZMA),
    "method 99": partial(patched, good, METHOD, 99),
    "deflated by name alone": partial(patched, good, METHOD, zipfile.ZIP_DEFLATED),
    "a member of text": partial(zipped, {"README.txt": b"weights"}),
    "a member without a header": partial(zipped, {"kernel.npy": b"weights"}),
    "same names": partial(twice, "kernel.npy", npy("(4,)", bytes(16))),
    "4 TiB": partial(array, npy(f"({TIB},)", bytes(16))),
    "4 TiB of axes": partial(array, npy(f"({2**20}, {2**20})", bytes(16))),
    "overflow": partial(array, npy(f"({2**61}, 8)", bytes(16))),
    "claimed by the directory too": claiming,
    "negative shape": partial(array, npy("(-4,)", bytes(16))),
    "too many bytes": partial(array, npy("(4,)", bytes(20))),
    "bomb": lambda path: zipped({"kernel.npy": npy(f"({2**23},)", bytes(2**25))}, path, zipfile.ZIP_DEFLATED),
    "objects": partial(array, npy("(1,)", pickle.dumps(None), "'|O'")),
    "version 9": partial(array, npy("(4,)", bytes(16), version=b"\x09\0")),
    "header of no literal": partial(array, npy("open('/etc/passwd')", bytes(16))),
    "deep header": partial(array, npy("(" * 5000 + ")" * 5000)),
    "signs": partial(array, npy("(" + "-" * 9000 + "1,)")),
    "dtype": partial(array, npy("(4,)", bytes(16), "'<f3'")),
    "checksum": lambda path: replaced(partial(array, npy("(4,)", b"abcdefghijklmnop")), b"mnop", b"mnoq", path),
    "complex": partial(arrays, lambda a: a + 0j),
    "long double": partial(arrays, lambda a: a.astype(np.longdouble)),
    "integers": partial(arrays, lambda a: a.astype(np.int64)),
    "words": partial(arrays, lambda a: np.array(["a"])),
    "nan": partial(arrays, partial(set_to, float("nan"))),
    "infinity": partial(arrays, partial(set_to, float("-inf"))),
}

SAFETENSORS: dict[str, Make] = {
    "text": text,
    "empty": Path.touch,
    "half": partial(cut, good, lambda n: n // 2),
    "but a byte": partial(cut, good, lambda n: n - 1),
    "header of 4 TiB": partial(safetensors, one(), bytes(16), length=TIB),
    "header past the end": partial(safetensors, one(), b"", length=999),
    "deep header": partial(safetensors, "[" * 50_000, b""),
    "no JSON": partial(safetensors, "weights", b""),
    "shape of 4 TiB": partial(safetensors, one(shape=f"[{TIB}]"), bytes(16)),
    "overflow": partial(safetensors, one(shape=f"[{2**62}, 16]"), bytes(16)),
    "negative shape": partial(safetensors, one(shape="[-4]"), bytes(16)),
    "data past the end": partial(safetensors, one(shape=f"[{TIB}]", offsets=f"[0, {4 * TIB}]"), bytes(16)),
    "data backwards": partial(safetensors, one(offsets="[16, 0]"), bytes(16)),
    "dtype": partial(safetensors, one("F3"), bytes(16)),
    "nan": lambda path: files.write(path, {**weights(), "bias": set_to(float("nan"), weights()["bias"])}),
}


# HDF5.


def hdf5(add: Callable[[Any], Any], path: Path) -> None:
    """The weights of haste's GRU without its bias, and what `add` does to the file."""
    with h5py.File(path, "w") as file:
        for name, tensor in weights().items():
            if name != "bias":
                file[name] = tensor.numpy()
        add(file)


def plain(file: Any) -> None:
    file["bias"] = weights()["bias"].numpy()


def dataset(*shape: Any, **options: Any) -> Make:
    return partial(hdf5, lambda file: file.create_dataset("bias", *shape, **options))


def linked(kind: Callable[[str], Any], path: Path) -> None:
    """The bias is a link, which would find one."""
    with h5py.File(path.with_name("other.h5"), "w") as other:
        plain(other)
    hdf5(lambda file: file.update({"title": weights()["bias"].numpy()}), path)
    with h5py.File(path, "a") as file:
        file["bias"] = kind(str(path.with_name("other.h5")))


def stored_outside(path: Path) -> None:
    path.with_name("bytes").write_bytes(bytes(60))
    dataset((15,), "f4", external=[(str(path.with_name("bytes")), 0, 60)])(path)


def virtual(path: Path) -> None:
    layout = h5py.VirtualLayout((15,), "f4")
    layout[:] = h5py.VirtualSource(str(path.with_name("other.h5")), "bias", (15,))
    hdf5(lambda file: file.create_virtual_dataset("bias", layout), path)


def itself(file: Any) -> None:
    """A group that holds itself, twice."""
    group = file.create_group("a")
    group["b"] = group["c"] = group


def hdf5_nested(file: Any) -> None:
    for _ in range(150):
        file = file.create_group("a")


HDF5: dict[str, Make] = {
    "text": text,
    "empty": Path.touch,
    "half": partial(cut, partial(hdf5, plain), lambda n: n // 2),
    "but a byte": partial(cut, partial(hdf5, plain), lambda n: n - 1),
    "signature alone": partial(cut, partial(hdf5, plain), lambda n: 8),
    "4 TiB": dataset((TIB,), "f4"),
    "4 TiB of axes": dataset((2**20, 2**20), "f4"),
    "overflow": dataset((2**60, 2**10), "f4"),
    "4 TiB in chunks": dataset((TIB,), "f4", chunks=(4,)),
    "a chunk of 2 GiB": dataset((4,), "f4", chunks=(2**29,), maxshape=(None,)),
    "bomb": dataset(data=np.zeros(2**23, "f4"), chunks=(2**20,), compression="gzip"),
    "filter": dataset(data=np.zeros(15, "f4"), chunks=(15,), compression="lzf"),
    "link": partial(linked, lambda other: h5py.SoftLink("/title")),
    "link to nothing": partial(linked, lambda other: h5py.SoftLink("/none")),
    "link to itself": partial(linked, lambda other: h5py.SoftLink("/bias")),
    "link to another file": partial(linked, lambda other: h5py.ExternalLink(other, "/bias")),
    "link to a device": partial(linked, lambda other: h5py.ExternalLink("/dev/stdin", "/bias")),
    "values in another file": stored_outside,
    "values of another dataset": virtual,
    "group in itself": partial(hdf5, itself),
    "groups 150 deep": partial(hdf5, hdf5_nested),
    "no values": dataset(data=h5py.Empty("f4")),
    "records": dataset(data=np.zeros(15, [("a", "f4"), ("b", "i4")])),
    "opaque": dataset(data=np.zeros(15, "V2")),
    "references": partial(hdf5, lambda file: file.create_dataset("bias", data=file.ref, dtype=h5py.ref_dtype)),
    "words": dataset(data=["a"] * 15, dtype=h5py.string_dtype()),
    "a type by name": partial(hdf5, lambda file: file.update({"bias": np.dtype("f4")})),
    "long double": dataset(data=np.zeros(15, np.longdouble)),
    "complex": dataset(data=np.zeros(15, np.complex64)),
    "integers": dataset(data=np.zeros(15, np.int64)),
    "no elements": dataset((TIB, 0), "f4"),
    "nan": dataset(data=np.full(15, np.nan, "f4")),
    "a name of no text": partial(hdf5, lambda file: file.update({b"\xff\n": np.zeros(2)})),
}

TABLE = [
    pytest.param(suffix, make, id=f"{suffix}-{name}")
    for suffix, table in ((".pt", PT), (".npz", NPZ), (".safetensors", SAFETENSORS), (".h5", HDF5))
    for name, make in table.items()
]


def refused(capsys: Any, folder: Path, source: Path, output: Path, named: Path, *args: str) -> str:
    """The one line that `festina convert` prints; nothing in the folder of the output changes."""
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert cli.main(["convert", *(args or ("haste.GRU",)), str(source), str(output)]) == 2
    printed, error = capsys.readouterr()
    assert printed == ""
    assert error.startswith("festina: ")
    assert error.count("\n") == 1, error
    assert str(named) in error
    assert "allocate" not in error, "sizes are compared with the file first"
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    assert not list(folder.glob(".*"))
    return error


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("suffix", "make"), TABLE)
def test_hostile_files(tmp_path: Path, capsys: Any, suffix: str, make: Make) -> None:
    source, output = tmp_path / f"in{suffix}", tmp_path / "out.pt"
    output.write_bytes(b"what was there")
    make(source)
    refused(capsys, tmp_path, source, output, source)


PLANS = {
    "text": "separate",
    "list": "[]",
    "number": "7",
    "deep": "[" * 2000,
    "deep field": '{"placement": ' + "[" * 900 + "]" * 900 + "}",
    "long": '{"eps": 1e-5}' + " " * 9000,
    "unknown field": '{"epsilon": 1e-5}',
    "name": '{"placement": "separate", "name": "TFA"}',
    "eps true": '{"eps": true}',
    "eps infinity": '{"eps": Infinity}',
    "eps 1e999": '{"eps": 1e999}',
    "eps of 400 digits": '{"eps": 1' + "0" * 400 + "}",
    "eps nan": '{"eps": NaN}',
    "eps negative": '{"eps": -1e-5}',
    "eps zero": '{"eps": 0}',
    "eps text": '{"eps": "1e-5"}',
    "eps null": '{"eps": null}',
    "clip": '{"clip": Infinity}',
    "clip false": '{"clip": false}',
    "inner_bias": '{"placement": "separate", "inner_bias": "no"}',
    "inner_bias_hh": '{"placement": "separate", "inner_bias_hh": 1}',
    "placement": '{"placement": "both"}',
    "placement null": '{"placement": null}',
    "groups": '{"placement": "separate", "groups": ["all"]}',
    "cell": '{"cell": {}}',
    "kind": '{"kind": true}',
    "reset": '{"reset": 1}',
}


def bits_of(text: str) -> Tensor:
    """A text as a checkpoint holds it."""
    return torch.from_numpy(np.unpackbits(np.frombuffer(text.encode(), np.uint8)).astype(np.float32))


SAVED_PLANS: dict[str, Tensor] = {
    **{name: torch.tensor(list(plan.encode()), dtype=torch.uint8) for name, plan in PLANS.items()},
    "no UTF-8": torch.tensor([255, 255], dtype=torch.uint8),
    **{f"bits of {name}": bits_of(PLANS[name]) for name in ("deep field", "long", "eps nan", "unknown field")},
    "ones": torch.ones(4),
    "ones, as many as a plan has": torch.ones(2048),
    "halves": torch.full((2048,), 0.5),
    "negative": -plan_tensor(HASTE),
    "matrix of floats": plan_tensor(HASTE).view(8, -1),
    "complex": plan_tensor(HASTE) + 0j,
    "a million floats": torch.zeros(1_000_000),
    "matrix": torch.ones(4, 4, dtype=torch.uint8),
    "a million bytes": torch.ones(1_000_000, dtype=torch.uint8),
}


@pytest.mark.parametrize("plan", SAVED_PLANS.values(), ids=SAVED_PLANS)
def test_hostile_plans(tmp_path: Path, capsys: Any, plan: Tensor) -> None:
    layer = festina.LayerNormLSTM(3, 5)
    source = tmp_path / "in.pt"
    torch.save({**layer.state_dict(), PLAN_KEY: plan}, source)
    assert "norm plan" in refused(capsys, tmp_path, source, tmp_path / "out.npz", source, "festina.LSTM")
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    with pytest.raises(RuntimeError, match="must hold a norm plan"):
        layer.load_state_dict(torch.load(source))
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_a_plan_of_other_tensors() -> None:
    """A state dict that holds another layer's plan is refused, unless only an inner bias is missing; no tensor is dropped."""
    layers = {}
    for plan in PLANS_BY_NAME.values():
        if CELLS["lstm"].admits(plan):
            layers.setdefault(LayerSpec(CELLS["lstm"], plan).parameter_names, festina.LSTM(3, 5, norm=plan))
    assert len(layers) > 5
    refused = 0
    for one, other in itertools.permutations(layers.values(), 2):
        try:
            layer = convert.load("festina.LSTM", {**one.state_dict(), PLAN_KEY: plan_tensor(other.norm)})
        except convert.ConvertError:
            refused += 1
        else:
            assert layer.state_dict().keys() - {PLAN_KEY} == one.state_dict().keys() - {PLAN_KEY}
    assert refused > len(layers) * (len(layers) - 1) / 2


def loop(path: Path) -> None:
    path.symlink_to(path)


INPUTS: dict[str, Make] = {"missing": lambda path: None, "folder": Path.mkdir, "pipe": os.mkfifo, "loop of links": loop}


@pytest.mark.parametrize("make", INPUTS.values(), ids=INPUTS)
@pytest.mark.parametrize("suffix", [".pt", ".npz", ".safetensors", ".h5"])
def test_inputs_that_are_no_files(tmp_path: Path, capsys: Any, suffix: str, make: Make) -> None:
    source = tmp_path / f"in{suffix}"
    make(source)
    refused(capsys, tmp_path, source, tmp_path / "out.pt", source)


@pytest.mark.parametrize(
    ("output", "text"),
    [
        ("none/out.pt", "there is no folder"),
        ("in.pt/out.pt", "is not a folder"),
        ("folder.pt", "is a folder"),
        ("pipe.pt", "must be a regular file"),
        ("loop.pt", "symbolic links"),
        ("out.txt", "must end in .safetensors"),
        ("out.h5", "must end in .safetensors, .pt, .pth, .bin, .ckpt, .npz: files in .h5 are only read"),
    ],
)
def test_outputs_that_cannot_be_written(tmp_path: Path, capsys: Any, output: str, text: str) -> None:
    (tmp_path / "folder.pt").mkdir()
    os.mkfifo(tmp_path / "pipe.pt")
    loop(tmp_path / "loop.pt")
    good(tmp_path / "in.pt")
    assert text in refused(capsys, tmp_path, tmp_path / "in.pt", tmp_path / output, tmp_path / output)


def test_weights_that_are_not_finite_on_request(tmp_path: Path, capsys: Any) -> None:
    source, output = tmp_path / "in.pt", tmp_path / "out.pt"
    PT["nan"](source)
    error = refused(capsys, tmp_path, source, output, source)
    assert "bias has 1 values of 15 that are NaN or infinite; --allow-nonfinite takes them" in error
    assert cli.main(["convert", "haste.GRU", str(source), str(output), "--allow-nonfinite"]) == 0
    assert sum(int(tensor.isnan().sum()) for tensor in files.read(output).values()) == 1
    with pytest.raises(convert.ConvertError, match="bias has 1 values"):
        convert.load("haste.GRU", files.read(source))


def test_other_tensors_are_not_read(tmp_path: Path) -> None:
    """A sparse tensor elsewhere in a checkpoint does no harm."""
    path = tmp_path / "in.pt"
    torch.save({"rnn": weights(), "adjacency": torch.eye(3).to_sparse()}, path)
    assert set(files.read(path, "rnn.")) == {f"rnn.{name}" for name in weights()}
    with pytest.raises(files.FileError, match=r"adjacency is sparse; call .to_dense\(\)"):
        files.read(path)


LIBRARY: dict[str, Callable[[], Any]] = {
    "meta": lambda: weights()["bias"].to("meta"),
    "sparse": lambda: weights()["bias"].to_sparse(),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2)]),
    "quantised": lambda: torch.quantize_per_tensor(weights()["bias"], 0.1, 0, torch.qint8),
    "4 TiB": lambda: torch.ones(1).expand(TIB),
    "4 TiB in NumPy": lambda: np.broadcast_to(np.float32(1), (TIB,)),
    "overlapping": lambda: torch.ones(2**21).as_strided((2**20, 2**20), (1, 1)),
    "complex": lambda: weights()["bias"].to(torch.complex64),
    "no axes of many": lambda: torch.ones(TIB, 0),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", LIBRARY.values(), ids=LIBRARY)
def test_hostile_state_dicts(make: Callable[[], Any]) -> None:
    with pytest.raises(convert.ConvertError, match="bias"):
        convert.load("haste.GRU", {**weights(), "bias": make()})


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"eps": True}, TypeError),
        ({"eps": "1e-5"}, TypeError),
        ({"eps": float("nan")}, ValueError),
        ({"eps": float("inf")}, ValueError),
        ({"eps": -1.0}, ValueError),
        ({"layer_norm": "no"}, TypeError),
        ({"forget_bias": None}, TypeError),
    ],
)
def test_options_of_formats(options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=next(iter(options))):
        convert.table("sonnet.LSTM", **options)


# Damage at random.


def content_of(suffix: str, write: Callable[[Path], None], folder: Path) -> bytes:
    path = folder / f"good{suffix}"
    write(path)
    return path.read_bytes()


WRITERS: dict[str, tuple[str, bool, Callable[[Path], None]]] = {
    "pt": (".pt", True, good),
    "legacy": (".pt", False, legacy),
    "npz": (".npz", True, good),
    "deflated npz": (
        ".npz",
        True,
        lambda path: np.savez_compressed(path, **{k: v.numpy() for k, v in weights().items()}),
    ),
    "safetensors": (".safetensors", False, good),
}
"""Suffix, whether the format has checksums, and a function that writes a good file."""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("suffix", "has_checksums", "write"), WRITERS.values(), ids=WRITERS)
def test_damage_is_noticed(tmp_path: Path, suffix: str, has_checksums: bool, write: Callable[[Path], None]) -> None:
    """A file with some bytes changed, or cut off, gives the right layer or a clear error. Without checksums, other numbers
    than those that were saved cannot be told from them."""
    whole = content_of(suffix, write, tmp_path)
    want = convert.load("haste.GRU", weights()).state_dict()
    path = tmp_path / f"bad{suffix}"

    @settings(max_examples=50, deadline=None, derandomize=True)
    @given(
        st.integers(0, len(whole)),
        st.lists(st.tuples(st.integers(0, len(whole) - 1), st.integers(1, 255)), max_size=3),
        st.booleans(),
    )
    def check(end: int, flips: list[tuple[int, int]], is_cut: bool) -> None:
        damaged = bytearray(whole)
        for at, mask in flips:
            damaged[at] ^= mask
        path.write_bytes(damaged[:end] if is_cut else damaged)
        try:
            layer = convert.load("haste.GRU", files.read(path))
        except (files.FileError, convert.ConvertError):
            return
        got = layer.state_dict()
        assert {name: tensor.shape for name, tensor in got.items()} == {
            name: tensor.shape for name, tensor in want.items()
        }
        if has_checksums:
            assert all(torch.equal(got[name], want[name]) for name in want)

    check()


def test_good_files_of_every_kind(tmp_path: Path) -> None:
    """What the tables damage is read while it is whole."""
    for suffix, _, write in WRITERS.values():
        path = tmp_path / f"good{suffix}"
        write(path)
        assert all(torch.equal(tensor, weights()[name]) for name, tensor in files.read(path).items())
    archive_of(tensor_of(b"K\4\x85"), tmp_path / "made.pt")
    assert torch.equal(files.read(tmp_path / "made.pt")["kernel"], torch.zeros(4))
    array(npy("(4,)", np.arange(4, dtype=">f4").tobytes(), "'>f4'"), tmp_path / "made.npz")
    assert torch.equal(files.read(tmp_path / "made.npz")["kernel"], torch.arange(4.0))
    safetensors(one(), bytes(16), tmp_path / "made.safetensors")
    assert torch.equal(files.read(tmp_path / "made.safetensors")["kernel"], torch.zeros(4))


@pytest.mark.parametrize("is_legacy", [False, True])
def test_every_kind_of_value_in_a_checkpoint(tmp_path: Path, is_legacy: bool) -> None:
    """`festina.convert.pickled` reads what torch.load(weights_only=True) reads."""
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    kinds = (torch.bfloat16, torch.float16, torch.int8, *([] if is_legacy else [torch.uint16, torch.uint64]))
    content = {
        "model": model.state_dict(),
        "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
        "parameter": nn.Parameter(torch.randn(3, 4).t()),
        "shared": model.state_dict(),
        "view": torch.arange(10)[3:7:2],
        "dtypes": {str(kind): torch.ones(3).to(kind) for kind in kinds},
        "bool": torch.tensor([True, False]),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(4.0),
        "values": [None, True, 3, -(2**40), 0.5, "text", b"bytes", (1, 2), {1, 2}, torch.Size([1]), torch.float16, 1j],
        "device": torch.device("cpu"),
    }
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=not is_legacy)
    want: dict[str, Tensor] = {}

    def collect(held: Any, names: tuple[str, ...]) -> None:
        if isinstance(held, Tensor):
            want[".".join(names)] = held
        elif isinstance(held, dict):
            for name, value in held.items():
                collect(value, (*names, str(name)))

    collect(torch.load(tmp_path / "a.pt", weights_only=True), ())
    got = files.read(tmp_path / "a.pt")
    assert list(got) == list(want)
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype
        assert torch.equal(got[name], tensor.detach()), name


def test_names_cannot_command_the_terminal(tmp_path: Path, capsys: Any) -> None:
    torch.save({"\x1b[2J": torch.ones(1)}, tmp_path / "in.pt")
    assert cli.main(["convert", "haste.GRU", str(tmp_path / "in.pt"), str(tmp_path / "out.pt")]) == 2
    error = capsys.readouterr().err
    assert r"\x1b[2J" in error
    assert "\x1b" not in error
