"""A probe gives what a session gives, and shows its logits and its hidden state in the model's coordinates."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.fx import Interpreter

from passes.fold_norm import FoldNorm
from passes.methods import METHODS
from passes.methods.method import WEIGHT_ONLY, Method, no_passes
from passes.rotate_stream import RotateStream
from passes.widen_floats import WidenFloats
from pipeline.backends.eager import open_transformer
from pipeline.capture import materialise
from pipeline.errors import ValidationFailed
from pipeline.lower import simulated_graph
from pipeline.metrics.probe import float_probe, simulated_probe, transformer_probe
from pipeline.models.checkpoint import load_model, open_checkpoint, write_checkpoint
from pipeline.quantize import Weights, write_weights
from pipeline.recipe_file import load_recipe
from pipeline.runner import GenerateOptions, Settings
from pipeline.validate import torch_session
from tests.pipeline.random_models import first_feeds, prompts_of, tiny

FAMILIES = {"llada": False, "dream": True}


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / request.param
    model = tiny(shifted=FAMILIES[request.param])
    model.norm.weight.data.uniform_(0.5, 2.0)
    config = replace(model.config, vocab_size=model.config.embedding_size)  # the one that Dream's config has
    write_checkpoint(folder, config, model.state_dict(), torch.float32)
    return open_checkpoint(folder)


@pytest.fixture(scope="module")
def feeds(checkpoint):
    settings = Settings.of_model(checkpoint.config)
    return first_feeds(settings, prompts_of(1, 3), GenerateOptions(gen_length=12, block_length=6))


def quantised(checkpoint, recipe, folder):
    write_weights(checkpoint, recipe, folder, on_piece=lambda _: None)
    return Weights(folder)


def traced_once(recipe):
    """With the outputs that a probe has anyway: tracing is what takes the time here."""
    return recipe.model_copy(update={"lowering": recipe.lowering.model_copy(update={"debug_logits": True})})


def same_records(found, expected):
    for name, array in expected.as_dict().items():
        np.testing.assert_array_equal(getattr(found, name), array, err_msg=name)


def test_full_precision(checkpoint, feeds):
    model = load_model(checkpoint)
    found = float_probe(checkpoint).observe(feeds)
    same_records(found.record, open_transformer(model).run(feeds))
    same_records(float_probe(checkpoint).run(feeds), found.record)
    ids, positions, kv_len, index = (torch.from_numpy(array) for array in list(feeds.as_dict().values())[:4])
    hidden = model.norm(model.hidden(ids, positions, kv_len))
    for b, rows in enumerate(index.tolist()):
        assert torch.equal(found.hidden[b], hidden[b, rows])
        expected = model.head(hidden[b, rows]) + torch.from_numpy(feeds.logit_bias)
        torch.testing.assert_close(found.logits[b], expected)


class LastNorm(Interpreter):
    """Keeps what the last norm of a graph gives."""

    def call_function(self, target, args, kwargs):
        result = super().call_function(target, args, kwargs)
        if target is torch.ops.aten.rms_norm.default:
            self.found = result
        return result


@pytest.mark.parametrize("name", ["rtn-w8a8", "rtn-w4a16"])
def test_simulated(checkpoint, feeds, tmp_path, name):
    """The head of these is int8 with quantised inputs, which must not show in the hidden state."""
    recipe = traced_once(load_recipe(name))
    if name == "rtn-w4a16":
        recipe = recipe.model_copy(update={"linear": recipe.linear.model_copy(update={"w_group": 16})})
    weights = quantised(checkpoint, recipe, tmp_path)
    probe = simulated_probe(checkpoint, recipe, weights)
    found = probe.observe(feeds)
    same_records(found.record, torch_session(checkpoint, recipe, weights, lowered=False).run(feeds))
    graph = simulated_graph(checkpoint.config, recipe, weights.numbers)
    WidenFloats()(graph)
    norms = LastNorm(materialise(graph, weights.all()))
    norms.run(*(torch.from_numpy(array) for array in feeds.as_dict().values()))
    assert torch.equal(found.hidden, norms.found.float())
    order = torch.sort(found.logits, dim=-1, descending=True, stable=True)
    np.testing.assert_array_equal(order.indices[..., : probe.top_k].numpy(), found.record.top_ids)
    np.testing.assert_array_equal(order.values[..., : probe.top_k].numpy(), found.record.top_logits)


def test_hidden_states_of_a_rotated_stream_are_the_models(checkpoint, feeds, tmp_path, monkeypatch):
    rotating = Method(
        name="none",
        summary="",
        needs_calibration=False,
        formats=WEIGHT_ONLY,
        solve=no_passes,
        rewrite=lambda plan, fit: [FoldNorm(), RotateStream(fit.seed)],
        rotates_stream=True,
    )
    monkeypatch.setitem(METHODS, "none", rotating)
    recipe = traced_once(load_recipe("fp16"))
    recipe = recipe.model_copy(update={"calibration": recipe.calibration.model_copy(update={"seed": 5})})
    probe = simulated_probe(checkpoint, recipe, quantised(checkpoint, recipe, tmp_path))
    expected = float_probe(checkpoint).observe(feeds)
    found = probe.observe(feeds)
    torch.testing.assert_close(found.hidden, expected.hidden, rtol=0.01, atol=0.01)  # weights are float16
    torch.testing.assert_close(found.logits, expected.logits, rtol=0.01, atol=0.05)
    assert probe.original is not None
    probe.original = None
    assert not torch.allclose(probe.observe(feeds).hidden, expected.hidden, atol=0.5), "nothing was rotated"


def test_a_broken_model_is_refused(feeds, checkpoint):
    model = load_model(checkpoint)
    model.norm.weight.data[0] = torch.inf
    with pytest.raises(ValidationFailed, match="infinite"):
        transformer_probe(model).run(feeds)


def test_a_closed_probe_does_not_run(feeds, checkpoint):
    probe = float_probe(checkpoint)
    probe.close()
    with pytest.raises(ValueError, match="closed"):
        probe.run(feeds)
