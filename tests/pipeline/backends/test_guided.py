"""Guided sessions against the formula on plain logits: full passes, windows, ranges of rows; clear errors."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from pipeline.backends.backend import Feeds, FullPasses, Record
from pipeline.backends.eager import open_transformer
from pipeline.backends.guided import EagerGuided, GuidedSession, PairCache, open_guided, paired
from pipeline.backends.ort import open_session
from pipeline.errors import InputRefused, UsageFault
from pipeline.folder import GUIDED, MODEL, SCORE
from pipeline.runner import read_settings
from pipeline.validation.feeds import sweep
from tests.pipeline.random_models import MASK, V, tiny

STRENGTH = np.array([0.0, 0.5, 2.0], np.float32)


def guided_feeds(model, *, strength: Sequence[float] = STRENGTH) -> Feeds:
    """Three canvases of 9, prompts of 2, 4 and 3, the rest masked."""
    draw = np.random.default_rng(1)
    ids = np.full((3, 9), MASK)
    promptless = ids.copy()
    for row, start in enumerate((2, 4, 3)):
        ids[row, :start] = draw.integers(0, 36, start)
        ids[row, 7] = promptless[row, 7] = 5  # written by a step, so it stays in both
    return Feeds(
        input_ids=ids,
        position_ids=np.tile(np.arange(9), (3, 1)),
        kv_len=np.array([9, 9, 8]),
        head_index=np.tile([4, 5, 6], (3, 1)),
        logit_bias=np.where(np.arange(V) == MASK, -1e9, 0).astype(np.float32),
        inv_temp=np.array([1.0, 0.5, 2.0], np.float32),
        guidance=np.asarray(strength, np.float32),
        promptless_ids=promptless,
    )


def by_hand(model, feeds: Feeds) -> torch.Tensor:
    """LLaDA's form of the formula, row by row."""
    rows = []
    for b, w in enumerate(feeds.guidance.tolist()):
        branches = []
        for ids in (feeds.input_ids, feeds.promptless_ids):
            one = torch.from_numpy(ids[b : b + 1]), torch.from_numpy(feeds.position_ids[b : b + 1])
            with torch.no_grad():
                logits = model.logits(*one, torch.from_numpy(feeds.kv_len[b : b + 1]))[0]
            branches.append(logits[feeds.head_index[b]].double())
        conditional, unconditional = branches
        rows.append(unconditional + (w + 1) * (conditional - unconditional))
    return torch.stack(rows) + torch.from_numpy(feeds.logit_bias)


@pytest.mark.parametrize("shifted", [False, True], ids=["llada", "dream"])
def test_the_formula(shifted: bool) -> None:
    model = tiny(shifted=shifted)
    feeds = guided_feeds(model)
    record = EagerGuided(model, top_k=4).run(feeds)
    expected = by_hand(model, feeds)
    order = torch.argsort(expected, dim=-1, descending=True)[..., :4]
    assert np.array_equal(record.top_ids, order.numpy())
    # Logits up to 60, guided threefold, in float32.
    np.testing.assert_allclose(record.top_logits, expected.gather(-1, order).numpy(), atol=2e-4)
    warm = expected * torch.from_numpy(feeds.inv_temp)[:, None, None]
    np.testing.assert_allclose(record.lse_t, warm.logsumexp(-1).numpy(), atol=4e-4)


def test_without_strength_it_is_the_plain_model() -> None:
    model = tiny(shifted=False)
    feeds = guided_feeds(model, strength=np.zeros(3))
    found = EagerGuided(model, top_k=4).run(feeds)
    plain = open_transformer(model, top_k=4).run(replace(feeds, guidance=None, promptless_ids=None))
    for name, array in found.as_dict().items():
        np.testing.assert_allclose(array, getattr(plain, name), rtol=1e-5, atol=1e-5, err_msg=name)


class Pairs(FullPasses):
    """What a graph of pairs is asked; its record counts the pairs."""

    guided, cached, top_k = True, True, 1

    def __init__(self) -> None:
        self.asked: list[tuple[Feeds, object, int]] = []

    def allocate(self, batch, slots):
        self.batch, self.slots, self.size_bytes = batch, slots, 8 * batch * slots
        return self

    def run(self, feeds, cache=None, *, first_row=0):
        self.asked.append((feeds, cache, first_row))
        return self.full_pass(feeds)

    def full_pass(self, feeds):
        rows = np.zeros((len(feeds.guidance), feeds.head_index.shape[1]), np.float32)
        return Record(
            top_ids=np.zeros((*rows.shape, 1), np.int64),
            top_logits=rows[..., None],
            tail=rows,
            neg_entropy=rows,
            lse_t=rows,
        )

    def close(self):
        self.closed = True


def test_requests_are_pairs_of_neighbouring_rows() -> None:
    inner = Pairs()
    session = GuidedSession(inner)
    cache = session.allocate(3, 32)
    assert (cache.batch, cache.slots, cache.size_bytes) == (3, 32, 8 * 6 * 32)
    feeds = replace(guided_feeds(tiny(shifted=False)), write_start=np.array([0, 4, 8]))
    record = session.run(feeds, cache, first_row=1)
    ((pairs, rows, first),) = inner.asked
    assert rows is inner
    assert first == 2
    assert record.tail.shape == (3, 3)
    for b in range(3):
        assert np.array_equal(pairs.input_ids[2 * b], feeds.input_ids[b])
        assert np.array_equal(pairs.input_ids[2 * b + 1], feeds.promptless_ids[b])
        for name in ("position_ids", "kv_len", "head_index", "inv_temp", "write_start"):
            for row in (2 * b, 2 * b + 1):
                assert np.array_equal(getattr(pairs, name)[row], getattr(feeds, name)[b]), name
    assert np.array_equal(pairs.guidance, STRENGTH)
    session.close()
    assert inner.closed


def test_what_does_not_fit_is_a_fault() -> None:
    model = tiny(shifted=False)
    feeds = guided_feeds(model)
    with pytest.raises(ValueError, match="needs guidance and promptless_ids"):
        paired(replace(feeds, promptless_ids=None))
    with pytest.raises(ValueError, match=r"guidance is None; this session is guided"):
        EagerGuided(model, top_k=4).run(replace(feeds, guidance=None))
    with pytest.raises(ValueError, match=r"this session is not guided"):
        open_transformer(model).run(feeds)
    with pytest.raises(ValueError, match="allocated by another session"):
        GuidedSession(Pairs()).run(feeds, Pairs().allocate(1, 16))
    closed = EagerGuided(model, top_k=4)
    closed.close()
    with pytest.raises(ValueError, match="was closed"):
        closed.run(feeds)
    assert isinstance(GuidedSession(Pairs()).allocate(1, 16), PairCache)


def test_a_bundle_without_guidance_says_so(tmp_path) -> None:
    with pytest.raises(UsageFault, match=r"exported without guidance; .* lowering\.guidance=true"):
        open_guided(tmp_path / GUIDED)


@pytest.fixture(scope="module")
def bundle(exported):
    """Of a shifted model, exported with guidance."""
    return exported("fp16", "dream")


def test_a_window_of_pairs_equals_the_whole_canvas(bundle) -> None:
    """Bit for bit, in any rows of a cache, each request with a window of its own."""
    session = open_guided(bundle / GUIDED, threads=1)
    draw, count = np.random.default_rng(2), 16
    ids = draw.integers(0, 300, (3, 48))
    starts = np.array([32, 0, 13])
    positions = starts[:, None] + np.arange(count)
    whole = Feeds(
        input_ids=ids,
        position_ids=np.tile(np.arange(48), (3, 1)),
        kv_len=np.array([48, 30, 41]),
        head_index=positions,
        logit_bias=np.zeros(read_settings(bundle / "config.json").embedding_size, np.float32),
        inv_temp=np.ones(3, np.float32),
        guidance=STRENGTH,
        promptless_ids=np.where(np.arange(48) < 9, 3, ids),
    )
    window = replace(
        whole,
        input_ids=np.take_along_axis(ids, positions, axis=1),
        position_ids=positions,
        head_index=np.tile(np.arange(count), (3, 1)),
        promptless_ids=np.take_along_axis(whole.promptless_ids, positions, axis=1),
        write_start=starts,
    )
    expected = session.run(whole).as_dict()
    cache = session.allocate(5, 64)
    session.run(whole, cache, first_row=1)
    session.run(replace(window, input_ids=window.promptless_ids[:, ::-1].copy()), cache, first_row=1)
    for name, array in session.run(window, cache, first_row=1).as_dict().items():
        assert np.array_equal(array, expected[name]), name
    for row in range(3):
        one = {
            name: array[row : row + 1]
            for name, array in vars(window).items()
            if isinstance(array, np.ndarray) and name != "logit_bias"
        }
        for name, array in session.run(replace(window, **one), cache, first_row=1 + row).as_dict().items():
            assert np.array_equal(array[0], expected[name][row]), name


def test_without_strength_the_exported_graph_answers(bundle) -> None:
    session, plain = open_guided(bundle / GUIDED, threads=1), open_session(bundle / MODEL, threads=1)
    for feeds in sweep(read_settings(bundle / "config.json"), 3):
        nothing = np.zeros(len(feeds.kv_len), np.float32)
        found = session.run(replace(feeds, guidance=nothing, promptless_ids=np.roll(feeds.input_ids, 1, axis=1)))
        for name, array in plain.run(feeds).as_dict().items():
            np.testing.assert_allclose(getattr(found, name), array, rtol=1e-5, atol=1e-4, err_msg=name)


def test_a_graph_of_rows_is_no_graph_of_pairs(bundle, tmp_path) -> None:
    with pytest.raises(InputRefused, match=r"has no input guidance"):
        open_guided(bundle / MODEL, threads=1)
    with pytest.raises(ValueError, match=r"this graph is not guided"):
        open_session(bundle / MODEL, threads=1).run(guided_feeds(tiny(shifted=True)))
    with pytest.raises(InputRefused, match=r"has inputs"):
        open_guided(bundle / SCORE, threads=1)
