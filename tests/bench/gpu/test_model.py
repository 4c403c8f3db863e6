"""The measured models: the pass on the kernels is the pass on the references, the baseline is the plain formula."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu.attention import attend, place, rotary_table
from bench.gpu.baseline import Bf16Model
from bench.gpu.compared import Compared, check_model
from bench.gpu.kernels import References
from bench.gpu.machine import Machine
from bench.gpu.model import Model
from bench.gpu.operands import Draws
from bench.gpu.passes import PassCase, pass_cases, prepare_pass, whole_pass
from bench.gpu.quantized import METHODS, QuantizedModel
from bench.gpu.shapes import TINY_DREAM, TINY_LLADA, ModelShape
from pipeline.models.transformer import rotary_angles, rotate
from plugins.int4 import unpack_codes
from plugins.layout import from_layout
from plugins.quantize import quantize

CPU = torch.device("cpu")
SHAPES = pytest.mark.parametrize("shape", [TINY_LLADA, TINY_DREAM], ids=lambda shape: shape.name)
# In the caches' types: two sums that differ by their order alone round to neighbours, a unit of the last place apart.
NEIGHBOURS = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}
LARGEST_LOGIT = 4.0  # of a hundred with a deviation of 1
CASES = pytest.mark.parametrize("case", pass_cases(tiny=True), ids=lambda case: case.name)


def record_error(model: Model) -> float:
    """How far a record may move, as a share of it, when every logit becomes its neighbour, that is moves by e at most.

    log p and the distance of two logits move by 2 e; so do, as a share, p of the best, tail (a sum of such e^z) and
    entropy, whose change is the covariance of the logits' moves with log p: at most e E|log p + H| <= 2 e H.
    """
    return 2 * NEIGHBOURS[model.cache_type] * LARGEST_LOGIT


@pytest.mark.parametrize("method", METHODS)
@SHAPES
def test_every_call_of_a_pass_is_that_of_the_reference(shape: ModelShape, method: str, emulated: Machine) -> None:
    compared = Compared(emulated.load(True))
    model = QuantizedModel(shape, emulated, compared, Draws(CPU, 5), method)
    for case in pass_cases(tiny=True):
        whole_pass(model, prepare_pass(model, case, Draws(CPU, 6)))
    assert compared.wrong == []
    assert compared.calls == len(pass_cases(tiny=True)) * (8 * shape.layers + 2)


@CASES
@SHAPES
def test_the_pass_on_naive_kernels_equals_the_simulation(shape: ModelShape, case: PassCase, emulated: Machine) -> None:
    """Naive kernels sum in float64 as the references do, so nothing may differ but SwiGLU's last place, in few rows."""
    found = []
    for kernels in (emulated.load(True), References()):
        model = QuantizedModel(shape, emulated, kernels, Draws(CPU, 5), "star", path="naive")
        found.append(whole_pass(model, prepare_pass(model, case, Draws(CPU, 6))))
    assert torch.equal(found[0].ids, found[1].ids)
    # Each tail is a sum in float64 that is rounded to float32 once, so they are neighbours at most; but for the rows
    # where a SwiGLU's last place makes a half its neighbour.
    apart = (found[0].tail.double() / found[1].tail.double() - 1).abs()
    assert float(apart.median()) <= 2.0**-23
    assert float(apart.max()) <= record_error(model)


def test_a_wrong_kernel_in_a_pass_is_named(simulated: Machine) -> None:
    class Wrong(References):
        def linear(self, *given: object, **named: object) -> Tensor:
            y = super().linear(*given, **named)  # type: ignore[arg-type]
            y.view(-1)[3] += 1
            return y

    compared = Compared(Wrong())
    model = QuantizedModel(TINY_LLADA, simulated, compared, Draws(CPU, 5), "star")
    whole_pass(model, prepare_pass(model, pass_cases(tiny=True)[1], Draws(CPU, 6)))
    assert [text.split(": ")[0] for text in compared.wrong[:2]] == ["call 2, linear", "call 4, linear"]


def test_checking_a_model_counts_its_calls(simulated: Machine) -> None:
    row = check_model(simulated, TINY_DREAM, 3)
    assert row["wrong"] == {}
    assert row["checked"] == len(METHODS) * len(pass_cases(tiny=True)) * (8 * TINY_DREAM.layers + 2)


def plain_bf16(model: Bf16Model, ids: Tensor) -> Tensor:
    """Logits of a full pass as a textbook writes them, one head after the other."""
    shape, weights = model.shape, model.weights
    C = shape.head_dim
    cos, sin = rotary_angles(torch.arange(len(ids))[None], 1.0 / shape.rope_theta ** (torch.arange(0, C, 2) / C))
    x = weights["embed"][ids]
    for block in weights["blocks"]:
        normed = F.rms_norm(x, x.shape[-1:], block["attention_norm"], shape.norm_eps)
        qkv = F.linear(normed, block["qkv"], block.get("bias"))
        heads = [part[None, None] for part in qkv.split(C, dim=-1)]
        keys = [rotate(k, cos, sin) for k in heads[shape.heads : shape.heads + shape.kv_heads]]
        group, z = shape.heads // shape.kv_heads, []
        for number, q in enumerate(heads[: shape.heads]):
            value = heads[shape.heads + shape.kv_heads + number // group]
            z.append(F.scaled_dot_product_attention(rotate(q, cos, sin), keys[number // group], value)[0, 0])
        x = x + F.linear(torch.cat(z, dim=-1), block["o"])
        normed = F.rms_norm(x, x.shape[-1:], block["mlp_norm"], shape.norm_eps)
        gate, up = F.linear(normed, block["gate_up"]).split(shape.inner, dim=-1)
        x = x + F.linear(F.silu(gate) * up, block["down"])
    return F.linear(F.rms_norm(x, x.shape[-1:], weights["norm"], shape.norm_eps), weights["head"]).float()


@SHAPES
def test_the_baseline_is_a_transformer(shape: ModelShape, simulated: Machine) -> None:
    model = Bf16Model(shape, simulated, Draws(CPU, 5))
    case = pass_cases(tiny=True)[0]
    inputs = prepare_pass(model, case, Draws(CPU, 6))
    found = whole_pass(model, inputs)
    logits = plain_bf16(model, inputs.ids)[inputs.head_rows] + model.logit_bias
    chance = logits.softmax(dim=-1)
    error = record_error(model)
    torch.testing.assert_close(1 / (1 + found.tail), chance.amax(dim=-1), rtol=error, atol=0)
    torch.testing.assert_close(found.neg_entropy, (chance * chance.log()).nansum(dim=-1), rtol=error, atol=0)
    assert bool((logits.gather(1, found.ids[:, None])[:, 0] >= logits.amax(dim=-1) - error).all())


def plain_linear(block: dict[str, Any], name: str, x: Tensor, state: Tensor) -> Tensor:
    """One linear by the references, on weights and activations that are unpacked first."""
    site, linear = block["sites"][name], block["linears"][name]
    codes, scale, _ = quantize(x, **site, **({"state": state} if "left" in site else {}))
    weight = from_layout(unpack_codes(linear["weight"], 4), 1, 2)
    y = scale * (linear["w_scale"][:, 0] * (codes.double() @ weight.double().t()).float())
    return y + linear.get("bias", 0.0)


def plain_quantized(model: QuantizedModel, ids: Tensor) -> Tensor:
    """The residual stream behind the last block, as a textbook writes it."""
    shape, x = model.shape, model.weights["embed"][ids].float()
    C, state = shape.head_dim, (ids == shape.mask_id).int()
    cos, sin = rotary_angles(torch.arange(len(ids))[None], 1.0 / shape.rope_theta ** (torch.arange(0, C, 2) / C))
    for block in model.weights["blocks"]:
        qkv = plain_linear(block, "qkv", x, state).half()
        heads = [part[None, None] for part in qkv.split(C, dim=-1)]
        group, z = shape.heads // shape.kv_heads, []
        for number, q in enumerate(heads[: shape.heads]):
            key, value = (heads[shape.heads + extra + number // group] for extra in (0, shape.kv_heads))
            z.append(F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(key, cos, sin), value)[0, 0])
        x = x + plain_linear(block, "o", torch.cat(z, dim=-1), state)
        gate, up = plain_linear(block, "gate_up", x, state).unflatten(-1, (-1, 2)).unbind(-1)
        x = x + plain_linear(block, "down", (F.silu(gate) * up).half(), state)
    return x


@pytest.mark.parametrize("method", METHODS)
@SHAPES
def test_the_quantised_model_is_a_transformer(shape: ModelShape, method: str, simulated: Machine) -> None:
    model = QuantizedModel(shape, simulated, References(), Draws(CPU, 5), method)
    inputs = prepare_pass(model, pass_cases(tiny=True)[0], Draws(CPU, 6))
    state = (inputs.ids == shape.mask_id).int()
    found = model.blocks(model.embed(inputs.ids), inputs.positions, state)
    expected = plain_quantized(model, inputs.ids)
    # Most rows differ by roundings of float32 alone: 8 linears of 4 each, of values up to 4 times the mean.
    apart = ((found - expected).abs() / expected.abs().mean()).amax(dim=-1)
    assert float(apart.median()) < 8 * 4 * 4 * 2.0**-24
    # Elsewhere a half of attention became its neighbour and moved a code, at most one of a linear. Codes are about 2.5
    # large and add up to 0.3 of the stream in the root of K terms, so that one step is 0.3 / (2.5 sqrt(K)) of it.
    assert float(apart.max()) < 8 * 0.3 / (2.5 * shape.hidden**0.5)
    record = whole_pass(model, inputs)
    codes, scale, _ = quantize(found[inputs.head_rows], model.weights["norm"], bits=8, eps=shape.norm_eps)
    head = from_layout(model.weights["head"], 1)
    logits = scale * model.weights["head_scale"][:, 0] * (codes.double() @ head.double().t()).float()
    chance = (logits + model.logit_bias).softmax(dim=-1)
    assert torch.equal(record.ids, chance.argmax(dim=-1))
    torch.testing.assert_close(1 / (1 + record.tail), chance.amax(dim=-1))


@pytest.mark.parametrize("kind", ["bf16", *METHODS])
@SHAPES
def test_a_block_pass_is_the_full_pass_on_equal_ids(shape: ModelShape, kind: str, simulated: Machine) -> None:
    """The cache holds what the full pass left, so passing the block's rows again changes nothing."""
    draws = Draws(CPU, 5)
    model: Model = (
        Bf16Model(shape, simulated, draws)
        if kind == "bf16"
        else QuantizedModel(shape, simulated, References(), draws, kind)
    )
    model.allocate(24)
    ids = torch.where(torch.arange(24) > 15, shape.mask_id, torch.arange(24) * 3)
    full = model(ids, torch.arange(24), torch.arange(16, 20))
    block = model(ids[16:20], torch.arange(16, 20), torch.arange(4))
    # Rows meet in attention only, whose sums may have another order where fewer rows pass.
    torch.testing.assert_close(block.tail, full.tail, rtol=record_error(model), atol=0)
    assert torch.equal(block.ids, full.ids)


def test_place_writes_its_slots_only() -> None:
    shape, draws = TINY_DREAM, Draws(CPU, 5)
    keys, values = (draws.normal(10, shape.kv_heads, shape.head_dim) for _ in range(2))
    before = keys.clone(), values.clone()
    qkv, table = draws.normal(3, shape.qkv_outputs), rotary_table(shape, 10, CPU)
    q = place(qkv, table, torch.tensor([4, 5, 6]), keys, values, shape.heads)
    others = [0, 1, 2, 3, 7, 8, 9]
    assert torch.equal(keys[others], before[0][others])
    assert torch.equal(values[others], before[1][others])
    assert torch.equal(values[4:7].flatten(1), qkv[:, -shape.kv_heads * shape.head_dim :])
    assert attend(q, keys, values).shape == (3, shape.attention)


@pytest.mark.parametrize("bits", [16, 8])
def test_an_embedding_takes_its_bytes(bits: int, simulated: Machine) -> None:
    draws = Draws(CPU, 5)
    model = QuantizedModel(TINY_LLADA, simulated, References(), draws, "rtn")
    before = model.weight_bytes
    model.draw_embedding(draws, bits)
    rows = TINY_LLADA.vocabulary
    assert model.weight_bytes == before - (rows * (TINY_LLADA.hidden - 4) if bits == 8 else 0)
    assert model.embed(torch.tensor([1, 2])).dtype == torch.float32


def test_inputs_are_not_zeros(simulated: Machine) -> None:
    model = QuantizedModel(TINY_LLADA, simulated, References(), Draws(CPU, 5), "star")
    inputs = prepare_pass(model, pass_cases(tiny=True)[0], Draws(CPU, 6))
    assert 0.2 < float((inputs.ids == TINY_LLADA.mask_id).float().mean()) < 0.8
    assert all(float(keys.float().std()) > 0.5 and float(values.float().std()) > 0.5 for keys, values in model.cache)
    run = partial(whole_pass, model, inputs)
    assert torch.equal(run().tail, run().tail)
