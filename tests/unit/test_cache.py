"""Checkpoints that are run as they are: converted once, into a cache folder."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest
import tiny
import tiny_gguf

import edgemem
from edgemem import converters
from edgemem.cli.cache import as_store, default_folder
from edgemem.errors import CheckpointError, EdgeMemError, StoreError
from edgemem.store import Store


@pytest.fixture
def folder(tmp_path) -> Path:
    """A Hugging Face folder."""
    return tiny.write(tmp_path / "model", "qwen3", 1, dtype="F32").folder


def write_gguf(path: Path, seed: int = 1, split: int = 0) -> Path:
    """A GGUF; another seed makes another model."""
    drawn = tiny.write(path.parent / f"drawn{seed}", "qwen3", seed, **tiny_gguf.facts("qwen3", 0))
    return tiny_gguf.write(path, drawn, split=split)


@pytest.fixture
def gguf(tmp_path) -> Path:
    return write_gguf(tmp_path / "model.gguf")


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """The cache folder, which is there once something is in it."""
    monkeypatch.setenv("EDGEMEM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def in_converter(tmp_path, monkeypatch):
    """in_converter(code): the process that converts runs it, before it ends its store."""

    def patch(code: str) -> None:
        lines = [
            "import sys",
            "if 'convert' in sys.orig_argv:",
            "    from edgemem.writer import StoreWriter",
            "    finish = StoreWriter.finish",
            "    def finish_late(*arguments, **options):",
            *(f"        {line}" for line in code.splitlines()),
            "        return finish(*arguments, **options)",
            "    StoreWriter.finish = finish_late",
        ]
        (tmp_path / "sitecustomize.py").write_text("\n".join(lines))
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    return patch


def start(*arguments) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "edgemem", *map(str, arguments)],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def run(*arguments, code: int = 0) -> tuple[str, str]:
    """Run a command, check its exit code, give (stdout, stderr)."""
    with start(*arguments) as process:
        stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == code, stderr
    assert "Traceback" not in stderr
    return stdout, stderr


def token_ids(model: Path, *more) -> tuple[list[int], str]:
    stdout, stderr = run("run", model, "-p", "Hello", "-n", 6, "--context", 32, "--json", *more)
    return json.loads(stdout)["token_ids"], stderr


def identity(path: Path) -> tuple:
    status = path.stat()
    return path, status.st_ino, status.st_mtime_ns


# What a run of a checkpoint gives


@pytest.mark.parametrize("source", ["folder", "gguf"])
@pytest.mark.parametrize("dtype", [None, "f16"])
def test_a_checkpoint_runs_as_its_store_does(source, dtype, cache, tmp_path, request):
    source, explicit = request.getfixturevalue(source), tmp_path / "explicit.edgemem"
    more = ["--dtype", dtype] if dtype else []
    converters.convert(source, explicit, dtype=dtype or "keep")
    ids, stderr = token_ids(source, *more)
    assert ids == token_ids(explicit)[0]
    (store,) = cache.iterdir()
    assert store.read_bytes() == explicit.read_bytes()
    assert store.name.startswith(f"model-{dtype or 'keep'}-") and str(store) in stderr
    assert f"converting {source} once" in stderr and "KiB" in stderr.splitlines()[-1]


def test_the_second_run_does_not_convert(gguf, cache):
    first, _ = token_ids(gguf)
    before = identity(*cache.iterdir())
    assert token_ids(gguf) == (first, "")
    assert identity(*cache.iterdir()) == before


def test_perplexity_takes_a_checkpoint(gguf, cache, tmp_path):
    text = tmp_path / "text"
    text.write_text("Once upon a time. " * 4)
    arguments = ("perplexity", gguf, "-f", text, "--window", 16, "--cache-dir", tmp_path / "other")
    stdout, _ = run(*arguments)
    assert stdout.startswith("perplexity ") and run(*arguments)[0] == stdout
    assert len(list((tmp_path / "other").iterdir())) == 1 and not cache.exists()


def test_the_process_that_runs_does_not_convert(gguf, cache, stories_store):
    """Whatever a conversion needs of memory is not in the run's budget; a store needs none."""
    code = (
        "import sys\nfrom pathlib import Path\nfrom edgemem.cli import options\n"
        "ready = lambda engine: None\n"
        "options.load_engine(Path(sys.argv[1]), 'auto', 32, 1, ready).close()\n"
        "print('edgemem.converters' in sys.modules)"
    )
    for model in (gguf, gguf, stories_store):
        stdout = subprocess.check_output([sys.executable, "-c", code, model], text=True)
        assert stdout == "False\n"
    assert len(list(cache.iterdir())) == 1


# What is converted again, and what lives side by side


@pytest.mark.parametrize("source", ["folder", "gguf"])
def test_a_source_that_changed_is_converted_again(source, cache, request, capfd):
    source = request.getfixturevalue(source)
    first = as_store(source)
    assert as_store(source) == first
    touched = source / "tokenizer.json" if source.is_dir() else source
    os.utime(touched, ns=(0, touched.stat().st_mtime_ns + 1))
    capfd.readouterr()
    second = as_store(source)
    assert list(cache.iterdir()) == [second] and second != first
    assert "has changed: converting it again" in capfd.readouterr().err


def test_another_model_in_its_place_gives_its_own_answers(gguf, cache):
    first, _ = token_ids(gguf)
    write_gguf(gguf, seed=2)
    second, _ = token_ids(gguf)
    assert first != second == token_ids(gguf)[0]


def test_another_version_of_edgemem_converts_again(gguf, cache, monkeypatch):
    first = as_store(gguf)
    monkeypatch.setattr("edgemem.cli.cache.__version__", "0.0.1")
    assert as_store(gguf) != first and len(list(cache.iterdir())) == 1


def test_equal_names_and_other_formats_live_side_by_side(gguf, cache, tmp_path):
    (tmp_path / "b").mkdir()
    other = write_gguf(tmp_path / "b" / "model.gguf", seed=2)
    stores = {as_store(gguf), as_store(other), as_store(gguf, dtype="q8_0")}
    assert stores == set(cache.iterdir()) and len(stores) == 3
    assert as_store(gguf, dtype="keep") in stores


def test_neurons_are_another_store(cache, tmp_path):
    apart = tiny.write(tmp_path / "relu", "opt", 1, activation="relu", max_positions=64).folder
    plain, _ = token_ids(apart)
    assert token_ids(apart, "--neurons")[0] == plain and len(set(cache.iterdir())) == 2
    with Store.open(as_store(apart, neurons=True)) as store:
        assert store.spec.neurons
    routed = tiny.write(tmp_path / "routed", "mixtral", 1).folder
    assert "leave --neurons out" in run("run", routed, "-p", "x", "--neurons", code=1)[1]


@pytest.mark.parametrize("damage", ["truncated", "empty", "text"])
def test_a_damaged_store_is_converted_again(damage, gguf, cache, capfd):
    store = as_store(gguf)
    data = store.read_bytes()
    store.write_bytes({"truncated": data[:-4096], "empty": b"", "text": b"hello"}[damage])
    assert as_store(gguf) == store and store.read_bytes() == data
    assert "is damaged" in capfd.readouterr().err


def test_one_store_for_all_parts_and_paths_of_a_source(folder, cache, tmp_path, monkeypatch):
    parts = tmp_path / "parts"
    parts.mkdir()
    first = write_gguf(parts / "model.gguf", split=12)
    found = sorted(parts.glob("*.gguf"))
    assert len(found) > 1 and first == found[0]
    monkeypatch.chdir(parts)
    stores = {as_store(part) for part in [*found, found[1].name, parts / ".." / "parts" / first]}
    assert list(stores) == list(cache.iterdir())
    os.utime(found[1], ns=(0, 0))
    assert as_store(first) not in stores
    monkeypatch.chdir(folder)
    assert as_store(".") == as_store(folder) == as_store(folder / ".." / "model")


def test_names_of_any_kind(cache, tmp_path):
    for name in ("x" * 250 + ".gguf", "日本" * 40 + ".gguf", "a b'\n*[x].gguf", "-o.gguf", ".gguf"):
        source = write_gguf(tmp_path / "model.gguf").rename(tmp_path / name)
        store = as_store(source)
        assert store.exists() and as_store(source) == store


READS = """
import sys
found = set()
sys.addaudithook(lambda event, a: found.add(str(a[0])) if event == "open" else None)
from edgemem import converters
converters.convert(sys.argv[1], sys.argv[2])
print(*(path for path in found if path.startswith(sys.argv[1])), sep="\\n")
"""


@pytest.mark.parametrize("source", ["folder", "gguf"])
def test_every_file_that_the_converter_reads_counts(source, cache, tmp_path, request):
    source = request.getfixturevalue(source)
    if source.is_dir():
        for name in ("generation_config.json", "tokenizer_config.json"):
            (source / name).write_text("{}")
        (source / "chat_template.jinja").write_text("x")
    command = [sys.executable, "-c", READS, source, tmp_path / "store"]
    read = set(subprocess.check_output(command, text=True).splitlines())
    assert len(read) >= (6 if source.is_dir() else 1)
    stores = {as_store(source)}
    for path in map(Path, read):
        os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
        stores.add(as_store(source))
    assert len(stores) == len(read) + 1


# What is no checkpoint


def test_a_store_is_opened_where_it_is(stories_store, cache, tmp_path):
    renamed = tmp_path / "looks-like.gguf"
    renamed.symlink_to(stories_store)
    for store in (stories_store, renamed):
        assert as_store(store) == store
        assert token_ids(store)[1] == "" and not cache.exists()
        assert "is a store" in run("run", store, "-p", "x", "--dtype", "keep", code=2)[1]
        assert "--neurons is for" in run("run", store, "-p", "x", "--neurons", code=2)[1]


def test_what_is_neither_is_refused_as_ever(cache, tmp_path):
    (tmp_path / "garbage.gguf").write_bytes(b"garbage")
    (tmp_path / "none").mkdir()
    os.mkfifo(tmp_path / "pipe")
    said = {
        "garbage.gguf": "not an edgemem store", "none": "not a file", "pipe": "not a file",
        "absent": "no such file", "absent/deep": "no such file",
    }  # fmt: skip
    for name, words in said.items():
        for more in ((), ("--dtype", "keep")):
            stderr = run("run", tmp_path / name, "-p", "x", *more, code=1)[1]
            assert words in stderr and stderr.count("\n") == 1
    assert not cache.exists()


def test_wrong_usage_is_told_before_a_conversion(gguf, cache):
    for option in (("--dtype", "f7"), ("--memory", "4X"), ("--temperature", -1)):
        assert "Error: " in run("run", gguf, "-p", "x", *option, code=2)[1]
    assert not cache.exists()


# What goes wrong


@pytest.mark.parametrize("size", [5, 100, -1000])
def test_a_broken_source_leaves_nothing(size, gguf, cache):
    gguf.write_bytes(gguf.read_bytes()[:size])
    stdout, stderr = run("run", gguf, "-p", "x", code=1)
    assert stdout == "" and f"edgemem: reading {gguf}: " in stderr.splitlines()[-1]
    assert stderr.count("\n") == 2 and list(cache.iterdir()) == []


def test_a_source_without_weights_is_told_by_the_converter(folder, cache):
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    assert "neither model.safetensors nor" in run("run", folder, "-p", "x", code=1)[1]
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("change", ["os.utime({0!r}, ns=(0, 0))", "os.unlink({0!r})"])
def test_a_source_that_changes_meanwhile(change, gguf, cache, in_converter):
    in_converter("import os\n" + change.format(str(gguf)))
    with pytest.raises(CheckpointError, match="changed while it was converted"):
        as_store(gguf)
    assert list(cache.iterdir()) == []


def test_a_cache_folder_that_cannot_be(gguf, tmp_path):
    (tmp_path / "file").write_text("")
    for cache in (tmp_path / "file", tmp_path / "file" / "deep", "/proc/cache"):
        stderr = run("run", gguf, "-p", "x", "--cache-dir", cache, code=1)[1]
        assert "--cache-dir" in stderr and str(cache) in stderr and stderr.count("\n") == 1


def test_a_cache_folder_that_is_read_only(gguf, cache):
    cache.mkdir(mode=0o500)
    if os.access(cache, os.W_OK):
        pytest.skip("root may write to any folder")
    with pytest.raises(StoreError, match="--cache-dir"):
        as_store(gguf)
    cache.chmod(0o700)
    store = as_store(gguf)
    cache.chmod(0o500)
    assert as_store(gguf) == store


def test_a_full_disk_is_told_before_anything_is_written(gguf, cache, tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text(
        "import shutil\nfrom types import SimpleNamespace\n"
        "shutil.disk_usage = lambda path: SimpleNamespace(total=1000, free=10)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    stderr = run("run", gguf, "-p", "x", code=1)[1]
    assert "the disk has 10 free" in stderr and "--cache-dir" in stderr
    assert list(cache.iterdir()) == []


def test_a_converter_that_cannot_start(gguf, cache, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/absent/python")
    with pytest.raises(EdgeMemError, match="starting /absent/python: No such file"):
        as_store(gguf)
    assert list(cache.iterdir()) == []


def test_the_converters_exit_code_is_passed_on(gguf, cache, in_converter):
    for code, words in (("import os; os._exit(7)", 7), ("import os; os.kill(os.getpid(), 9)", 137)):
        in_converter(code)
        with pytest.raises(click.exceptions.Exit) as caught:
            as_store(gguf)
        assert caught.value.exit_code == words
        assert list(cache.iterdir()) == []


# Several at once, and signals


def wait_for(path: Path) -> str:
    """What another process writes into a file."""
    for _ in range(600):
        if path.exists() and path.read_text():
            return path.read_text()
        time.sleep(0.05)
    raise TimeoutError(f"{path} was not written")


def test_two_at_once_convert_once(gguf, cache):
    command = ("run", gguf, "-p", "Hello", "-n", 6, "--context", 32)
    with start(*command) as first, start(*command) as second:
        (text, one), (same, other) = first.communicate(timeout=60), second.communicate(timeout=60)
    assert first.returncode == second.returncode == 0 and text == same
    assert (one + other).count("the store is") == 1 and len(list(cache.iterdir())) == 1


def test_one_waits_for_the_other(gguf, cache, in_converter, tmp_path):
    go = tmp_path / "go"
    in_converter(f"import os, time\nwhile not os.path.exists({str(go)!r}): time.sleep(0.01)")
    command = ("run", gguf, "-p", "Hello", "-n", 6, "--context", 32)
    with start(*command) as first:
        assert "converting" in first.stderr.readline()
        wait_for_lock(cache)
        with start(*command) as second:
            assert f"waiting for another process that converts {gguf}" in second.stderr.readline()
            go.touch()
            (text, one), (same, other) = first.communicate(), second.communicate()
    assert text == same and "the store is" in one and "the store" not in other
    assert len(list(cache.iterdir())) == 1


def wait_for_lock(cache: Path) -> None:
    """Until somebody holds the lock of the only model that is converted into the cache."""
    (path,) = cache.glob(".*.lock")
    for _ in range(600):
        with path.open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return
        time.sleep(0.05)
    raise TimeoutError(f"nobody holds {path}")


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_ends_both(name, gguf, cache, in_converter, tmp_path):
    number, pid = getattr(signal, name), tmp_path / "pid"
    in_converter(
        f"import os, time\nopen({str(pid)!r}, 'w').write(str(os.getpid()))\ntime.sleep(100)"
    )
    with start("run", gguf, "-p", "x") as process:
        converter = int(wait_for(pid))
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "Traceback" not in stderr
    said = "interrupted" if name == "SIGINT" else f"ended by {name}"
    assert stderr.count(f"edgemem: {said}\n") == 1 and list(cache.iterdir()) == []
    with pytest.raises(ProcessLookupError):
        os.kill(converter, 0)


def test_what_killed_processes_leave_is_removed(gguf, cache, in_converter, tmp_path, monkeypatch):
    pid = tmp_path / "pid"
    in_converter(
        f"import os, time\nopen({str(pid)!r}, 'w').write(str(os.getpid()))\ntime.sleep(100)"
    )
    with start("run", gguf, "-p", "x") as process:
        converter = int(wait_for(pid))
        process.kill()
        os.kill(converter, signal.SIGKILL)
        process.communicate()
    monkeypatch.delenv("PYTHONPATH")
    (lock,) = cache.iterdir()
    prefix = lock.name.removeprefix(".").removesuffix(".lock")
    for name in (f"{prefix}-0.part", f".{prefix}-0.part.1.2.tmp", "somebody-else.part"):
        (cache / name).touch()
    store = as_store(gguf)
    assert {store, cache / "somebody-else.part"} == set(cache.iterdir())
    with Store.open(store) as opened:
        assert opened.verify().ok


# The cache folder


def test_the_cache_folder(monkeypatch, tmp_path):
    for name in ("EDGEMEM_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    for platform, place in (("linux", ".cache"), ("darwin", "Library/Caches")):
        monkeypatch.setattr(sys, "platform", platform)
        assert default_folder() == tmp_path / place / "edgemem"
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert default_folder() == tmp_path / "local" / "edgemem"
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    assert default_folder() == tmp_path / ".cache" / "edgemem"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_folder() == tmp_path / "xdg" / "edgemem"
    monkeypatch.setenv("EDGEMEM_CACHE", str(tmp_path / "own"))
    assert default_folder() == tmp_path / "own"


def test_help_says_where_stores_are_kept():
    for command in ("run", "perplexity"):
        stdout, _ = run(command, "--help")
        assert "MODEL" in stdout and "--cache-dir" in stdout and "EDGEMEM_CACHE" in stdout
    assert edgemem.__version__ in run("--version")[0]
