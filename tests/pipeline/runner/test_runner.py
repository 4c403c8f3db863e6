"""A bundle, opened and asked; and what the device process must not import."""

import json
import subprocess
import sys

import pytest

from pipeline.errors import HashMismatch, InputRefused, UsageFault
from pipeline.runner import GenerateOptions, Runner, generate
from pipeline.runner.self_test import self_test
from tests.pipeline.random_models import EOS, LETTERS, MASK, seal

HEAVY = ("torch", "onnx", "onnx_ir", "onnxscript", "pydantic", "yaml", "transformers", "safetensors")


@pytest.fixture(scope="module")
def runner(whole_bundle):
    return Runner(whole_bundle, threads=1)


def test_text_in_text_out(runner):
    prompts = ["abc", "hello", "", "a1b2"]
    completions = runner.generate_text(prompts)
    ids = [[LETTERS.index(c) for c in prompt] for prompt in prompts]
    results = generate(runner.session, runner.settings, ids, runner.settings.generation)
    assert [c.result for c in completions] == results
    assert [c.prompt_tokens for c in completions] == [3, 5, 0, 4]
    assert len({c.text for c in completions}) > 1
    for completion in completions:
        assert completion.text == "".join(LETTERS[i] for i in completion.result.ids if i < len(LETTERS))
        assert EOS not in completion.result.ids


def test_special_tokens_are_no_text(runner):
    assert runner.decode([0, EOS, MASK, 1]) == "ab"


def test_options_replace_the_defaults_of_the_bundle(runner):
    assert len(runner.generate_text(["abc"])[0].result.region) == 12
    assert len(runner.generate_text(["abc"], GenerateOptions(gen_length=5))[0].result.region) == 5


def test_a_prompt_too_long_is_a_usage_fault(runner):
    with pytest.raises(UsageFault, match="85 tokens"):
        runner.generate_text(["a" * 85])


def test_text_that_is_no_unicode_is_a_usage_fault(runner):
    with pytest.raises(UsageFault, match="not valid Unicode"):
        runner.generate_text(["\udcff"])


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", "config.json", "tokenizer.json"])
def test_one_changed_byte_is_found(bundle, name):
    content = bytearray((bundle / name).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / name).write_bytes(content)
    with pytest.raises(HashMismatch, match=name):
        Runner(bundle)


def test_a_folder_that_is_no_bundle_is_refused(tmp_path):
    with pytest.raises(InputRefused):
        Runner(tmp_path)


def test_a_tokenizer_that_cannot_be_read_is_refused(bundle):
    (bundle / "tokenizer.json").write_text("{}")
    seal(bundle)
    with pytest.raises(InputRefused, match=r"tokenizer\.json cannot be read"):
        Runner(bundle)


def test_settings_that_disagree_with_the_model_are_refused(bundle):
    settings = json.loads((bundle / "config.json").read_text())
    (bundle / "config.json").write_text(json.dumps({**settings, "top_k": 4}))
    seal(bundle)
    with pytest.raises(InputRefused, match="records 8 ids"):
        Runner(bundle)


def test_the_running_process_has_no_torch(whole_bundle):
    code = (
        "import sys\n"
        "import pipeline.cli.run, pipeline.cli.evaluate\n"
        "from pathlib import Path\n"
        "from pipeline.runner import Runner\n"
        "runner = Runner(Path(sys.argv[1]), threads=1)\n"
        "from pipeline.runner.self_test import self_test\n"
        "self_test(runner.session, Path(sys.argv[1]) / 'golden')\n"
        "runner.generate_text(['abc'])\n"
        "print(' '.join(sorted({name.split('.')[0] for name in sys.modules})))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(whole_bundle)], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "onnxruntime" in loaded
    assert not loaded & set(HEAVY)


class TestSelfTest:
    def test_a_whole_bundle_passes(self, runner, whole_bundle):
        (replay,) = self_test(runner.session, whole_bundle / "golden")
        assert replay.wrong_ids == 0
        assert all(difference <= 1e-3 for difference in replay.differences.values())

    def spoil(self, runner, bundle, change):
        path = bundle / "golden" / "step-0.json"
        golden = json.loads(path.read_text())
        change(golden)
        path.write_text(json.dumps(golden))
        self_test(runner.session, bundle / "golden")

    @pytest.mark.parametrize("name", ["top_logits", "tail", "neg_entropy", "lse_t"])
    def test_a_different_number_fails(self, runner, bundle, name):
        def change(golden):
            values = golden["record"][name][1]
            values[2] = [v + 0.01 for v in values[2]] if name == "top_logits" else values[2] + 0.01

        with pytest.raises(Exception, match=f"{name} differs by 0.01"):
            self.spoil(runner, bundle, change)

    def test_a_different_id_fails(self, runner, bundle):
        def change(golden):
            golden["record"]["top_ids"][0][0][0] += 1

        with pytest.raises(Exception, match="1 of 144 ids differ"):
            self.spoil(runner, bundle, change)

    def test_nan_fails(self, runner, bundle):
        def change(golden):
            golden["record"]["tail"][0][0] = float("nan")

        with pytest.raises(Exception, match="tail differs by nan"):
            self.spoil(runner, bundle, change)

    def test_ids_may_swap_where_their_logits_meet(self, runner, bundle):
        def change(golden):
            ids, logits = golden["record"]["top_ids"][0][0], golden["record"]["top_logits"][0][0]
            ids[3], ids[4] = ids[4], ids[3]
            golden["tolerance"]["top_logits"] = logits[3] - logits[4]

        self.spoil(runner, bundle, change)

    def test_what_is_no_recorded_pass_is_refused(self, runner, bundle):
        with pytest.raises(InputRefused, match="not a recorded pass: KeyError"):
            self.spoil(runner, bundle, lambda golden: golden.pop("tolerance"))
        (bundle / "golden" / "step-0.json").unlink()
        with pytest.raises(InputRefused, match="no recorded passes"):
            self_test(runner.session, bundle / "golden")
