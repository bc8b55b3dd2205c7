"""The marker `full`: tests that take minutes, run where they are asked for by name (`-m full`) and nowhere else."""

import pytest

from festina.backends.triton import is_interpreting

if is_interpreting():
    from offline import quicken_interpreter

    quicken_interpreter()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "full: the whole product of cases; minutes; run with -m full")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "full" in config.option.markexpr:
        return
    kept = [item for item in items if "full" not in item.keywords]
    config.hook.pytest_deselected(items=[item for item in items if "full" in item.keywords])
    items[:] = kept
