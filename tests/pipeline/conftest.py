"""Fixtures that sessions, runner, evaluation and commands share."""

import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def whole_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of a tiny random model; read only."""
    from tests.pipeline.random_models import tiny, write_bundle

    folder = tmp_path_factory.mktemp("bundles") / "bundle"
    write_bundle(tiny(shifted=False), folder)
    return folder


@pytest.fixture
def bundle(whole_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the bundle that a test may spoil."""
    return Path(shutil.copytree(whole_bundle, tmp_path / "bundle"))
