"""Each test of a library runs once for each way to bring Festina's layers in."""

import pytest
from ways import Way


@pytest.fixture(params=["replaced", "patched", "normalised"])
def way(request: pytest.FixtureRequest) -> Way:
    return Way(request.param)
