"""The loop against a 40-line reference loop on a tiny random model, through the eager backend."""

import numpy as np
import pytest
import torch

from pipeline.backends.eager import EagerSession
from pipeline.errors import UsageFault
from pipeline.models.config import ModelConfig
from pipeline.models.transformer import Transformer
from pipeline.runner import GenerateOptions, Settings, generate

V, MASK, EOS, PAD = 40, 37, 36, 38


def tiny(*, shifted: bool) -> Transformer:
    """Random model with sharpened logits, so that thresholds and end-of-text really happen."""
    torch.manual_seed(3)
    config = ModelConfig(
        family="dream" if shifted else "llada",
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        embedding_size=V,
        vocab_size=V - 1,
        max_length=96,
        rope_theta=1e4,
        norm_eps=1e-5,
        qkv_bias=shifted,
        tied_head=False,
        shifted_logits=shifted,
        mask_id=MASK,
        eos_id=EOS,
        pad_id=PAD,
    )
    model = Transformer(config).eval()
    for block in model.blocks:
        for linear in (block.attn.v_proj, block.attn.o_proj, block.mlp.up_proj, block.mlp.down_proj):
            linear.weight.data *= 3.0
    model.head.weight.data *= 8.0
    model.head.weight.data[EOS] *= 1.5
    return model


def record(logits, logit_bias, inv_temp, top_k):
    """The graph's five outputs, by their definition."""
    l = logits + logit_bias  # noqa: E741
    top_logits, top_ids = l.sort(dim=-1, descending=True, stable=True)
    z = l - top_logits[..., :1]
    others = torch.ones_like(z).scatter(-1, top_ids[..., :1], 0.0)
    tail = (z.exp() * others).sum(-1)
    entropy = torch.distributions.Categorical(logits=l).entropy()
    lse = torch.logsumexp(l * inv_temp[:, None, None], dim=-1)
    return top_ids[..., :top_k], top_logits[..., :top_k], tail, -entropy, lse


def session_of(model: Transformer, top_k: int = 8) -> EagerSession:
    def graph(input_ids, position_ids, kv_len, head_index, logit_bias, inv_temp):
        x = model.hidden(input_ids, position_ids, kv_len)
        x = torch.take_along_dim(x, head_index[..., None], dim=1)
        return record(model.head(model.norm(x)), logit_bias, inv_temp, top_k)

    return EagerSession(graph, top_k=top_k)


def reference(model: Transformer, prompt: list[int], options: GenerateOptions) -> list[int]:
    """Textbook decoding of one prompt, float64 softmax over all logits; the region, filled with EOS after the first."""
    gen, size = options.gen_length, options.block_length
    x = torch.tensor([[*prompt, *[MASK] * gen]])
    start, positions, kv = len(prompt), torch.arange(len(prompt) + gen)[None], torch.tensor([len(prompt) + gen])
    total = options.steps or gen
    for s in range(0, gen, size):
        e = min(s + size, gen)
        steps = max(1, total * e // gen - total * s // gen)
        step = 0
        while (x[0, start + s : start + e] == MASK).any():
            with torch.no_grad():
                logits = model.logits(x, positions, kv)[0].clone()
            if model.config.shifted_logits:
                logits = torch.cat((logits[:1], logits[:-1]))
            logits[:, MASK] = -torch.inf
            logits[:, model.config.vocab_size :] = -torch.inf
            p, ids = logits.double().softmax(-1).max(-1)
            p[x[0] != MASK] = -1.0
            p[start + e :] = -1.0
            need = (e - s) // steps + (step < (e - s) % steps)
            picks = set(p.topk(min(need, int((p >= 0).sum()))).indices.tolist())
            if options.policy == "threshold":
                picks |= set(torch.nonzero(p >= options.threshold)[:, 0].tolist())
            for j in picks:
                x[0, j] = ids[j]
            step += 1
        region = x[0, start:].tolist()
        if EOS in region[:e]:
            return region[: region.index(EOS)] + [EOS] * (gen - region.index(EOS))
    return x[0, start:].tolist()


def prompts_of(seed: int, count: int) -> list[list[int]]:
    draw = np.random.default_rng(seed)
    return [draw.integers(0, 36, draw.integers(0, 20)).tolist() for _ in range(count)]


OPTIONS = [
    GenerateOptions(policy=policy, gen_length=gen, block_length=block, steps=steps, threshold=0.6)
    for policy in ("quota", "threshold")
    for gen, block, steps in [(24, 8, None), (24, 24, 12), (21, 8, 10), (16, 32, 5), (20, 4, 2)]
]


@pytest.mark.parametrize("shifted", [False, True], ids=["llada", "dream"])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: f"{o.policy}-{o.gen_length}-{o.block_length}-{o.steps}")
def test_every_policy_matches_the_reference_loop(options, shifted):
    model = tiny(shifted=shifted)
    prompts = prompts_of(seed=options.gen_length, count=9)
    settings = Settings.of_model(model.config)
    results = generate(session_of(model), settings, prompts, options, batch_size=4)
    for prompt, result in zip(prompts, results, strict=True):
        region = [EOS if EOS in result.region[:i] else t for i, t in enumerate(result.region)]
        assert region == reference(model, prompt, options)


def test_prompt_that_is_too_long_is_a_usage_fault():
    model = tiny(shifted=False)
    with pytest.raises(UsageFault, match="90 tokens and gen-length is 7"):
        generate(session_of(model), Settings.of_model(model.config), [[1] * 90], GenerateOptions(gen_length=7))
