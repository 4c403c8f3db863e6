"""The command line: exit codes, one-line errors, signals, and help that imports nothing heavy."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Any

import click
import pytest

import pipeline
from passes.base import PassError
from pipeline import cli
from pipeline.__main__ import Terminated, as_known, main
from pipeline.cli import COMMANDS, Entry
from pipeline.cli.export import default_output
from pipeline.errors import BuildFailed, EnvironmentFault, HashMismatch, InputRefused, ValidationFailed, WillNotFit
from pipeline.folder import STAGES, WorkFolder
from pipeline.recipe import Recipe
from pipeline.recipe_file import BUILTIN_RECIPES

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipeline", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


LOADED = """
import sys
from pipeline.__main__ import main
code = main(sys.argv[1:])
heavy = {"torch", "onnx", "onnxruntime", "numpy", "pydantic", "yaml", "transformers", "tokenizers", "safetensors"}
print("LOADED", code, sorted(heavy & set(sys.modules)))
"""


@pytest.mark.parametrize("words", [[], *([name] for name in COMMANDS), ["recipe", "show"]], ids=" ".join)
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    command = [sys.executable, "-c", LOADED, *words, "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "Usage: dllmc" in done.stdout
    assert "--debug" in done.stdout
    assert done.stdout.splitlines()[-1] == "LOADED 0 []"


def test_options_may_be_spelled_with_underscores(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", "show", "fp16", "--set", "lowering.top-k=4"]) == 0
    assert "top_k: 4" in capsys.readouterr().out
    with pytest.MonkeyPatch.context() as patch:
        command = click.Command(
            "x", params=[click.Option(["--gen-length"], type=int)], callback=lambda gen_length: None
        )
        patch.setattr("pipeline.cli.verify.command", command)
        assert main(["verify", "--gen_length", "3"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["exprot"], "no command 'exprot'; did you mean 'export'?"),
        (["zzz"], "`dllmc --help` lists the commands"),
        (["export"], "Missing argument 'MODEL'"),
        (["export", "m", "--recip", "x"], "'--recipe'?"),
        (["export", "m", "--from", "lower", "--until", "quantize"], "--from lower comes after --until quantize"),
        (["export", "builtin:tiny-llada", "--set", "linear.w_bit=4"], "did you mean 'linear.w_bits'?"),
        (["export", "builtin:tiny-llada", "--recipe", "rtn-w4a44"], "did you mean 'rtn-w4a4'?"),
        (["export", "builtin:tiny-llada", "--set", "attention.prob_bits=8"], "prob_bits 8 cannot be exported"),
        (["quantize", "nowhere"], "holds no export in progress"),
        (["export", "builtin:tiny-llada", "--workers", "0"], "0 is not in the range 1<=x<=256"),
        (["export", "builtin:tiny-llada", "--cache", "tape"], "'tape' is not one of 'ram', 'disk'"),
        (["export", "builtin:tiny-llada", "--set", "calibration.source=c4"], "'c4' is no source of text"),
    ],
)
def test_wrong_words_are_usage_errors(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""
    assert list(tmp_path.iterdir()) == []


def test_version_and_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == "dllmc 0.1.0\n"
    assert main(["recipe", "list"]) == 0
    assert tuple(line.split()[0] for line in capsys.readouterr().out.splitlines()) == BUILTIN_RECIPES
    assert main(["models", "--json"]) == 0
    assert "builtin:tiny-llada" in json.loads(capsys.readouterr().out)["builtin"]


def install(monkeypatch: pytest.MonkeyPatch, fault: BaseException) -> None:
    """Make `dllmc models` raise this."""

    def act(**unused: object) -> None:
        raise fault

    monkeypatch.setattr("pipeline.cli.models.command", click.Command("models", callback=act))


def caused(by: Exception) -> PassError:
    """What the runner of passes makes of an exception."""
    fault = PassError(f"pass Fold failed ({by}); passes before it: none")
    fault.__cause__ = by
    return fault


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        (InputRefused("x"), 4),
        (ValidationFailed("x"), 5),
        (BuildFailed("x"), 6),
        (HashMismatch("x"), 7),
        (EnvironmentFault("x"), 8),
        (WillNotFit("x"), 3),
        (MemoryError(), 3),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."), 3),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), 3),
        (OSError(errno.ENOSPC, "No space left on device"), 3),
        (RuntimeError("I/O error: No space left on device (os error 28)"), 3),
        (PermissionError(errno.EACCES, "Permission denied", "file"), 8),
        (ModuleNotFoundError("No module named 'torch._C'", name="torch._C"), 8),
        (ModuleNotFoundError("No module named 'pipeline.x'", name="pipeline.x"), 1),
        (KeyboardInterrupt(), 130),
        (ZeroDivisionError("x"), 1),
        (caused(MemoryError()), 3),
        (caused(caused(OSError(errno.ENOSPC, "No space left on device"))), 3),
        (caused(ZeroDivisionError("x")), 1),
    ],
)
def test_every_fault_has_its_code_and_one_line(
    fault: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(monkeypatch, fault)
    assert main(["models"]) == code
    error = capsys.readouterr().err.strip()
    assert error.count("\n") == 0
    assert error.startswith("dllmc: ")
    assert ("a bug in dllmc" in error) == (code == 1)


def test_what_torch_says_when_memory_ends() -> None:
    """In its own words, which differ between systems and releases."""
    import torch

    with pytest.raises(RuntimeError, match="DefaultCPUAllocator") as found:
        torch.empty(1 << 60, dtype=torch.uint8)
    known = as_known(found.value)
    assert isinstance(known, WillNotFit)
    assert "close other programs" in str(known)


@pytest.mark.parametrize("fault", [KeyboardInterrupt(), Terminated()])
@pytest.mark.parametrize("command", COMMANDS)
def test_only_what_publishes_speaks_of_publishing(
    command: str, fault: BaseException, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def act(**unused: object) -> None:
        raise fault

    entry = COMMANDS[command]
    monkeypatch.setattr(f"{entry.module}.{entry.attribute}", click.Command(command, callback=act))
    assert main([command]) in (130, 143)
    error = capsys.readouterr().err
    assert ("nothing was published, repeat the command" in error) == (command in ("export", *STAGES))


def test_a_missing_package_is_named_with_its_remedy() -> None:
    known = as_known(ModuleNotFoundError("No module named 'pydantic'", name="pydantic"))
    assert "pip install 'dllmc[export]'" in str(known)


def test_debug_shows_the_traceback_wherever_it_stands(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in (["--debug", "models"], ["models", "--debug"]):
        install(monkeypatch, InputRefused("bad model"))
        assert main(arguments) == 4
        error = capsys.readouterr().err
        assert "Traceback" in error
        assert error.endswith("dllmc: bad model\n")


def test_a_message_cannot_move_the_cursor(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    install(monkeypatch, InputRefused("file \x1b[2J\r\nname"))
    assert main(["models"]) == 4
    assert capsys.readouterr().err == "dllmc: file \\x1b[2J\\r\\nname\n"


SLEEPER = """
import sys, time
from pathlib import Path
import click
from pipeline.cli import COMMANDS, Entry
import pipeline.cli.models
from pipeline.__main__ import main
from pipeline.folder import WorkFolder, write_bytes

@click.command()
def command():
    "Work until a signal arrives."
    with WorkFolder(Path(sys.argv[1])) as work:
        write_bytes(work.path / "half", b"x")
        print("ready", flush=True)
        time.sleep(60)

pipeline.cli.models.command = command
sys.exit(main(["models"]))
"""


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_signals_leave_nothing_half_written(tmp_path: Path, number: int, code: int, word: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SLEEPER, str(tmp_path / "out")],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A test runner in the background may have had SIGINT ignored, which children inherit.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    os.kill(process.pid, number)
    _, error = process.communicate(timeout=30)
    assert process.returncode == code
    assert error.strip().startswith(f"dllmc: {word}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_in_a_weakref_callback_is_not_lost(
    number: signal.Signals, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Python drops what such a callback raises, and torch has many of them."""

    def act(**unused: object) -> None:
        thing: set[int] = set()
        holder = weakref.ref(thing, lambda _: signal.raise_signal(number))
        del thing
        time.sleep(20)
        assert holder() is None

    monkeypatch.setattr("pipeline.cli.models.command", click.Command("models", callback=act))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    started = time.monotonic()
    try:
        assert main(["models"]) == code
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - started <= 10
    assert capsys.readouterr().err.strip().count("\n") == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_that_a_library_renames_is_not_lost(
    number: signal.Signals, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Extension modules turn what a Python callback of theirs raised into an error of their own."""

    def act(**unused: object) -> None:
        try:
            signal.raise_signal(number)
        except BaseException as fault:
            raise RuntimeError("error in a callback") from fault

    monkeypatch.setattr("pipeline.cli.models.command", click.Command("models", callback=act))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert main(["models"]) == code
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err.strip().count("\n") == 0


def test_the_module_runs_in_a_checkout(tmp_path: Path) -> None:
    done = run("verify", str(tmp_path))
    assert done.returncode == 4
    assert done.stdout == ""
    assert "holds no manifest.json" in done.stderr


def test_a_reader_that_leaves_early_is_no_error() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline", "recipe", "show", "fp16"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    error = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=30) in (0, 1)
    assert error == ""


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("builtin:tiny-llada", "tiny-llada-x"),
        ("models/My Model/", "My_Model-x"),
        ("/", "model-x"),
    ],
)
def test_the_default_output_is_named_after_model_and_recipe(model: str, expected: str) -> None:
    assert default_output(model, "x") == Path("exported") / expected


def test_an_unknown_entry_is_our_bug(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(cli.COMMANDS, "models", Entry("pipeline.nowhere", "command", "x"))
    assert main(["models"]) == 1
    assert "pipeline.nowhere" in capsys.readouterr().err


class Stages:
    """Stands in for `pipeline.stages`: records what it is asked."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []

    def export(self, model: str, output: Path, recipe: Recipe, **options: Any) -> Path:
        options.pop("report").note("working")
        self.asked.append({"model": model, "output": output, "recipe": recipe.name, **options})
        return output


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> Stages:
    stand_in = Stages()
    monkeypatch.setitem(sys.modules, "pipeline.stages", stand_in)
    monkeypatch.setattr(pipeline, "stages", stand_in, raising=False)
    return stand_in


def test_export_passes_its_words_on(stages: Stages, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "builtin:tiny-dream"]) == 0
    assert main(["export", "m", "-o", "my out", "--recipe", "fp16", "--until", "lower", "--validate", "off"]) == 0
    assert main(["export", "m", "-o", "out", "--from", "lower", "--force", "--json"]) == 0
    plain = {"first": None, "last": None, "force": False, "validate": True, "workers": 1, "cache_on_disk": False}
    default = Path("exported/tiny-dream-rtn-w8a8")
    assert stages.asked == [
        {"model": "builtin:tiny-dream", "output": default, "recipe": "rtn-w8a8", **plain},
        {"model": "m", "output": Path("my out"), "recipe": "fp16", **plain, "last": "lower", "validate": False},
        {"model": "m", "output": Path("out"), "recipe": "rtn-w8a8", **plain, "first": "lower", "force": True},
    ]
    captured = capsys.readouterr()
    assert captured.out.splitlines() == [
        'exported/tiny-dream-rtn-w8a8   next: dllmc run exported/tiny-dream-rtn-w8a8 --prompt "..."',
        "my out   next: dllmc validate 'my out'",
        '{"event": "note", "text": "working"}',
        '{"event": "result", "folder": "out", "stage": "bundle"}',
    ]
    assert captured.err == "working\nworking\n"


def test_a_stage_runs_alone(stages: Stages) -> None:
    assert main(["lower", "out", "--model", "m", "--recipe", "fp16"]) == 0
    assert main(["quantize", "out", "--model", "m", "--workers", "3", "--cache", "disk"]) == 0
    asked = [
        tuple(call[key] for key in ("model", "first", "last", "workers", "cache_on_disk")) for call in stages.asked
    ]
    assert asked == [("m", "lower", "lower", 1, False), ("m", "quantize", "quantize", 3, True)]


def test_stage_commands_read_the_recorded_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.cli.export import _recorded
    from pipeline.recipe_file import dump_recipe, load_recipe

    output = tmp_path / "out"
    with WorkFolder(output) as work:
        work.record_job("builtin:tiny-dream", dump_recipe(load_recipe("rtn-w4a16", ["linear.w_group=32"])))
    assert _recorded(output, None, None, ()) == (
        "builtin:tiny-dream",
        load_recipe("rtn-w4a16", ["linear.w_group=32"]),
    )
    assert _recorded(output, None, None, ("linear.w_group=16",))[1].linear.w_group == 16
    assert _recorded(output, None, "fp16", ()) == ("builtin:tiny-dream", load_recipe("fp16"))
    assert _recorded(output, "other", "fp16", ()) == ("other", load_recipe("fp16"))
