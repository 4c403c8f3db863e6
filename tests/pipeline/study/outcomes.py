"""Outcomes of cells as a measurement would leave them, with figures of the test's own."""

import random
from copy import deepcopy
from typing import Any

from pipeline.study.grid import FULL, FULL_BITS, Cell

SAMPLES, STEPS, EOS = 40, 3, 9


def sums(values: list[float], weights: list[float] | None = None) -> dict[str, Any]:
    return {"values": values, "weights": weights or [1.0] * len(values)}


def outcome(*, nll: float = 0.5, right: float = 1.0, error: float = 0.1, seed: int = 0) -> dict[str, Any]:
    """A cell of all tasks: about `nll` bits a token, exactly the share `right` right."""
    draw = random.Random(seed)
    tokens = [5.0 + n % 4 for n in range(SAMPLES)]
    bits = [nll * weight + draw.gauss(0, 0.01) for weight in tokens]
    hits = [float(n < right * SAMPLES) for n in range(SAMPLES)]
    steps = {
        "total": sums([error * STEPS * (STEPS + 1) / 2] * 4, [8.0 * STEPS] * 4),
        "by_step": [sums([error * step] * 4, [8.0] * 4) for step in range(1, STEPS + 1)],
        "power": [sums([2.0] * 4) for _ in range(STEPS)],
    }
    by_step = [sums([2.0] * 4, [4.0] * 4) for _ in range(STEPS)]
    ids = [[n % 7, 1 if hit else 2, EOS, EOS] for n, hit in enumerate(hits)]
    return {
        "seconds": {"nll": 1.0},
        "linears": {"quantised": 8, "kept": 0},
        "tasks": {
            "nll": {"bits": sums(bits, tokens), "by_level": [sums(bits, tokens)] * 2},
            "agreement": {"argmax": sums([6.0] * SAMPLES, [8.0] * SAMPLES), "kl": sums([0.2] * SAMPLES)},
            "match": {
                "score": {
                    "total": sums(hits),
                    "nfe": sums([2.0] * SAMPLES),
                    "kinds": {"add": sums(hits[:20]), "sort": sums(hits[20:])},
                },
                "run": {"ids": ids, "steps": [[1, 1, 2, 2]] * SAMPLES, "nfe": [2] * SAMPLES},
                "eos_id": EOS,
            },
            "choice": {"right": sums(hits), "margin": sums([1.5] * SAMPLES), "kinds": {"add": sums(hits)}},
            "trajectory": {"free": steps, "forced": deepcopy(steps), "tokens": {"free": by_step, "forced": by_step}},
        },
    }


def full(model: str = "m") -> tuple[Cell, dict[str, Any]]:
    found = outcome(nll=0.1)
    for task in ("agreement", "trajectory"):
        del found["tasks"][task]
    return Cell(model=model, method=FULL, bits=FULL_BITS), found


def measured(
    method: str,
    bits: str = "w4a4",
    *,
    model: str = "m",
    states: str = "noised",
    seed: int = 0,
    variant: str = "",
    **figures: float,
) -> tuple[Cell, dict[str, Any]]:
    cell = Cell(model=model, method=method, bits=bits, states=states, seed=seed, variant=variant)
    return cell, outcome(seed=seed, **figures)
