"""Hidden states along a generation against a replay of every canvas alone; equal models do not move."""

import pytest
import torch

from pipeline.metrics.trajectory import chosen_rows, trajectory
from pipeline.runner import GenerateOptions, generate
from tests.pipeline.metrics.probes import probes
from tests.pipeline.random_models import MASK, first_feeds, prompts_of

PROMPTS = prompts_of(4, 8)
# Prompts of one length leave the loop at different steps: an end-of-text settles a row.
OPTIONS = GenerateOptions(gen_length=8, block_length=4, threshold=0.9)


def canvases(session, settings):
    """Of each prompt, the canvas that each step of its generation saw."""
    seen = [[prompt + [MASK] * OPTIONS.gen_length] for prompt in PROMPTS]
    generate(
        session,
        settings,
        PROMPTS,
        OPTIONS,
        on_step=lambda step: seen[step.request].append(PROMPTS[step.request] + step.region.tolist()),
    )
    return [states[:-1] for states in seen]


def hidden(model, canvas):
    ids = torch.tensor([canvas])
    with torch.no_grad():
        x = model.hidden(ids, torch.arange(len(canvas))[None], torch.tensor([len(canvas)]))
        return model.norm(x)[0].double()


def likeliest(model, canvas):
    """Of every row, the mask and what is no id left out."""
    with torch.no_grad():
        logits = model.head(hidden(model, canvas).float())
    logits[:, MASK], logits[:, model.config.vocab_size :] = -torch.inf, -torch.inf
    return logits.argmax(-1).tolist()


def plain(pairs):
    """values and weights [step][sample] of (sample, step, reference, candidate)."""
    last = max(step for _, step, _, _ in pairs) + 1
    error, power, weight = ([[0.0] * len(PROMPTS) for _ in range(last)] for _ in range(3))
    for sample, step, reference, candidate in pairs:
        error[step][sample] = (candidate - reference).square().sum().item()
        power[step][sample] = reference.square().sum().item()
        weight[step][sample] = float(reference.numel())
    return error, power, weight


@pytest.mark.parametrize("shifted", [False, True], ids=["llada", "dream"])
def test_against_a_replay(shifted):
    model, reference, other, candidate, settings = probes(shifted=shifted)
    exact, own = canvases(reference, settings), canvases(candidate, settings)
    assert exact != own, "the candidate goes the same way"
    pairs = {
        "forced": [
            (n, step, hidden(model, canvas), hidden(other, canvas))
            for n, states in enumerate(exact)
            for step, canvas in enumerate(states)
        ],
        "free": [
            (n, step, hidden(model, a), hidden(other, b))
            for n, states in enumerate(exact)
            for step, (a, b) in enumerate(zip(states, own[n], strict=False))
        ],
    }
    found = trajectory(reference, candidate, settings, PROMPTS, OPTIONS, batch_size=3)
    for name, steps in (("forced", found.forced), ("free", found.free)):
        error, power, weight = plain(pairs[name])
        assert len(steps.by_step) == len(error)
        for step, (sums, squares) in enumerate(zip(steps.by_step, steps.power, strict=True)):
            assert sums.values == pytest.approx(error[step], rel=1e-4, abs=1e-6)
            assert squares.values == pytest.approx(power[step], rel=1e-4)
            assert sums.weights == squares.weights == tuple(weight[step])
        assert steps.total.mean == pytest.approx(sum(map(sum, error)) / sum(map(sum, weight)), rel=1e-4)
    assert found.free.total.mean > found.forced.total.mean > 0.0


@pytest.mark.parametrize("shifted", [False, True], ids=["llada", "dream"])
def test_tokens_against_a_replay(shifted):
    model, reference, other, candidate, settings = probes(shifted=shifted)
    exact, own = canvases(reference, settings), canvases(candidate, settings)
    found = trajectory(reference, candidate, settings, PROMPTS, OPTIONS, batch_size=3).tokens
    for step in range(max(map(len, exact))):
        agreed, masked = [0] * len(PROMPTS), [0] * len(PROMPTS)
        for n, states in enumerate(exact):
            if step >= len(states):
                continue
            a, b = (likeliest(each, states[step]) for each in (model, other))
            places = [place - shifted for place, token in enumerate(states[step]) if token == MASK]
            agreed[n], masked[n] = sum(a[place] == b[place] for place in places), len(places)
        assert (found.forced[step].values, found.forced[step].weights) == (tuple(agreed), tuple(masked))
    assert len(found.forced) == max(map(len, exact))
    for step in range(len(found.free)):
        both = [step < min(len(a), len(b)) for a, b in zip(exact, own, strict=True)]
        same = [
            sum(x == y for x, y in zip(a[step], b[step], strict=True)) - len(prompt) if taken else 0
            for taken, a, b, prompt in zip(both, exact, own, PROMPTS, strict=True)
        ]
        assert found.free[step].values == tuple(same)
        assert found.free[step].weights == tuple(OPTIONS.gen_length * taken for taken in both)
    assert found.free[0].mean == 1.0 > found.free[-1].mean


def test_a_mask_in_a_prompt_is_not_to_be_generated():
    _, reference, _, _, settings = probes(shifted=False)
    prompts = [[MASK, *prompt] for prompt in PROMPTS[:2]]
    found = trajectory(reference, reference, settings, prompts, OPTIONS).tokens
    assert found.forced[0].weights == (OPTIONS.gen_length,) * 2


def test_equal_models_do_not_move():
    _, reference, _, _, settings = probes(shifted=False)
    found = trajectory(reference, reference, settings, PROMPTS, OPTIONS)
    for steps in (found.free, found.forced):
        assert steps.total.values == (0.0,) * len(PROMPTS)
        assert all(sums.mean == 0.0 for sums in steps.by_step)
        assert all(sums.mean > 0.0 for sums in steps.power)
    assert found.free == found.forced
    assert all(sums.mean == 1.0 for sums in (*found.tokens.free, *found.tokens.forced))


def test_rows_of_a_record_are_chosen():
    _, probe, _, _, settings = probes(shifted=False)
    feeds = first_feeds(settings, PROMPTS, OPTIONS)
    narrow = probe.run(feeds)
    wide = probe.observe(type(feeds)(**feeds.as_dict() | {"head_index": feeds.position_ids})).record
    chosen = chosen_rows(wide, feeds.head_index)
    for name, array in narrow.as_dict().items():
        torch.testing.assert_close(torch.from_numpy(getattr(chosen, name)), torch.from_numpy(array))
