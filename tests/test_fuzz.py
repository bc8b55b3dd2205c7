"""The first examples of each target of fuzz.py; `make fuzz` runs more."""

from __future__ import annotations

import warnings

import fuzz
import pytest

from festina.backends.cpu import abi

COUNTS = {"calls": 25, "wrong": 60, "structs": 10, "files": 40, "plans": 60}


@pytest.mark.parametrize("target", fuzz.TARGETS)
def test_first_examples(target: str) -> None:
    if target == "structs" and (reason := abi.library().reason):
        pytest.skip(reason)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # drawn at random, some layers are not worth having
        assert fuzz.examples(target, seed=0, count=COUNTS[target]) == COUNTS[target]
