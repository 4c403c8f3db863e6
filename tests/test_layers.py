"""The house rules that a reader relies on: imports run one way, files are short, README's tree is true."""

import ast
import importlib
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("pipeline", "passes", "plugins")
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 50
MAX_LINE = 120
# Kernels know pointers, integers and a stream; their emulation on a CPU maps memory and switches stacks.
SYSTEM_HEADERS = {"sys/mman.h", "unistd.h", "ucontext.h", "setjmp.h"}

# Room -> rooms it may import.
MAY_IMPORT = {
    "plugins": {"plugins"},
    "passes": {"passes", "plugins"},
    "pipeline": set(ROOMS),
}
# These ship to the device: what they import at module level must be there, too.
ON_DEVICE = (
    "pipeline/runner",
    "pipeline/backends",
    "pipeline/cli",
    "pipeline/errors.py",
    "pipeline/evaluation.py",
    "pipeline/folder.py",
    "pipeline/inspection.py",
    "pipeline/manifest.py",
    "pipeline/progress.py",
    "pipeline/version.py",
)
RUNNER_COMMANDS = ("run", "chat", "score", "benchmark", "verify", "inspect", "evaluate")
HEAVY = {"torch", "onnx", "onnx_ir", "onnxscript", "pydantic", "yaml", "transformers", "safetensors"}
HEAVY |= {"passes", "plugins"}
# A command's --help imports its module, so these may hold nothing but click.
COMMAND_LINE = ("pipeline/cli", "pipeline/__main__.py")

FILES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
OTHER_FILES = sorted(path for folder in ("tests", "bench") for path in (ROOT / folder).rglob("*.py"))
NATIVE_FILES = sorted(
    path for folder in ("plugins", "tests") for kind in ("*.h", "*.cu", "*.cpp") for path in (ROOT / folder).rglob(kind)
)
KERNEL_FILES = [path for path in NATIVE_FILES if path.is_relative_to(ROOT / "plugins/cuda")]


# What may hold braces and quotes that mean nothing: comments, strings, characters, lines of the preprocessor.
MEANINGLESS = re.compile(
    r"""//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])+'|^[ \t]*\#(?:\\\n|[^\n])*""", re.DOTALL | re.MULTILINE
)
SCOPE = re.compile(r"(template\s*<.*>\s*)?(inline\s+)?(namespace|struct|class|union|enum|extern)\b[^()=]*$", re.DOTALL)


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imported(tree: ast.AST) -> Iterator[str]:
    """Dotted names that the statements of a tree import."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield str(node.module)


def at_module_level(tree: ast.AST) -> Iterator[str]:
    """The same, of statements that run when the module is imported."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from imported(node)
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from at_module_level(node)


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", FILES, ids=named)
def test_imports_run_one_way(path: Path) -> None:
    allowed = MAY_IMPORT[path.relative_to(ROOT).parts[0]]
    rooms = {name.split(".")[0] for name in imported(parse(path))} & {*ROOMS, "tests"}
    assert rooms <= allowed, f"{named(path)} imports {sorted(rooms - allowed)}, allowed: {sorted(allowed)}"


@pytest.mark.parametrize("path", [path for path in FILES if named(path).startswith(ON_DEVICE)], ids=named)
def test_device_code_imports_nothing_heavy(path: Path) -> None:
    heavy = {name.split(".")[0] for name in at_module_level(parse(path))} & HEAVY
    assert not heavy, f"{named(path)} imports {sorted(heavy)} at module level"


@pytest.mark.parametrize("command", RUNNER_COMMANDS)
def test_runner_commands_import_device_code_only(command: str) -> None:
    """And what they import is checked above, so that no file is left out of `ON_DEVICE`."""
    waiting, seen = [ROOT / f"pipeline/cli/{command}.py"], set()
    first = waiting[0]
    while waiting:
        path = waiting.pop()
        seen.add(path)
        tree = parse(path)
        names = imported(tree) if path == first else at_module_level(tree)
        for name in names:
            if name.split(".")[0] == "pipeline":
                stem = ROOT.joinpath(*name.split("."))
                found = stem.with_suffix(".py") if stem.with_suffix(".py").is_file() else stem / "__init__.py"
                waiting += {found} - seen
    strangers = {named(path) for path in seen if not named(path).startswith(ON_DEVICE)}
    assert strangers == set(), f"dllmc {command} imports {sorted(strangers)}: add them to ON_DEVICE"


@pytest.mark.parametrize("path", [path for path in FILES if named(path).startswith(COMMAND_LINE)], ids=named)
def test_commands_import_late(path: Path) -> None:
    third_party = {
        name.split(".")[0] for name in at_module_level(parse(path)) if name.split(".")[0] not in sys.stdlib_module_names
    }
    assert third_party <= {"click", "pipeline"}, f"{named(path)} imports {sorted(third_party)} at module level"


@pytest.mark.parametrize("path", FILES + OTHER_FILES, ids=named)
def test_files_and_functions_are_short(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_FILE_LINES, f"{named(path)} has {lines} lines, at most {MAX_FILE_LINES}"
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = int(node.end_lineno or 0) - node.lineno + 1  # options of a command stand above this line
            assert length <= MAX_FUNCTION_LINES, f"{named(path)}: {node.name} has {length} lines"


def native_functions(source: str) -> Iterator[tuple[str, int]]:
    """Heads of the functions of namespaces and classes, each with its number of lines, head included."""
    text = MEANINGLESS.sub(lambda found: "\n" * found.group().count("\n"), source)
    blocks: list[tuple[str, int, bool]] = []  # head, where it begins, whether what is in it are declarations
    start = 0
    for mark in re.finditer("[;{}]", text):
        declares = all(scope for *_, scope in blocks)
        if mark.group() == "{":
            head = text[start : mark.start()].strip()
            blocks.append((head, mark.start() - len(text[start : mark.start()].lstrip()), bool(SCOPE.match(head))))
        elif mark.group() == "}":
            head, begin, is_scope = blocks.pop()
            if not is_scope and "(" in head and all(scope for *_, scope in blocks):
                yield head, text.count("\n", begin, mark.start()) + 1
        if mark.group() != ";" or declares:
            start = mark.end()
    assert not blocks, f"no }} for {blocks[-1][0]}"


NATIVE = """
namespace n {
// not {
struct S {
  int f(int a = g(1)) const {
    if (a) { h('{'); }
    return 1;
  }
};
constexpr int kTable[] = {1, 2};
#define OPEN {
template <class T>
T twice(T x) {
  return x + x;
}
}
"""


def test_native_functions_are_found() -> None:
    assert list(native_functions(NATIVE)) == [
        ("int f(int a = g(1)) const", 4),
        ("template <class T>\nT twice(T x)", 4),
    ]


@pytest.mark.parametrize("path", NATIVE_FILES, ids=named)
def test_native_files_are_short_and_say_what_they_are(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= MAX_FILE_LINES, f"{named(path)} has {len(lines)} lines, at most {MAX_FILE_LINES}"
    assert max(map(len, lines)) <= MAX_LINE, f"{named(path)} has lines longer than {MAX_LINE}"
    assert lines[0].startswith("// "), f"{named(path)} does not begin with what it is"
    for head, length in native_functions("\n".join(lines)):
        assert length <= MAX_FUNCTION_LINES, f"{named(path)}: {head} has {length} lines"


@pytest.mark.parametrize("path", KERNEL_FILES, ids=named)
def test_kernels_know_no_runtime(path: Path) -> None:
    included = re.findall(r'#\s*include [<"]([^>"]+)', path.read_text(encoding="utf-8"))
    own = {
        name for name in included if any((folder / name).is_file() for folder in (path.parent, ROOT / "plugins/cuda"))
    }
    strangers = [name for name in included if name not in own and "." in name and not name.startswith("cuda_")]
    assert set(strangers) <= SYSTEM_HEADERS, f"{named(path)} includes {strangers}"


@pytest.mark.parametrize("path", FILES, ids=named)
def test_every_module_says_what_it_is(path: Path) -> None:
    assert ast.get_docstring(parse(path)), f"{named(path)} has no docstring"


@pytest.mark.parametrize("room", ROOMS)
def test_packages_are_of_this_tree(room: str) -> None:
    found = Path(str(importlib.import_module(room).__file__))
    assert found == ROOT / room / "__init__.py", f"{room} was imported from {found}"


def tracked() -> set[str]:
    """Entries of the root and of each room, one level deep, as git knows them; folders end in a slash."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: nothing says which files belong to the tree")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    entries = set()
    for name in listed.splitlines():
        parts = name.split("/")
        depth = 2 if parts[0] in ROOMS else 1
        entries.add("/".join(parts[:depth]) + ("/" if len(parts) > depth else ""))
    return {name for name in entries if not name.endswith("__init__.py")}


def test_readme_tree_is_true() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"## The tree\n.*?```\n(.*?)```", readme, re.DOTALL)
    assert block, "README has no tree"
    listed: list[str] = []
    room = ""
    for line in block.group(1).splitlines():
        name = line.split()[0]
        room = room if line.startswith("  ") else name
        listed.append(room + name if line.startswith("  ") else name)
        assert len(line.split()) > 1, f"README's tree says nothing about {name}"
    present = {name for name in tracked() if "/" in name and not name.startswith(".")} | {f"{room}/" for room in ROOMS}
    assert len(listed) == len(set(listed)), "README's tree lists an entry twice"
    assert set(listed) == present, (
        f"missing from README's tree: {sorted(present - set(listed))}; "
        f"listed, but not in git: {sorted(set(listed) - present)}"
    )
