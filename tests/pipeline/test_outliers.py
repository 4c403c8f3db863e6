"""Tallies are what a slow count gives, the stream is the whole model, and the command leaves all or nothing."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median_low

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from passes.stats import STATES
from pipeline.__main__ import main
from pipeline.calibration.corpus import calibration_states
from pipeline.calibration.states import Sample, States, make_states
from pipeline.errors import InputRefused
from pipeline.models.checkpoint import Checkpoint, load_model, open_checkpoint, write_checkpoint
from pipeline.outliers.plots import by_layer, layers_and_sites, pooled
from pipeline.outliers.scan import Scan, scan
from pipeline.outliers.tally import RATIO_CAP, Finding, Tally, Thresholds
from pipeline.recipe import Calibration
from tests.pipeline.random_models import tiny
from tests.pipeline.test_calibrate import states_of, whole_inputs
from tests.pipeline.watched import Watched, uncollected

Made = Callable[..., Path]
THRESHOLDS = Thresholds(large_ratio=4, normal_share=0.6, massive_ratio=50)


def tallied(rows: Tensor, parts: list[int], thresholds: Thresholds = THRESHOLDS) -> Finding:
    tally = Tally(thresholds, shown_tokens=3)
    for part in rows.split(parts):
        tally.add(part)
    assert tally.shown.abs().max() == rows.abs().max()
    assert len(tally.shown) <= 3
    starts = range(len(rows) - len(tally.shown) + 1)
    assert any(torch.equal(rows[start : start + len(tally.shown)], tally.shown) for start in starts)
    return tally.finding()


def planted(tokens: int, channels: int, seed: int) -> Tensor:
    """Rows with a few large channels, a few huge values, and a row of zeros at times."""
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randn(tokens, channels, generator=draw)
    rows[:, : channels // 8] *= 12
    rows[torch.rand(rows.shape, generator=draw) < 0.02] *= 300
    if seed % 3 == 0:
        rows[tokens // 2] = 0
    return rows


def slowly(rows: Tensor, limits: Thresholds) -> tuple[list[int], list[int], float, list[float]]:
    """Normal channels, massive ones, share of massive tokens and ratios to the median, value by value."""
    values = [[abs(value) for value in row] for row in rows.tolist()]
    large, massive, ratios = [0] * rows.shape[1], set(), []
    for token, row in enumerate(values):
        unit = median_low(row)
        ratios.append(max(row) / unit if unit else 0.0)
        for channel, value in enumerate(row):
            large[channel] += value > 0 and value >= limits.large_ratio * unit
            if value > 0 and value >= limits.massive_ratio * unit:
                massive.add((token, channel))
    normal = [channel for channel, count in enumerate(large) if count >= limits.normal_share * len(values)]
    massive = {pair for pair in massive if pair[1] not in normal}
    share = len({token for token, _ in massive}) / len(values)
    return normal, sorted({channel for _, channel in massive}), share, ratios


@given(st.integers(1, 24), st.integers(1, 40), st.integers(0, 99), st.data())
def test_a_tally_is_the_slow_count_however_the_rows_are_parted(
    tokens: int, channels: int, seed: int, data: st.DataObject
) -> None:
    rows = planted(tokens, channels, seed)
    first = data.draw(st.integers(0, tokens))
    found = tallied(rows, [first, tokens - first])
    normal, massive, share, ratios = slowly(rows, THRESHOLDS)
    assert (found.normal_channels, found.massive_channels, found.massive_tokens) == (normal, massive, share)
    assert found.tokens == tokens
    assert torch.equal(found.channel_maxima, rows.abs().amax(0))
    assert found.max == float(rows.abs().max())
    rms = rows.double().square().mean().sqrt()
    assert abs(found.rms - rms) <= 1e-12 * rms
    assert abs(found.crest_factor * found.rms - found.max) <= 1e-12 * found.max
    assert abs(found.token_peak_ratio[0] - median_low(ratios)) <= 1e-12 * max(ratios)
    assert abs(found.token_peak_ratio[1] - max(ratios)) <= 1e-12 * max(ratios)
    crests = [float(row.abs().max() / row.double().square().mean().sqrt()) if row.any() else 0.0 for row in rows]
    assert abs(found.token_crest_factor[0] - median_low(crests)) <= 1e-6 * max(crests)


def test_a_channel_is_normal_and_a_token_massive() -> None:
    rows = torch.ones(10, 16)
    rows[:, 3] = -20.0  # large in every token
    rows[2:9, 5] = 20.0  # in seven of ten
    rows[0:5, 7] = 20.0  # in half: not normal, not massive
    rows[4, 11] = 500.0
    rows[4, 12] = rows[8, 12] = -60.0
    found = tallied(rows, [4, 6])
    assert found.normal_channels == [3, 5]
    assert found.massive_channels == [11, 12]
    assert found.massive_tokens == 0.2
    assert found.kind == "both"
    assert tallied(rows[:4], [4]).kind == "normal"
    assert tallied(rows[4:5, 8:], [1], Thresholds(massive_ratio=50, normal_share=2)).kind == "massive"
    assert tallied(rows[:1, 8:], [1]).kind == "none"


def test_a_massive_value_on_all_tokens_is_a_normal_outlier() -> None:
    rows = torch.ones(6, 8)
    rows[:, 2] = 1e4
    found = tallied(rows, [6])
    assert (found.normal_channels, found.massive_channels, found.massive_tokens) == ([2], [], 0.0)


def test_rows_without_a_median_have_numbers() -> None:
    rows = torch.zeros(2, 8)
    assert tallied(rows, [2]).crest_factor == 0.0
    rows[1, 0] = 1e-3
    found = tallied(rows, [2])
    assert found.token_peak_ratio == (0.0, RATIO_CAP)
    assert found.massive_channels == [0]


def scanned(checkpoint: Checkpoint, states: States) -> Scan:
    return scan(checkpoint, states, THRESHOLDS, on_piece=lambda _: None)


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_the_stream_shows_what_the_whole_model_does(model: Made, family: str) -> None:
    checkpoint = open_checkpoint(model(family, layers=2))
    states = states_of(checkpoint, 37)  # three batches, the last one short
    found = scanned(checkpoint, states)
    valid = torch.arange(states.input_ids.shape[1])[None, :] < states.kv_len[:, None]
    inputs = whole_inputs(load_model(checkpoint), states)
    assert inputs.keys() == found.findings.keys()
    crests = {}
    for site, x in inputs.items():
        assert tuple(found.findings[site]) == STATES
        for state, rows in zip(STATES, (x[valid & ~states.masked], x[valid & states.masked]), strict=True):
            true, one = tallied(rows, [len(rows)]), found.findings[site][state]
            assert one.tokens == true.tokens
            assert (one.channel_maxima - true.channel_maxima).abs().max() <= 2e-5 * true.max
            for name in ("max", "rms", "crest_factor"):
                assert abs(getattr(one, name) - getattr(true, name)) <= 2e-5 * getattr(true, name)
            crests[site, state] = true.crest_factor
            if site == found.worst:
                assert found.shown[state].abs().max() == one.max
    assert found.worst == max(crests, key=lambda key: crests[key])[0]


def test_one_block_is_in_memory_at_a_time(model: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(model("llada", layers=4))
    states = states_of(checkpoint, 4)
    watched = Watched(monkeypatch)
    with uncollected():
        scanned(checkpoint, states)
    assert watched.alive == [0] * 5


def test_what_is_not_finite_is_refused_with_site_and_sample(tmp_path: Path) -> None:
    random = tiny(shifted=False)
    for linear in (random.blocks[1].mlp.up_proj, random.blocks[1].mlp.gate_proj):
        linear.weight.data[::2, 0], linear.weight.data[1::2, 0] = 3e38, -3e38
    for writer in (random.blocks[0].attn.o_proj, random.blocks[0].mlp.down_proj, random.blocks[1].attn.o_proj):
        writer.weight.data[0] = 0
    random.embed.weight.data[:, 0] = 0
    random.embed.weight.data[7, 0] = 100.0  # the one token that reaches the first channel
    write_checkpoint(tmp_path / "model", random.config, random.state_dict(), torch.float32)
    samples = [Sample([1, 2, 3, 4], 2) for _ in range(19)]
    samples[17] = Sample([7, 2, 3, 4], 2)
    checkpoint = open_checkpoint(tmp_path / "model")
    states = make_states(samples, random.config, seed=0, noised=True)
    with pytest.raises(
        InputRefused, match=r"blocks\.1\.mlp\.down_proj has values that are not finite in calibration sample 17"
    ):
        scanned(checkpoint, states)


def outliers(source: Path | str, output: Path, *words: str) -> int:
    return main(["outliers", str(source), "-o", str(output), "--samples", "6", "--length", "24", *words])


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes seconds and has tests of its own."""
    monkeypatch.setattr("pipeline.outliers.survey.write_plots", lambda folder, found: [])


FILES = {"outliers.json", "outliers.md", "channel_maxima.safetensors", "heatmaps.png", "channels.png", "worst_site.png"}


def test_the_command_leaves_a_whole_folder(model: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = model("dream", layers=1)
    assert outliers(source, tmp_path / "new" / "out", "--json", "--seed", "5") == 0
    printed = json.loads(capsys.readouterr().out)
    out = tmp_path / "new" / "out"
    assert {path.name for path in out.iterdir()} == FILES
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert json.loads((out / "outliers.json").read_bytes()) == printed
    assert printed["calibration"] | {"samples": 6, "length": 24, "seed": 5} == printed["calibration"]
    assert len(printed["sites"]) == 5
    page = (out / "outliers.md").read_text()
    assert sum(line.startswith("| ") for line in page.splitlines()) == 2 + 2 * 5
    maxima = load_file(out / "channel_maxima.safetensors")
    for site, by_state in printed["sites"].items():
        for state, finding in by_state.items():
            top = maxima[f"{site}/{state}"].topk(8)
            assert [entry["channel"] for entry in finding["largest_channels"]] == top.indices.tolist()
            assert finding["max"] == float(f"{float(top.values[0]):.6g}")
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in FILES if name.endswith("png"))


def test_the_same_command_gives_the_same_bytes(model: Made, tmp_path: Path, undrawn: None) -> None:
    source = model("llada", layers=1)
    for name in ("one", "two"):
        assert outliers(source, tmp_path / name) == 0
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name


def test_pictures_show_sites_by_layer_and_keep_every_peak() -> None:
    rows = torch.ones(5, 1300)
    rows[3, 777] = 9.0
    assert pooled(rows).shape == (5, 434)
    assert pooled(rows)[3].argmax() == 777 // 3
    assert pooled(rows).max() == 9.0
    found = Scan()
    for layer in (0, 1):
        for site in ("attn.o_proj", "mlp.down_proj"):
            tally = Tally(THRESHOLDS, shown_tokens=1)
            tally.add(torch.full((2, 4), layer + 1.0 + 10 * (site == "mlp.down_proj")))
            found.take({f"blocks.{layer}.{site}": {"masked": tally}})
    layers, sites = layers_and_sites(found)
    assert (layers, sites) == ([0, 1], ["attn.o_proj", "mlp.down_proj"])
    assert by_layer(found, layers, sites, "masked", lambda finding: finding.max).tolist() == [[1, 2], [11, 12]]
    assert by_layer(found, layers, sites, "unmasked", lambda finding: finding.max).isnan().all()


def test_clean_text_has_no_masked_tokens(model: Made, tmp_path: Path) -> None:
    assert outliers(model("llada", layers=1), tmp_path / "out", "--states", "clean") == 0
    report = json.loads((tmp_path / "out" / "outliers.json").read_bytes())
    assert {tuple(by_state) for by_state in report["sites"].values()} == {("unmasked",)}


def test_the_text_may_be_a_file(model: Made, tmp_path: Path, undrawn: None) -> None:
    (tmp_path / "text.txt").write_text("\n".join("what is 12 plus 34, and then 56?" for _ in range(8)))
    checkpoint = open_checkpoint(model("llada", layers=1))
    assert outliers(checkpoint.folder, tmp_path / "out", "--source", f"file:{tmp_path / 'text.txt'}") == 0
    text = checkpoint.tokenizer()
    part = Calibration(source=f"file:{tmp_path / 'text.txt'}", samples=6, length=24)
    states = calibration_states(part, text, checkpoint.config)
    report = json.loads((tmp_path / "out" / "outliers.json").read_bytes())
    counts = report["sites"]["head"]
    assert sum(finding["tokens"] for finding in counts.values()) == int(states.kv_len.sum())
    assert counts["masked"]["tokens"] == int(states.masked.sum())


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--massive-ratio", "2"], 2, "massive_ratio 2 is below large_ratio 10"),
        (["--large-ratio", "nan"], 2, "large_ratio is nan"),
        (["--normal-share", "0"], 2, "normal_share is 0"),
        (["--source", "web:x"], 2, "no source of text"),
        (["--source", "file:absent.txt"], 4, "absent.txt"),
        (["--length", "4"], 2, "--length"),
    ],
)
def test_what_cannot_be_asked_leaves_nothing(
    model: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], code: int, said: str
) -> None:
    assert outliers(model("llada", layers=1), tmp_path / "out", *words) == code
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_what_exists_is_not_touched(model: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    assert outliers(model("llada", layers=1), tmp_path / "out") == 2
    assert "exists already" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_no_model_leaves_nothing(tmp_path: Path) -> None:
    assert outliers(tmp_path / "absent", tmp_path / "out") == 4
    assert list(tmp_path.iterdir()) == []


def test_plots_need_their_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert outliers("builtin:tiny-llada", tmp_path / "out") == 8
    said = capsys.readouterr().err
    assert "dllmc[study]" in said
    assert "scan" not in said  # before any work
    assert list(tmp_path.iterdir()) == []
