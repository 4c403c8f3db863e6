"""What the rules of equality let pass, and what they must not."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bench.gpu.cases import CALLS, Case, all_cases, real_cases
from bench.gpu.compare import close, compare_call, equal
from bench.gpu.correctness import check
from bench.gpu.kernels import References
from bench.gpu.operands import Draws
from bench.gpu.shapes import LLADA, TINY_DREAM
from plugins.int4 import pack_codes, unpack_codes

CASES = all_cases()
LINEAR = next(c for c in CASES if c.op == "linear" and c.name.startswith("w4a4 bias"))
SWIGLU = next(c for c in CASES if c.op == "linear" and c.name.startswith("w4a4 swiglu 7"))
PLAIN = next(c for c in CASES if c.op == "quantize" and c.name.startswith("plain 9"))
GATED = next(c for c in CASES if c.op == "quantize" and c.name.startswith("norm transform state 33x768"))
HEAD = next(c for c in CASES if c.op == "head" and c.name.startswith("1x9"))
ROTATE = next(c for c in CASES if c.op == "rotate" and "float32 to float32" in c.name)


class _Changed(References):
    """The references with one output changed."""

    def __init__(self, op: str, change: Callable[[list[Tensor]], None]) -> None:
        def call(*given: object, **named: object) -> object:
            found = getattr(References, op)(self, *given, **named)
            outputs = [found] if isinstance(found, Tensor) else list(found)
            change(outputs)
            return outputs[0] if isinstance(found, Tensor) else tuple(outputs)

        setattr(self, op, call)


def _one_code_more(outputs: list[Tensor]) -> None:
    place = (outputs[0] & 15 != 7).nonzero()[0]
    outputs[0][tuple(place)] += 1


def _next_float(index: int) -> Callable[[list[Tensor]], None]:
    def change(outputs: list[Tensor]) -> None:
        flat = outputs[index].view(-1)
        flat[0] = torch.nextafter(flat[0], torch.tensor(torch.inf, dtype=flat.dtype))

    return change


def _fill(index: int, value: float) -> Callable[[list[Tensor]], None]:
    return lambda outputs: outputs[index].view(-1)[-1:].fill_(value)


def _swap_ids(outputs: list[Tensor]) -> None:
    outputs[0][..., :2] = outputs[0][..., :2].flip(-1).clone()


@pytest.mark.parametrize(
    ("case", "change"),
    [
        (LINEAR, _next_float(0)),
        (LINEAR, _fill(0, torch.nan)),
        (SWIGLU, _fill(0, torch.nan)),
        (SWIGLU, lambda outputs: outputs[0].mul_(1 + 2.0**-18)),
        (PLAIN, _one_code_more),
        (PLAIN, _next_float(1)),
        (GATED, _fill(0, 0x55)),
        (GATED, lambda outputs: outputs[0].bitwise_xor_(1)),
        (GATED, lambda outputs: outputs[1].mul_(1.01)),
        (HEAD, _swap_ids),
        (HEAD, _next_float(1)),
        (HEAD, lambda outputs: outputs[2].mul_(1 + 2.0**-15)),
        (HEAD, lambda outputs: outputs[3].mul_(1 + 2.0**-15)),
        (HEAD, lambda outputs: outputs[4].mul_(1 + 2.0**-15)),
        (HEAD, _fill(4, torch.nan)),
        (ROTATE, lambda outputs: outputs[0].add_(2.0**-16)),
        (ROTATE, _fill(0, torch.nan)),
    ],
    ids=lambda value: value.key if isinstance(value, Case) else "",
)
def test_a_change_is_seen(case: Case, change: Callable[[list[Tensor]], None]) -> None:
    cpu = torch.device("cpu")
    assert check(case, References(), Draws(cpu, 3)) == {}
    assert check(case, _Changed(case.op, change), Draws(cpu, 3)).get("wrong")


def _beside_halves(*values: float) -> tuple[Tensor, dict[str, object], list[Tensor]]:
    """A row whose steps are these values behind a 7, the arguments that leave it as it is, and the reference."""
    x = torch.zeros(1, 128)
    x[0, : len(values) + 1] = torch.tensor([7.0, *values])
    named = {"norm_weight": torch.full((128,), float(x.square().mean().sqrt())), "eps": 1e-12}
    return x, named, list(References().quantize(x, **named))


def _moved(expected: list[Tensor], column: int, steps: int) -> list[Tensor]:
    """The outputs with one code moved."""
    codes = unpack_codes(expected[0], 4)
    codes[0, column] += steps
    return [pack_codes(codes, 4), *expected[1:]]


def test_a_code_beside_a_half_may_differ_by_one() -> None:
    x, named, expected = _beside_halves(2.5, 3.2)
    down = -1 if int(unpack_codes(expected[0], 4)[0, 1]) == 3 else 1
    assert compare_call("quantize", _moved(expected, 1, down), expected, (x,), named) is None
    assert compare_call("quantize", _moved(expected, 1, 2 * down), expected, (x,), named)
    assert "codes: 1 of 128 wrong" in str(compare_call("quantize", _moved(expected, 2, 1), expected, (x,), named))
    x, named, expected = _beside_halves(2.5 - 2e-5)
    assert "codes: 1 of 128 wrong" in str(compare_call("quantize", _moved(expected, 1, 1), expected, (x,), named))


def test_many_codes_may_not_differ() -> None:
    x, named, expected = _beside_halves(*[2.5] * 8)
    found = expected
    for column in range(1, 9):
        found = _moved(found, column, -1 if int(unpack_codes(found[0], 4)[0, column]) == 3 else 1)
    assert "8 of 128 codes differ" in str(compare_call("quantize", found, expected, (x,), named))


def test_shapes_and_types_count() -> None:
    assert equal(torch.zeros(2), torch.zeros(3))
    assert close(torch.zeros(2), torch.zeros(2, dtype=torch.float16), torch.ones(2))
    x, named, expected = _beside_halves(2.5)
    assert "scale: torch.float32 [1]" in str(
        compare_call("quantize", [expected[0], expected[1][0], expected[2]], expected, (x,), named)
    )


def test_a_tail_far_below_one_is_not_lost() -> None:
    """The best logit stands so far above the others that together they weigh less than any absolute bound."""
    given, named = CALLS["head"](HEAD, Draws(torch.device("cpu"), 3))
    bias = torch.zeros_like(given[4])
    bias[77] = 24.0
    given = (*given[:4], bias, *given[5:])
    expected = list(References().head(*given, **named))
    assert 0 < float(expected[2].max()) < 1e-4
    assert compare_call("head", expected, expected, given, named) is None
    assert "tail" in str(
        compare_call("head", [*expected[:2], torch.zeros_like(expected[2]), *expected[3:]], expected, given, named)
    )


def test_cases_have_names_of_their_own() -> None:
    keys = [case.key for case in (*CASES, *real_cases(LLADA))]
    assert len(keys) == len(set(keys))
    assert {case.op for case in CASES} == set(CALLS)


def test_references_take_every_case_and_stay_finite() -> None:
    draws = Draws(torch.device("cpu"), 5)
    for case in [*CASES[::23], *real_cases(TINY_DREAM)]:
        given, named = CALLS[case.op](case, draws)
        found = getattr(References(), case.op)(*given, **named)
        for tensor in (found,) if isinstance(found, Tensor) else found:
            assert bool(torch.isfinite(tensor.float()).all()), case.key
