"""The checks of other endings pass honest ones and find each way of being wrong."""

import math
from dataclasses import replace

import numpy as np
import pytest

from pipeline.backends.backend import Feeds, Floats, Ids, Record
from pipeline.backends.eager import open_transformer
from pipeline.backends.guided import EagerGuided
from pipeline.backends.score import EagerScore
from pipeline.runner import Settings
from pipeline.validation.endings import EndingCheck, check_guided, check_scores
from pipeline.validation.feeds import sweep
from tests.pipeline.random_models import V, tiny

SETTINGS = replace(Settings.of_model(tiny(shifted=False).config, top_k=4), vocab_size=V - 1)


class Wrong(EagerScore):
    """Right but for one thing."""

    def __init__(self, fault: str) -> None:
        super().__init__(tiny(shifted=False))
        self.fault = fault

    def logits(self, feeds: Feeds) -> Floats:
        head = np.maximum(feeds.head_index - 1, 0) if self.fault == "rows shifted" else feeds.head_index
        logits = super().logits(replace(feeds, head_index=head)).copy()
        last = np.argmin(logits[0, 0])
        if self.fault == "the best logit moved":
            logits[0, 0, np.argmax(logits[0, 0])] *= 1 + 2.0**-20
        if self.fault == "a logit beyond the record moved":
            logits[0, 0, last] = logits[0, 0].max() - 8
        if self.fault == "no bias":
            logits -= feeds.logit_bias
        if self.fault == "not a number":
            logits[0, 0, last] = math.nan
        return logits

    def log_probabilities(self, feeds: Feeds, target_ids: Ids) -> Floats:
        found = super().log_probabilities(feeds, target_ids)
        if self.fault == "likelihoods moved":
            found = found * np.float32(1 + 2.0**-20)
        if self.fault == "likelihoods of other ids":
            found = super().log_probabilities(feeds, np.roll(target_ids, 1, axis=-1))
        if self.fault == "likelihoods not numbers":
            found = found * np.float32(math.nan)
        return found


FEEDS = [one for one in sweep(SETTINGS, 3) if one.input_ids.shape[1] == 7]


def check(scorer: EagerScore) -> EndingCheck:
    exported = open_transformer(tiny(shifted=False), top_k=4)
    return check_scores(exported, scorer, SETTINGS, FEEDS, seed=1)


def test_the_same_model_is_right() -> None:
    found = check(EagerScore(tiny(shifted=False)))
    assert found.right
    assert (found.passes, found.rows, found.differing) == (6, 3 * 7 + 3 * 21, 0)
    assert found.largest <= found.tolerance


@pytest.mark.parametrize(
    "fault",
    [
        "rows shifted",
        "the best logit moved",
        "a logit beyond the record moved",
        "no bias",
        "not a number",
        "likelihoods moved",
        "likelihoods of other ids",
        "likelihoods not numbers",
    ],
)
def test_what_is_wrong_is_found(fault: str) -> None:
    assert not check(Wrong(fault)).right


def test_ids_and_logits_of_the_record_are_counted() -> None:
    moved = check(Wrong("the best logit moved"))
    assert 1 <= moved.differing <= moved.passes * 8  # one row of each pass, 4 ids and 4 logits
    assert check(Wrong("likelihoods moved")).differing == 0


class WrongGuided(EagerGuided):
    """Right but for one thing."""

    def __init__(self, fault: str = "") -> None:
        super().__init__(tiny(shifted=False), top_k=4)
        self.fault = fault

    def full_pass(self, feeds: Feeds) -> Record:
        assert feeds.guidance is not None
        assert feeds.guidance[0] == 0
        assert feeds.promptless_ids is not None
        if self.fault == "no guidance":
            feeds = replace(feeds, guidance=np.zeros_like(feeds.guidance))
        if self.fault == "guidance of the next request":
            feeds = replace(feeds, guidance=np.roll(feeds.guidance, 1))
        if self.fault == "branches swapped":
            feeds = replace(feeds, input_ids=feeds.promptless_ids, promptless_ids=feeds.input_ids)
        if self.fault == "w + 1":
            feeds = replace(feeds, guidance=feeds.guidance + 1)
        record = super().full_pass(feeds)
        if self.fault == "not a number":
            record.tail[0, 0] = math.nan
        return record


def test_the_formula_is_right() -> None:
    found = check_guided(WrongGuided(), EagerScore(tiny(shifted=False)), SETTINGS, FEEDS, seed=1)
    assert found.right
    assert found.rows == 3 * 7 + 3 * 21


@pytest.mark.parametrize(
    "fault", ["no guidance", "guidance of the next request", "branches swapped", "w + 1", "not a number"]
)
def test_wrong_guidance_is_found(fault: str) -> None:
    assert not check_guided(WrongGuided(fault), EagerScore(tiny(shifted=False)), SETTINGS, FEEDS, seed=1).right
