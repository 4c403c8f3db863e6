"""Reading tasks, scoring answers, and that the score does not depend on the batch."""

import json
from dataclasses import replace

import pytest

from pipeline.errors import InputRefused, UsageFault
from pipeline.evaluation import Item, evaluate, normalised, open_model, read_task
from pipeline.models.checkpoint import write_checkpoint
from pipeline.runner import GenerateOptions, Runner
from tests.pipeline.random_models import LETTERS, prompts_of, tiny, tokenizer

OPTIONS = GenerateOptions(gen_length=12, block_length=6, threshold=0.6)


@pytest.fixture
def task(tmp_path):
    def write(*lines):
        path = tmp_path / "task.jsonl"
        path.write_bytes(b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines))
        return path

    return write


def test_lines_become_items(task):
    path = task({"prompt": "a", "answer": "b", "kind": "x"}, {"prompt": "", "answer": "\u00e9"}, b"", b"")
    assert read_task(path) == [Item(line=1, prompt="a", answer="b", kind="x"), Item(line=2, prompt="", answer="\u00e9")]
    assert len(read_task(path, limit=1)) == 1


@pytest.mark.parametrize(
    "bad",
    [
        b"{",
        b"",
        b"[1]",
        b'"x"',
        b'{"prompt": "a"}',
        b'{"prompt": "a", "answer": 3}',
        b'{"prompt": null, "answer": "b"}',
        b'{"prompt": "\xff", "answer": "b"}',
        b'{"prompt": "\\ud800", "answer": "b"}',
        b"[" * 100_000,
    ],
    ids=lambda line: ascii(line[:24]),
)
def test_a_malformed_line_is_refused_with_its_number(task, bad):
    good = {"prompt": "a", "answer": "b"}
    with pytest.raises(InputRefused, match="line 3"):
        read_task(task(good, good, bad, good))


def test_no_task_is_refused(task, tmp_path):
    with pytest.raises(InputRefused, match="empty"):
        read_task(task(b"", b""))
    with pytest.raises(UsageFault, match="cannot be read"):
        read_task(tmp_path / "absent.jsonl")


@pytest.fixture(scope="module")
def model(whole_bundle):
    return Runner(whole_bundle, threads=1)


@pytest.fixture(scope="module")
def items(model):
    """Every second answer is what the model says, with other white space."""
    prompts = ["".join(LETTERS[i] for i in prompt) for prompt in prompts_of(seed=5, count=20)]
    said = [completion.text for completion in model.generate(prompts, OPTIONS)]
    answers = [f" {text}\n" if i % 2 == 0 else text + "z" for i, text in enumerate(said)]
    return [Item(line=i + 1, prompt=p, answer=a) for i, (p, a) in enumerate(zip(prompts, answers, strict=True))]


def answers_of(model, items):
    return model.generate([item.prompt for item in items], OPTIONS)


@pytest.mark.parametrize("batch_size", [1, 7, 32])
def test_the_score_is_the_share_of_equal_answers(model, items, batch_size):
    seen: list[int] = []
    score = evaluate(model, items, OPTIONS, batch_size=batch_size, on_done=seen.append)
    assert score.exact_match == 0.5
    assert score.count == 20
    assert score.nfe == pytest.approx(sum(c.result.nfe for c in answers_of(model, items)) / 20)
    assert score.nfe_full == pytest.approx(sum(c.result.nfe_full for c in answers_of(model, items)) / 20)
    assert score.tpf == pytest.approx(sum(c.result.tpf for c in answers_of(model, items)) / 20)
    assert score.tokens_per_second > 0
    assert score.unreachable == sum(len(item.answer.strip()) > 12 for item in items)
    assert seen == list(range(1, 21))


def test_a_stop_text_ends_an_answer(model):
    options = replace(OPTIONS, eos="forbid")
    (whole,) = model.generate(["hello"], options)
    at = next(i for i in range(1, 12) if whole.text[i] not in whole.text[:i])
    item = Item(line=1, prompt="hello", answer=whole.text[:at])
    assert evaluate(model, [item], options).exact_match == 0
    assert evaluate(model, [item], replace(options, stop=(whole.text[at:],))).exact_match == 1


def test_a_canvas_that_grows_reaches_every_answer(model, items):
    assert evaluate(model, items[:3], replace(OPTIONS, gen_length=None)).unreachable == 0


def test_a_mask_in_a_prompt_names_its_line(model):
    with pytest.raises(UsageFault, match="line 2: the prompt holds the model's mask token"):
        evaluate(model, [Item(line=1, prompt="a", answer="b"), Item(line=2, prompt="<mask>", answer="b")], OPTIONS)


def test_a_prompt_too_long_names_its_line(model):
    with pytest.raises(UsageFault, match="line 4: the prompt has 95 tokens"):
        evaluate(model, [Item(line=4, prompt="a" * 95, answer="b")], OPTIONS)


def test_normalised():
    assert normalised(" a\t b\n") == "a b"


def test_a_checkpoint_and_its_float_bundle_score_alike(items, tmp_path, whole_bundle):
    random = tiny(shifted=False)
    folder = tmp_path / "model"
    write_checkpoint(folder, random.config, random.state_dict(), dtype=next(random.parameters()).dtype)
    tokenizer().save(str(folder / "tokenizer.json"))
    checkpoint, bundle = open_model(str(folder), threads=1), open_model(str(whole_bundle), threads=1)
    assert checkpoint.settings.vocab_size == bundle.settings.vocab_size == 39
    exact = replace(OPTIONS, exact=True)  # torch keeps no keys and values
    found = [
        replace(evaluate(model, items, exact), seconds=0.0, tokens_per_second=0.0) for model in (checkpoint, bundle)
    ]
    assert found[0] == found[1]
    assert 0 < found[0].exact_match < 1


def test_ids_without_a_token_are_banned_as_in_a_bundle(tmp_path):
    random = tiny(shifted=False)
    write_checkpoint(tmp_path, random.config, random.state_dict())
    short = json.loads(tokenizer().to_str())
    short["added_tokens"].pop()  # <pad>, the last id
    (tmp_path / "tokenizer.json").write_text(json.dumps(short))
    assert random.config.vocab_size == 39
    assert open_model(str(tmp_path)).settings.vocab_size == 38


def test_a_folder_that_is_neither_is_refused(tmp_path):
    with pytest.raises(InputRefused):
        open_model(str(tmp_path / "nowhere"))
