"""What a benchmark counts, on a session whose passes cost nothing and write what they are told."""

from dataclasses import replace

import numpy as np
import pytest

from pipeline.backends.backend import Record
from pipeline.errors import UsageFault
from pipeline.runner import Engine, GenerateOptions, Settings
from pipeline.runner.benchmark import Case, Run, TimedSession, benchmark, cases_of, measure, random_prompts, summary
from tests.pipeline.random_models import EOS, MASK, PAD, tiny

SETTINGS = Settings.of_model(tiny(shifted=False).config)
OPTIONS = GenerateOptions(gen_length=8, block_length=4, policy="quota")


class Memory:
    """A cache without numbers."""

    def __init__(self, batch, slots):
        self.batch, self.slots, self.size_bytes = batch, slots, 10 * batch * slots


class Constant:
    """Every row proposes id 5 with certainty."""

    top_k = 2
    cached = True
    guided = False

    def allocate(self, batch, slots):
        return Memory(batch, slots)

    def run(self, feeds, cache=None, *, first_row=0):
        shape = feeds.head_index.shape
        zeros = np.zeros(shape, np.float32)
        ids = np.stack([np.full(shape, 5), np.full(shape, 6)], -1)
        logits = np.stack([zeros, zeros - 50], -1)
        return Record(top_ids=ids, top_logits=logits, tail=zeros, neg_entropy=zeros, lse_t=zeros)

    def close(self):
        pass


def test_passes_steps_and_tokens_are_counted():
    session = TimedSession(Constant())
    run = measure(Engine(session, SETTINGS), session, [[1], [1, 2]], Case(options=OPTIONS, batch_size=2))
    assert run.tokens == 16
    assert run.steps == 8  # one token a step, both rows in one
    assert (run.nfe_full, run.nfe_block) == (4, 12)
    assert len(run.full_ms) + len(run.block_ms) == 8
    assert run.tpf == 1.0
    assert session.cache_bytes > 0
    # A row: 16 ids with positions, 4 head rows with 2 ids each, length and temperature; a pass: the bias of 40 ids.
    row = 16 * (8 + 8) + 4 * 8 + 8 + 4 + 4 * (2 * (8 + 4) + 3 * 4)
    assert run.transfer_bytes == 8 * (2 * row + 40 * 4) + 6 * 2 * 8  # block passes say where they write


def test_exact_cases_have_no_block_passes():
    session = TimedSession(Constant())
    case = Case(options=replace(OPTIONS, exact=True), batch_size=1)
    run = measure(Engine(session, SETTINGS), session, [[1]], case)
    assert run.block_ms == ()
    assert summary(case, [run])["block_pass_ms"] is None


def test_host_time_is_what_no_pass_took():
    run = Run(
        full_ms=(3.0, 5.0),
        block_ms=(1.0,),
        wall_ms=12.0,
        steps=3,
        transfer_bytes=300,
        tokens=6,
        nfe_full=2,
        nfe_block=1,
    )
    slow = replace(run, wall_ms=24.0, full_ms=(30.0,))
    assert run.host_ms_per_step == 1.0
    assert run.tokens_per_second == 500.0
    assert run.tpf == 2.0
    found = summary(Case(options=OPTIONS, batch_size=4), [run, slow, run])
    assert found["full_pass_ms"] == 5.0  # of 3, 5, 30, 3, 5
    assert found["tokens_per_second"] == 500.0
    assert found["transfer_bytes_per_step"] == 100
    assert (found["policy"], found["block_length"], found["batch_size"], found["exact"]) == ("quota", 4, 4, False)


def test_cases_take_turns_and_the_first_turn_is_not_counted(monkeypatch):
    order, counted = [], []

    def count(case, runs):
        counted.append(len(runs))
        return case.facts()

    def watch(engine, session, prompts, case, decode):
        order.append(case.batch_size)
        return measure(engine, session, prompts, case, decode)

    monkeypatch.setattr("pipeline.runner.benchmark.measure", watch)
    monkeypatch.setattr("pipeline.runner.benchmark.summary", count)
    seen = []
    cases = list(cases_of(OPTIONS, [], [], [1, 2, 3]))
    found = benchmark(
        Engine(Constant(), SETTINGS), [[1]], cases, repeats=2, on_run=lambda done, total: seen.append((done, total))
    )
    assert order == [1, 2, 3] * 3
    assert counted == [2, 2, 2]
    assert seen == [(number, 9) for number in range(1, 10)]
    assert [case["batch_size"] for case in found["cases"]] == [1, 2, 3]
    assert (found["prompts"], found["prompt_tokens"], found["repeats"]) == (1, 1, 2)


def test_without_prompts_there_is_nothing_to_measure():
    with pytest.raises(UsageFault, match="no prompts"):
        benchmark(Engine(Constant(), SETTINGS), [], list(cases_of(OPTIONS, [], [], [1])))


def test_random_prompts_are_text_and_always_the_same():
    prompts = random_prompts(SETTINGS, 20, 30)
    assert [len(ids) for ids in prompts] == [30] * 20
    ids = {i for prompt in prompts for i in prompt}
    assert not ids & {MASK, EOS, PAD, 39}
    assert len(ids) == 36
    assert prompts == random_prompts(SETTINGS, 20, 30)
