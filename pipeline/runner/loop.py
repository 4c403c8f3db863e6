"""THE denoising loop: requests in, events out.

Rows are right-padded and independent: each has its own block, step counter and random keys, and a finished row's place
goes to the next request at once. Shape letters: B batch, Q query rows, R head rows (the block), K top-K, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice

import numpy as np

from pipeline.backends.backend import Feeds, Floats, Record, Session
from pipeline.errors import InputRefused, UsageFault, ValidationFailed
from pipeline.runner.caches import Caches
from pipeline.runner.candidates import Candidates, Picks, Scores, flip_share
from pipeline.runner.canvas import Blocks, Canvases
from pipeline.runner.edits import edits, is_final
from pipeline.runner.eos import BANNED, eligible, forbid
from pipeline.runner.monitor import Monitor
from pipeline.runner.passes import Passes
from pipeline.runner.policies import DRAWN, POLICIES, WARM
from pipeline.runner.results import Block, Done, Event, Request, Result, Step
from pipeline.runner.rules import Cut, penalise, restrict, stop_at
from pipeline.runner.sampling import PLACE, Proposal, RowLogits, keyed_draws, propose
from pipeline.runner.settings import GenerateOptions, Settings
from pipeline.runner.window import Rows, full_feeds

Decode = Callable[[Sequence[int]], str]
FullLogits = Callable[[Feeds, int, int], Floats]  # a full pass, row of its batch, head row -> biased logits [V]


class Engine:
    """A session that answers any number of requests; what its caches need is allocated once.

    `full_logits` answers for tokens beyond the top-K; without it draws stay inside, see `sampling.propose`.
    """

    def __init__(self, session: Session, settings: Settings, *, full_logits: FullLogits | None = None) -> None:
        self.session, self.settings, self.full_logits = session, settings, full_logits
        self.caches = Caches(session)

    def run(
        self,
        requests: Iterable[Request],
        options: GenerateOptions,
        *,
        batch_size: int = 32,
        decode: Decode | None = None,
        cancelled: Collection[int] = (),
    ) -> Generator[Event, None, None]:
        """Denoise the requests, taking each when a place is free; closing the iterator ends all of them.

        `decode` is needed for stop texts. The caller may add the number of a request to `cancelled` at any time: it is
        done before its next step. Raises UsageFault and InputRefused for a request when it is taken.
        """
        options.check()
        if batch_size < 1:
            raise UsageFault(f"batch_size is {batch_size}; expected 1 or more")
        if options.stop and decode is None:
            raise ValueError("stop texts need a function that decodes ids")
        return self._events(iter(requests), options, batch_size, decode, cancelled)

    def _events(
        self,
        requests: Iterator[Request],
        options: GenerateOptions,
        batch_size: int,
        decode: Decode | None,
        cancelled: Collection[int],
    ) -> Generator[Event, None, None]:
        waiting = deque(islice(requests, batch_size))
        batch = _Batch(self, len(waiting), options, decode)
        trusted = False
        try:
            while waiting or len(batch.canvases.live):
                while waiting and (free := batch.canvases.free_place()) is not None:
                    batch.admit(free, checked(waiting.popleft(), self.settings, options))
                    waiting.extend(islice(requests, 1))
                trusted = False
                events = (batch.cancel(cancelled) if cancelled else []) or batch.advance()
                trusted = True
                yield from events
        finally:
            # After a fault the caches hold numbers that nobody vouches for.
            (batch.passes.close if trusted else batch.passes.forget)()


class _Batch:
    """The rows under way in one `Engine.run`."""

    def __init__(self, engine: Engine, places: int, options: GenerateOptions, decode: Decode | None) -> None:
        self.engine, self.settings, self.options, self.decode = engine, engine.settings, options, decode
        self.bias = logit_bias(engine.settings)
        if options.eos == "forbid":
            self.bias = forbid(self.bias, engine.settings.eos_id)
        self.canvases = Canvases(places, engine.settings, options)
        self.monitor = Monitor(places)
        self.passes = Passes(engine.session, engine.caches, self.canvases, self.bias, self.monitor)
        self.extra = np.zeros(places, dtype=np.int64)  # passes over a block without masks, to edit it
        self.policy = POLICIES[options.policy]
        self.warm, self.drawn = options.policy in WARM, options.policy in DRAWN

    def admit(self, place: int, request: Request) -> None:
        self.canvases.admit(place, request)
        self.monitor.begin(place)
        self.extra[place] = 0

    def cancel(self, cancelled: Collection[int]) -> list[Event]:
        """The end of every row that is not wanted any more."""
        rows = self.canvases
        unwanted = [place for place in rows.live.tolist() if rows.request_of(place).request in cancelled]
        return [Done(result=replace(self._result(place), finish_reason="cancelled")) for place in unwanted]

    def advance(self) -> list[Event]:
        """One forward pass and one commit for every live row; what came of it, row by row."""
        rows, blocks = self.canvases, self.canvases.blocks()
        record = self.passes.run(blocks)
        if not (np.isfinite(record.tail).all() and np.isfinite(record.top_logits).all()):
            raise ValidationFailed("the model produced NaN or infinite logits; its bundle cannot be trusted")
        row_logits = self._row_logits(blocks)
        record = self._ruled(record, blocks, row_logits)
        proposal, draws = self._propose(record, blocks, row_logits)
        picks = self._pick(proposal, draws, blocks)
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
        full_logits = self.engine.full_logits
        if full_logits is None:
            return None
        rows, shift = self.canvases, self.canvases.window.shift
        inverse = self.passes.inverse

        def row_logits(b: int, r: int) -> Floats:
            place = slice(int(blocks.places[b]), int(blocks.places[b]) + 1)
            given = Rows(ids=rows.ids[place], lengths=rows.length[place], positions=blocks.positions[b : b + 1])
            return full_logits(full_feeds(given, shift, self.bias, np.full(1, inverse, dtype=np.float32)), 0, r)

        return row_logits

    def _ruled(self, record: Record, blocks: Blocks, row_logits: RowLogits | None) -> Record:
        """The record under repetition penalty and allowed ids."""
        rows, options = self.canvases, self.options
        if options.repetition_penalty != 1.0:
            seen = [rows.written(place) for place in blocks.places.tolist()]
            record = penalise(
                record, seen, options.repetition_penalty, temperature=options.temperature, row_logits=row_logits
            )
        allowed = {(b, r): ids for b, place in enumerate(blocks.places.tolist()) for r, ids in rows.allowed(place)}
        if allowed:
            record = restrict(record, allowed, temperature=options.temperature, row_logits=row_logits)
        return record

    def _propose(self, record: Record, blocks: Blocks, row_logits: RowLogits | None) -> tuple[Proposal, Scores | None]:
        rows, options, places = self.canvases, self.options, blocks.places
        draws = None
        if options.temperature > 0 or self.drawn:
            draws = keyed_draws(
                seed=options.seed,
                requests=[rows.request_of(place).request for place in places.tolist()],
                steps=rows.step[places].tolist(),
                starts=blocks.positions[:, 0].tolist(),
                rows=rows.width,
            )
        proposal = propose(
            record,
            temperature=options.temperature,
            top_p=options.top_p,
            warm=self.warm,
            draws=draws,
            row_logits=row_logits,
        )
        return proposal, draws

    def _pick(self, proposal: Proposal, draws: Scores | None, blocks: Blocks) -> Picks:
        """The masked positions to commit now, at least one of each row that has one [B, R]."""
        rows, options, places = self.canvases, self.options, blocks.places
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
                flip=flip_share(rows.block_step[places], rows.block_steps[places]),
                draws=np.zeros_like(proposal.doubt) if draws is None else draws[..., PLACE],
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
        index = blocks.places[:, None], blocks.positions
        written = blocks.inside & ~blocks.masked & (self.canvases.step_map[index] > 0)
        return edits(record, self.canvases.ids[index], written, self.options.edit)

    def _events(
        self, blocks: Blocks, picks: Picks, log_probability: Scores, settled: dict[int, tuple[int, int]]
    ) -> list[Event]:
        rows = self.canvases
        events: list[Event] = []
        for b, place in enumerate(blocks.places.tolist()):
            start, number = int(rows.start[place]), rows.request_of(place).request
            cut = self._cut(place)
            finished = bool(rows.finished[place]) or cut is not None
            if cut is not None:
                rows.finish(place)
            region = rows.region(place)
            committed = blocks.positions[b, picks[b]] - start
            events.append(
                Step(
                    request=number,
                    region=region,
                    committed=committed,
                    confidences=np.exp(log_probability[b, picks[b]]),
                    finished=finished,
                )
            )
            if place in settled:
                begin, end = (position - start for position in settled[place])
                events.append(Block(request=number, start=begin, stop=end, ids=region[begin:end].tolist()))
            if finished:
                result = self._result(place)
                if cut is not None:
                    result = replace(result, ids=result.ids[: cut.ids], text=cut.text, finish_reason="stop")
                events.append(Done(result=result))
        return events

    def _cut(self, place: int) -> Cut | None:
        """Where a stop text ends this row, in what is written from the region's start without a gap."""
        if not self.options.stop or self.decode is None:
            return None
        rows = self.canvases
        region = slice(int(rows.start[place]), int(rows.length[place]))
        ids, written = rows.ids[place, region], ~rows.open[place, region]
        ends = np.flatnonzero(ids == self.settings.eos_id)
        if len(ends):  # what follows an end-of-text is not part of the text
            written = written & (np.arange(len(ids)) < ends[0])
        return stop_at(ids, written, self.options.stop, self.decode)

    def _result(self, place: int) -> Result:
        return replace(self.canvases.release(place), agreement=self.monitor.agreement(place))


def generate(
    session: Session,
    settings: Settings,
    prompts: Sequence[Sequence[int]],
    options: GenerateOptions,
    *,
    request_ids: Sequence[int] | None = None,
    on_step: Callable[[Step], None] | None = None,
    batch_size: int = 32,
) -> list[Result]:
    """Denoise every prompt; results in the order of the prompts, each independent of what shares its batch."""
    numbers = range(len(prompts)) if request_ids is None else request_ids
    requests = [Request(ids=ids, request=number) for ids, number in zip(prompts, numbers, strict=True)]
    return denoise(Engine(session, settings), requests, options, on_step=on_step, batch_size=batch_size)


def denoise(
    engine: Engine,
    requests: Sequence[Request],
    options: GenerateOptions,
    *,
    on_step: Callable[[Step], None] | None = None,
    batch_size: int = 32,
    decode: Decode | None = None,
) -> list[Result]:
    """The results of all requests, in their order; nothing is computed unless all of them can be."""
    options.check()
    for request in requests:
        checked(request, engine.settings, options)
    numbers = [request.request for request in requests]
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"the requests have the numbers {numbers}; expected different ones")
    # Neighbours in length share batches: little padding. The longest first: later ones fit in the caches of theirs.
    longest_first = sorted(requests, key=lambda request: -len(request.ids))
    results = {}
    for event in engine.run(longest_first, options, batch_size=batch_size, decode=decode):
        if isinstance(event, Done):
            results[event.result.request] = event.result
        elif isinstance(event, Step) and on_step is not None:
            on_step(event)
    return [results[number] for number in numbers]


def checked(request: Request, settings: Settings, options: GenerateOptions) -> Request:
    """The request; raises UsageFault and InputRefused for one that cannot be answered."""
    if not request.fill:
        checked_prompt(request.ids, settings, options)
    else:
        _check_ids(request.ids, settings)
        if len(request.ids) > settings.max_length:
            raise UsageFault(
                f"the canvas has {len(request.ids)} tokens; the model takes {settings.max_length}. Shorten the text"
            )
        if settings.mask_id not in request.ids:
            raise UsageFault(f"the canvas has no mask (id {settings.mask_id}), so there is nothing to fill")
    for ids in ({*request.forced.values()}, *request.allowed.values()):
        _check_ids(sorted(ids), settings)
        if settings.mask_id in ids:
            raise UsageFault(f"the mask (id {settings.mask_id}) is forced or allowed; expected ids that can be written")
    if empty := [position for position, ids in request.allowed.items() if not ids]:
        raise UsageFault(f"position {empty[0]} allows no id; expected one or more")
    if wrong := [position for position in (*request.forced, *request.allowed) if position < 0]:
        raise UsageFault(f"position {wrong[0]} is forced or restricted; expected 0 or more, from the region's start")
    return request


def checked_prompt(prompt: Sequence[int], settings: Settings, options: GenerateOptions) -> list[int]:
    """The prompt as a list; raises UsageFault when the canvas is too long, InputRefused for an id out of range."""
    wanted = 1 if options.gen_length is None else options.gen_length
    if len(prompt) + wanted > settings.max_length:
        raise UsageFault(
            f"the prompt has {len(prompt)} tokens and gen-length is {wanted}: {len(prompt) + wanted} together; "
            f"the model takes {settings.max_length}. Shorten the prompt or lower --gen-length"
        )
    return _check_ids(prompt, settings)


def _check_ids(given: Sequence[int], settings: Settings) -> list[int]:
    ids = [int(i) for i in given]
    wrong = [i for i in ids if not 0 <= i < settings.embedding_size]
    if wrong:
        raise InputRefused(
            f"the tokenizer made id {wrong[0]}; the model's embedding has rows 0 to {settings.embedding_size - 1}"
        )
    return ids


def logit_bias(settings: Settings) -> Floats:
    """Bias [V] that bans the mask id and the rows of the head beyond the vocabulary."""
    bias = np.zeros(settings.embedding_size, dtype=np.float32)
    bias[settings.vocab_size :] = BANNED
    bias[settings.mask_id] = BANNED
    return bias
