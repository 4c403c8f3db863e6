"""The loop with a cache: what it computes, what it keeps, and that no row knows of another."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from pipeline.errors import ValidationFailed
from pipeline.runner import Block, Done, Engine, GenerateOptions, Request, Step, denoise, generate
from pipeline.runner.schedule import BRIDGE
from tests.pipeline.runner.stale_model import EOS, LETTERS, MASK, SETTINGS, StaleModel, decode

OPTIONS = GenerateOptions(gen_length=40, block_length=8, threshold=0.6, vicinity=(0, 0))


def prompts_of(seed, count, longest=60):
    draw = np.random.default_rng(seed)
    return [draw.integers(0, LETTERS, draw.integers(0, longest + 1)).tolist() for _ in range(count)]


def settings_of(shift):
    return replace(SETTINGS, shifted_logits=bool(shift))


@st.composite
def options_of_any_kind(draw):
    return GenerateOptions(
        gen_length=draw(st.sampled_from([None, 1, 24, 37])),
        block_length=draw(st.sampled_from([1, 8, 16, 20])),
        policy=draw(st.sampled_from(["threshold", "quota"])),
        threshold=draw(st.sampled_from([0.55, 0.7, 1.0])),
        refresh_every=draw(st.sampled_from([1, 2, 3, 100])),
        vicinity=draw(st.sampled_from([(0, 0), (3, 0), (0, 5), (16, 16), (500, 500)])),
        exact=draw(st.booleans()),
    )


@hypothesis_settings(max_examples=25)
@given(options_of_any_kind(), st.integers(0, 1), st.integers(1, 5), st.integers(0, 1000), st.booleans())
def test_every_row_is_decoded_as_it_would_be_by_hand(options, shift, batch_size, seed, monitor):
    model, prompts = StaleModel(often=20), prompts_of(seed, 6)
    results = generate(model, settings_of(shift), prompts, replace(options, monitor=monitor), batch_size=batch_size)
    for prompt, result in zip(prompts, results, strict=True):
        plain = decode(prompt, options, shift=shift, often=20)
        assert result.region == plain.region
        assert result.nfe_full == plain.nfe_full
        assert monitor or result.nfe_block == plain.nfe_block


@hypothesis_settings(max_examples=15)
@given(options_of_any_kind(), st.integers(0, 1), st.integers(1, 5), st.integers(0, 1000), st.booleans())
def test_every_filled_canvas_is_decoded_as_it_would_be_by_hand(options, shift, batch_size, seed, monitor):
    draw = np.random.default_rng(seed)
    parts = [[[i] * 9 + [MASK] * draw.integers(1, 25) for i in ids] for ids in prompts_of(seed, 6, longest=5)]
    canvases = [[MASK, *(i for part in text for i in part)] for text in parts]
    requests = [Request(ids=ids, request=i, fill=True) for i, ids in enumerate(canvases)]
    engine = Engine(StaleModel(often=20), settings_of(shift))
    results = denoise(engine, requests, replace(options, monitor=monitor), batch_size=batch_size)
    for request, result in zip(requests, results, strict=True):
        plain = decode(list(request.ids), options, shift=shift, often=20, fill=True)
        assert (result.region, result.nfe_full) == (plain.region, plain.nfe_full)
        assert monitor or result.nfe_block == plain.nfe_block


@pytest.mark.parametrize("shift", [0, 1])
def test_a_vicinity_as_wide_as_the_canvas_is_the_exact_mode(shift):
    prompts, wide = prompts_of(1, 8), replace(OPTIONS, vicinity=(200, 200), monitor=True)
    expected = generate(StaleModel(), settings_of(shift), prompts, replace(OPTIONS, exact=True))
    stale = generate(StaleModel(), settings_of(shift), prompts, OPTIONS)
    found = generate(StaleModel(), settings_of(shift), prompts, wide, batch_size=3)
    assert [result.region for result in found] == [result.region for result in expected]
    assert [result.region for result in stale] != [result.region for result in expected], "nothing was ever stale"
    assert {result.agreement for result in found} <= {1.0, None}


def test_the_exact_mode_and_a_session_without_a_cache_take_full_passes_only():
    prompts = prompts_of(2, 5)
    exact, uncached = StaleModel(), StaleModel(cached=False)
    first = generate(exact, SETTINGS, prompts, replace(OPTIONS, exact=True))
    second = generate(uncached, SETTINGS, prompts, OPTIONS)
    assert first == second
    for model in (exact, uncached):
        assert not model.allocated
        assert all(call.full and call.cache is None for call in model.calls)
    assert all(result.nfe_block == 0 for result in first)


def test_a_block_pass_computes_a_window_and_no_more():
    model = StaleModel()
    options = replace(OPTIONS, block_length=32, gen_length=64, vicinity=(4, 0))
    (result,) = generate(model, settings_of(1), [[3] * 100], options)
    blocks = [call.feeds for call in model.calls if not call.full]
    assert len(blocks) == result.nfe_block
    assert {feeds.input_ids.shape for feeds in blocks} == {(1, 48)}
    assert {int(feeds.write_start[0]) for feeds in blocks} == {100 - 4 - 1, 132 - 4 - 1}
    assert all(feeds.head_index[0].tolist() == list(range(4, 36)) for feeds in blocks)
    assert all(feeds.kv_len.tolist() == [164] for feeds in blocks)
    assert [call.full for call in model.calls].count(True) == result.nfe_full == 2


def test_rows_share_calls_and_a_free_place_is_taken_at_once():
    model = StaleModel()
    requests = [Request(ids=prompt, request=i) for i, prompt in enumerate(prompts_of(3, 9, longest=10))]
    events = list(Engine(model, SETTINGS).run(requests, OPTIONS, batch_size=3))
    steps = [event.request for event in events if isinstance(event, Step)]
    done = {event.result.request: at for at, event in enumerate(events) if isinstance(event, Done)}
    begun = {
        request: next(at for at, event in enumerate(events) if isinstance(event, Step) and event.request == request)
        for request in done
    }
    assert sorted(done) == list(range(9))
    for request in range(3, 9):
        earlier = sorted(at for other, at in done.items() if at < begun[request])
        assert len(earlier) >= request - 2
        assert begun[request] - earlier[request - 3] <= 12  # events of the two other rows stand between, no more
    assert len(model.calls) < len(steps)


def test_places_beside_a_row_are_computed_only_where_nothing_is_lost():
    """The hole that a finished row leaves is bridged in block passes, never in full ones."""
    model = StaleModel(often=12)
    options, prompts = replace(OPTIONS, policy="quota"), prompts_of(5, 6)
    results = generate(model, SETTINGS, prompts, options, batch_size=6)
    assert [r.region for r in results] == [decode(p, options, often=12).region for p in prompts]
    idle = [(call.full, int((call.feeds.kv_len == 1).sum())) for call in model.calls]
    assert all(count == 0 for full, count in idle if full)
    assert any(count for _, count in idle)
    holes = [
        after.first_row - before.first_row - len(before.feeds.kv_len)
        for before, after in pairwise(model.calls)
        if before.full and after.full
    ]
    assert any(0 < hole <= BRIDGE for hole in holes), "no full pass ever had a hole"


def test_a_thousand_requests_take_the_memory_of_a_few():
    model = StaleModel(often=8)
    engine = Engine(model, SETTINGS)
    prompts = prompts_of(5, 1000, longest=140)
    options = replace(OPTIONS, threshold=0.5)
    results = []
    for first in range(0, 1000, 250):
        requests = [Request(ids=prompts[i], request=i) for i in range(first, first + 250)]
        results += denoise(engine, requests, options, batch_size=8)
        model.calls.clear()
    for i in range(0, 1000, 37):
        assert results[i].request == i
        assert results[i].region == decode(prompts[i], options, often=8).region
    assert len(model.allocated) <= 12
    assert len(engine.caches.idle) <= 3


def test_a_row_lives_in_a_cache_of_about_its_own_length():
    model = StaleModel()
    generate(model, SETTINGS, [[3] * 150, [3] * 5], OPTIONS, batch_size=1)
    sizes = {(int(call.feeds.kv_len[0]), call.cache.slots) for call in model.calls}
    # 45 and 190 positions are 48 and 192 slots with room for a window of 16.
    assert sizes == {(190, 224), (45, 64)}


def test_a_growing_canvas_moves_to_a_larger_cache_and_seldom():
    model, options = StaleModel(often=10**6), replace(OPTIONS, gen_length=None)
    (result,) = generate(model, SETTINGS, [[1]], options)
    plain = decode([1], options, often=10**6)
    assert (result.region, result.nfe_full, len(result.region)) == (plain.region, plain.nfe_full, 199)
    assert [kept.slots for kept in model.allocated] == [64, 160, 224]


def test_caches_are_kept_between_runs_and_not_shared_by_two():
    model = StaleModel()
    engine = Engine(model, SETTINGS)
    first = engine.run([Request(ids=[1, 2])], OPTIONS)
    second = engine.run([Request(ids=[3, 4])], OPTIONS)
    next(first), next(second)
    assert len(model.allocated) == 2
    for events, prompt in ((second, [3, 4]), (first, [1, 2])):
        *_, done = events
        assert done.result.region == decode(prompt, OPTIONS).region
    third = engine.run([Request(ids=[5])], OPTIONS)
    next(third)
    third.close()
    assert len(engine.caches.idle) == 2
    assert len(model.allocated) == 2


def test_a_cache_that_a_fault_left_is_not_used_again():
    model = StaleModel()
    engine = Engine(model, SETTINGS)
    good = model.run

    def bad(feeds, cache=None, *, first_row=0):
        record = good(feeds, cache, first_row=first_row)
        return replace(record, tail=record.tail * np.nan) if len(model.calls) == 3 else record

    model.run = bad
    with pytest.raises(ValidationFailed, match="NaN"):
        list(engine.run([Request(ids=[1])], OPTIONS))
    assert engine.caches.idle == []
    list(engine.run([Request(ids=[1])], OPTIONS))
    assert (len(engine.caches.idle), len(model.allocated)) == (1, 2)


def test_what_is_not_a_number_is_found_in_rows_that_nobody_asked_for(monkeypatch):
    """The place of a finished row is computed with its neighbours, and what it leaves in the cache meets the next."""
    model = StaleModel(often=12)
    good = model.run

    def bad(feeds, cache=None, *, first_row=0):
        record = good(feeds, cache, first_row=first_row)
        return replace(record, tail=np.where(feeds.kv_len[:, None] == 1, np.nan, record.tail))

    monkeypatch.setattr(model, "run", bad)
    with pytest.raises(ValidationFailed, match="NaN"):
        generate(model, SETTINGS, prompts_of(5, 6), replace(OPTIONS, policy="quota"), batch_size=6)


def test_a_request_may_be_cancelled_while_others_go_on():
    prompts, cancelled = prompts_of(6, 4), set()
    results = {}
    for event in Engine(StaleModel(), SETTINGS).run(
        (Request(ids=prompt, request=i) for i, prompt in enumerate(prompts)), OPTIONS, batch_size=2, cancelled=cancelled
    ):
        if isinstance(event, Step) and event.request == 1:
            cancelled.update((1, 3))
        if isinstance(event, Done):
            results[event.result.request] = event.result
    assert sorted(results) == [0, 1, 2, 3]
    assert [results[i].finish_reason == "cancelled" for i in range(4)] == [False, True, False, True]
    assert (results[1].nfe, results[3].nfe) == (1, 0)
    assert results[3].ids == []
    assert MASK not in results[1].ids
    assert MASK in results[1].region
    for i in (0, 2):
        assert results[i].region == decode(prompts[i], OPTIONS).region


def test_the_monitor_sees_staleness_and_changes_nothing():
    prompts = prompts_of(7, 6)
    plain = generate(StaleModel(), SETTINGS, prompts, OPTIONS)
    watched = generate(StaleModel(), SETTINGS, prompts, replace(OPTIONS, monitor=True), batch_size=4)
    assert all(result.agreement is None for result in plain)
    assert any(0.0 <= result.agreement < 1.0 for result in watched if result.agreement is not None)
    for before, after in zip(plain, watched, strict=True):
        assert replace(after, agreement=None, nfe_block=before.nfe_block) == before
        assert after.nfe_block == before.nfe_block + before.nfe_full - 1


def test_events_tell_the_whole_story():
    model, prompts = StaleModel(often=10), prompts_of(8, 6)
    requests = [Request(ids=prompt, request=i) for i, prompt in enumerate(prompts)]
    events = list(Engine(model, SETTINGS).run(requests, OPTIONS, batch_size=4))
    for i in range(6):
        steps = [event for event in events if isinstance(event, Step) and event.request == i]
        blocks = [event for event in events if isinstance(event, Block) and event.request == i]
        (done,) = (event.result for event in events if isinstance(event, Done) and event.result.request == i)
        assert [step.finished for step in steps] == [False] * (done.nfe - 1) + [True]
        assert steps[-1].region.tolist() == done.region
        for before, after in pairwise(steps):
            assert all(b in (MASK, a) for b, a in zip(before.region, after.region, strict=True))
        for number, step in enumerate(steps, start=1):
            assert [done.step_map[j] for j in step.committed] == [number] * len(step.committed)
            np.testing.assert_allclose([np.exp(done.logprobs[j]) for j in step.committed], step.confidences)
        assert [block.start for block in blocks] == [0, *(block.stop for block in blocks[:-1])]
        assert all(block.ids == done.region[block.start : block.stop] for block in blocks)
        joined = [token for block in blocks for token in block.ids]
        assert (joined[: joined.index(EOS)] if EOS in joined else joined) == done.ids
        assert done.tpf == len(done.ids) / done.nfe


def test_a_stop_text_ends_a_row_where_nothing_before_it_is_open():
    def letters(ids):
        return "".join(chr(ord("A") + i) for i in ids)

    prompts = prompts_of(9, 6)
    whole = generate(StaleModel(often=1000), SETTINGS, prompts, OPTIONS)
    stop = letters(whole[0].ids[9:11])
    options = replace(OPTIONS, stop=(stop, "no such text"))
    requests = [Request(ids=prompt, request=i) for i, prompt in enumerate(prompts)]
    engine = Engine(StaleModel(often=1000), SETTINGS)
    found = denoise(engine, requests, options, decode=letters, batch_size=4)
    for before, after in zip(whole, found, strict=True):
        at = letters(before.ids).find(stop)
        if at < 0:
            assert after == before
            continue
        assert (after.finish_reason, after.text) == ("stop", letters(before.ids)[:at])
        assert after.ids == before.ids[:at]
        assert after.nfe <= before.nfe
    assert found[0].finish_reason == "stop"
    behind = replace(OPTIONS, stop=(letters([EOS]),))
    ended = denoise(Engine(StaleModel(often=5), SETTINGS), requests, behind, decode=letters)
    assert {result.finish_reason for result in ended} == {"eos"}, "an end-of-text is no text"
    with pytest.raises(ValueError, match="decodes"):
        denoise(engine, requests, options)


def test_forced_and_allowed_ids_hold_and_only_there():
    request = Request(ids=[1, 2, 3], forced={0: 7, 13: EOS}, allowed={4: frozenset({5}), 5: frozenset(range(LETTERS))})
    model = StaleModel(often=10_000)
    engine = Engine(model, SETTINGS, full_logits=lambda feeds, row, head: np.zeros(44, np.float32))
    beside = Request(ids=[4] * 2, request=1)  # shorter, so it comes later
    result, other = denoise(engine, [request, beside], OPTIONS)
    assert (result.region[0], result.region[4], result.step_map[0]) == (7, 5, 0)
    assert result.ids == result.region[:13]
    assert result.finish_reason == "eos"
    assert other.region == decode([4] * 2, OPTIONS, often=10_000).region


def test_only_what_a_step_wrote_freely_is_written_again():
    canvas = [1, 2, MASK, MASK, 3, *[MASK] * 20, 4, EOS]
    forced, allowed = {0: 7, 3: 8, 6: 9}, {4: frozenset({5}), 5: frozenset({6})}
    requests = [Request(ids=canvas, fill=True), Request(ids=[1, 2, 3], request=1, forced=forced, allowed=allowed)]
    engine = Engine(StaleModel(often=10_000), SETTINGS, full_logits=lambda feeds, row, head: np.zeros(44, np.float32))
    filled, other = denoise(engine, requests, replace(OPTIONS, policy="quota", edit=0.55))
    assert filled.nfe > canvas.count(MASK) + 4, "nothing was written again"
    assert [i for i, given in zip(filled.region, canvas, strict=True) if given != MASK] == [1, 2, 3, 4, EOS]
    assert [other.region[position] for position in (0, 3, 6, 4, 5)] == [7, 8, 9, 5, 6]


def test_a_filled_canvas_shares_a_batch_with_prompts():
    canvas = [1, 2, MASK, MASK, 3, *[MASK] * 20, 4, EOS]
    prompts = prompts_of(10, 3)
    requests = [Request(ids=canvas, request=9, fill=True)]
    requests += [Request(ids=prompt, request=i) for i, prompt in enumerate(prompts)]
    filled, *others = denoise(Engine(StaleModel(), SETTINGS), requests, OPTIONS)
    assert MASK not in filled.region
    assert [given in (MASK, written) for given, written in zip(canvas, filled.region, strict=True)] == [True] * 27
    assert [step > 0 for step in filled.step_map] == [i == MASK for i in canvas]
    assert [r.region for r in others] == [decode(prompt, OPTIONS).region for prompt in prompts]


def test_unwatched_nothing_comes_but_the_results():
    requests = [Request(ids=prompt, request=i) for i, prompt in enumerate(prompts_of(8, 6))]
    engine = Engine(StaleModel(often=10), SETTINGS)
    watched = list(engine.run(requests, OPTIONS, batch_size=4))
    turns = engine.turns
    assert list(engine.run(requests, OPTIONS, batch_size=4, watched=False)) == [
        event for event in watched if isinstance(event, Done)
    ]
    assert engine.turns == 2 * turns
