"""Masked NLL and agreement from records alone."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import plugins
from pipeline.backends.backend import Feeds, FullPasses, Record
from pipeline.validation.feeds import Scored
from pipeline.validation.quality import compare, masked_nll

V, K = 11, 4


def record_of(logits: torch.Tensor, top_k: int = K) -> Record:
    assert "record" in plugins.OPS
    outputs: Sequence[torch.Tensor] = torch.ops.dllmc.record(logits, torch.zeros(V), torch.ones(len(logits)), top_k)
    names = ("top_ids", "top_logits", "tail", "neg_entropy", "lse_t")
    return Record(**{name: tensor.numpy() for name, tensor in zip(names, outputs, strict=True)})


class Fixed(FullPasses):
    """A session whose logits are given."""

    def __init__(self, logits: torch.Tensor, top_k: int = K) -> None:
        self.logits, self.top_k = logits, top_k

    def full_pass(self, feeds: Feeds) -> Record:
        return record_of(self.logits, self.top_k)

    def close(self) -> None:
        return None


def scored(targets: list[list[int]], counts: list[list[bool]]) -> Scored:
    batch, rows = np.shape(targets)
    ids = np.zeros((batch, rows), np.int64)
    feeds = Feeds(
        input_ids=ids,
        position_ids=ids,
        kv_len=np.full(batch, rows),
        head_index=ids,
        logit_bias=np.zeros(V, np.float32),
        inv_temp=np.ones(batch, np.float32),
    )
    return Scored(feeds=feeds, targets=np.array(targets), counts=np.array(counts))


@given(seed=st.integers(0, 1000), scale=st.floats(0.1, 20.0), target=st.integers(0, V - 1))
def test_nll_is_that_of_the_softmax_inside_the_top(seed: int, scale: float, target: int) -> None:
    logits = torch.randn(1, 1, V, generator=torch.Generator().manual_seed(seed)) * scale
    record = record_of(logits)
    nll = masked_nll(record, np.array([[target]]), V)
    exact = -torch.log_softmax(logits.double(), -1)[0, 0]
    if target in record.top_ids[0, 0]:
        assert nll[0, 0] == pytest.approx(float(exact[target]), abs=1e-5, rel=1e-5)
    else:
        rest = 1.0 - math.fsum(math.exp(-float(exact[i])) for i in record.top_ids[0, 0])
        # What the top leave is one minus their sum: its error is one rounding of float32, whatever its size.
        share = np.array([rest - 2.0**-22, rest + 2.0**-22]).clip(1e-12) / (V - K)
        highest, lowest = -np.log(share)
        assert lowest - 1e-9 <= nll[0, 0] <= highest + 1e-9


def test_only_rows_that_count_are_counted() -> None:
    logits = torch.zeros(2, 2, V)
    logits[..., 3] = 5.0
    other = logits.clone()
    other[0, 0] = 0.0
    other[0, 0, 7] = 5.0  # parts from the reference
    other[1, 1, 3] = 50.0  # agrees and is surer, but does not count
    batch = scored([[3, 3], [3, 3]], [[True, True], [True, False]])
    quality = compare([record_of(logits)] * 2, Fixed(other), [batch, batch], V)
    sure, wrong = (-torch.log_softmax(logits[0, 0].double(), -1)[i].item() for i in (3, 7))
    assert quality.tokens == 6
    assert quality.agreement == pytest.approx(2 / 3)
    assert quality.reference_nll == pytest.approx(sure, abs=1e-6)
    assert quality.nll_increase == pytest.approx((wrong - sure) / 3, abs=1e-6)


def test_nan_is_not_averaged_away() -> None:
    logits = torch.zeros(1, 2, V)
    broken = logits.clone()
    broken[0, 1] = float("nan")
    quality = compare([record_of(logits)], Fixed(broken), [scored([[1, 1]], [[True, True]])], V)
    assert math.isnan(quality.nll_increase)


def test_records_of_other_sizes_do_not_compare() -> None:
    logits = torch.zeros(1, 1, V)
    with pytest.raises(ValueError, match="keep 4 ids, the session 5"):
        compare([record_of(logits)], Fixed(logits, top_k=5), [scored([[1]], [[True]])], V)
