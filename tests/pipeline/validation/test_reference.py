"""Full precision piece by piece: the records of the whole model, one block in memory."""

from dataclasses import replace

import numpy as np
import pytest

from pipeline.backends.backend import OUTPUTS
from pipeline.backends.eager import open_transformer
from pipeline.models.checkpoint import Checkpoint, load_model, open_checkpoint
from pipeline.recipe_file import load_recipe
from pipeline.runner.settings import Settings
from pipeline.validate import measurement_states
from pipeline.validation.feeds import scored_batches
from pipeline.validation.reference import records
from tests.conftest import Made
from tests.pipeline.watched import Watched, uncollected


def batches_of(checkpoint: Checkpoint, size: int) -> list:  # type: ignore[type-arg]
    tokenizer = checkpoint.tokenizer()
    states = measurement_states(checkpoint, load_recipe("fp16", ["validation.samples=7"]), tokenizer)
    scored = scored_batches(Settings.of_model(checkpoint.config), states, size)
    feeds = [
        replace(one.feeds, inv_temp=np.linspace(0.5, 2, len(one.feeds.kv_len), dtype=np.float32)) for one in scored
    ]
    return list(zip(states.batches(size), feeds, strict=True))


@pytest.mark.parametrize("family", ["llada", "dream"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_records_are_those_of_the_whole_model(model: Made, family: str, tied: bool) -> None:
    checkpoint = open_checkpoint(model(family, tied=tied))
    batches = batches_of(checkpoint, 3)
    found = records(checkpoint, batches, top_k=5)
    session = open_transformer(load_model(checkpoint), top_k=5)
    assert len(found) == len(batches) == 3
    for record, (_, feeds) in zip(found, batches, strict=True):
        expected = session.run(feeds)
        for name in OUTPUTS[1:]:
            np.testing.assert_allclose(getattr(record, name), getattr(expected, name), rtol=1e-4, atol=1e-5)
        clear = expected.top_logits[..., 0] - expected.top_logits[..., 1] > 1e-3
        assert (record.top_ids[..., 0] == expected.top_ids[..., 0])[clear].all()
        assert clear.any()


def test_one_block_is_in_memory_at_a_time(model: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(model("llada", layers=4))
    batches = batches_of(checkpoint, 4)
    watched = Watched(monkeypatch)
    with uncollected():
        records(checkpoint, batches, top_k=5)
    assert watched.alive == [0] * 5
