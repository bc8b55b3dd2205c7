"""Files that are written (`festina.output`): whole or not at all, where and as a plain write would make them."""

from __future__ import annotations

import json
import os
import resource
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

import festina.onnx
from festina import cli, output
from festina.convert import files

OLD = b"what was there"
SUFFIXES = [".pt", ".npz", ".safetensors"]


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    yield
    os.umask(before)


@contextmanager
def largest_file(nbytes: int) -> Iterator[None]:
    """The system lets no file grow beyond this: a write fails in its middle, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), ValueError("no")])
def test_a_failed_write_changes_nothing(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(OLD)

    def write() -> None:
        with output.replacing(path) as unfinished:
            unfinished.write_text("half of the n")
            raise error

    for there in (True, False):
        with pytest.raises(type(error)):
            write()
        assert (path.read_bytes() == OLD) if there else not path.exists()
        assert names(tmp_path) == ({"a.txt"} if there else set())
        path.unlink(missing_ok=True)
    if isinstance(error, OSError):
        assert error.filename == str(path)


@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_a_failed_end_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(OLD)

    def fail(*args: Any, **options: Any) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, fails, fail)
    with pytest.raises(OSError, match=r"Input/output error: .*a\.txt"), output.replacing(path) as unfinished:
        unfinished.write_text("new")
    assert path.read_bytes() == OLD
    assert names(tmp_path) == {"a.txt"}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_convert_on_a_full_disk(tmp_path: Path, capsys: Any, suffix: str) -> None:
    source, target = tmp_path / "in.pt", tmp_path / f"out{suffix}"
    torch.save(torch.nn.GRU(8, 64).state_dict(), source)
    target.write_bytes(OLD)
    with largest_file(20_000):
        assert cli.main(["convert", "torch.GRU", str(source), str(target)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("festina: ")
    assert str(target) in error
    assert error.count("\n") == 1
    assert target.read_bytes() == OLD
    assert names(tmp_path) == {source.name, target.name}


WRITERS = {
    ".pt": (torch, "save"),
    ".npz": (np.lib.format, "write_array"),
    ".safetensors": ("safetensors.torch", "save_file"),
}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_convert_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    source, target = tmp_path / "in.pt", tmp_path / f"out{suffix}"
    torch.save(torch.nn.GRU(2, 3).state_dict(), source)
    target.write_bytes(OLD)

    def interrupted(first: Any, second: Any, *args: Any, **options: Any) -> None:
        file = second if isinstance(second, Path) else first
        file.write_bytes(b"half") if isinstance(file, Path) else file.write(b"half")
        raise KeyboardInterrupt

    where, name = WRITERS[suffix]
    monkeypatch.setattr(
        f"{where}.{name}" if isinstance(where, str) else where, *([] if isinstance(where, str) else [name]), interrupted
    )
    assert cli.main(["convert", "torch.GRU", str(source), str(target)]) == 130
    assert target.read_bytes() == OLD
    assert names(tmp_path) == {source.name, target.name}


def test_a_file_converted_onto_itself(tmp_path: Path) -> None:
    for suffix in SUFFIXES:
        path = tmp_path / f"a{suffix}"
        files.write(path, torch.nn.GRU(2, 3).state_dict())
        want = files.read(path)
        assert cli.main(["convert", "torch.GRU", str(path), str(path)]) == 0
        assert all(torch.equal(tensor, want[name]) for name, tensor in files.read(path).items())


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_permissions_are_those_of_a_plain_write(tmp_path: Path, suffix: str) -> None:
    path, plain = tmp_path / f"a{suffix}", tmp_path / "plain"
    for mask in (0o022, 0o077, 0o002):
        with umask(mask):
            plain.write_bytes(OLD)
            files.write(path, {"w": torch.ones(2)})
        assert path.stat().st_mode == plain.stat().st_mode
        path.unlink()
        plain.unlink()
    path.write_bytes(OLD)
    path.chmod(0o640)
    files.write(path, {"w": torch.ones(2)})
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_links_stay(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    real, link, open_end = tmp_path / "there" / "real.pt", tmp_path / "link.pt", tmp_path / "open.pt"
    link.symlink_to("there/real.pt")
    open_end.symlink_to("there/new.pt")
    real.write_bytes(OLD)
    for path in (link, open_end):
        files.write(path, {"w": torch.ones(2)})
        assert path.is_symlink()
        assert not path.readlink().is_absolute()
    assert torch.equal(files.read(real)["w"], torch.ones(2))
    assert names(tmp_path / "there") == {"real.pt", "new.pt"}


def test_what_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(OLD)
    for path, kind, text in (
        (tmp_path / "none" / "a", FileNotFoundError, "there is no folder"),
        (tmp_path / "file" / "a", NotADirectoryError, "is not a folder"),
        (tmp_path, IsADirectoryError, "is a folder"),
    ):
        for write in (lambda path: output.append(path, "a"), lambda path: output.replacing(path).__enter__()):
            with pytest.raises(kind, match=text) as caught:
                write(path)
            assert str(path) in str(caught.value)
    with pytest.raises(OSError, match="must be a regular file"), output.replacing(os.devnull):
        pass
    output.append(os.devnull, "gone")
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_protected_files_stay(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(OLD)
    path.chmod(0o444)
    with pytest.raises(PermissionError, match="write-protected"), output.replacing(path):
        pass
    path.chmod(0o644)
    tmp_path.chmod(0o555)
    with pytest.raises(PermissionError, match=r"a\.txt"), output.replacing(path):
        pass
    tmp_path.chmod(0o755)


def test_files_beside_move_along(tmp_path: Path) -> None:
    """A large ONNX model has a second file with its weights, which it names."""
    with output.replacing(tmp_path / "a.onnx") as unfinished:
        unfinished.write_text("see a.onnx.data")
        unfinished.with_name("a.onnx.data").write_text("weights")
    assert names(tmp_path) == {"a.onnx", "a.onnx.data"}


def test_append_adds_a_line_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    output.append(path, json.dumps({"a": 1}) + "\n")
    before = path.read_bytes()
    with largest_file(20), pytest.raises(OSError, match="File too large"):
        output.append(path, "b" * 100 + "\n")
    assert path.read_bytes() == before
    output.append(path, "ç\n")
    assert path.read_text("utf-8").splitlines() == ['{"a": 1}', "ç"]


# The other writers.


@pytest.mark.parametrize("command", ["bench", "demo"])
def test_commands_look_at_their_output_first(tmp_path: Path, capsys: Any, command: str) -> None:
    (tmp_path / "demo.json").mkdir()
    options = {"bench": ["--out", str(tmp_path / "none" / "a.jsonl")], "demo": ["--out", str(tmp_path)]}[command]
    assert cli.main([command, *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("festina: ")
    assert str(tmp_path) in error


def test_a_picture_is_drawn_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from festina.cli.demo import picture

    path = tmp_path / "demo.png"
    path.write_bytes(OLD)

    def fail(figure: Figure, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", fail)
    monkeypatch.setattr(picture, "mark_goal", lambda race, axes: None)

    class Nothing:
        racers = ()

    with pytest.raises(OSError, match="No space"):
        picture.draw(Nothing(), path)  # type: ignore[arg-type]
    assert path.read_bytes() == OLD


def test_a_model_is_exported_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.onnx"
    path.write_bytes(OLD)

    class Program:
        def save(self, path: Path) -> None:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(festina.onnx, "find_spec", lambda name: True)
    monkeypatch.setattr(torch.onnx, "export", lambda *args, **options: Program())
    with pytest.raises(OSError, match="No space"):
        festina.onnx.export(festina.GRU(2, 3), torch.zeros(2, 2, 2), path)
    assert path.read_bytes() == OLD
