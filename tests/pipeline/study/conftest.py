"""One Ray cluster of this machine for all tests that need one."""

from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(scope="session")
def cluster() -> Iterator[Any]:
    """Ray, started; engines must leave it running."""
    library = pytest.importorskip("ray")
    library.init(num_cpus=2, include_dashboard=False, configure_logging=False, log_to_driver=False)
    yield library
    library.shutdown()
