"""A bundle, opened and asked; and what the device process must not import."""

import gc
import json
import os
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from pipeline.errors import HashMismatch, InputRefused, UsageFault, ValidationFailed
from pipeline.folder import TOKENIZER_CONFIG
from pipeline.runner import Completion, GenerateOptions, Piece, Runner, Step, TextModel, generate
from pipeline.runner.chat import ChatTemplate
from pipeline.runner.self_test import self_test
from tests.pipeline.random_models import EOS, LETTERS, MASK, PAD, seal

HEAVY = ("torch", "onnx", "onnx_ir", "onnxscript", "pydantic", "yaml", "transformers", "safetensors")


@pytest.fixture(scope="module")
def runner(whole_bundle):
    return Runner(whole_bundle, threads=1)


def test_text_in_text_out(runner):
    prompts = ["abc", "hello", "", "a1b2"]
    completions = runner.generate(prompts)
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
    assert len(runner.generate(["abc"])[0].result.region) == 12
    assert len(runner.generate(["abc"], GenerateOptions(gen_length=5))[0].result.region) == 5


def test_an_option_by_its_name_changes_one_thing(runner):
    assert runner.options(gen_length=5) == replace(runner.settings.generation, gen_length=5)
    (changed,) = runner.generate(["abc"], GenerateOptions(gen_length=9), block_length=3)
    assert changed.result == runner.generate(["abc"], GenerateOptions(gen_length=9, block_length=3))[0].result


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"treshold": 0.5}, "did you mean threshold"),
        ({"xyzzy": 1}, "known: gen_length"),
        ({"block_length": 0}, "block_length is 0"),
        ({"threshold": 1.5}, r"threshold is 1\.5"),
        ({"threshold": -0.5}, r"threshold is -0\.5"),
        ({"stop": ("",)}, "empty text"),
        ({"stop": "abc"}, r"stop is one text, 'abc'; expected a tuple of texts, pass \('abc',\)"),
    ],
)
def test_options_that_cannot_be_meant(runner, changes, why):
    with pytest.raises(UsageFault, match=why):
        runner.generate(["abc"], **changes)


def test_one_text_is_no_list_of_prompts(runner):
    with pytest.raises(UsageFault, match="expected a list"):
        runner.generate("abc")


def test_an_empty_prompt_shares_a_batch(runner):
    together = runner.generate(["abc", "", "hello"])
    assert [c.result.region for c in together] == [
        runner.generate([prompt])[0].result.region for prompt in ("abc", "", "hello")
    ]


def test_speed_counts_what_stands_before_the_end(runner):
    (completion,) = runner.generate(["abc"], gen_length=24)
    assert completion.seconds > 0
    assert completion.tokens_per_second == len(completion.result.ids) / completion.seconds


def test_more_stop_texts_than_text(runner):
    (whole,) = runner.generate(["abc"])
    (same,) = runner.generate(["abc"], stop=tuple(f"{number:04}?" for number in range(1000)))
    assert same.text == whole.text
    (cut,) = runner.generate(["abc"], stop=(*(f"{number:04}?" for number in range(1000)), whole.text[1:3]))
    assert whole.text.startswith(cut.text + whole.text[1:3])
    assert cut.result.finish_reason == "stop"


def test_a_prompt_too_long_is_a_usage_fault(runner):
    with pytest.raises(UsageFault, match="85 tokens"):
        runner.generate(["a" * 85])


def test_a_canvas_that_grows_has_no_length_to_lower(runner):
    with pytest.raises(UsageFault, match="96 tokens; the model takes 96, and an answer needs one of them"):
        runner.generate(["a" * 96], gen_length=None)
    (last,) = runner.generate(["a" * 95], gen_length=None, block_length=2**31 - 1)
    assert len(last.result.region) == 1


def test_text_that_is_no_unicode_is_a_usage_fault(runner):
    with pytest.raises(UsageFault, match="not valid Unicode"):
        runner.generate(["\udcff"])


def test_a_mask_in_the_prompt_is_asked_for_elsewhere(runner):
    for call in (lambda: runner.generate(["ab<mask>"]), lambda: runner.stream("<mask>")):
        with pytest.raises(UsageFault, match="holds the model's mask token"):
            call()


class TestStream:
    OPTIONS: ClassVar = {"gen_length": 24, "block_length": 4, "policy": "quota", "eos": "forbid"}

    def test_pieces_join_up_to_the_text_that_generate_gives(self, runner):
        *events, last = runner.stream("hello", **self.OPTIONS)
        assert isinstance(last, Completion)
        assert "".join(event.text for event in events if isinstance(event, Piece)) == last.text
        assert sum(isinstance(event, Piece) for event in events) == 6  # one a block
        assert last.result == runner.generate(["hello"], **self.OPTIONS)[0].result

    def test_what_is_committed_stays(self, runner):
        steps = [event for event in runner.stream("hello", **self.OPTIONS) if isinstance(event, Step)]
        assert len(steps) == 24
        for before, after in pairwise(steps):
            written = before.region != MASK
            assert (after.region[written] == before.region[written]).all()
            assert len(after.committed) == 1

    def test_a_stop_text_over_two_blocks_is_never_said(self, runner):
        (whole,) = runner.generate(["hello"], **self.OPTIONS)
        stop = whole.text[3:5]  # the last letter of a block and the first of the next
        *events, last = runner.stream("hello", **self.OPTIONS, stop=(stop,))
        assert "".join(event.text for event in events if isinstance(event, Piece)) == last.text
        assert last.text == whole.text[: whole.text.index(stop)]

    def test_what_could_begin_a_stop_text_is_said_at_the_end(self, runner):
        (whole,) = runner.generate(["hello"], **self.OPTIONS)
        *events, last = runner.stream("hello", **self.OPTIONS, stop=(f"{whole.text[-1]}?",))
        pieces = [event.text for event in events if isinstance(event, Piece)]
        assert "".join(pieces) == last.text == whole.text
        assert pieces[-1] == whole.text[-len(pieces[-1]) :]
        assert isinstance(events[-1], Piece)

    def test_closing_it_cancels(self, runner, monkeypatch):
        (before,) = runner.generate(["hello"], **self.OPTIONS)
        passes = []
        run = runner.session.run
        monkeypatch.setattr(runner.session, "run", lambda *words, **more: passes.append(1) or run(*words, **more))
        events = runner.stream("hello", **self.OPTIONS)
        assert isinstance(next(events), Step)
        events.close()
        assert len(passes) == 1
        assert list(events) == []
        assert runner.generate(["hello"], **self.OPTIONS)[0].result == before.result

    def test_a_fault_is_raised_at_the_call(self, runner):
        with pytest.raises(UsageFault, match="threshold"):
            runner.stream("a", threshold=2.0)


class TestFilling:
    def test_only_masks_are_written(self, runner):
        canvas = [0, MASK, 1, EOS, MASK, MASK, 2]
        result = runner.fill(canvas).result
        assert [i for i, given in zip(result.region, canvas, strict=True) if given != MASK] == [0, 1, EOS, 2]
        assert MASK not in result.region
        assert result.ids == result.region
        assert [step > 0 for step in result.step_map] == [given == MASK for given in canvas]

    def test_text_with_gaps(self, runner):
        completion = runner.infill("ab<mask:3>c<mask:2>", eos="forbid")
        assert completion.text[:2] == "ab"
        assert completion.text[5] == "c"
        assert len(completion.text) == 8
        assert completion.prompt_tokens == 3

    @pytest.mark.parametrize(
        ("call", "why"),
        [
            (lambda runner: runner.fill([1, 2]), "no mask"),
            (lambda runner: runner.fill([]), "no mask"),
            (lambda runner: runner.fill([MASK] * 97), "the model takes 96"),
            (lambda runner: runner.infill("abc"), "no gap"),
            (lambda runner: runner.infill("<mask><mask:2>"), "holds the model's mask token"),
        ],
    )
    def test_what_cannot_be_filled(self, runner, call, why):
        with pytest.raises(UsageFault, match=why):
            call(runner)

    def test_an_id_out_of_range_is_refused(self, runner):
        with pytest.raises(InputRefused, match="rows 0 to 39"):
            runner.fill([40, MASK])


class TestChat:
    TEMPLATE = ChatTemplate(
        text="{% for m in messages %}{{ m.role[0] ~ m.content ~ end }}{% endfor %}a", tokens={"end": "<pad>"}
    )
    MESSAGES: ClassVar = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "x"}]

    def test_the_template_makes_the_prompt(self, runner):
        model = TextModel(runner.session, runner.settings, runner.tokenizer, template=self.TEMPLATE)
        ids = [*(LETTERS.index(c) for c in "uhi"), PAD, *(LETTERS.index(c) for c in "ax"), PAD, LETTERS.index("a")]
        assert model.encode_chat(self.MESSAGES) == ids
        completion = model.chat(self.MESSAGES, gen_length=9)
        (expected,) = generate(runner.session, runner.settings, [ids], model.options(gen_length=9))
        assert completion.result == expected
        assert list(model.stream(self.MESSAGES, gen_length=9))[-1].result == expected

    def test_a_bundle_carries_its_template(self, bundle):
        (bundle / TOKENIZER_CONFIG).write_text(
            json.dumps({"chat_template": self.TEMPLATE.text, "special_ids": {"end": PAD}})
        )
        seal(bundle)
        assert Runner(bundle, 1).template == self.TEMPLATE

    def test_one_text_is_no_conversation(self, runner):
        with pytest.raises(UsageFault, match="messages is one text; expected a list"):
            runner.chat("hi")

    def test_without_a_template_there_is_no_chat(self, runner):
        for call in (runner.chat, runner.stream):
            with pytest.raises(UsageFault, match="no chat template"):
                call(self.MESSAGES)


def test_a_pass_that_yields_nan_spoils_no_later_request(whole_bundle, monkeypatch):
    """A slot that is not seen is weighed with 0, and 0 times NaN is NaN: such a cache must not be taken again."""
    runner, options = Runner(whole_bundle, threads=1), {"policy": "quota", "eos": "forbid"}
    (before,) = runner.generate(["hello"], **options)
    run, passes = runner.session.run, []

    def once(feeds, cache=None, *, first_row=0):
        record = run(feeds, cache, first_row=first_row)
        passes.append(cache)
        if len(passes) != 3:
            return record
        for array in cache.arrays.values():
            array.fill(np.nan)
        return replace(record, tail=np.full_like(record.tail, np.nan))

    monkeypatch.setattr(runner.session, "run", once)
    with pytest.raises(ValidationFailed, match="NaN"):
        runner.generate(["hello"], **options)
    assert len(passes) == 3
    assert runner.generate(["hello"], **options)[0].result == before.result
    assert len(passes) > 6


def test_a_thousand_requests_of_any_length_take_the_memory_of_two_hundred(runner):
    """Nothing is kept of a request, and each has the answer that it has alone."""
    draw = np.random.default_rng(11)
    prompts = ["".join(LETTERS[i] for i in draw.integers(0, 36, draw.integers(0, 50))) for _ in range(1000)]
    lengths = draw.integers(1, 17, 20).tolist()  # one a call of fifty
    found, resident = [], []
    for number, gen_length in enumerate(lengths):
        asked = prompts[50 * number : 50 * number + 50]
        found += runner.generate(asked, gen_length=gen_length, block_length=8, threshold=0.3, batch_size=8)
        resident.append(resident_bytes())
    for i in range(0, 1000, 43):
        (alone,) = runner.generate(
            [prompts[i]], gen_length=lengths[i // 50], request_ids=[i % 50], block_length=8, threshold=0.3
        )
        assert found[i].result == alone.result
        assert found[i].text == alone.text
    assert len({completion.text for completion in found}) > 50
    assert max(resident[4:]) - resident[3] <= 1 << 20, resident


def resident_bytes() -> int:
    """What this process has in memory now."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_guidance_needs_its_graph(runner):
    with pytest.raises(UsageFault, match=r"lowering\.guidance=true"):
        runner.generate(["abc"], guidance=1.0)


def test_a_model_without_a_score_graph_cannot_score(runner):
    model = TextModel(runner.session, runner.settings, runner.tokenizer)
    with pytest.raises(UsageFault, match=r"score\.onnx"):
        model.score("a", "b")


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
        "import pipeline.cli.chat, pipeline.cli.score, pipeline.cli.benchmark\n"
        "from pathlib import Path\n"
        "from pipeline.runner import Runner\n"
        "runner = Runner(Path(sys.argv[1]), threads=1)\n"
        "from pipeline.runner.self_test import self_test\n"
        "self_test(runner.session, Path(sys.argv[1]) / 'golden')\n"
        "runner.generate(['abc'])\n"
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
