"""Tiny random models, and a bundle made of one, for the tests of sessions, loop, runner and evaluation."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch.export import export
from torch.fx import GraphModule

import plugins
from passes.add_cache import AddCache
from passes.base import run
from passes.clean_capture import CleanCapture
from passes.invariants import check_float
from passes.quantize_attention import QuantizeAttention
from pipeline.backends.backend import OUTPUTS, Feeds
from pipeline.backends.eager import open_transformer
from pipeline.capture import Recorded, whole_inputs
from pipeline.lower import cached_signature, translate
from pipeline.manifest import build_manifest
from pipeline.models.config import ModelConfig
from pipeline.models.transformer import Transformer
from pipeline.quantize import quant_plan
from pipeline.recipe import Recipe
from pipeline.recipe_file import load_recipe
from pipeline.runner import GenerateOptions, Settings
from pipeline.runner.canvas import Canvases
from pipeline.runner.loop import logit_bias
from pipeline.runner.results import Request
from pipeline.runner.window import Terms, full_feeds

V, MASK, EOS, PAD = 40, 37, 36, 38
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"  # ids 0 to 35
SPECIALS = ["<eos>", "<mask>", "<pad>"]


def tiny(*, shifted: bool) -> Transformer:
    """Random model whose logits are sharp and like end-of-text, so that thresholds and early stops really happen."""
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


def prompts_of(seed: int, count: int) -> list[list[int]]:
    """Prompts of 0 to 19 letters."""
    draw = np.random.default_rng(seed)
    return [draw.integers(0, len(LETTERS), draw.integers(0, 20)).tolist() for _ in range(count)]


def first_feeds(settings: Settings, prompts: list[list[int]], options: GenerateOptions) -> Feeds:
    """Inputs of the first pass over these prompts as one batch."""
    canvases = Canvases(len(prompts), settings, options)
    for place, prompt in enumerate(prompts):
        canvases.admit(place, Request(ids=prompt))
    rows = canvases.rows(canvases.live, canvases.length, canvases.blocks().positions, guided=False)
    return full_feeds(rows, canvases.window.shift, Terms.of(options, logit_bias(settings)))


def tokenizer() -> Tokenizer:
    """One token a letter; white space is dropped."""
    made = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(LETTERS)}, unk_token="0"))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split("", "isolated")]
    )
    made.decoder = decoders.Fuse()
    made.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIALS])
    return made


def captured(model: Transformer, recipe: Recipe) -> GraphModule:
    """The model's graph with its weights, in float but for the operands of attention."""
    recorded = Recorded(model.config, top_k=recipe.lowering.top_k).eval()
    recorded.load_state_dict(model.state_dict(), strict=False)
    example, shapes = whole_inputs(model.config)
    graph = export(recorded, on_cpu(example), dynamic_shapes=shapes, strict=False).module(check_guards=False)
    assert isinstance(graph, GraphModule)
    run(graph, [CleanCapture(), QuantizeAttention(quant_plan(recipe, model.config))], check_float)
    return graph


def write_model(model: Transformer, path: Path, *, external: bool = False, sets: tuple[str, ...] = ()) -> None:
    """The model as float ONNX with the signature of a bundle's graph; `sets` are settings of the fp16 recipe."""
    recipe = load_recipe("fp16", sets)
    write_captured(captured(model, recipe), recipe, model.config, path, external=external)


def write_captured(
    graph: GraphModule, recipe: Recipe, config: ModelConfig, path: Path, *, external: bool = False
) -> None:
    """A captured graph, with its caches, as ONNX."""
    run(graph, [AddCache(recipe.lowering.cache)], check_float)
    signature = cached_signature(config, recipe)
    program = translate(graph, replace(signature, example=on_cpu(signature.example)), recipe.lowering.opset)
    plugins.attach_functions(program)
    ir.save(program, path, external_data=f"{path.name}.data" if external else None)


def on_cpu(tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Zeros of the same shapes and types."""
    return tuple(torch.zeros_like(tensor, device="cpu") for tensor in tensors)


def write_bundle(model: Transformer, folder: Path) -> None:
    """A bundle of the float model: graph, settings, tokenizer, one golden pass, manifest."""
    folder.mkdir()
    write_model(model, folder / "model.onnx", external=True)
    settings = Settings.of_model(model.config, generation=GenerateOptions(gen_length=12, block_length=6, threshold=0.6))
    (folder / "config.json").write_text(json.dumps(settings.as_json()))
    tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "golden").mkdir()
    feeds = first_feeds(settings, prompts_of(1, 3), settings.generation)
    record = open_transformer(model).run(feeds)
    golden = {
        "inputs": {name: array.tolist() for name, array in feeds.as_dict().items()},
        "record": {name: array.tolist() for name, array in record.as_dict().items()},
        "tolerance": dict.fromkeys(OUTPUTS[1:], 1e-3),
    }
    (folder / "golden" / "step-0.json").write_text(json.dumps(golden))
    seal(folder)


def seal(folder: Path) -> None:
    """Write the manifest of what the folder holds now."""
    (folder / "manifest.json").unlink(missing_ok=True)
    (folder / "manifest.json").write_bytes(build_manifest(folder, {})[1])
