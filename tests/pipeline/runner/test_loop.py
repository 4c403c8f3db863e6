"""The loop over full passes: batches, draws, guidance, what it asks a session for and what it refuses."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from pipeline.backends.backend import OUTPUTS, FullPasses, Record
from pipeline.backends.eager import open_transformer
from pipeline.backends.guided import EagerGuided
from pipeline.errors import InputRefused, UsageFault, ValidationFailed
from pipeline.runner import Engine, GenerateOptions, Request, Settings, Step, denoise, generate
from pipeline.runner.policies import POLICIES
from pipeline.runner.sampling import keyed_draws
from plugins.record import record as record_of
from tests.pipeline.random_models import EOS, MASK, PAD, V, prompts_of, tiny
from tests.pipeline.runner.plain_loop import decode


@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_results_do_not_depend_on_the_batch(policy, temperature):
    model = tiny(shifted=True)
    settings, session = Settings.of_model(model.config), open_transformer(model)
    options = GenerateOptions(
        gen_length=14, block_length=6, policy=policy, temperature=temperature, threshold=0.5, steps=7
    )
    prompts = prompts_of(seed=8, count=12)
    whole = generate(session, settings, prompts, options)
    assert len({tuple(result.region) for result in whole}) > 6
    order = np.random.default_rng(0).permutation(len(prompts)).tolist()
    for batch_size in (1, 5):
        shuffled = generate(
            session, settings, [prompts[i] for i in order], options, request_ids=order, batch_size=batch_size
        )
        assert shuffled == [whole[i] for i in order]


def test_seed_and_request_decide_the_sample():
    model = tiny(shifted=False)
    settings, session = Settings.of_model(model.config), open_transformer(model)

    def sample(seed: int, requests: list[int]) -> list[list[int]]:
        options = GenerateOptions(gen_length=12, temperature=3.0, seed=seed, policy="quota")
        prompts = [[3, 4]] * len(requests)
        return [r.region for r in generate(session, settings, prompts, options, request_ids=requests)]

    first, second = sample(0, [0, 1])
    assert first != second
    assert sample(0, [1, 0]) == [second, first]
    assert sample(1, [0])[0] != first


class Fixed(FullPasses):
    """A session whose every head row has the same logits [V]; remembers its feeds."""

    def __init__(self, logits, top_k):
        self.logits, self.top_k = logits, top_k

    def full_pass(self, feeds):
        self.feeds = feeds
        rows = np.tile(self.logits + feeds.logit_bias, (*feeds.head_index.shape, 1)).astype(np.float32)
        outputs = record_of(torch.from_numpy(rows), torch.zeros(()), torch.from_numpy(feeds.inv_temp), self.top_k)
        return Record(**dict(zip(OUTPUTS, (o.numpy() for o in outputs), strict=True)))

    def close(self):
        pass


SETTINGS = Settings.of_model(tiny(shifted=False).config)
NEVER_ENDING = np.where(np.arange(V) == EOS, -1e9, 0.0)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_sampling_follows_the_softmax_at_that_temperature(temperature):
    logits = np.full(V, -50.0)
    logits[:5] = [2.0, 1.5, 1.0, 0.0, -1.0]
    logits[MASK] = 5.0  # banned, whatever the model thinks of it
    session = Fixed(logits, top_k=8)
    options = GenerateOptions(gen_length=64, block_length=64, temperature=temperature, policy="quota", steps=1)
    results = generate(session, SETTINGS, [[]] * 100, options)
    counts = np.bincount([i for r in results for i in r.region], minlength=V)
    p = np.exp(logits[:5] / temperature)
    expected = 6400 * p / p.sum()
    assert counts[5:].sum() == 0
    assert ((counts[:5] - expected) ** 2 / expected).sum() <= 18.47  # 4 degrees of freedom, 0.1 %


def test_draws_are_keyed_by_the_rows_own_request_step_and_position(monkeypatch):
    keys = []

    def spy(*, seed, requests, steps, starts, rows):
        keys.extend((seed, *key) for key in zip(requests, steps, starts, strict=True))
        return keyed_draws(seed=seed, requests=requests, steps=steps, starts=starts, rows=rows)

    monkeypatch.setattr("pipeline.runner.batch.keyed_draws", spy)
    options = GenerateOptions(gen_length=4, block_length=2, temperature=1.0, seed=9, policy="quota")
    generate(Fixed(NEVER_ENDING, top_k=8), SETTINGS, [[1, 2, 3], [1]], options, request_ids=[5, 6], batch_size=1)
    starts = {5: 3, 6: 1}
    assert keys == [(9, r, step, starts[r] + 2 * (step // 2)) for r in (5, 6) for step in range(4)]


def test_a_sampled_token_is_as_sure_as_its_clean_probability():
    logits = np.array([3.0, 2.5, 0.0, -1.0, *[-60.0] * (V - 4)])
    steps = []
    options = GenerateOptions(gen_length=32, temperature=5.0, policy="quota", steps=1)
    (result,) = generate(Fixed(logits, top_k=8), SETTINGS, [[1]], options, on_step=steps.append)
    p = np.exp(logits) / np.exp(logits).sum()
    assert set(result.region) == {0, 1, 2, 3}
    np.testing.assert_allclose(steps[0].confidences, p[result.region], rtol=1e-6)
    np.testing.assert_allclose(np.exp(result.logprobs), p[result.region], rtol=1e-6)


def test_ids_beyond_the_vocabulary_and_the_mask_are_never_chosen():
    logits = np.linspace(-3, 3, V)  # the best id is the last row, beyond vocab_size
    for temperature in (0.0, 1.0):
        options = GenerateOptions(gen_length=20, temperature=temperature)
        (result,) = generate(Fixed(logits, top_k=8), SETTINGS, [[1]], options)
        assert MASK not in result.region
        assert max(result.region) < SETTINGS.vocab_size == V - 1


def test_a_penalty_reaches_what_lies_beyond_the_top_k():
    logits = np.linspace(9, 8, V, dtype=np.float32)
    engine = Engine(Fixed(logits, 2), SETTINGS, full_logits=lambda feeds, row, head: logits + feeds.logit_bias)
    options = GenerateOptions(gen_length=8, block_length=1, repetition_penalty=2.0)
    (result,) = denoise(engine, [Request(ids=[5])], options)
    assert result.region == list(range(8))


def test_a_shifted_model_is_asked_one_row_earlier():
    session = Fixed(np.zeros(V), top_k=2)
    options = GenerateOptions(gen_length=4, block_length=4, steps=1, policy="quota")
    for shifted, expected in ((False, [[3, 4, 5, 6], [0, 1, 2, 3]]), (True, [[2, 3, 4, 5], [0, 0, 1, 2]])):
        generate(session, replace(SETTINGS, shifted_logits=shifted), [[], [1, 2, 3]], options)
        assert session.feeds.head_index.tolist() == expected
        assert session.feeds.kv_len.tolist() == [7, 4]  # the longest first
        assert session.feeds.input_ids.shape == (2, 16)
        assert session.feeds.input_ids[0].tolist() == [1, 2, 3, *[MASK] * 4, *[PAD] * 9]


def test_steps_show_the_canvas_filling_in_and_no_committed_token_changes():
    model = tiny(shifted=False)
    seen: dict[int, list[Step]] = {}
    options = GenerateOptions(gen_length=16, block_length=8, policy="quota", steps=16)
    results = generate(
        open_transformer(model),
        SETTINGS,
        prompts_of(seed=2, count=5),
        options,
        on_step=lambda step: seen.setdefault(step.request, []).append(step),
    )
    for result in results:
        steps = seen[result.request]
        assert [step.finished for step in steps] == [False] * (result.nfe - 1) + [True]
        assert steps[-1].region.tolist() == result.region
        for before, after in pairwise(steps):
            assert all(b in (MASK, a) for b, a in zip(before.region, after.region, strict=True))
            assert (after.region[after.committed] != MASK).all()


@pytest.mark.parametrize("shifted", [False, True], ids=["llada", "dream"])
def test_guidance_leads_away_from_what_stands_without_the_prompt(shifted):
    model = tiny(shifted=shifted)
    settings, prompts = Settings.of_model(model.config), prompts_of(seed=4, count=4)
    options = GenerateOptions(gen_length=12, block_length=6, guidance=1.5, threshold=0.6)
    engine = Engine(open_transformer(model), settings, open_guided=lambda: EagerGuided(model, top_k=8))
    requests = [Request(ids=prompt, request=i) for i, prompt in enumerate(prompts)]
    for prompt, result in zip(prompts, denoise(engine, requests, options, batch_size=3), strict=True):

        def guided(ids, prompt=prompt):
            positions, length = torch.arange(len(ids))[None], torch.tensor([len(ids)])
            with torch.no_grad():
                conditional = model.logits(torch.tensor([ids]), positions, length)[0]
                free = [MASK] * len(prompt) + ids[len(prompt) :]
                unconditional = model.logits(torch.tensor([free]), positions, length)[0]
            logits = unconditional + 2.5 * (conditional - unconditional)
            if shifted:
                logits = torch.cat((logits[:1], logits[:-1]))
            logits[:, MASK] = logits[:, V - 1] = -torch.inf
            return logits.double().numpy()

        region = [EOS if EOS in result.region[:i] else t for i, t in enumerate(result.region)]
        assert region == decode(guided, prompt, options, mask=MASK, eos=EOS)
    plain = denoise(engine, requests, replace(options, guidance=0.0))
    assert plain == generate(open_transformer(model), settings, prompts, replace(options, guidance=0.0))


def test_guidance_needs_a_graph_for_it():
    with pytest.raises(UsageFault, match="export the bundle again"):
        generate(Fixed(np.zeros(V), top_k=2), SETTINGS, [[1]], GenerateOptions(guidance=1.0))


def test_nan_is_never_decoded():
    with pytest.raises(ValidationFailed, match="NaN"):
        generate(Fixed(np.full(V, np.nan), top_k=2), SETTINGS, [[1]], GenerateOptions())


def test_an_id_outside_the_embedding_is_refused():
    with pytest.raises(InputRefused, match="id 40"):
        generate(Fixed(np.zeros(V), top_k=2), SETTINGS, [[V]], GenerateOptions())


def test_no_prompts_no_results():
    assert generate(Fixed(np.zeros(V), top_k=2), SETTINGS, [], GenerateOptions()) == []


def test_prompt_that_is_too_long_is_a_usage_fault():
    model = tiny(shifted=False)
    with pytest.raises(UsageFault, match="90 tokens and gen-length is 7"):
        generate(open_transformer(model), Settings.of_model(model.config), [[1] * 90], GenerateOptions(gen_length=7))
