"""`dllmc score DIR`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click


@click.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--prompt", metavar="TEXT", required=True, help="What stands before the answer.")
@click.option("--answer", metavar="TEXT", required=True, help="The text whose likelihood is asked.")
@click.option("--samples", type=click.IntRange(min=1), default=128, show_default=True, help="Masks drawn.")
@click.option("--seed", type=int, default=0, show_default=True, help="Key of the masks.")
@click.option("--guidance", type=float, default=0.0, show_default=True, help="Strength of classifier-free guidance.")
@click.option("--threads", type=click.IntRange(min=1), help="Cores to use [all].")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    folder: Path,
    prompt: str,
    answer: str,
    samples: int,
    seed: int,
    guidance: float,
    threads: int | None,
    as_json: bool,
) -> None:
    """Say how likely an answer is: an upper bound on -log2 p(answer | prompt), estimated on drawn masks.

    Answers with equal numbers of tokens see equal masks, so their difference says which is likelier. The bundle's
    defaults of generation have no part in it.

    \b
    dllmc score exported/tiny-llada-rtn-w8a8 --prompt "547+985=" --answer "7+5=12;4+8+1=13;5+9+1=15;1532"
    """
    from pipeline.progress import Progress
    from pipeline.runner import Runner

    with Progress(json=as_json).stage("load", brief=True) as stage:
        runner = Runner(folder, threads=threads, on_bytes=stage.advance_bytes)
    score = runner.score(prompt, answer, samples=samples, seed=seed, guidance=guidance)
    if as_json:
        click.echo(json.dumps({**asdict(score), "bits_per_token": score.bits_per_token}))
    else:
        click.echo(
            f"at most {score.bits:.3f} bits, {score.bits_per_token:.3f} a token, "
            f"for {score.tokens} tokens on {score.samples} masks"
        )
