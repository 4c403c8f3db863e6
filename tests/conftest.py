"""Settings that every test runs under: property tests repeat themselves, torch draws from one seed."""

import os

import pytest
from hypothesis import settings

# Machines of any speed run the same examples, and a red run stays red.
settings.register_profile("dllmc", deadline=None, derandomize=True, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dllmc"))


@pytest.fixture(autouse=True)
def seeded_torch(request: pytest.FixtureRequest) -> None:
    """The same draws whichever tests ran before; tests that never import torch do not import it here."""
    import sys

    torch = sys.modules.get("torch")
    if torch is not None:
        torch.manual_seed(0)
