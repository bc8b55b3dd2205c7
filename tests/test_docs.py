"""The tests named in docs/compatibility.md exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_tests_that_the_table_names_exist() -> None:
    table = (ROOT / "docs" / "compatibility.md").read_text()
    named, file = [], ""
    for found in re.finditer(r"`(\w+\.py)?::(\w+)`", table):
        file = found[1] or file
        named.append((file, found[2]))
    assert len(named) > 25
    missing = [f"{file}::{name}" for file, name in named if f"def {name}(" not in (ROOT / "tests" / file).read_text()]
    assert not missing
