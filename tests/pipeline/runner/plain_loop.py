"""Decoding as the papers write it: one text, no cache, whole rows of logits in float64, Python numbers.

What the loop does with arrays over a batch is here done position by position, to be read beside the papers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import exp, log

import numpy as np

from pipeline.runner import GenerateOptions
from pipeline.runner.draws import uniform_rows

Law = list[tuple[float, int]]  # probability and id, the likeliest first
LogitsOf = Callable[[list[int]], np.ndarray]  # ids [L] -> logits [L, V], row j of position j, banned ids at -inf
DREAM = ("margin", "maskgit", "entropy", "origin")


@dataclass
class Seen:
    """One masked position as a policy sees it."""

    position: int
    token: int
    p: float  # of the token, clean
    odds: float  # against it: (1 - p) / p without the rounding of 1 - p
    law: Law  # under temperature and top_p for Dream's policies
    draw: float

    @property
    def entropy(self) -> float:
        return -sum(p * log(p) for p, _ in self.law if p > 0)

    @property
    def margin(self) -> float:
        return self.law[0][0] - (self.law[1][0] if len(self.law) > 1 else 0.0)


def uniform(*, seed: int, request: int, step: int, start: int, rows: int, columns: int) -> np.ndarray:
    """What one request draws [rows, columns], as if it were alone."""
    drawn = uniform_rows(seed=seed, requests=[request], steps=[step], starts=[start], rows=rows, columns=columns)
    return np.asarray(drawn[0])


def law_of(logits: list[float], order: list[int], temperature: float, top_p: float) -> Law:
    """Softmax of logits [V] at a temperature, cut to its nucleus; `order` has the ids, the likeliest first."""
    weights = [exp((logits[i] - logits[order[0]]) / temperature) for i in order]
    total, before, kept = sum(weights), 0.0, []
    for w, i in zip(weights, order, strict=True):
        if before <= top_p * total:
            kept.append((w, i))
        before += w
    mass = sum(w for w, _ in kept)
    return [(w / mass, i) for w, i in kept]


def drawn(law: Law, u: float) -> int:
    """The id at which the probabilities, the likeliest first, sum up to more than u."""
    spent = 0.0
    for p, i in law:
        spent += p
        if spent > u:
            return i
    return law[-1][1]


def look(position: int, logits: np.ndarray, options: GenerateOptions, draws: np.ndarray) -> Seen:
    """The best token of a row of logits [V], under temperature the one that draws [3] make, and what is known of it."""
    row = logits.tolist()
    order = sorted(range(len(row)), key=lambda i: (-row[i], i))
    law, token = law_of(row, order, 1.0, 1.0), order[0]
    clean = {i: p for p, i in law}
    if options.temperature > 0 or options.policy in DREAM:
        warm = law_of(row, order, options.temperature or 1.0, options.top_p)
        token = drawn(warm, draws[0]) if options.temperature > 0 else token
        law = warm if options.policy in DREAM else law
    own = next(p for p, i in law if i == token)
    odds = sum(p for p, i in law if i != token) / own
    return Seen(position=position, token=token, p=clean[token], odds=odds, law=law, draw=float(draws[1]))


def by_confidence(seen: list[Seen], options: GenerateOptions, quota: int) -> list[Seen]:
    """LLaDA's quota, Fast-dLLM's threshold and factor, LLaDA2's mixture, LocalLeap, dInfer's hierarchy."""
    order = sorted(seen, key=lambda s: s.odds)
    sure = [s for s in seen if s.p >= options.threshold]
    match options.policy:
        case "quota":
            return order[:quota]
        case "threshold":
            return sure + order[:quota]
        case "factor":
            count = 1
            while count < len(order) and (count + 2) * (1 - order[count].p) < options.factor:
                count += 1
            return order[: max(count, quota)]
        case "quota_or_threshold":
            return sure if len(sure) >= quota else order[:quota]
        case "hierarchy":
            gaps: list[list[Seen]] = []
            for s in seen:
                if not gaps or s.position > gaps[-1][-1].position + 1:
                    gaps.append([])
                gaps[-1].append(s)
            best = [min(gap, key=lambda s: s.odds) for gap in gaps]
            return sure + [s for s in best if s.p >= options.threshold * 0.62 / 0.92] + order[:quota]
        case _:
            near = [s for s in seen if any(abs(s.position - anchor.position) <= 4 for anchor in sure)]
            return sure + [s for s in near if s.p >= options.threshold * 0.75 / 0.9] + order[:quota]


def by_entropy_bound(seen: list[Seen], options: GenerateOptions, quota: int) -> list[Seen]:
    """EB-Sampler: one more while what was taken before it stays within the bound."""
    order = sorted(seen, key=lambda s: s.entropy)
    count = 1
    while count < len(order) and sum(s.entropy for s in order[:count]) <= options.entropy_bound:
        count += 1
    return order[: max(count, quota)]


def by_time_grid(seen: list[Seen], options: GenerateOptions, step: int, steps: int) -> list[Seen]:
    """Dream: a share of the masks that falls from t to the next t; everything at the last step."""
    t, then = (1 - (1 - 1e-3) * k / steps for k in (step, step + 1))
    share = 1 - then / t if step < steps - 1 else 1.0
    if options.policy == "origin":
        return [s for s in seen if s.draw < share] or [min(seen, key=lambda s: s.draw)]
    score = {"margin": lambda s: -s.margin, "maskgit": lambda s: s.odds, "entropy": lambda s: s.entropy}
    return sorted(seen, key=score[options.policy])[: max(1, int(len(seen) * share))]


def choose(seen: list[Seen], options: GenerateOptions, eos: int, step: int, steps: int, quota: int) -> list[Seen]:
    """What one step commits."""
    if options.eos == "last":
        seen = [s for s in seen if s.token != eos] or seen
    if options.eos == "threshold":
        seen = [s for s in seen if s.token != eos or s.p >= options.eos_threshold] or seen
    if options.policy in DREAM:
        return by_time_grid(seen, options, step, steps)
    if options.policy == "entropy_bound":
        return by_entropy_bound(seen, options, quota)
    if options.policy == "random":
        return sorted(seen, key=lambda s: s.draw)[:quota]
    return by_confidence(seen, options, quota)


def decode(
    logits_of: LogitsOf, prompt: list[int], options: GenerateOptions, *, mask: int, eos: int, request: int = 0
) -> list[int]:
    """The region, end-of-text after the first one."""
    assert options.gen_length is not None
    x, start, gen = [*prompt, *[mask] * options.gen_length], len(prompt), options.gen_length
    total, passes = options.steps or gen, 0
    for s in range(start, start + gen, options.block_length):
        e = min(s + options.block_length, start + gen)
        steps = max(1, total * (e - start) // gen - total * (s - start) // gen)
        step = extra = 0
        while True:
            clean = logits_of(x)
            rows = penalised(clean, [i for i in x[start:] if i not in (mask, eos)], options.repetition_penalty)
            if options.eos == "forbid":
                rows[:, eos] = -np.inf
            draws = uniform(seed=options.seed, request=request, step=passes, start=s, rows=e - s, columns=3)
            masks = [look(j, rows[j], options, draws[j - s]) for j in range(s, e) if x[j] == mask]
            # The penalty would fall on what a written position holds.
            changes = edited(clean, range(s, e), x, mask, options)
            if masks:
                quota = (e - s) // steps + (step < (e - s) % steps)
                changes += choose(masks, options, eos, step, steps, quota)
            for seen in changes:
                x[seen.position] = seen.token
            step, passes, extra = step + 1, passes + 1, extra + (not masks)
            if options.edit is None:
                if mask not in x[s:e]:
                    break
            elif not masks and (not changes or extra == 16):
                break
        if eos in x[start:e]:
            break
    region = x[start:]
    return region[: region.index(eos)] + [eos] * (gen - region.index(eos)) if eos in region else region


def edited(logits: np.ndarray, block: range, x: list[int], mask: int, options: GenerateOptions) -> list[Seen]:
    """LLaDA2.1: committed tokens of the block whose row has another best token and is sure of it."""
    if options.edit is None:
        return []
    greedy = replace(options, temperature=0.0)
    seen = [look(j, logits[j], greedy, np.zeros(3)) for j in block if x[j] != mask]
    return [s for s in seen if s.token != x[s.position] and s.p > options.edit]


def penalised(rows: np.ndarray, seen: list[int], penalty: float) -> np.ndarray:
    """CTRL's repetition penalty on logits [L, V]."""
    rows = rows.astype(np.float64)
    for i in set(seen):
        rows[:, i] = np.where(rows[:, i] > 0, rows[:, i] / penalty, rows[:, i] * penalty)
    return rows
