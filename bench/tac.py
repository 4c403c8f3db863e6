"""By how much TAC divides the error of attention's output when probabilities have 4 bits. `python -m bench.tac`

Probabilities on the fixed grid 0, 1/15, .. 1, all else in float; maps from one set of canvases, errors on others. A
short canvas is one problem of some 30 tokens, a long one has solved problems before it, up to 256 tokens.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from bench.record import write_result
from passes.graph import is_call
from passes.options import Tac
from passes.quantize_attention import quantized_attention
from passes.solvers.tac import Moments, covariance, error, identity, moments, paired
from pipeline.calibrate import float_pieces
from pipeline.calibration.states import Sample, States, builtin_corpus, encode_pair, make_states
from pipeline.calibration.stream import Stream
from pipeline.capture import ENDS, constants
from pipeline.models import BUILTIN
from pipeline.models.checkpoint import Checkpoint, open_checkpoint

TAC = Tac()  # the paper's constants
SHOTS = {"short": 1, "long": 12}  # problems a canvas
BLOCKS = (16, 32, 64, 128)
CANVASES = {"short": 512, "long": 64}
DRAWS = 3


class Rounded(Interpreter):
    """Runs a block in float; keeps attention's output, what it is on the grid, and what a row's probabilities lose."""

    def run_node(self, n: Node) -> Any:
        if is_call(n, torch.ops.aten.scaled_dot_product_attention.default):
            q, k, v, visible = self.fetch_args_kwargs_from_env(n)[0]
            self.full, self.quantized = (
                quantized_attention(q, k, v, visible, prob_bits=bits).transpose(1, 2).flatten(2) for bits in (16, 4)
            )
            kept = quantized_attention(q, k, torch.ones_like(v), visible, prob_bits=4)[..., 0]
            self.lost = 1 - kept.transpose(1, 2)
        return super().run_node(n)


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Of the rows that count: attention's output [M, K] and the share of probability that rounds to nothing [M, H]."""

    full: Tensor
    quantized: Tensor
    lost: Tensor

    def moments(self, size: int) -> Moments:
        return moments(self.full, self.quantized, size)


def canvases(checkpoint: Checkpoint, shots: int, count: int, seed: int, *, held_out: bool) -> States:
    """The last of `shots` problems noised, those before it solved, as many of their tokens as the model takes."""
    tokenizer, config = checkpoint.tokenizer(), checkpoint.config
    corpus = builtin_corpus(count * shots, seed, held_out=held_out)
    pairs = [encode_pair(problem.prompt, problem.answer, tokenizer, config) for problem in corpus]
    samples = []
    for first in range(0, len(pairs), shots):
        *solved, last = pairs[first : first + shots]
        before = [token for pair in solved for token in pair.ids[:-1]][len(last.ids) - config.max_length :]
        samples.append(Sample([*before, *last.ids], len(before) + last.start))
    return make_states(samples, config, seed=seed, noised=True)


def attention_rows(block: GraphModule, stream: Stream) -> Rows:
    found = []
    for batch in stream:
        seen = Rounded(block)
        seen.run(*batch.inputs)
        found.append([each[batch.valid] for each in (seen.full, seen.quantized, seen.lost)])
    full, quantized, lost = (torch.cat(parts) for parts in zip(*found, strict=True))
    return Rows(full=full, quantized=quantized, lost=lost)


@torch.no_grad()
def gains(checkpoint: Checkpoint, shots: int, count: int, seed: int = 1) -> Iterator[dict[str, float]]:
    """Block by block, by how much each form and size divides the squared error on half as many other canvases."""
    frequencies = constants(checkpoint.config)["rope_frequencies"]
    learned, tested = (
        Stream(canvases(checkpoint, shots, number, seed, held_out=held_out), frequencies)
        for number, held_out in ((count, False), (count // 2, True))
    )
    for piece, graph in float_pieces(checkpoint):
        if piece.name == ENDS:
            for stream in (learned, tested):
                stream.enter(graph)
            continue
        rows, others = attention_rows(graph, learned), attention_rows(graph, tested)
        narrow, test = rows.moments(TAC.block), others.moments(TAC.block)
        before = error(identity(rows.full.shape[1], TAC.block), test)
        paper = covariance(narrow, rho=TAC.rho, eta=TAC.eta, alpha=TAC.alpha)
        found = {"lost": float(others.lost.mean()), "covariance 16": before / error(paper, test)}
        for size in BLOCKS:
            fitted = paired(rows.moments(size), rho=TAC.rho, alpha=0.0)
            found[f"paired {size}"] = before / error(fitted, others.moments(size))
        yield found
        for stream in (learned, tested):
            stream.compute(graph)
            stream.advance()


def main() -> None:
    rows: list[dict[str, Any]] = []
    for name, folder in BUILTIN.items():
        for canvas, shots in SHOTS.items():
            for seed in range(DRAWS):
                found = gains(open_checkpoint(folder), shots, CANVASES[canvas], seed)
                for block, each in enumerate(found):
                    rounded = {key: round(value, 3) for key, value in each.items()}
                    rows.append({"model": name, "canvas": canvas, "seed": seed, "block": block, **rounded})
                    print(rows[-1], flush=True)
    print(write_result("tac", rows))


if __name__ == "__main__":
    main()
