"""NLL, agreement and KL against one canvas, one position at a time in plain torch; equal models agree in everything."""

import math

import pytest
import torch

from pipeline.metrics.bootstrap import paired
from pipeline.metrics.masked_nll import masked_nll
from pipeline.metrics.noise_grid import noise_grid
from pipeline.metrics.teacher_forced import teacher_forced
from tests.pipeline.metrics.probes import probes, samples

LEVELS = 4


def distributions(model, grid, settings):
    """(canvas, target, probabilities) of every masked position, one canvas without padding at a time."""
    for n, positions in enumerate(grid.states.masked):
        length = int(grid.states.kv_len[n])
        ids = grid.states.input_ids[n : n + 1, :length]
        with torch.no_grad():
            logits = model.logits(ids, torch.arange(length)[None], torch.tensor([length]))[0].double()
        logits[:, settings.vocab_size :] = -math.inf
        logits[:, settings.mask_id] = -math.inf
        for position in positions.nonzero().flatten().tolist():
            row = max(position - settings.shifted_logits, 0)
            yield n, int(grid.states.clean_ids[n, position]), logits[row].softmax(-1).tolist()


@pytest.fixture(scope="module", params=[False, True], ids=["llada", "dream"])
def case(request):
    model, reference, other, candidate, settings = probes(shifted=request.param)
    grid = noise_grid(samples(6), settings, levels=LEVELS)
    return model, reference, other, candidate, settings, grid


def test_against_plain_definitions(case):
    model, reference, other, candidate, settings, grid = case
    found = teacher_forced(reference, candidate, grid, settings, size=5)
    bits, other_bits, same, kl = torch.zeros((4, 6 * LEVELS), dtype=torch.float64)
    pairs = zip(distributions(model, grid, settings), distributions(other, grid, settings), strict=True)
    for (n, target, p), (_, _, q) in pairs:
        bits[n] -= math.log2(p[target])
        other_bits[n] -= math.log2(q[target])
        same[n] += p.index(max(p)) == q.index(max(q))
        kl[n] += sum(a * math.log2(a / b) for a, b in zip(p, q, strict=True) if a > 0)
    by_sample = [
        (found.reference.bits, bits),
        (found.candidate.bits, other_bits),
        (found.agreement.argmax, same),
        (found.agreement.kl, kl),
    ]
    weights = grid.states.masked.sum(1).view(6, LEVELS).double()
    for sums, expected in by_sample:
        assert sums.values == pytest.approx(expected.view(6, LEVELS).sum(1).tolist(), rel=1e-4, abs=1e-4)
        assert sums.weights == tuple(weights.sum(1).tolist())
    for level, sums in enumerate(found.candidate.by_level):
        assert sums.values == pytest.approx(other_bits.view(6, LEVELS)[:, level].tolist(), rel=1e-4, abs=1e-4)
        assert sums.weights == tuple(weights[:, level].tolist())
    assert found.agreement.argmax.mean < 1.0, "the candidate is too good to test anything"
    assert found.agreement.kl.mean > 1e-3
    assert found.reference == masked_nll(reference, grid, settings, size=5)
    assert found.candidate == masked_nll(candidate, grid, settings, size=5)


def test_equal_models_agree_in_everything(case):
    _, reference, _, _, settings, grid = case
    found = teacher_forced(reference, reference, grid, settings)
    assert found.agreement.argmax.mean == 1.0
    assert found.agreement.kl.values == (0.0,) * 6
    assert found.candidate == found.reference
    interval = paired([found.reference.bits], [found.candidate.bits])
    assert (interval.difference, interval.low, interval.high) == (0.0, 0.0, 0.0)


def test_batches_do_not_matter(case):
    _, reference, _, candidate, settings, grid = case
    whole, single = (teacher_forced(reference, candidate, grid, settings, size=size) for size in (100, 1))
    assert whole.candidate.bits.values == pytest.approx(single.candidate.bits.values, rel=1e-5)
    assert whole.agreement.kl.values == pytest.approx(single.agreement.kl.values, rel=1e-4, abs=1e-5)
