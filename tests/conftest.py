"""Settings that every test runs under: property tests repeat themselves, torch draws from one seed."""

import os
from collections.abc import Callable
from pathlib import Path

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


Made = Callable[..., Path]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """`model(family, layers, tied)`: a checkpoint folder that transformers saved; read only."""
    from tests.exports import once, shared_root, write_model

    root = shared_root(tmp_path_factory.getbasetemp()) / "models"

    def made(family: str, *, layers: int = 2, tied: bool = False, kv_heads: int = 2) -> Path:
        name = f"{family}-{layers}-{kv_heads}{'-tied' if tied else ''}"
        return once(
            root / name, lambda folder: write_model(folder, family, layers=layers, kv_heads=kv_heads, tied=tied)
        )

    return made


@pytest.fixture(scope="session")
def exported(model: Made, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """`exported(recipe, family, ...)`: the bundle that `dllmc export` makes of `model(family, ...)`; read only."""
    from tests.exports import export, once, shared_root

    root = shared_root(tmp_path_factory.getbasetemp()) / "exported"

    def made(recipe: str, *description: str, **choices: int) -> Path:
        source = model(*description, **choices)

        def make(folder: Path) -> None:
            assert export(source, folder, recipe) == 0

        return once(root / f"{source.name}-{recipe}", make)

    return made


@pytest.fixture(scope="session")
def stages_done(model: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work folder of one small rtn-w4a4 export after calibrate, quantize and lower, each by its own command."""
    from pipeline.__main__ import main
    from tests.exports import once, settings, shared_root

    output = shared_root(tmp_path_factory.getbasetemp()) / "stages" / "out"

    def make(folder: Path) -> None:
        source = str(model("llada", layers=1))
        assert main(["calibrate", str(output), "--model", source, *settings("rtn-w4a4")]) == 0
        assert main(["quantize", str(output)]) == 0
        assert main(["lower", str(output)]) == 0

    return once(output.with_name("out.work"), make)
