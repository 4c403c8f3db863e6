"""Runs remember what was written when; two of them part where a replay of their canvases does."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.metrics.free_run import FreeRun, free_run
from pipeline.metrics.free_running import free_running
from pipeline.runner import GenerateOptions, generate
from tests.pipeline.metrics.probes import probes
from tests.pipeline.random_models import EOS, MASK, prompts_of

OPTIONS = GenerateOptions(gen_length=12, block_length=6, threshold=0.5)
PROMPTS = prompts_of(3, 9)
_, REFERENCE, _, CANDIDATE, SETTINGS = probes(shifted=False)


def canvas(run, number, step):
    """The region after a step, masks where nothing was written."""
    places = zip(run.ids[number], run.steps[number], strict=True)
    return [token if written <= step else MASK for token, written in places]


def test_a_run_is_what_the_loop_did():
    run = free_run(REFERENCE, SETTINGS, PROMPTS, OPTIONS, batch_size=4)
    seen = {}
    results = generate(
        REFERENCE,
        SETTINGS,
        PROMPTS,
        OPTIONS,
        on_step=lambda step: seen.setdefault(step.request, []).append(step.region.tolist()),
        batch_size=9,
    )
    assert run.nfe == tuple(result.nfe for result in results)
    assert min(run.nfe) < max(run.nfe), "rows of one length test little"
    for number, result in enumerate(results):
        assert list(run.ids[number]) == result.region
        for step, region in enumerate(seen[number], start=1):
            assert canvas(run, number, step) == region


def plain(reference, candidate, number):
    """First step after which the two canvases differ."""
    for step in range(1, max(reference.nfe[number], candidate.nfe[number]) + 1):
        if canvas(reference, number, step) != canvas(candidate, number, step):
            return step
    return None


def runs(count, length):
    row = st.lists(st.tuples(st.sampled_from([1, 2, EOS]), st.integers(1, 3)), min_size=length, max_size=length)
    return st.lists(row, min_size=count, max_size=count).map(
        lambda rows: FreeRun(
            ids=tuple(tuple(token for token, _ in row) for row in rows),
            steps=tuple(tuple(step for _, step in row) for row in rows),
            nfe=tuple(max(step for _, step in row) for row in rows),
        )
    )


@given(st.data(), st.integers(1, 3), st.integers(1, 4))
def test_runs_part_where_their_canvases_do(data, count, length):
    reference, candidate = data.draw(runs(count, length)), data.draw(runs(count, length))
    found = free_running(reference, candidate, EOS)
    for number in range(count):
        step = plain(reference, candidate, number)
        assert found.first_divergence[number] == step
        assert found.steps.values[number] == (reference.nfe[number] if step is None else step - 1)
        ours, theirs = reference.ids[number], candidate.ids[number]
        ends = [ids.index(EOS) + 1 if EOS in ids else length for ids in (ours, theirs)]
        equal = sum(ours[i] == theirs[i] for i in range(max(ends)))
        assert (found.tokens.values[number], found.tokens.weights[number]) == (equal, max(ends))
        assert found.identical.values[number] == (ours[: max(ends)] == theirs[: max(ends)])
    assert found.steps.weights == reference.nfe


def test_models_part_and_equal_ones_do_not():
    reference, candidate = (free_run(probe, SETTINGS, PROMPTS, OPTIONS) for probe in (REFERENCE, CANDIDATE))
    same = free_running(reference, reference, EOS)
    assert same.first_divergence == (None,) * len(PROMPTS)
    assert (same.tokens.mean, same.identical.mean, same.steps.mean) == (1.0, 1.0, 1.0)
    other = free_running(reference, candidate, EOS)
    assert 0.0 < other.tokens.mean < 1.0
    assert other.steps.mean < 1.0


def test_other_prompts_do_not_compare():
    run = FreeRun(ids=((1, 2),), steps=((1, 1),), nfe=(1,))
    longer = FreeRun(ids=((1, 2, 3),), steps=((1, 1, 1),), nfe=(1,))
    with pytest.raises(ValueError, match="differ"):
        free_running(run, longer, EOS)


def test_draws_belong_to_the_prompt_not_the_batch():
    warm = GenerateOptions(gen_length=6, block_length=6, temperature=1.0, policy="quota")
    whole, single = (free_run(REFERENCE, SETTINGS, PROMPTS, warm, batch_size=size) for size in (9, 1))
    assert np.mean([a == b for a, b in zip(whole.ids, single.ids, strict=True)]) == 1.0
