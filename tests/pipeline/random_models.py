"""Tiny random models, and a bundle made of one, for the tests of sessions, loop, runner and evaluation."""

import json
import warnings
from pathlib import Path

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch.export import Dim

import plugins
from pipeline.backends.backend import INPUTS, OUTPUTS, Feeds
from pipeline.backends.eager import open_transformer
from pipeline.capture import Recorded
from pipeline.manifest import build_manifest
from pipeline.models.config import ModelConfig
from pipeline.models.transformer import Transformer
from pipeline.runner import GenerateOptions, Settings
from pipeline.runner.canvas import Canvas
from pipeline.runner.loop import block_positions, feeds_of, logit_bias

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
    rows = [Canvas(prompt, request, settings, options) for request, prompt in enumerate(prompts)]
    return feeds_of(rows, block_positions(rows, options), logit_bias(settings), options)


def tokenizer() -> Tokenizer:
    """One token a letter; white space is dropped."""
    made = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(LETTERS)}, unk_token="0"))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split("", "isolated")]
    )
    made.decoder = decoders.Fuse()
    made.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIALS])
    return made


def write_model(model: Transformer, path: Path, *, external: bool = False) -> None:
    """The model as float ONNX with the graph's signature."""
    graph = Recorded(model.config, top_k=8).eval()
    graph.load_state_dict(model.state_dict(), strict=False)
    ids = torch.zeros(2, 5, dtype=torch.long)
    example = (ids, ids.clone(), ids[:, 0].clone(), ids[:, :3].clone(), torch.zeros(V), torch.zeros(2))
    batch, query, rows = Dim("batch"), Dim("query"), Dim("rows")
    canvas, per_row = {0: batch, 1: query}, {0: batch}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's exporter warns about its own internals
        program = torch.onnx.export(
            graph,
            example,
            dynamic_shapes=(canvas, canvas, per_row, {0: batch, 1: rows}, None, per_row),
            dynamo=True,
            opset_version=24,
            custom_translation_table=plugins.translation_table(),
            input_names=list(INPUTS),
            output_names=list(OUTPUTS),
            optimize=False,
            verbose=False,
        )
    plugins.attach_functions(program.model)
    program.save(path, external_data=external)


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
