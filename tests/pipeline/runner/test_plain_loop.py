"""Every policy and modifier, token for token, against the plain loop on a tiny random model."""

import pytest
import torch

from pipeline.backends.eager import open_transformer, transformer_graph
from pipeline.runner import GenerateOptions, Settings, generate
from pipeline.runner.loop import Engine, denoise
from pipeline.runner.policies import POLICIES
from pipeline.runner.results import Request
from tests.pipeline.random_models import EOS, MASK, V, prompts_of, tiny
from tests.pipeline.runner.plain_loop import decode


def logits_of(model):
    """Rows of their own positions, mask id and ids beyond the vocabulary banned."""

    def rows(ids):
        positions = torch.arange(len(ids))
        with torch.no_grad():
            logits = model.logits(torch.tensor([ids]), positions[None], torch.tensor([len(ids)]))[0].clone()
        if model.config.shifted_logits:
            logits = torch.cat((logits[:1], logits[:-1]))
        logits[:, MASK] = -torch.inf
        logits[:, model.config.vocab_size :] = -torch.inf
        return logits.double().numpy()

    return rows


def assert_same(options, *, shifted, count=4, batch_size=3, top_k=V):
    """The loop in batches without a cache, the plain loop prompt by prompt."""
    model = tiny(shifted=shifted)
    prompts = prompts_of(seed=options.block_length, count=count)
    # With every logit in the record, what lies beyond the top-K plays no part.
    session = open_transformer(model, top_k=top_k)
    results = generate(session, Settings.of_model(model.config, top_k=top_k), prompts, options, batch_size=batch_size)
    for request, (prompt, result) in enumerate(zip(prompts, results, strict=True)):
        region = [EOS if EOS in result.region[:i] else t for i, t in enumerate(result.region)]
        assert region == decode(logits_of(model), prompt, options, mask=MASK, eos=EOS, request=request)
    return results


FAMILIES = pytest.mark.parametrize("shifted", [False, True], ids=["llada", "dream"])


@FAMILIES
@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_every_policy_is_the_plain_loop(policy, shifted):
    options = {"policy": policy, "threshold": 0.6, "factor": 0.9, "entropy_bound": 0.8, "exact": True}
    for gen, block, steps in [(18, 8, None), (12, 12, 5)]:
        assert_same(GenerateOptions(gen_length=gen, block_length=block, steps=steps, **options), shifted=shifted)
    drawn = GenerateOptions(gen_length=18, block_length=8, temperature=2.0, top_p=0.95, seed=4, **options)
    assert_same(drawn, shifted=shifted, count=3, batch_size=2)


@FAMILIES
@pytest.mark.parametrize(("gen", "block", "steps"), [(24, 8, None), (24, 24, 12), (21, 8, 10), (16, 32, 5), (20, 4, 2)])
def test_blocks_and_steps_are_those_of_the_plain_loop(gen, block, steps, shifted):
    """With a few logits a row, which is all that these policies look at."""
    for policy in ("quota", "threshold"):
        options = GenerateOptions(policy=policy, gen_length=gen, block_length=block, steps=steps, threshold=0.6)
        assert_same(options, shifted=shifted, top_k=8)


@FAMILIES
@pytest.mark.parametrize("policy", ["margin", "maskgit", "entropy"])
def test_dreams_policies_score_under_top_p(policy, shifted):
    options = GenerateOptions(policy=policy, gen_length=16, block_length=16, steps=6, top_p=0.85, exact=True)
    assert_same(options, shifted=shifted)


@pytest.mark.parametrize("mode", ["forbid", "last", "threshold"])
@pytest.mark.parametrize(
    ("policy", "temperature"), [("threshold", 0.0), ("quota", 0.0), ("entropy", 0.0), ("threshold", 2.0)]
)
def test_end_of_text_waits_as_in_the_plain_loop(mode, policy, temperature):
    options = GenerateOptions(
        gen_length=16,
        block_length=8,
        policy=policy,
        threshold=0.5,
        steps=8,
        temperature=temperature,
        eos=mode,
        eos_threshold=0.8,
        exact=True,
    )
    results = assert_same(options, shifted=False)
    if mode == "forbid":
        assert all(result.finish_reason == "length" and EOS not in result.region for result in results)


@FAMILIES
@pytest.mark.parametrize("tau", [0.2, 0.6])
def test_edits_are_those_of_the_plain_loop(tau, shifted):
    options = GenerateOptions(gen_length=16, block_length=8, threshold=0.3, edit=tau, exact=True)
    results = assert_same(options, shifted=shifted)
    assert any(result.nfe > 16 for result in results) or tau > 0.5


@FAMILIES
def test_a_penalty_edits_nothing_away(shifted):
    options = GenerateOptions(
        gen_length=16, block_length=8, threshold=0.3, edit=0.5, repetition_penalty=1.6, exact=True
    )
    assert_same(options, shifted=shifted, count=3)


@pytest.mark.parametrize("options", [{}, {"policy": "maskgit"}, {"policy": "random"}], ids=str)
def test_two_logits_a_row_draw_what_all_of_them_draw(options):
    """The draws are equal and so is the order in which tokens share them; only where the tokens are kept differs."""
    model, prompts = tiny(shifted=True), prompts_of(seed=4, count=5)
    whole, asked = transformer_graph(model, top_k=1), []

    def full_logits(feeds, row, head_row):
        asked.append(row)
        with torch.inference_mode():
            logits = whole(*(torch.from_numpy(array) for array in feeds.as_dict().values()))[5]
        return logits[row, head_row].numpy() + feeds.logit_bias

    wanted = GenerateOptions(gen_length=16, block_length=8, temperature=2.0, exact=True, **options)
    results = []
    for top_k in (2, V):
        settings = Settings.of_model(model.config, top_k=top_k)
        engine = Engine(open_transformer(model, top_k=top_k), settings, full_logits=full_logits)
        requests = [Request(ids=prompt, request=number) for number, prompt in enumerate(prompts)]
        results.append([result.region for result in denoise(engine, requests, wanted)])
    assert results[0] == results[1]
    assert asked


@FAMILIES
@pytest.mark.parametrize("changes", [{}, {"temperature": 2.0, "policy": "maskgit"}], ids=["best", "drawn"])
def test_the_repetition_penalty_is_that_of_the_plain_loop(changes, shifted):
    options = GenerateOptions(
        gen_length=16, block_length=16, repetition_penalty=1.6, threshold=0.7, exact=True, **changes
    )
    assert_same(options, shifted=shifted, count=4)
