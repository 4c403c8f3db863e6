"""How much memory of tensors is alive at once, counted by torch's own allocator: no clock, nothing of the system."""

from collections.abc import Callable
from itertools import accumulate

from torch.profiler import ProfilerActivity, profile


def peak_bytes(act: Callable[[], object]) -> int:
    """The most bytes of tensors that `act` holds at once, those inside of operations and its result counted.

    What was there before is not, nor is its end: make inside of `act` what it is to free.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        result = act()
    del result  # not sooner: it counts
    assert seen.profiler is not None
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())), default=0)
