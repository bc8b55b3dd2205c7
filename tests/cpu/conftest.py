"""Fixtures for the tests of the compiled core."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from festina.backends.cpu import plans


@pytest.fixture
def use_threads() -> Iterator[Callable[[int], None]]:
    """Sets how many threads calls run on, whatever they are worth."""

    def use(count: int) -> None:
        patch.setattr(plans, "threads_for", lambda *_: count)
        plans.make_plan.cache_clear()

    with pytest.MonkeyPatch.context() as patch:
        yield use
    plans.make_plan.cache_clear()
