"""Environment variables: what asks for something that cannot be had is an error at the first use, never another choice."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

import festina
from festina import backends, cli, environment
from festina.backends.cpu import abi


@pytest.fixture(autouse=True)
def anew() -> Iterator[None]:
    """What is found once in a process is looked for again."""
    found = (abi.library, abi.core, backends.select, backends._chosen)
    for cached in found:
        cached.cache_clear()
    yield
    for cached in found:
        cached.cache_clear()


def assert_refused(*words: str) -> None:
    """A layer, its cell and `explain` all say `words`; what does not need the core is not concerned."""
    layer, x = festina.LayerNormGRU(3, 4), torch.randn(2, 2, 3)
    for call in (lambda: layer(x), lambda: layer.cell()(x[0])):
        for mode in (torch.no_grad, torch.enable_grad):
            with pytest.raises(backends.BackendError) as error, mode():
                call()
            assert all(word in str(error.value) for word in words)
    told = dict(backends.explain(layer, x))
    assert all(told.values()), "no backend takes the call"
    assert told["eager"] == told["cpu"] == str(error.value)
    with backends.use("eager"):
        layer(x)
    assert "cpu" in dict(backends.explain(layer.to("meta"), x.to("meta")))["cpu"]
    layer(x.to("meta"))


@pytest.mark.parametrize("value", ["-5", "", "nan", "inf", "nonsense", "1e400", "1e308", "512MB"])
def test_a_wrong_limit_of_the_pool_is_refused(value, monkeypatch):
    monkeypatch.setenv("FESTINA_POOL_MB", value)
    assert environment.pool_limit()[0] == 0
    assert_refused(f"FESTINA_POOL_MB is {value!r}", "a finite number of at least 0", "unset it")


@pytest.mark.parametrize(("value", "limit"), [("0", 0), ("1.5", 3 << 19), (None, 512 << 20)])
def test_a_limit_of_the_pool_is_in_mb(value, limit, monkeypatch):
    monkeypatch.delenv("FESTINA_POOL_MB", raising=False)
    if value is not None:
        monkeypatch.setenv("FESTINA_POOL_MB", value)
    assert environment.pool_limit() == (limit, None)


def test_a_core_that_is_named_and_cannot_be_loaded_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("FESTINA_CORE", str(tmp_path / "none.so"))
    assert_refused("FESTINA_CORE=", f"there is no {tmp_path / 'none.so'}", "unset FESTINA_CORE")
    abi.library.cache_clear()
    (tmp_path / abi.LIBRARY).write_text("no library")
    monkeypatch.setenv("FESTINA_CORE", str(tmp_path))
    assert_refused(f"FESTINA_CORE={tmp_path}", "cannot be loaded", "unset FESTINA_CORE")


def test_an_instruction_set_without_a_core_is_refused(monkeypatch):
    monkeypatch.setattr(abi, "LIBRARY", "none.so")
    monkeypatch.delenv("FESTINA_CORE", raising=False)
    monkeypatch.setenv("FESTINA_ISA", "avx2")
    assert_refused("FESTINA_ISA=avx2", "the compiled core is missing")
    abi.library.cache_clear()
    monkeypatch.setenv("FESTINA_ISA", "")
    festina.LayerNormGRU(3, 4)(torch.randn(2, 2, 3))  # an empty name asks for nothing, and eager may serve


def test_a_backend_that_does_not_exist_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(backends, "_forced", "nonsense")
    layer, x = festina.LayerNormGRU(3, 4), torch.randn(2, 2, 3)
    uses = [
        lambda: layer(x),
        lambda: layer.cell()(x[0]),
        lambda: torch.func.vmap(layer)(x.unsqueeze(0)),
        lambda: backends.explain(layer, x),
    ]
    for use in uses:
        with pytest.raises(
            backends.BackendError, match=r"FESTINA_BACKEND is 'nonsense', but there are .*eager; name one"
        ):
            use()
    with backends.use("eager"):
        layer(x)
    monkeypatch.setenv("FESTINA_BACKEND", "nonsense")
    monkeypatch.setenv("FESTINA_BACKENDS", "cpu")
    monkeypatch.delenv("FESTINA_ISA", raising=False)
    assert cli.main(["info"]) == 0
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert ["FESTINA_BACKEND", "nonsense"] in lines
    assert ["FESTINA_ISA", "not set"] in lines
    assert ["FESTINA_BACKENDS", "festina reads no variable of this name"] in lines
    assert [
        "every",
        "call raises  FESTINA_BACKEND is 'nonsense', but there are triton, cpu, eager; name one or unset it",
    ] in lines


@pytest.mark.skipif(abi.library().core is None, reason="there is no core")
def test_import_raises_for_no_variable():
    """Each is wrong; the first call says so."""
    code = (
        "import torch, festina\n"
        "layer, x = festina.LSTM(3, 4), torch.zeros(2, 2, 3)\n"
        "for name in ('', 'cpu'):\n"
        "    festina.backends._forced = name or festina.backends._forced\n"
        "    try: layer(x)\n"
        "    except festina.backends.BackendError as error: print(error)\n"
    )
    wrong = {"FESTINA_BACKEND": "nonsense", "FESTINA_ISA": "nonsense"}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **wrong}, capture_output=True, text=True, check=True
    )
    first, second = done.stdout.splitlines()
    assert first.startswith("FESTINA_BACKEND is 'nonsense'")
    runnable = ", ".join(abi.core().isas(runnable=True))
    assert second.startswith(
        "backend 'cpu' was asked for but cannot run this case: FESTINA_ISA=nonsense cannot be had: "
    )
    assert second.endswith(f"this CPU runs {runnable}; name one of them or unset FESTINA_ISA")
