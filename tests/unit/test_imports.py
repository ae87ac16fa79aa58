"""What an import costs: nothing heavy, neither for the package nor on the way to a text."""

import subprocess
import sys

HEAVY = ("torch", "transformers", "onnxruntime", "numba", "llvmlite", "jinja2")
CLI_ONLY = ("click", "tqdm")


def run(code, *arguments, cwd):
    """Run code in a fresh interpreter; it prints what it was asked."""
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=cwd
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_importing_the_package_loads_only_the_package(tmp_path):
    """That it takes under 0.3 s follows: there is nothing to wait for."""
    code = (
        "import sys; before = set(sys.modules); import edgemem\n"
        "print(*sorted({m.partition('.')[0] for m in set(sys.modules) - before}))"
    )
    loaded = run(code, cwd=tmp_path).split()
    assert set(loaded) <= {"edgemem", *sys.stdlib_module_names} | {"_edgemem_editable"}


def test_the_api_is_small_in_memory(tmp_path):
    code = (
        "import edgemem; edgemem.load; from edgemem.budget import peak_bytes; print(peak_bytes())"
    )
    assert int(run(code, cwd=tmp_path)) < 60 << 20


def test_names_are_found_where_they_are_used(tmp_path):
    code = (
        "import edgemem\n"
        "assert edgemem.__version__ and issubclass(edgemem.CorruptError, edgemem.EdgeMemError)\n"
        "assert 'load' in dir(edgemem) and callable(edgemem.load)\n"
        "try: edgemem.absent\n"
        "except AttributeError as error: print(error)"
    )
    assert "absent" in run(code, cwd=tmp_path)


def test_generating_imports_nothing_heavy(stories_store, tmp_path):
    code = (
        "import sys, edgemem\n"
        "engine = edgemem.load(sys.argv[1])\n"
        "engine.generate('Once', max_tokens=3, temperature=1.0)\n"
        "print(*sys.modules)"
    )
    loaded = run(code, str(stories_store), cwd=tmp_path).split()
    assert not {*HEAVY, *CLI_ONLY} & set(loaded)


def test_loading_and_generating_stays_small(stories_store, tmp_path):
    """All but the slab, which is weights: under 60 MiB, whatever the machine's speed."""
    code = (
        "import sys, edgemem\n"
        "engine = edgemem.load(sys.argv[1], context=64)\n"
        "engine.generate('Once', max_tokens=3)\n"
        "from edgemem.budget import peak_bytes\n"
        "from edgemem.inventory import resident_bytes\n"
        "print(peak_bytes() - resident_bytes(engine.store))"
    )
    assert int(run(code, str(stories_store), cwd=tmp_path)) < 60 << 20


def test_help_imports_no_engine(tmp_path):
    code = (
        "import sys\nfrom edgemem.__main__ import main\n"
        "try: main(['run', '--help'])\n"
        "except SystemExit: print(*sys.modules)"
    )
    loaded = run(code, cwd=tmp_path).split()
    assert not {*HEAVY, "numpy", "tokenizers", "edgemem.engine"} & set(loaded)
