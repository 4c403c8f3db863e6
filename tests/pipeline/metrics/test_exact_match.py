"""Answers of a run are judged as `dllmc eval` judges them, over all problems and by kind."""

from pipeline.evaluation import Item, evaluate
from pipeline.metrics.exact_match import exact_match
from pipeline.metrics.free_run import free_run
from pipeline.runner import GenerateOptions, TextModel
from pipeline.tiny.problems import Problem
from tests.pipeline.metrics.probes import probes
from tests.pipeline.random_models import LETTERS, prompts_of, tokenizer

OPTIONS = GenerateOptions(gen_length=12, block_length=6, threshold=0.6)


def test_score_is_that_of_an_evaluation():
    _, probe, _, _, settings = probes(shifted=True)
    model = TextModel(probe, settings, tokenizer())
    prompts = ["".join(LETTERS[i] for i in prompt) for prompt in prompts_of(seed=5, count=12)]
    said = [completion.text for completion in model.generate(prompts, OPTIONS)]
    # Every second answer is what the model says, with other white space; those of kind b are all wrong.
    answers = [f" {text}\n" if i % 4 == 0 else text + "z" for i, text in enumerate(said)]
    problems = [
        Problem("ab"[i % 2], prompt, answer) for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
    ]
    items = [Item(line=i + 1, prompt=p.prompt, answer=p.answer) for i, p in enumerate(problems)]
    score = evaluate(model, items, OPTIONS)
    run = free_run(probe, settings, [model.encode(prompt) for prompt in prompts], OPTIONS)
    found = exact_match(model, problems, run)
    assert found.total.mean == score.exact_match == 0.25
    assert found.nfe.mean == score.nfe
    assert found.total.values == tuple(float(i % 4 == 0) for i in range(12))
    assert {kind: sums.values for kind, sums in found.kinds.items()} == {"a": (1.0, 0.0) * 3, "b": (0.0,) * 6}
