"""A rule turns a record into the record of changed logits, and a stop string ends a text where it begins."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pipeline.backends.backend import OUTPUTS, Record
from pipeline.errors import UsageFault
from pipeline.runner.rules import Cut, penalise, penalised_rows, restrict, stop_at
from plugins.record import record as record_of

V, K = 12, 4
LOGITS = hnp.arrays(np.float64, (2, 2, V), elements=st.sampled_from([-8.0, -2.0, -0.5, 0.0, 0.5, 1.5, 4.0, 7.0]))
TEMPERATURE = st.sampled_from([0.0, 0.5, 1.0, 2.0])
IDS = st.lists(st.integers(0, V - 1), unique=True).map(np.array).map(lambda ids: ids.astype(np.int64))


def record(logits, temperature=0.0, top_k=K):
    inverse = torch.full((len(logits),), 1 / temperature if temperature else 1.0)
    outputs = record_of(torch.from_numpy(logits).float(), torch.zeros(()), inverse, top_k)
    return Record(**dict(zip(OUTPUTS, (output.numpy() for output in outputs), strict=True)))


def rows_of(logits):
    return lambda b, r: logits[b, r].astype(np.float32)


def assert_same(made, wanted):
    assert np.array_equal(made.top_ids, wanted.top_ids)
    for name in OUTPUTS[1:]:
        array = getattr(made, name)
        assert array.dtype == np.float32
        # Sums of the rest are differences of float32 numbers of size 1 + tail.
        np.testing.assert_allclose(array, getattr(wanted, name), rtol=2e-5, atol=2e-5, err_msg=name)


def penalised(logits, seen, penalty):
    """CTRL's penalty over whole rows."""
    made = logits.copy()
    for b, ids in enumerate(seen):
        chosen = made[b][:, ids]
        made[b][:, ids] = np.where(chosen > 0, chosen / penalty, chosen * penalty)
    return made


@given(LOGITS, st.tuples(IDS, IDS), st.sampled_from([0.5, 1.3, 4.0]), TEMPERATURE)
def test_a_penalty_makes_the_record_of_the_penalised_logits(logits, seen, penalty, temperature):
    made = penalise(record(logits, temperature, V), seen, penalty, temperature=temperature)
    assert_same(made, record(penalised(logits, seen, penalty), temperature, V))


@given(LOGITS, st.tuples(IDS, IDS), st.sampled_from([1.3, 4.0]), TEMPERATURE)
def test_beyond_the_top_k_a_penalty_changes_no_weight(logits, seen, penalty, temperature):
    whole = record(logits, temperature)
    made = penalise(whole, seen, penalty, temperature=temperature)
    changed = logits.copy()
    for b, r in np.ndindex(2, 2):
        inside = np.intersect1d(whole.top_ids[b, r], seen[b])
        changed[b, r] = penalised(logits[b : b + 1, r : r + 1], [inside], penalty)[0, 0]
        order = np.lexsort((whole.top_ids[b, r], -changed[b, r, whole.top_ids[b, r]]))
        assert np.array_equal(made.top_ids[b, r], whole.top_ids[b, r, order])
        # The record op names the best of the whole row, so the sums compare where that is still inside.
        if changed[b, r].argmax() in whole.top_ids[b, r]:
            wanted = record(changed[b : b + 1, r : r + 1], temperature)
            for name in ("tail", "neg_entropy", "lse_t"):
                got = getattr(made, name)[b, r]
                np.testing.assert_allclose(got, getattr(wanted, name)[0, 0], rtol=2e-5, atol=2e-5, err_msg=name)


@given(LOGITS, st.tuples(IDS, IDS), st.sampled_from([0.5, 1.3, 4.0]))
def test_with_rows_to_ask_for_the_best_id_is_that_of_the_penalised_row(logits, seen, penalty):
    made = penalise(record(logits), seen, penalty, row_logits=penalised_rows(rows_of(logits), seen, penalty))
    whole = penalised(logits, seen, penalty)
    best = np.take_along_axis(whole, made.top_ids[..., :1], axis=-1)[..., 0]
    np.testing.assert_allclose(best, whole.max(axis=-1), rtol=1e-6)


def test_a_row_is_asked_for_only_where_a_better_id_may_hide():
    logits = np.array([[[9.0, 8.0, 7.0, 6.0, 5.0, *[0.0] * 7], [9.0, 4.0, 3.0, 1.0, 0.0, *[0.0] * 7]]])
    asked = []

    def row_logits(b, r):
        asked.append((b, r))
        return logits[b, r].astype(np.float32)

    rows = penalised_rows(row_logits, [np.arange(4)], 2.0)
    made = penalise(record(logits), [np.arange(4)], 2.0, row_logits=rows)
    assert asked == [(0, 0)]
    penalise(record(logits), [np.arange(4)], 2.0, row_logits=rows, wanted=np.array([[False, True]]))
    assert asked == [(0, 0)]
    assert made.top_ids[0, 0, 0] == 4
    assert made.top_ids[0, 1, 0] == 0


def test_what_no_rule_touches_stays_to_the_last_bit():
    logits = np.random.default_rng(1).normal(size=(2, 3, V)) * 3
    whole = record(logits, 0.7)
    assert penalise(whole, [np.arange(V)] * 2, 1.0) is whole
    last = np.argsort(logits[1, 2])[:1]
    made = [
        penalise(whole, [last, last], 3.0, temperature=0.7),
        restrict(whole, {(0, 1): {int(whole.top_ids[0, 1, 2])}}, temperature=0.7),
    ]
    for name in OUTPUTS:
        before = getattr(whole, name)
        for b, r in [(0, 0), (0, 2), (1, 0), (1, 1), (1, 2)]:
            assert np.array_equal(getattr(made[1], name)[b, r], before[b, r])
        assert np.array_equal(getattr(made[0], name)[1, 2], before[1, 2])
    assert made[1].top_ids[0, 1, 0] == whole.top_ids[0, 1, 2] != whole.top_ids[0, 1, 0]


@given(LOGITS, IDS.filter(len), TEMPERATURE)
def test_allowed_ids_share_the_law(logits, ids, temperature):
    made = restrict(record(logits, temperature, V), {(1, 0): set(ids.tolist())}, temperature=temperature)
    banned = logits.copy()
    banned[1, 0, np.setdiff1d(np.arange(V), ids)] = -1e9
    wanted = record(banned, temperature, V)
    assert np.array_equal(made.top_ids[1, 0, : len(ids)], wanted.top_ids[1, 0, : len(ids)])
    for name in ("tail", "neg_entropy", "lse_t"):
        got, expected = getattr(made, name)[1, 0], getattr(wanted, name)[1, 0]
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5, err_msg=name)


def test_allowed_ids_beyond_the_top_k_are_looked_up():
    logits = np.arange(V, dtype=np.float64)[None, None]
    made = restrict(record(logits), {(0, 0): {0, 2}}, row_logits=rows_of(logits))
    assert made.top_ids[0, 0, :2].tolist() == [2, 0]
    np.testing.assert_allclose(made.tail[0, 0], np.exp(-2), rtol=1e-6)
    with pytest.raises(UsageFault, match=r"none of the 2 allowed ids is among the model's 4 best.*score\.onnx"):
        restrict(record(logits), {(0, 0): {0, 2}})
    with pytest.raises(UsageFault, match="allows no id"):
        restrict(record(logits), {(0, 0): set()})


WORDS = ["a", "b", "END", "<", "/s>", "", "é"]


def decode(ids):
    return "".join(WORDS[i] for i in ids)


@pytest.mark.parametrize(
    ("ids", "stops", "cut"),
    [
        ([0, 1, 2, 0], ("END",), Cut(ids=2, text="ab")),
        ([0, 1, 2, 0], ("zzz", "b", "END"), Cut(ids=1, text="a")),
        ([0, 2, 0], ("ND",), Cut(ids=1, text="aE")),
        ([0, 3, 4, 0], ("</s>",), Cut(ids=1, text="a")),
        ([2, 0], ("END",), Cut(ids=0, text="")),
        ([0, 5, 5, 2], ("END",), Cut(ids=3, text="a")),
        ([0, 1], ("END", "a b", "c"), None),
        ([0, 1], (), None),
        ([], ("END",), None),
    ],
)
def test_the_first_stop_string_ends_the_text(ids, stops, cut):
    ids = np.array(ids, dtype=np.int64)
    assert stop_at(ids, np.ones(len(ids), dtype=bool), stops, decode) == cut


@given(st.lists(st.sampled_from([0, 1, 2, 3, 4, 6]), max_size=9), st.data())
def test_only_the_committed_beginning_can_stop(ids, data):
    committed = np.array(data.draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids))), dtype=bool)
    length = next((i for i, known in enumerate(committed) if not known), len(ids))
    stops = ("</s>", "bE", "é")
    cut = stop_at(np.array(ids, dtype=np.int64), committed, stops, decode)
    text = decode(ids[:length])
    assert (cut is not None) == any(stop in text for stop in stops)
    if cut is not None:
        assert cut.text == min((text.split(stop)[0] for stop in stops if stop in text), key=len)
        assert cut.text.startswith(decode(ids[: cut.ids]))
