"""One turn of the loop: a forward pass for every live row, what it proposes, which of that is written.

Shape letters: B batch, R head rows (the block), K top-K, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import cache

import numpy as np

from pipeline.backends.backend import Feeds, Floats, Record
from pipeline.runner.caches import Caches
from pipeline.runner.candidates import Candidates, Picks, Scores, flip_share
from pipeline.runner.canvas import Blocks, Canvases
from pipeline.runner.edits import edits, is_final
from pipeline.runner.eos import eligible
from pipeline.runner.monitor import Monitor
from pipeline.runner.passes import Passes
from pipeline.runner.policies import DRAWN, POLICIES, TIMED, WARM
from pipeline.runner.results import Block, Done, Event, Request, Result, Step
from pipeline.runner.rules import Cut, penalise, penalised_rows, restrict, stop_at
from pipeline.runner.sampling import PLACE, Proposal, RowLogits, keyed_draws, propose, settle
from pipeline.runner.settings import GenerateOptions, Settings
from pipeline.runner.window import Terms, full_feeds

Decode = Callable[[Sequence[int]], str]
FullLogits = Callable[[Feeds, int, int], Floats]  # a full pass, row of its batch, head row -> biased logits [V]


class Batch:
    """The rows under way in one generation."""

    def __init__(
        self,
        places: int,
        settings: Settings,
        options: GenerateOptions,
        caches: Caches,
        terms: Terms,
        *,
        full_logits: FullLogits | None,
        decode: Decode | None,
        watched: bool,
    ) -> None:
        self.watched = watched  # whether anyone wants to know of steps and blocks
        self.settings, self.options, self.terms = settings, options, terms
        self.full_logits, self.decode = full_logits, decode
        self.canvases = Canvases(places, settings, options)
        self.monitor = Monitor(places)
        self.passes = Passes(caches, self.canvases, terms, self.monitor)
        self.extra = np.zeros(places, dtype=np.int64)  # passes over a block without masks, to edit it
        self.policy = POLICIES[options.policy]
        self.warm, self.drawn, self.timed = (options.policy in names for names in (WARM, DRAWN, TIMED))
        self.unused = np.zeros((places, self.canvases.width))  # stands for what the policy does not look at
        self.restricted = False  # whether a request ever allowed certain ids only

    def admit(self, place: int, request: Request) -> None:
        """Begin a request at a free place."""
        self.canvases.admit(place, request)
        self.monitor.begin(place)
        self.extra[place] = 0
        self.restricted |= bool(request.allowed)

    def cancel(self, cancelled: Collection[int]) -> list[Event]:
        """The end of every row that is not wanted any more."""
        rows = self.canvases
        unwanted = [place for place in rows.live.tolist() if rows.request_of(place).request in cancelled]
        return [Done(result=replace(self._result(place), finish_reason="cancelled")) for place in unwanted]

    def advance(self) -> list[Event]:
        """One forward pass and one commit for every live row; what came of it, row by row."""
        rows, blocks = self.canvases, self.canvases.blocks()
        record = self.passes.run(blocks)
        ruled, row_logits = self._ruled(record, blocks)
        draws = self._draws(blocks)
        proposal, picks = settle(
            lambda wanted: self._propose(ruled, draws, row_logits, wanted),
            lambda proposal: self._pick(proposal, draws, blocks),
        )
        ids, log_probability, final = proposal.ids, proposal.log_probability, np.ones(len(picks), dtype=bool)
        if self.options.edit is not None:
            replaced = self._edit(record, blocks)
            self.extra[blocks.places] += ~blocks.masked.any(axis=1)
            final = is_final(blocks.masked, replaced, self.extra[blocks.places])
            self.extra[blocks.places[final]] = 0
            ids = np.where(replaced, record.top_ids[..., 0], ids)
            log_probability = np.where(replaced, -np.log1p(record.tail.astype(np.float64)), log_probability)
            picks = picks | replaced
        rows.write(blocks, picks, ids, log_probability)
        settled = {place: (start, stop) for place, start, stop in rows.settle(blocks, final)}
        return self._events(blocks, picks, log_probability, settled)

    def _row_logits(self, blocks: Blocks) -> RowLogits | None:
        full_logits, rows = self.full_logits, self.canvases
        if full_logits is None:
            return None

        @cache  # a token that is picked late is asked for with those before it
        def row_logits(b: int, r: int) -> Floats:
            one = blocks.places[b : b + 1]
            given = rows.rows(one, rows.length[one], blocks.positions[b : b + 1], guided=self.terms.guided)
            return full_logits(full_feeds(given, rows.window.shift, self.terms), 0, r)

        return row_logits

    def _ruled(self, record: Record, blocks: Blocks) -> tuple[Record, RowLogits | None]:
        """The record, and whole rows, under repetition penalty and allowed ids; for open rows only."""
        rows, options, row_logits = self.canvases, self.options, self._row_logits(blocks)
        if options.repetition_penalty != 1.0:
            penalty, seen = options.repetition_penalty, [rows.written(place) for place in blocks.places.tolist()]
            if row_logits is not None:
                row_logits = penalised_rows(row_logits, seen, penalty)
            record = penalise(
                record,
                seen,
                penalty,
                temperature=options.temperature,
                row_logits=row_logits,
                wanted=blocks.masked,
            )
        if self.restricted:
            allowed = {(b, r): ids for b, place in enumerate(blocks.places.tolist()) for r, ids in rows.allowed(place)}
            record = restrict(record, allowed, temperature=options.temperature, row_logits=row_logits)
        return record, row_logits

    def _draws(self, blocks: Blocks) -> Scores | None:
        rows, options, places = self.canvases, self.options, blocks.places
        if options.temperature == 0 and not self.drawn:
            return None
        return keyed_draws(
            seed=options.seed,
            requests=[rows.request_of(place).request for place in places.tolist()],
            steps=rows.step[places].tolist(),
            starts=blocks.positions[:, 0].tolist(),
            rows=rows.width,
        )

    def _propose(self, record: Record, draws: Scores | None, row_logits: RowLogits | None, wanted: Picks) -> Proposal:
        return propose(
            record,
            temperature=self.options.temperature,
            top_p=self.options.top_p,
            warm=self.warm,
            draws=draws,
            row_logits=row_logits,
            wanted=wanted,
        )

    def _pick(self, proposal: Proposal, draws: Scores | None, blocks: Blocks) -> Picks:
        """The masked positions to commit now, at least one of each row that has one [B, R]."""
        rows, options, places = self.canvases, self.options, blocks.places
        unused = self.unused[: len(places)]
        choice = eligible(
            options.eos,
            blocks.masked,
            proposal.ids,
            proposal.log_probability,
            eos_id=self.settings.eos_id,
            eos_threshold=options.eos_threshold,
        )
        picks = choice & self.policy(
            Candidates(
                doubt=proposal.doubt,
                masked=choice,
                quota=rows.quota(),
                threshold=options.threshold,
                neg_entropy=proposal.neg_entropy,
                margin=proposal.margin,
                flip=flip_share(rows.block_step[places], rows.block_steps[places]) if self.timed else unused[:, 0],
                draws=unused if draws is None else draws[..., PLACE],
                factor=options.factor,
                entropy_bound=options.entropy_bound,
            )
        )
        # Else the row would never end.
        assert (picks.any(axis=1) == choice.any(axis=1)).all(), f"policy {options.policy} committed nothing"
        return picks

    def _edit(self, record: Record, blocks: Blocks) -> Picks:
        """Written positions of the block to write again."""
        assert self.options.edit is not None
        rows, index = self.canvases, (blocks.places[:, None], blocks.positions)
        written = blocks.inside & ~blocks.masked & (rows.step_map[index] > 0)
        if self.restricted:  # what a request restricts is not written again
            for b, place in enumerate(blocks.places.tolist()):
                kept = list(rows.request_of(place).allowed)
                written[b] &= ~np.isin(blocks.positions[b] - rows.start[place], kept)
        return edits(record, rows.ids[index], written, self.options.edit)

    def _events(
        self, blocks: Blocks, picks: Picks, log_probability: Scores, settled: dict[int, tuple[int, int]]
    ) -> list[Event]:
        rows, places = self.canvases, blocks.places.tolist()
        cuts = {place: cut for place in places if (cut := self._cut(place))} if self.options.stop else {}
        for place in cuts:
            rows.finish(place)
        done = rows.finished[blocks.places]
        events: list[Event] = []
        # One row after the other: a row's events end with its result, which frees its place.
        for b in range(len(places)) if self.watched else np.flatnonzero(done).tolist():
            if self.watched:
                events += self._row_events(blocks, b, picks[b], log_probability[b], settled)
            if done[b]:
                result, cut = self._result(places[b]), cuts.get(places[b])
                if cut is not None:
                    result = replace(result, ids=result.ids[: cut.ids], text=cut.text, finish_reason="stop")
                events.append(Done(result=result))
        return events

    def _row_events(
        self, blocks: Blocks, b: int, picked: Picks, log_probability: Scores, settled: dict[int, tuple[int, int]]
    ) -> list[Event]:
        """What a step did to row b, of picks and log-probabilities [R]."""
        rows, place = self.canvases, int(blocks.places[b])
        number, region, start = rows.request_of(place).request, rows.region(place), int(rows.start[place])
        step = Step(
            request=number,
            region=region,
            committed=blocks.positions[b, picked] - start,
            confidences=np.exp(log_probability[picked]),
            finished=bool(rows.finished[place]),
        )
        if place not in settled:
            return [step]
        begin, end = (position - start for position in settled[place])
        return [step, Block(request=number, start=begin, stop=end, ids=region[begin:end].tolist())]

    def _cut(self, place: int) -> Cut | None:
        """Where a stop text ends this row, in what is written from the region's start without a gap."""
        assert self.decode is not None
        rows = self.canvases
        region = slice(int(rows.start[place]), int(rows.length[place]))
        ids, written = rows.ids[place, region], ~rows.open[place, region]
        ends = np.flatnonzero(ids == self.settings.eos_id)
        if len(ends):  # what follows an end-of-text is not part of the text
            written = written & (np.arange(len(ids)) < ends[0])
        return stop_at(ids, written, self.options.stop, self.decode)

    def _result(self, place: int) -> Result:
        return replace(self.canvases.release(place), agreement=self.monitor.agreement(place))
