"""The score graph of a bundle has the rows of logits that its record is of; clear errors."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.backends.backend import Feeds, Record
from pipeline.backends.ort import open_session
from pipeline.backends.score import EagerScore, OrtScore, open_score
from pipeline.errors import InputRefused, UsageFault
from pipeline.folder import MODEL, MODEL_DATA, SCORE
from pipeline.runner import read_settings
from pipeline.validation.feeds import sweep
from tests.pipeline.random_models import tiny

Made = Callable[..., Path]
BUNDLES = {
    "llada-w4a4": ("rtn-w4a4", "llada", {"tied": True}),
    "dream-fp16": ("fp16", "dream", {}),
}


@pytest.fixture(scope="module", params=BUNDLES)
def bundle(request: pytest.FixtureRequest, exported: Made) -> Path:
    recipe, family, choices = BUNDLES[request.param]
    return exported(recipe, family, **choices)


@pytest.fixture(scope="module")
def session(bundle: Path) -> OrtScore:
    return open_score(bundle / SCORE, threads=1)


@pytest.fixture(scope="module")
def passes(bundle: Path) -> list[tuple[Feeds, Record]]:
    """Of every length and noise level, in batches of one and three."""
    exported = open_session(bundle / MODEL, threads=1)
    return [(feeds, exported.run(feeds)) for feeds in sweep(read_settings(bundle / "config.json"), 5)]


def test_its_logits_are_those_of_the_record(session: OrtScore, passes: list[tuple[Feeds, Record]]) -> None:
    """Bit for bit, so a draw beyond the top K goes on where the record ends."""
    for feeds, record in passes:
        logits = session.logits(feeds)
        assert np.array_equal(np.take_along_axis(logits, record.top_ids, axis=-1), record.top_logits)
        rows = torch.from_numpy(logits)
        _, _, tail, neg_entropy, lse_t = torch.ops.dllmc.record(
            rows, torch.zeros(rows.shape[-1]), torch.from_numpy(feeds.inv_temp), 1
        )
        for found, whole in ((record.tail, tail), (record.neg_entropy, neg_entropy), (record.lse_t, lse_t)):
            np.testing.assert_allclose(found, whole.numpy(), rtol=2.0**-22, atol=1e-12)


def test_likelihoods_are_the_softmax_of_its_logits(session: OrtScore, passes: list[tuple[Feeds, Record]]) -> None:
    draw = np.random.default_rng(0)
    for feeds, record in passes:
        targets = draw.integers(0, 300, feeds.head_index.shape)
        log_p = (
            torch.from_numpy(session.logits(feeds))
            .double()
            .log_softmax(-1)
            .gather(-1, torch.tensor(targets)[..., None])
        )
        np.testing.assert_allclose(session.log_probabilities(feeds, targets), log_p[..., 0].numpy(), rtol=2.0**-22)
        best = session.log_probabilities(feeds, record.top_ids[..., 0])
        np.testing.assert_allclose(best, -np.log1p(record.tail.astype(np.float64)), rtol=2.0**-22, atol=1e-12)


def test_the_same_rows_in_torch() -> None:
    model = tiny(shifted=False)
    session, draw = EagerScore(model), np.random.default_rng(1)
    feeds = Feeds(
        input_ids=draw.integers(0, 36, (2, 9)),
        position_ids=np.tile(np.arange(9), (2, 1)),
        kv_len=np.array([9, 6]),
        head_index=draw.integers(0, 6, (2, 4)),
        logit_bias=draw.standard_normal(model.config.embedding_size).astype(np.float32),
        inv_temp=np.array([1.0, 0.5], np.float32),
    )
    with torch.no_grad():
        every = model.logits(*(torch.from_numpy(getattr(feeds, n)) for n in ("input_ids", "position_ids", "kv_len")))
    rows = torch.take_along_dim(every, torch.from_numpy(feeds.head_index)[..., None], dim=1)
    rows = rows + torch.from_numpy(feeds.logit_bias)
    np.testing.assert_allclose(session.logits(feeds), rows.numpy(), rtol=1e-5, atol=1e-5)
    targets = draw.integers(0, 36, (2, 4))
    warm = (rows.double() * torch.tensor([1.0, 0.5])[:, None, None]).log_softmax(-1)
    expected = warm.gather(-1, torch.from_numpy(targets)[..., None])[..., 0]
    np.testing.assert_allclose(session.log_probabilities(feeds, targets), expected.numpy(), rtol=1e-5, atol=1e-5)


def test_a_bundle_without_one_says_so(tmp_path: Path) -> None:
    with pytest.raises(UsageFault, match=r"holds no score\.onnx, .* export it again"):
        open_score(tmp_path / SCORE)


def test_another_graph_is_refused(exported: Made, tmp_path: Path) -> None:
    bundle = exported("fp16", "dream")
    shutil.copy(bundle / MODEL, tmp_path / SCORE)
    shutil.copy(bundle / MODEL_DATA, tmp_path / MODEL_DATA)
    with pytest.raises(InputRefused, match=r"score\.onnx has inputs .*; expected .*target_ids"):
        open_score(tmp_path / SCORE, threads=1)


def test_a_closed_session_does_not_run(exported: Made, passes: list[tuple[Feeds, Record]]) -> None:
    session = open_score(exported("fp16", "dream") / SCORE, threads=1)
    session.close()
    with pytest.raises(ValueError, match="was closed"):
        session.logits(passes[0][0])
