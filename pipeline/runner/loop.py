"""THE denoising loop: requests in, events out.

Rows are right-padded and independent: each has its own block, step counter and random keys, and a finished row's place
goes to the next request at once. Shape letters: B batch, Q query rows, R head rows (the block), K top-K, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice

import numpy as np

from pipeline.backends.backend import Floats, Session
from pipeline.errors import InputRefused, UsageFault
from pipeline.runner.batch import Batch, Decode, FullLogits
from pipeline.runner.caches import Caches
from pipeline.runner.eos import BANNED, forbid
from pipeline.runner.results import Done, Event, Request, Result, Step
from pipeline.runner.settings import GenerateOptions, Settings
from pipeline.runner.window import Terms


class Engine:
    """A session that answers any number of requests; what its caches need is allocated once.

    `full_logits` answers for tokens beyond the top-K; without it draws stay inside, see `sampling.propose`.
    `open_guided` opens the session of guided requests when the first one comes.
    """

    def __init__(
        self,
        session: Session,
        settings: Settings,
        *,
        full_logits: FullLogits | None = None,
        open_guided: Callable[[], Session] | None = None,
    ) -> None:
        self.settings, self.full_logits, self.open_guided = settings, full_logits, open_guided
        self.caches = Caches(session)
        self.guided_caches: Caches | None = None
        self.turns = 0  # of the loop until now, each a forward pass for every row under way

    def run(
        self,
        requests: Iterable[Request],
        options: GenerateOptions,
        *,
        batch_size: int = 32,
        decode: Decode | None = None,
        cancelled: Collection[int] = (),
        watched: bool = True,
    ) -> Generator[Event, None, None]:
        """Denoise the requests, taking each when a place is free; closing the iterator ends all of them.

        Not `watched`, no event comes but the last of each request. `decode` is needed for stop texts. The caller may
        add the number of a request to `cancelled` at any time: it is done before its next step. Raises UsageFault and
        InputRefused for a request when it is taken.
        """
        options.check()
        if batch_size < 1:
            raise UsageFault(f"batch_size is {batch_size}; expected 1 or more")
        if options.stop and decode is None:
            raise ValueError("stop texts need a function that decodes ids")
        bias = logit_bias(self.settings)
        terms = Terms.of(options, forbid(bias, self.settings.eos_id) if options.eos == "forbid" else bias)
        batch_of = partial(
            Batch,
            settings=self.settings,
            options=options,
            caches=self.caches_for(options),
            terms=terms,
            full_logits=self.full_logits,
            decode=decode,
            watched=watched,
        )
        return self._events(iter(requests), options, batch_of, batch_size, cancelled)

    def caches_for(self, options: GenerateOptions) -> Caches:
        """The caches, and with them the session, that these options need; raises UsageFault."""
        if options.guidance == 0:
            return self.caches
        if self.guided_caches is None:
            if self.open_guided is None:
                raise UsageFault(
                    f"guidance is {options.guidance}, and this model was opened without a graph for it; pass "
                    "--guidance 0, or export the bundle again with --set lowering.guidance=true"
                )
            self.guided_caches = Caches(self.open_guided())
        return self.guided_caches

    def _events(
        self,
        requests: Iterator[Request],
        options: GenerateOptions,
        batch_of: Callable[[int], Batch],
        batch_size: int,
        cancelled: Collection[int],
    ) -> Generator[Event, None, None]:
        waiting = deque(islice(requests, batch_size))
        batch = batch_of(len(waiting))
        trusted = False
        try:
            while waiting or len(batch.canvases.live):
                while waiting and (free := batch.canvases.free_place()) is not None:
                    batch.admit(free, checked(waiting.popleft(), self.settings, options))
                    waiting.extend(islice(requests, 1))
                trusted = False
                self.turns += 1
                events = (batch.cancel(cancelled) if cancelled else []) or batch.advance()
                trusted = True
                yield from events
        finally:
            # After a fault the caches hold numbers that nobody vouches for.
            (batch.passes.close if trusted else batch.passes.forget)()


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
    on_done: Callable[[Result], None] | None = None,
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
    watched = on_step is not None
    for event in engine.run(longest_first, options, batch_size=batch_size, decode=decode, watched=watched):
        if isinstance(event, Done):
            results[event.result.request] = event.result
            if on_done is not None:
                on_done(event.result)
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
    wanted = options.gen_length
    if wanted is None and len(prompt) >= settings.max_length:
        raise UsageFault(
            f"the prompt has {len(prompt)} tokens; the model takes {settings.max_length}, and an answer needs one of "
            "them. Shorten the prompt"
        )
    if wanted is not None and len(prompt) + wanted > settings.max_length:
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
