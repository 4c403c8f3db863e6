"""Caches of codes and scales: the bits of passes over whole canvases, the codes of the simulation, their bytes."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.fx import GraphModule

from pipeline.backends.ort import OrtSession, open_session
from pipeline.backends.ort_cache import Part
from pipeline.folder import MODEL
from pipeline.recipe_file import load_recipe
from pipeline.runner.settings import Settings
from pipeline.validation.cached import BATCH, LENGTH, check_cache
from pipeline.validation.feeds import feeds_of, sweep
from pipeline.validation.forced import ForcedModel
from pipeline.validation.nodes import check_nodes
from tests.passes.sketch import copy_of
from tests.pipeline.random_models import captured, tiny, write_captured

# family, bits of keys, of values, symmetric grid, profile
CASES = {
    "llada": ("llada", 8, 4, True, "in_place"),
    "dream": ("dream", 4, 8, False, "in_place"),
    "window": ("dream", 4, 8, True, "window"),
}
# name without the layer -> type and width of the array [batch, 1 head, slots, width]; a head has 16 channels
ARRAYS: dict[str, dict[str, tuple[type[np.generic], int]]] = {
    "llada": {"k": (np.int8, 16), "k_scale": (np.float32, 1), "v": (np.int8, 8), "v_scale": (np.float32, 1)},
    "dream": {
        "k": (np.int8, 8),
        "k_scale": (np.float32, 1),
        "k_zero": (np.int32, 1),
        "v": (np.int8, 16),
        "v_scale": (np.float32, 1),
        "v_zero": (np.int32, 1),
    },
    "window": {"k": (np.int8, 8), "k_scale": (np.float32, 1), "v": (np.int8, 16), "v_scale": (np.float32, 1)},
}
LAYERS = 2


@dataclass(frozen=True, kw_only=True)
class Case:
    """A float model whose keys and values are quantised: the file, a session on it, the same graph in torch."""

    name: str
    settings: Settings
    path: Path
    graph: GraphModule
    session: OrtSession


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    family, k_bits, v_bits, symmetric, profile = CASES[request.param]
    model = tiny(shifted=family == "dream")
    sets = [f"attention.k_bits={k_bits}", f"attention.v_bits={v_bits}", f"lowering.cache={profile}"]
    recipe = load_recipe("rtn-w8a8", [*sets, f"linear.symmetric={str(symmetric).lower()}"])
    path = tmp_path_factory.mktemp("cache") / MODEL
    graph = captured(model, recipe)
    write_captured(copy_of(graph), recipe, model.config, path)
    return Case(
        name=request.param,
        settings=Settings.of_model(model.config, top_k=recipe.lowering.top_k),
        path=path,
        graph=graph,
        session=open_session(path, threads=1),
    )


def test_the_cache_holds_codes_and_scales(case: Case) -> None:
    arrays, profile = ARRAYS[case.name], CASES[case.name][-1]
    stem = "present" if profile == "in_place" else "present_window"
    assert case.session.layout.in_place is (profile == "in_place")
    assert case.session.layout.parts == tuple(
        Part(f"past_{kind}_{layer}", f"{stem}_{kind}_{layer}", dtype, 1, width)
        for layer in range(LAYERS)
        for kind, (dtype, width) in arrays.items()
    )
    a_slot = LAYERS * sum(np.dtype(dtype).itemsize * width for dtype, width in arrays.values())
    assert case.session.allocate(3, 32).size_bytes == 3 * 32 * a_slot


def test_windows_give_the_bits_of_whole_canvases(case: Case) -> None:
    check = check_cache(case.session, case.settings, 0)
    assert (check.passes, check.largest) == (9, 0.0)


def test_the_file_computes_what_the_simulation_computes(case: Case) -> None:
    """Each quantiser alone gives equal codes, and on equal codes nothing but rounding differs."""
    _, feeds, _ = (one for one in sweep(case.settings, 1) if one.input_ids.shape == (3, 33))  # half masked
    for check in check_nodes(case.path, case.graph, [feeds], threads=1):
        assert check.passed
        assert (check.codes_off, check.largest) == (0, 0.0)
    forced = ForcedModel(case.path, case.graph, [feeds], threads=1)
    assert len(forced.quantisers) == 2 * LAYERS
    assert forced.compare(feeds).share <= 1


def test_codes_and_scales_are_written_in_place(case: Case, talkative: None, capfd: pytest.CaptureFixture[str]) -> None:
    """ONNX Runtime warns of each copy of a cache."""
    session = open_session(case.path, threads=1)
    ids = torch.zeros(BATCH, LENGTH, dtype=torch.long)
    feeds = feeds_of(case.settings, ids, torch.full((BATCH,), LENGTH), ids)
    cache = session.allocate(BATCH, LENGTH)
    capfd.readouterr()
    session.run(feeds, cache)
    session.run(feeds)
    assert capfd.readouterr().err == ""
    assert all(array.any() for name, array in cache.arrays.items() if "zero" not in name)
