"""docs/compatibility.md names tests and versions that there are, docs/environment.md the variables that are read."""

from __future__ import annotations

import re
from pathlib import Path

from festina.environment import VARIABLES

ROOT = Path(__file__).parents[1]


def test_the_tests_that_the_table_names_exist() -> None:
    table = (ROOT / "docs" / "compatibility.md").read_text()
    named, file = [], ""
    for found in re.finditer(r"`([\w/]+\.py)?::(\w+)`", table):
        file = found[1] or file
        named.append((file, found[2]))
    assert len(named) > 25
    missing = [f"{file}::{name}" for file, name in named if f"def {name}(" not in (ROOT / "tests" / file).read_text()]
    assert not missing


def test_the_table_of_libraries_has_the_versions_that_are_tested() -> None:
    page = (ROOT / "docs" / "compatibility.md").read_text().partition("## Libraries")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| ([a-z][\w-]+) ([\d.]+) \|", page, re.MULTILINE)
    files = "tests/ecosystem/libraries.txt", "constraints.txt"
    pinned = [re.findall(r"^([\w-]+)==([\d.]+)$", (ROOT / file).read_text(), re.MULTILINE) for file in files]
    assert rows == [*pinned[0], *(pin for pin in pinned[1] if pin[0] == "lightning")]


def test_the_table_of_environment_variables_is_the_list_that_is_read() -> None:
    page = (ROOT / "docs" / "environment.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert rows == [f"| `{v.name}` | {v.meaning} | {v.default} | {v.check} |" for v in VARIABLES]


def test_one_module_alone_reads_festinas_environment_variables() -> None:
    named = re.compile(r"environ\b.*FESTINA_|getenv\(.FESTINA_")
    readers = {path.name for path in (ROOT / "festina").rglob("*.py") if named.search(path.read_text())}
    assert readers <= {"environment.py"}
    read = {name for path in (ROOT / "csrc").rglob("*.cc") for name in re.findall(r'getenv\("(\w+)"', path.read_text())}
    assert read <= {v.name for v in VARIABLES}
