"""Train a reference model with the masked-diffusion objective; `python -m pipeline.tiny.train tiny-llada -o DIR`.

Loss: a uniform number of answer tokens is masked and the cross-entropy averaged over them, which is the any-order form
of LLaDA's 1/t-weighted bound (arXiv 2502.09992, eq. 6) without its variance. Shape letters: B batch, L sequence.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from pipeline.models.config import ModelConfig
from pipeline.models.transformer import Transformer
from pipeline.tiny.outliers import OutlierPressure
from pipeline.tiny.problems import Maker, fingerprint, problems
from pipeline.tiny.reference import REFERENCES

HISTORY = "training"  # key of the weights' header
ANSWER_REGION = 32  # longest answer canvas the models are trained on
EXTRA_END_WEIGHT = 0.05  # loss weight of every end-of-text after the first: it teaches nothing new
SHORT_REGION_SHARE = 0.75


Row = tuple[list[int], list[int], int]  # prompt, answer, tokens that the answer region has


class Pool:
    """A fixed pool of encoded training problems, drawn in batches of similar length."""

    def __init__(self, tokenizer: Tokenizer, kinds: Mapping[str, Maker], count: int, seed: int) -> None:
        drawn = list(islice(problems(seed, held_out=False, kinds=kinds), count))
        self.prompts = [e.ids for e in tokenizer.encode_batch([p.prompt for p in drawn])]
        self.answers = [e.ids for e in tokenizer.encode_batch([p.answer for p in drawn])]

    def batches(self, config: ModelConfig, size: int, seed: int) -> Iterator[tuple[Tensor, ...]]:
        """Endless (clean ids [B, L], noised ids, kv_len [B], loss weight [B, L])."""
        draw = torch.Generator().manual_seed(seed)
        while True:
            picks = torch.randint(len(self.prompts), (4 * size,), generator=draw).tolist()
            rows = []
            for i in picks:
                prompt, answer = self.prompts[i], self.answers[i]
                least = len(answer) + 1
                spare = max(ANSWER_REGION - least, 0)
                short = torch.rand((), generator=draw).item() < SHORT_REGION_SHARE
                extra = int(torch.randint(min(6, spare + 1) if short else spare + 1, (), generator=draw).item())
                rows.append((prompt, answer, least + extra))
            rows.sort(key=lambda r: len(r[0]) + r[2])
            for start in torch.randperm(4, generator=draw).tolist():
                yield self._noised(rows[start * size : (start + 1) * size], config, draw)

    @staticmethod
    def _noised(rows: list[Row], config: ModelConfig, draw: torch.Generator) -> tuple[Tensor, ...]:
        length = max(len(p) + region for p, _, region in rows)
        clean = torch.full((len(rows), length), config.pad_id)
        weight = torch.zeros(len(rows), length)
        region_mask = torch.zeros(len(rows), length, dtype=torch.bool)
        kv_len = torch.tensor([len(p) + region for p, _, region in rows])
        for b, (prompt, answer, region) in enumerate(rows):
            s = len(prompt)
            clean[b, : s + len(answer)] = torch.tensor(prompt + answer)
            clean[b, s + len(answer) : s + region] = config.eos_id
            region_mask[b, s : s + region] = True
            weight[b, s : s + len(answer) + 1] = 1.0
            weight[b, s + len(answer) + 1 : s + region] = EXTRA_END_WEIGHT
        # A uniform masked share of each row, at least one token.
        share = torch.rand(len(rows), 1, generator=draw)
        score = torch.rand(len(rows), length, generator=draw).masked_fill(~region_mask, 2.0)
        count = (share * region_mask.sum(1, keepdim=True)).floor() + 1
        masked = score.argsort(1).argsort(1) < count
        masked &= region_mask
        weight = weight * masked
        weight = weight / weight.sum(1, keepdim=True).clamp_min(EXTRA_END_WEIGHT)
        return clean, clean.masked_fill(masked, config.mask_id), kv_len, weight


def loss_of(model: Transformer, clean: Tensor, noised: Tensor, kv_len: Tensor, weight: Tensor) -> Tensor:
    """Weighted cross-entropy at the masked positions, one unit of weight a row."""
    positions = torch.arange(clean.shape[1], device=clean.device).expand_as(clean)
    logits = model.logits(noised, positions, kv_len)
    if model.config.shifted_logits:
        logits, clean, weight = logits[:, :-1], clean[:, 1:], weight[:, 1:]
    picked = weight > 0
    each = F.cross_entropy(logits[picked].float(), clean[picked], reduction="none")
    return (each * weight[picked]).sum() / clean.shape[0]


def train(config: ModelConfig, tokenizer: Tokenizer, options: argparse.Namespace) -> Transformer:
    """AdamW with warm-up and cosine decay; bfloat16 autocast, float32 weights; deterministic for one machine type."""
    torch.manual_seed(options.seed)
    device = torch.device(options.device)
    model = Transformer(config)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.02 if "embed" in name else parameter.shape[1] ** -0.5)
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.data.mul_((2 * config.num_layers) ** -0.5)
    if options.start:
        model.load_state_dict(load_file(options.start))
    model.to(device)
    pressure = OutlierPressure(model, options.outlier_target)
    optimiser = torch.optim.AdamW(model.parameters(), lr=options.lr, betas=(0.9, 0.98), weight_decay=options.decay)
    pool = Pool(tokenizer, REFERENCES[options.name].kinds, options.pool, seed=options.seed + 1)
    batches = pool.batches(config, options.batch, options.seed + 2 + options.first_step)
    started = time.time()
    running = 0.0
    for step in range(options.first_step, options.steps):
        batch = next(batches)
        warm = min(1.0, (step - options.first_step + 1) / 200)
        decay = 0.5 * (1 + math.cos(math.pi * step / options.steps))
        for group in optimiser.param_groups:
            group["lr"] = options.lr * warm * (0.02 + 0.98 * decay)
        with torch.autocast(device.type, torch.bfloat16):
            loss = loss_of(model, *(t.to(device) for t in batch))
        extra, ratio = pressure.take()
        optimiser.zero_grad(set_to_none=True)
        (loss + options.outliers * extra).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        running += (loss.item() - running) / min(step - options.first_step + 1, 100)
        if (step + 1) % 50 == 0:
            seconds = time.time() - started
            print(f"step {step + 1} loss {running:.4f} peak/rms {ratio:.2f} seconds {seconds:.0f}", flush=True)  # noqa: T201
        if options.snapshot and (step + 1) % 250 == 0:
            save(options.snapshot, model, [*history(options.start), phase_of(options, step + 1)])
    return model


def phase_of(options: argparse.Namespace, last_step: int) -> dict[str, str | int | float]:
    """What one run of this script did, for the model card."""
    names = ("seed", "batch", "lr", "decay", "pool", "outliers", "outlier_target", "device")
    numbers = {name: getattr(options, name) for name in names}
    drawn = fingerprint(REFERENCES[options.name].kinds)
    return {"first_step": options.first_step, "last_step": last_step, "problems": drawn, **numbers}


def history(weights: Path | None) -> list[dict[str, str | int | float]]:
    """The phases that made these weights, oldest first; none without weights."""
    if weights is None:
        return []
    with safe_open(weights, "pt") as file:
        phases: list[dict[str, str | int | float]] = json.loads(file.metadata()[HISTORY])
    return phases


def save(path: Path, model: Transformer, phases: list[dict[str, str | int | float]]) -> None:
    """Weights by our names in float32, their history in the header."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, path, {HISTORY: json.dumps(phases)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=REFERENCES)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--decay", type=float, default=0.01)
    parser.add_argument("--pool", type=int, default=400_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--outliers", type=float, default=0.5, help="weight of the pressure towards outliers")
    parser.add_argument("--outlier-target", type=float, default=9.5, help="peak over rms that is asked for")
    parser.add_argument("--start", type=Path, help="weights of an earlier snapshot")
    parser.add_argument("--first-step", type=int, default=0, help="step of that snapshot, for the schedule")
    parser.add_argument("--snapshot", type=Path)
    options = parser.parse_args()
    reference = REFERENCES[options.name]
    tokenizer = reference.tokenizer()
    model = train(reference.config(tokenizer), tokenizer, options)
    save(options.output, model, [*history(options.start), phase_of(options, options.steps)])


if __name__ == "__main__":
    main()
