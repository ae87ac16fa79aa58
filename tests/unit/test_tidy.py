"""The rules of the house, as tests: what may import what, how long things are, how they are named.

A rule here is one of DESIGN §3, §4 or §10. When a rule is in the way, change the design first.
"""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("edgemem", "converters", "native", "bench", "tests")
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 70
MAX_COLUMNS = 100

FLOORS = {
    "engine": 7, "server": 7, "perplexity": 7, "benchmark": 7,
    "session": 6, "rates": 6, "needs": 6,
    "streamer": 5, "generation": 5, "inventory": 5,
    "residency": 4, "budget": 4, "governor": 4, "kvcache": 4, "models": 4, "sequence": 4,
    "arguments": 4, "recorder": 4, "belady": 4, "rows": 4,
    "store": 3, "writer": 3, "kernels": 3, "tokenizer": 3, "chat": 3, "sampler": 3,
    "demand": 3, "window": 3, "predictors": 3, "lookahead": 3, "planner": 3, "policies": 3,
    "format": 2, "_native": 2,
    "spec": 1, "dtypes": 1, "trace": 1, "tracefile": 1, "memory": 1,
    "errors": 0,
}  # fmt: skip
SEES_ALL = {
    "__init__", "__main__", "cli", "doctor", "plan", "profile", "calibration", "recording",
    "thresholds",
}  # fmt: skip
CONVERTERS_SEE = 3

HOMES = {
    "cffi": ("edgemem/_native.py", "native/cffi_build.py"),
    "psutil": ("edgemem/budget.py",),
    "tokenizers": ("edgemem/tokenizer.py",),
    "jinja2": ("edgemem/chat.py",),
    "click": ("edgemem/cli/", "edgemem/__main__.py"),
    "tqdm": ("edgemem/cli/",),
    "numba": ("converters/", "bench/replay"),
    "llvmlite": ("edgemem/doctor.py", "bench/"),
    "onnxruntime": ("converters/",),
    "torch": ("bench/",),
    "transformers": ("bench/",),
    "numpy": ("edgemem/", "converters/", "bench/"),
}
"""Where a third-party package may be imported, outside tests; none but these may be at all."""

BANNED_NAMES = re.compile(r"^(utils?|commons?|helpers?|misc)$", re.IGNORECASE)
MARKERS = re.compile("|".join(("TO" + "DO", "FIX" + "ME", "XX" + "X", "HA" + "CK")))


def files(*suffixes: str, folders=FOLDERS) -> list[Path]:
    """The project's own source files, by path relative to its root."""
    found = (p for f in folders for p in (ROOT / f).rglob("*") if p.suffix in suffixes)
    return sorted(p.relative_to(ROOT) for p in found if "__pycache__" not in p.parts)


def tree(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(), str(path))


def imports(path: Path) -> list[tuple[int, str]]:
    """(line, dotted absolute name) of every import anywhere in a file, also inside functions.

    Names imported for annotations alone (`if TYPE_CHECKING:`) are no dependency and do not count.
    """
    package = ["edgemem", *path.parts[:-1]] if path.parts[0] == "converters" else path.parts[:-1]
    found, module = [], tree(path)
    for node in ast.walk(module):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body.clear()
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            stem = ".".join(base + ([node.module] if node.module else []))
            inside = stem in ("edgemem", "edgemem.converters")  # from . import store
            names = [f"{stem}.{alias.name}" for alias in node.names] if inside else [stem]
            found += [(node.lineno, name) for name in names]
    return found


def noun(path: Path) -> str:
    """The module or package under edgemem that a file belongs to: models/llama.py → models."""
    return path.parts[1] if len(path.parts) > 2 else path.stem


def test_modules_import_only_from_lower_floors():
    wrong = []
    for path in files(".py", folders=("edgemem",)):
        home = noun(path)
        if home in SEES_ALL:
            continue
        assert home in FLOORS, f"{path} stands on no floor: give {home} one in DESIGN §3 and here"
        for line, name in imports(path):
            parts = name.split(".")
            if parts[0] != "edgemem" or len(parts) < 2 or parts[1] in (home, "__version__"):
                continue
            extension = home == "_native" and parts[1] not in FLOORS
            if not extension and FLOORS.get(parts[1], 99) >= FLOORS[home]:
                wrong.append(f"{path}:{line}: {home} (floor {FLOORS[home]}) imports {name}")
    assert not wrong, "\n".join(wrong)


def test_floors_are_those_of_the_design():
    """The drawing of §3 and the table above hold the same names on the same floors."""
    design = ROOT.parent / "shared" / "DESIGN.md"
    if not design.exists():
        pytest.skip(f"the design is not beside the project: {design}")
    drawing = design.read_text().split("## 3.")[1].split("```")[1]
    drawn, floor = {}, None
    for line in drawing.strip().splitlines():
        floor = int(line[0]) if line[0].isdigit() else floor
        names = re.split(r"\s{3,}", line[1:].strip())[0]  # what follows a gap is a comment
        drawn |= {word.removesuffix("/*"): floor for word in names.split()}
    assert set(drawn.values()) == set(range(8)), "the drawing was not understood"
    assert {name: FLOORS.get(name) for name in drawn} == drawn


def test_converters_see_floors_0_to_3():
    wrong = []
    for path in files(".py", folders=("converters",)):
        for line, name in imports(path):
            parts = name.split(".")
            if parts[0] != "edgemem" or len(parts) < 2 or parts[1] == "converters":
                continue
            if parts[1] not in ("__version__",) and FLOORS.get(parts[1], 99) > CONVERTERS_SEE:
                wrong.append(f"{path}:{line}: imports {name}")
    assert not wrong, "\n".join(wrong)


def test_nothing_imports_tests_or_bench():
    wrong, outside = [], ("tests", "bench", "conftest", "tiny", "oracle")
    for path in files(".py", folders=("edgemem", "converters", "native")):
        wrong += [f"{path}:{line}: {name}" for line, name in imports(path)
                  if name.split(".")[0] in outside]  # fmt: skip
    assert not wrong, "\n".join(wrong)


def test_third_party_packages_stay_at_home():
    wrong = []
    for path in files(".py", folders=("edgemem", "converters", "native")):
        for line, name in imports(path):
            top = name.split(".")[0]
            if top in sys.stdlib_module_names or top in ("edgemem", "__future__"):
                continue
            if not str(path).startswith(HOMES.get(top, ())):
                wrong.append(f"{path}:{line}: {top} may be imported in {HOMES.get(top, 'no file')}")
    assert not wrong, "\n".join(wrong)


def test_files_are_short_and_lines_fit():
    wrong = []
    for path in files(".py", ".c", ".h"):
        lines = (ROOT / path).read_text().splitlines()
        if len(lines) > MAX_FILE_LINES:
            wrong.append(f"{path}: {len(lines)} lines")
        wrong += [f"{path}:{i}: {len(line)} columns" for i, line in enumerate(lines, 1)
                  if len(line) > MAX_COLUMNS]  # fmt: skip
    assert not wrong, "\n".join(wrong)


def python_functions(path: Path):
    for node in ast.walk(tree(path)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node.name, node.lineno, node.end_lineno - node.lineno + 1


def c_functions(path: Path):
    """A body opens with `{` at the end of a line that began, with its signature, in column 0."""
    start = name = None
    for i, line in enumerate((ROOT / path).read_text().splitlines(), 1):
        if line.startswith("}") and start:
            yield name, start, i - start + 1
            start = None
        elif re.match(r"\w.*\w\(", line) and not line.rstrip().endswith(";"):
            start, name = i, re.search(r"(\w+)\(", line)[1]
        elif re.match(r"(typedef|struct|enum|static const)\b", line):
            start = None


def test_functions_are_short():
    wrong = []
    for path in files(".py", ".c", ".h"):
        functions = python_functions if path.suffix == ".py" else c_functions
        long = (f for f in functions(path) if f[2] > MAX_FUNCTION_LINES)
        wrong += [f"{path}:{line}: {name} has {length} lines" for name, line, length in long]
    assert not wrong, "\n".join(wrong)


def test_names_say_something():
    wrong = [str(p) for p in files(".py", ".c", ".h") if any(map(BANNED_NAMES.match, p.parts[:-1]))]
    wrong += [str(p) for p in files(".py", ".c", ".h") if BANNED_NAMES.match(p.stem)]
    for path in files(".py"):
        wrong += [f"{path}:{node.lineno}: class {node.name}" for node in ast.walk(tree(path))
                  if isinstance(node, ast.ClassDef) and node.name.endswith("Manager")]  # fmt: skip
    assert not wrong, "\n".join(wrong)


def test_nothing_is_left_for_later():
    wrong = []
    for path in files(".py", ".c", ".h", ".md", ".toml", ".txt"):
        for i, line in enumerate((ROOT / path).read_text().splitlines(), 1):
            if MARKERS.search(line):
                wrong.append(f"{path}:{i}: {line.strip()}")
    assert not wrong, "\n".join(wrong)


def test_public_names_have_docstrings():
    wrong = []
    for path in files(".py", folders=("edgemem", "converters")):
        module = tree(path)
        if module.body and not ast.get_docstring(module):
            wrong.append(f"{path}: the module")
        for node in module.body:
            public = isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name[0] != "_"
            # a command of the CLI says what it is for in its help text
            command = public and any("command(" in ast.unparse(d) for d in node.decorator_list)
            if public and not command and not ast.get_docstring(node):
                wrong.append(f"{path}:{node.lineno}: {node.name}")
    assert not wrong, "no docstring:\n" + "\n".join(wrong)
