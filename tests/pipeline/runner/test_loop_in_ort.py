"""The loop over an exported graph and its cache: bits that depend on nobody else, and are the exact mode's at best."""

from dataclasses import replace

import numpy as np
import pytest

from pipeline.backends.ort import open_session
from pipeline.runner import GenerateOptions, Settings, generate
from tests.pipeline.random_models import prompts_of, tiny, write_model

OPTIONS = GenerateOptions(gen_length=20, block_length=8, threshold=0.6)


@pytest.fixture(scope="module", params=[False, True], ids=["llada", "dream"])
def opened(request, tmp_path_factory):
    """A session and the settings of its model."""
    model = tiny(shifted=request.param)
    path = tmp_path_factory.mktemp("model") / "model.onnx"
    write_model(model, path)
    return open_session(path, threads=1), Settings.of_model(model.config)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"refresh_every": 2, "vicinity": (3, 2), "monitor": True},
        {"gen_length": None, "refresh_every": 3, "block_length": 4},
        {"temperature": 0.7, "policy": "entropy", "top_p": 0.9},
        {"policy": "quota", "edit": 0.5, "repetition_penalty": 1.3},
        {"exact": True},
    ],
    ids=lambda changes: "-".join(changes) or "defaults",
)
def test_results_do_not_depend_on_the_batch(opened, changes):
    options, prompts = replace(OPTIONS, **changes), prompts_of(seed=8, count=9)
    whole = generate(*opened, prompts, options, batch_size=9)
    assert len({tuple(result.region) for result in whole}) > 3
    order = np.random.default_rng(0).permutation(len(prompts)).tolist()
    shuffled = [prompts[i] for i in order]
    for batch_size in (1, 4):
        found = generate(*opened, shuffled, options, request_ids=order, batch_size=batch_size)
        assert found == [whole[i] for i in order]


def test_a_vicinity_as_wide_as_the_canvas_is_the_exact_mode_bit_for_bit(opened):
    prompts = prompts_of(seed=9, count=6)
    exact = generate(*opened, prompts, replace(OPTIONS, exact=True))
    wide = generate(*opened, prompts, replace(OPTIONS, vicinity=(96, 96), monitor=True), batch_size=4)
    for expected, found in zip(exact, wide, strict=True):
        assert found.agreement in (None, 1.0)
        changed = {"nfe_full": expected.nfe_full, "nfe_block": 0, "agreement": None}
        assert replace(found, **changed) == expected
        assert found.nfe_full < expected.nfe_full or expected.nfe_full == 1
