"""Both backends: one meaning, rows that do not know of each other, clear errors."""

import os

import numpy as np
import onnx
import pytest

from pipeline.backends import BACKENDS
from pipeline.backends.backend import OUTPUTS
from pipeline.backends.eager import open_transformer
from pipeline.backends.ort import open_session
from pipeline.errors import InputRefused
from pipeline.runner import GenerateOptions, Settings
from tests.pipeline.random_models import V, first_feeds, prompts_of, tiny

OPTIONS = GenerateOptions(gen_length=12, block_length=6)


@pytest.fixture(scope="module", params=sorted(BACKENDS))
def session(request, whole_bundle):
    if request.param == "ort":
        return open_session(whole_bundle / "model.onnx", threads=1)
    return open_transformer(tiny(shifted=False))


def feeds_for(prompts):
    return first_feeds(Settings.of_model(tiny(shifted=False).config), prompts, OPTIONS)


def test_outputs_have_the_promised_types_and_shapes(session):
    record = session.run(feeds_for(prompts_of(2, 5)))
    assert session.top_k == 8
    for name, array in record.as_dict().items():
        assert array.shape == ((5, 6, 8) if name.startswith("top") else (5, 6)), name
        assert array.dtype == (np.int64 if name == "top_ids" else np.float32), name


def test_a_row_alone_equals_the_row_in_a_batch(session):
    prompts = prompts_of(4, 12)
    together = session.run(feeds_for(prompts)).as_dict()
    for row, prompt in enumerate(prompts):
        alone = session.run(feeds_for([prompt])).as_dict()
        for name in OUTPUTS:
            np.testing.assert_allclose(alone[name][0], together[name][row], rtol=1e-5, atol=1e-5, err_msg=name)


def test_backends_agree(whole_bundle):
    feeds = feeds_for(prompts_of(6, 7))
    ort = open_session(whole_bundle / "model.onnx", threads=1).run(feeds).as_dict()
    eager = open_transformer(tiny(shifted=False)).run(feeds).as_dict()
    for name in OUTPUTS:
        # Two float32 sums of 96 terms in another order, logits up to 60.
        np.testing.assert_allclose(ort[name], eager[name], rtol=1e-4, atol=1e-4, err_msg=name)


def test_folding_changes_nothing_but_speed(whole_bundle):
    feeds = feeds_for(prompts_of(6, 2))
    plain, folded = (
        open_session(whole_bundle / "model.onnx", threads=1, fold=fold).run(feeds).as_dict() for fold in (False, True)
    )
    for name in OUTPUTS:
        np.testing.assert_allclose(plain[name], folded[name], rtol=1e-4, atol=1e-4, err_msg=name)


def test_a_closed_session_does_not_run(whole_bundle):
    for session in (open_session(whole_bundle / "model.onnx"), open_transformer(tiny(shifted=False))):
        session.close()
        with pytest.raises(ValueError, match="closed"):
            session.run(feeds_for([[1]]))


def test_the_precheck_runs_before_the_runtime(bundle):
    os.link(bundle / "model.onnx.data", bundle / "other")
    with pytest.raises(InputRefused, match="hard links"):
        open_session(bundle / "model.onnx")


def test_a_damaged_model_is_refused(bundle):
    whole = (bundle / "model.onnx").read_bytes()
    (bundle / "model.onnx").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputRefused, match=r"not a well-formed ONNX model|cannot be run"):
        open_session(bundle / "model.onnx")


def test_an_unknown_op_is_refused(bundle):
    model = onnx.load(bundle / "model.onnx", load_external_data=False)
    model.graph.node[0].op_type = "NoSuchOp"
    (bundle / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(InputRefused, match="cannot be run by ONNX Runtime"):
        open_session(bundle / "model.onnx")


@pytest.mark.parametrize(("field", "name"), [("input", "inv_temp"), ("output", "tail")])
def test_another_signature_is_refused(bundle, field, name):
    model = onnx.load(bundle / "model.onnx", load_external_data=False)
    values = getattr(model.graph, field)
    if field == "input":
        values.add().CopyFrom(onnx.helper.make_tensor_value_info("extra", onnx.TensorProto.FLOAT, [V]))
    else:
        values.remove(next(value for value in values if value.name == name))
    (bundle / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(InputRefused, match="inputs" if field == "input" else "no output tail"):
        open_session(bundle / "model.onnx")
