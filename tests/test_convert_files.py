"""Files of tensors, and the command that converts them."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from samples import assert_same
from torch import Tensor

import festina
from festina import cli, convert, norms
from festina.convert import files

SUFFIXES = [".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".npz"]


@pytest.fixture
def layer() -> festina.LSTM:
    torch.manual_seed(0)
    return festina.LayerNormLSTM(3, 5, dtype=torch.float64)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_files_both_ways(tmp_path: Path, layer: festina.LSTM, suffix: str) -> None:
    path = tmp_path / f"layer{suffix}"
    state = {**layer.state_dict(), "view": torch.arange(6.0).view(2, 3).t()}
    state["empty"] = torch.zeros(0, 3)
    files.write(path, state)
    for device in ("cpu", "meta"):
        with torch.device(device):  # by default; nothing in a file is moved there
            assert_same(files.read(path), state, rtol=0, atol=0)
            files.write(path, files.read(path))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_command_there_and_back(tmp_path: Path, layer: festina.LSTM, suffix: str, capsys: Any) -> None:
    theirs, ours, back = (tmp_path / f"{name}{suffix}" for name in ("theirs", "ours", "back"))
    dumped = convert.dump("haste.LayerNormLSTM", layer)
    files.write(theirs, {f"encoder.{name}": value for name, value in dumped.items()})
    assert cli.main(["convert", "haste.LayerNormLSTM", str(theirs), str(ours), "--prefix", "encoder."]) == 0
    assert "LayerNormLSTM(3, 5, norm=norms.HASTE)" in capsys.readouterr().out
    layer.load_state_dict(files.read(ours))
    command = [
        "convert",
        "festina.LSTM",
        str(ours),
        str(back),
        "--to",
        "haste.LayerNormLSTM",
        "--to-prefix",
        "encoder.",
    ]
    assert cli.main(command) == 0
    assert_same(files.read(back), files.read(theirs), rtol=0, atol=0)


def test_command_with_options(tmp_path: Path) -> None:
    cell = {
        "linear.weight": torch.randn(15, 8),
        "layer_norm.weight": torch.ones(15),
        "layer_norm.bias": torch.zeros(15),
    }
    files.write(tmp_path / "in.npz", cell)
    command = ["convert", "sheeprl.LayerNormGRUCell", str(tmp_path / "in.npz"), str(tmp_path / "out.pt")]
    assert cli.main([*command, "--option", "eps=1e-5", "--option", "order=xh"]) == 0
    loaded = convert.load("festina.GRU", files.read(tmp_path / "out.pt"))
    assert loaded.norm == norms.DREAMER.with_eps(1e-5)
    assert_same(loaded.weight_ih_l0[10:].detach(), cell["linear.weight"][5:10, :3])  # its candidate is second


def test_relu_indrnn_keeps_its_nonlinearity(tmp_path: Path) -> None:
    layer = festina.IndRNN(3, 5, nonlinearity="relu")
    files.write(tmp_path / "in.pt", layer.state_dict())
    command = ["convert", "festina.IndRNN", str(tmp_path / "in.pt"), str(tmp_path / "out.pt")]
    assert cli.main([*command, "--option", "nonlinearity=relu"]) == 0
    layer.load_state_dict(files.read(tmp_path / "out.pt"))


def test_nested_checkpoints_become_dotted_names(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "state_dict": {"rnn.weight": torch.ones(2)}}, tmp_path / "a.ckpt")
    assert list(files.read(tmp_path / "a.ckpt")) == ["state_dict.rnn.weight"]


class Trap:
    """Creates a file if it is ever unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def write_torch(path: Path, trap: Trap) -> None:
    torch.save({"weight": torch.ones(2), "extra": trap}, path)


def write_pickle(path: Path, trap: Trap) -> None:
    path.write_bytes(pickle.dumps(trap, protocol=2))


def write_numpy(path: Path, trap: Trap) -> None:
    np.savez(path, weight=np.array([trap], dtype=object))


@pytest.mark.parametrize(("suffix", "write"), [(".pt", write_torch), (".bin", write_pickle), (".npz", write_numpy)])
def test_nothing_is_ever_unpickled(tmp_path: Path, capsys: Any, suffix: str, write: Any) -> None:
    path, mark = tmp_path / f"bad{suffix}", tmp_path / "ran"
    write(path, Trap(mark))
    assert cli.main(["convert", "haste.GRU", str(path), str(tmp_path / "out.pt")]) == 2
    assert str(path) in capsys.readouterr().err
    assert not mark.exists()
    assert not (tmp_path / "out.pt").exists()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_damaged_files_are_named(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"bad{suffix}"
    path.write_bytes(b"no tensors here")
    with pytest.raises(files.FileError, match="bad"):
        files.read(path)


def test_bfloat16_and_npz(tmp_path: Path) -> None:
    with pytest.raises(files.FileError, match="no bfloat16, the dtype of w"):
        files.write(tmp_path / "a.npz", {"w": torch.ones(2, dtype=torch.bfloat16)})


def weights_of_keras(path: Path, scope: str, variables: Mapping[str, Tensor], dtype: str = "<f8") -> None:
    """A file as Keras writes it: a group for each part of a name, some texts, other layers' variables."""
    with h5py.File(path, "w") as file:
        for name, tensor in variables.items():
            file[f"{scope}/{name}"] = tensor.numpy().astype(dtype)
        file.attrs["keras_version"] = "3.8.0"
        file["layers/dense/vars/0"] = np.zeros((5, 2), "f4")
        file["layers/dense/names"] = "kernel"
        file.create_group("optimizer")


@pytest.mark.parametrize(
    ("path", "scope", "names", "prefix", "dtype"),
    [
        ("a.weights.h5", "layers/lstm/cell/vars", ("0", "1", "2"), "layers/lstm/", "<f8"),
        ("a.h5", "lstm/lstm/lstm_cell", ("kernel:0", "recurrent_kernel:0", "bias:0"), "lstm/", ">f4"),
        ("a.hdf5", "m/lstm/cell", ("kernel", "recurrent_kernel", "bias"), "m/l", "<f2"),
    ],
    ids=["Keras 3", "Keras 2", "float16"],
)
def test_files_of_keras(
    tmp_path: Path, capsys: Any, path: str, scope: str, names: Any, prefix: str, dtype: str
) -> None:
    layer = festina.LSTM(3, 5, dtype=torch.float64)
    dumped = convert.dump("keras.LSTM", layer)
    keys = ("kernel", "recurrent_kernel", "bias")
    variables = {name: dumped[key] for name, key in zip(names, keys)}
    weights_of_keras(tmp_path / path, scope, variables, dtype)
    out = tmp_path / "out.npz"
    assert cli.main(["convert", "keras.LSTM", str(tmp_path / path), str(out), "--prefix", prefix]) == 0
    assert "LSTM(3, 5)" in capsys.readouterr().out
    got = files.read(out)
    assert {tensor.dtype for tensor in got.values()} == {getattr(torch, f"float{8 * int(dtype[2])}")}
    want = convert.load(
        "keras.LSTM", {key: tensor.numpy().astype(dtype) for key, tensor in dumped.items()}
    ).state_dict()
    assert_same(got, dict(want), rtol=0, atol=0)


@pytest.mark.parametrize(("suffix", "package"), [(".safetensors", "safetensors"), (".h5", "h5py")])
def test_a_missing_package_is_named(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, suffix: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / f"a{suffix}").write_bytes(bytes(9))
    assert cli.main(["convert", "keras.LSTM", str(tmp_path / f"a{suffix}"), str(tmp_path / "out.pt")]) == 2
    error = capsys.readouterr().err
    assert f"needs the package {package}" in error
    assert "pip install 'festina[convert]'" in error


def test_missing_safetensors_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(files.FileError, match=r"pip install 'festina\[convert\]'"):
        files.write(tmp_path / "a.safetensors", {})


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["haste.GRU", "none.pt", "out.pt"], "No such file"),
        (["haste.GRU", "in.onnx", "out.pt"], "in.onnx must end in .safetensors"),
        (["haste.Gru", "in.pt", "out.pt"], "got 'haste.Gru'"),
        (["haste.GRU", "in.pt", "out.pt"], "missing: kernel"),
        (["keras.GRU", "in.pt", "out.pt", "--option", "eps"], "an option must be NAME=VALUE, got 'eps'"),
        (
            ["keras.GRU", "in.pt", "out.pt", "--option", "eps=1"],
            "options of keras.GRU must be among reset_after, got eps",
        ),
    ],
)
def test_command_says_what_is_wrong(tmp_path: Path, monkeypatch: Any, capsys: Any, args: list[str], text: str) -> None:
    monkeypatch.chdir(tmp_path)
    tensors: dict[str, Tensor] = {"other": torch.ones(2)}
    files.write("in.pt", tensors)
    assert cli.main(["convert", *args]) == 2
    assert text in capsys.readouterr().err
