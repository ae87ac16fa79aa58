"""The command line as a user meets it: output, exit codes, streams, signals."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import tiny

import edgemem
from edgemem.dtypes import KV_TYPES

PROMPT = "Once upon a time"
ENVIRONMENT = {**os.environ, "PYTHONIOENCODING": "utf-8"}


def edgemem_command(*arguments):
    return [sys.executable, "-m", "edgemem", *map(str, arguments)]


def run(*arguments, code=0, **options):
    """Run a command; check its exit code; give (stdout, stderr)."""
    options = {"stdin": subprocess.DEVNULL} | options
    if "input" in options:
        del options["stdin"]
    result = subprocess.run(
        edgemem_command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=ENVIRONMENT, timeout=120, **options,
    )  # fmt: skip
    stdout, stderr = result.stdout.decode(), result.stderr.decode()
    assert result.returncode == code, stderr
    assert "Traceback" not in stderr
    return stdout, stderr


def one_line(stderr):
    """An error's single line."""
    assert stderr.startswith("edgemem: ") and stderr.count("\n") == 1, stderr
    return stderr


# What commands say


def test_version_and_help():
    assert run("--version")[0] == f"edgemem {edgemem.__version__}\n"
    stdout, _ = run("--help")
    commands = "convert run inspect verify perplexity plan bench doctor demo"
    for command in commands.split():
        assert command in stdout
        assert "--json" in run(command, "--help")[0]


def test_run_prints_the_text_alone(stories_store):
    with edgemem.load(stories_store) as engine:
        expected = engine.generate(PROMPT, max_tokens=20)
    stdout, stderr = run("run", stories_store, "-p", PROMPT, "-n", 20)
    assert stdout == expected + "\n"
    account = one_line(stderr)
    for words in ("20 tokens at", "tok/s", "prompt of 5", "ended by length", "peak memory"):
        assert words in account


def test_run_as_json(stories_store):
    stdout, stderr = run("run", stories_store, "-p", PROMPT, "-n", 20, "--json")
    result = json.loads(stdout)
    assert stderr == "" and stdout.count("\n") == 1
    with edgemem.load(stories_store) as engine:
        assert result["text"] == engine.generate(PROMPT, max_tokens=20)
        assert engine.tokenizer.decode(result["token_ids"]) in PROMPT + result["text"]
    assert result["prompt_tokens"] == 5 and result["generated_tokens"] == 20
    assert result["finish_reason"] == "length"
    for phase, tokens in (("prefill", 5), ("decode", 19)):
        assert result[phase]["tokens"] == tokens
        assert result[phase]["seconds"] > 0 and result[phase]["tokens_per_second"] > 0
    assert 1 << 20 < result["peak_rss_bytes"] < 1 << 30


def test_the_prompt_comes_from_option_file_or_stdin(stories_store, tmp_path):
    arguments = ("-n", 8)
    expected, _ = run("run", stories_store, "-p", PROMPT, *arguments)
    file = tmp_path / "prompt"
    file.write_text(PROMPT + "\n")
    assert run("run", stories_store, "-f", file, *arguments)[0] == expected
    assert run("run", stories_store, *arguments, input=PROMPT.encode())[0] == expected
    assert run("run", stories_store, "-f", "-", *arguments, input=PROMPT.encode())[0] == expected


def test_sampling_options_reach_the_sampler(stories_store):
    hot = ("--temperature", 1.2, "--top-k", 50, "--top-p", 0.95, "--min-p", 0.01)

    def sample(*more):
        return run("run", stories_store, "-p", PROMPT, "-n", 20, *hot, *more)[0]

    assert sample("--seed", 5) == sample("--seed", 5) != sample("--seed", 6)
    assert sample("--seed", 5, "--repetition-penalty", 1.5) != sample("--seed", 5)


def test_stop_strings(stories_store):
    stdout, _ = run("run", stories_store, "-p", PROMPT, "--stop", "zzz", "--stop", " little")
    assert stdout == ", there was a\n"
    result = json.loads(run("run", stories_store, "-p", PROMPT, "--stop", ",", "--json")[0])
    assert result["text"] == "" and result["finish_reason"] == "stop"


@pytest.mark.parametrize("count", [0, 1, 10**9])
def test_counts(stories_store, count):
    arguments = ("run", stories_store, "-p", PROMPT, "-n", count, "--context", 32, "--json")
    result = json.loads(run(*arguments)[0])
    assert result["generated_tokens"] == min(count, 27)
    assert result["finish_reason"] == ("context" if count > 1 else "length")


def test_the_type_of_the_kv_cache(stories_store, tmp_path):
    """`--kv` is what it says, and the numbers are those of the library."""
    arguments = ("run", stories_store, "-p", PROMPT, "-n", 60, "--json")
    for kv in KV_TYPES:
        stdout, stderr = run(*arguments, "--kv", kv)
        result = json.loads(stdout)
        assert (f"--kv {kv} changes the answer" in stderr) == (kv != KV_TYPES[0])
        with edgemem.load(stories_store, kv=kv) as engine:
            assert result["kv"] == kv
            assert result["text"] == engine.generate(PROMPT, max_tokens=60)
    (tmp_path / "text").write_text("Once upon a time there was a little girl. " * 20)
    lines = [
        run("perplexity", stories_store, "-f", tmp_path / "text", "--kv", kv)[0] for kv in KV_TYPES
    ]
    assert lines[0] == run("perplexity", stories_store, "-f", tmp_path / "text")[0] != lines[1]


@pytest.mark.parametrize("prompt", ["🐶 naïve “café” 日本語", " ", "\n\n", "x" * 300])
def test_odd_prompts(tiny_moe_store, prompt):
    run("run", tiny_moe_store, "-p", prompt, "-n", 5, "--temperature", 2)


def test_inspect(tiny_moe_store):
    stdout, _ = run("inspect", tiny_moe_store)
    for words in (
        "qwen3_moe",
        "22.0 M",
        "32 experts of 128, 4 per token",
        "192 expert",
        "1024 tokens",
    ):
        assert words in stdout
    facts = json.loads(run("inspect", tiny_moe_store, "--json")[0])
    assert facts["parameters"] == 22007424
    assert facts["bundles"]["expert"]["bundle_count"] == 192
    assert facts["streamable_bytes"] == facts["bundles"]["expert"]["payload_bytes"]
    assert facts["spec"]["n_experts"] == 32
    assert sum(facts["dtype_bytes"].values()) <= facts["dense_bytes"] + facts["streamable_bytes"]


def test_inspect_says_where_positions_come_from(tmp_path):
    from edgemem import converters

    for model_type, words in (("opt", "learned positions"), ("falcon", "RoPE")):
        tiny.write(tmp_path / model_type, model_type, seed=1)
        converters.convert(tmp_path / model_type, tmp_path / f"{model_type}.edgemem")
        assert words in run("inspect", tmp_path / f"{model_type}.edgemem")[0]


def test_verify(stories_store, tmp_path):
    assert "all intact" in run("verify", stories_store)[0]
    assert json.loads(run("verify", stories_store, "--json")[0])["ok"] is True
    broken = tmp_path / "broken.edgemem"
    data = bytearray(stories_store.read_bytes())
    data[8192] ^= 1
    broken.write_bytes(data)
    stdout, stderr = run("verify", broken, code=1)
    assert "checksum" in stdout and "1 fault" in one_line(stderr)
    report = json.loads(run("verify", broken, "--json", code=1)[0])
    assert report["ok"] is False and len(report["faults"]) == 1
    assert "checksum" in one_line(run("run", broken, "-p", "x", code=1)[1])


def test_perplexity(stories_store, tmp_path):
    text = tmp_path / "text"
    text.write_text("Once upon a time there was a little dog. " * 5)
    stdout, stderr = run("perplexity", stories_store, "-f", text, "--limit", 50, "--window", 20)
    assert stdout.startswith("perplexity ") and "50 tokens in 3 windows of 20" in stderr
    report = json.loads(run("perplexity", stories_store, "-f", text, "--json")[0])
    assert f"{report['perplexity']:.4f}" != stdout.split()[1] and report["window_tokens"] == 256
    text.write_text("")
    assert "0 tokens" in run("perplexity", stories_store, "-f", text, code=2)[1]


def test_convert(shared, tmp_path):
    source, target = shared / "models" / "stories260k", tmp_path / "out.edgemem"
    stdout, _ = run("convert", source, "-o", target, "--dtype", "q8_0")
    assert "llama" in stdout and target.exists()
    assert str(target) in one_line(run("convert", source, "-o", target, code=1)[1])
    report = json.loads(run("convert", source, "-o", target, "--force", "--json")[0])
    assert report["store_bytes"] == target.stat().st_size
    assert one_line(run("convert", tmp_path, "-o", tmp_path / "x", code=1)[1])
    assert "nowhere" in one_line(
        run("convert", tmp_path / "nowhere", "-o", tmp_path / "x", code=1)[1]
    )
    run("convert", source, "-o", tmp_path / "x", "--page-size", 5000, code=2)
    assert [path.name for path in tmp_path.iterdir()] == ["out.edgemem"]


def test_demo():
    stdout, stderr = run("demo", "-n", 12)
    assert stdout.startswith("Natasha opened the door.") and len(stdout) > 40
    assert "tok/s" in one_line(stderr) and "peak memory" in stderr
    result = json.loads(run("demo", "-n", 3, "-p", "The", "--temperature", 0, "--json")[0])
    assert result["generated_tokens"] == 3


# Errors


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["-p", "x", "-f", "y"], "not both"),
        (["-f", "absent"], "absent"),
        (["-p", "x", "--temperature", "-1"], "temperature"),
        (["-p", "x", "--temperature", "nan"], "temperature"),
        (["-p", "x", "--top-p", "1.5"], "top_p"),
        (["-p", "x", "--seed", "-1"], "seed"),
        (["-p", "x", "-n", "-1"], "max-tokens"),
        (["-p", "x", "-n", "many"], "max-tokens"),
        (["-p", "x", "--stop", ""], "stop string"),
        (["-p", "x", "--memory", "4X"], "4GiB"),
        (["-p", "x", "--context", "0"], "context"),
        (["-p", "x", "--context", "100000"], "512"),
        (["-p", "x", "--kv", "q4_0"], "q8_0"),
        (["-p", "x", "--threads", "0"], "threads"),
        (["-p", "x", "--threads", "1025"], "at most 1024"),
        (["-p", "x", "--memory", "9" * 400], "TiB"),
        (["-p", "x", "--temperature", "inf"], "from 0 to 1e"),
        (["-p", "x", "--frobnicate"], "frobnicate"),
        (["-p", "x", "extra"], "extra"),
    ],
)
def test_wrong_usage_exits_with_2(stories_store, arguments, words):
    stdout, stderr = run("run", stories_store, *arguments, code=2)
    assert words in stderr and stdout == ""


def test_text_that_is_not_utf8_is_refused(stories_store):
    assert "UTF-8" in run("run", stories_store, input=b"Once \xff", code=2)[1]
    assert (
        "UTF-8"
        in run("run", stories_store, "-p", b"\xff".decode(errors="surrogateescape"), code=2)[1]
    )


def test_errors_are_one_line_and_exit_with_1(stories_store, tmp_path):
    assert "no such file" in one_line(run("run", tmp_path / "absent", "-p", "x", code=1)[1])
    (tmp_path / "text").write_text("not a store")
    for command in ("run", "inspect", "verify"):
        extra = ["-p", "x"] if command == "run" else []
        assert "not an edgemem store" in one_line(
            run(command, tmp_path / "text", *extra, code=1)[1]
        )
    stderr = run("run", stories_store, "-p", "word " * 600, code=1)[1]
    assert "context of 512" in one_line(stderr)


def test_a_budget_that_is_too_small_shows_the_sum(stories_store):
    stderr = run("run", stories_store, "-p", "x", "--memory", "20M", code=1)[1]
    lines = stderr.splitlines()
    assert lines[0].startswith("edgemem: the model does not fit the memory budget")
    assert any(line.split()[:1] == ["weights"] for line in lines)


def test_an_empty_prompt_needs_a_bos(stories_store, no_bos_store):
    run("run", stories_store, "-p", "", "-n", 2)
    run("run", stories_store, "-n", 2, input=b"\n")
    assert "BOS" in run("run", no_bos_store, "-p", "", code=2)[1]


@pytest.fixture(scope="module")
def no_bos_store(shared, tmp_path_factory):
    from edgemem import converters

    folder = tmp_path_factory.mktemp("no-bos")
    source = shutil.copytree(shared / "models" / "tiny-relu", folder / "source")
    for name in ("config.json", "tokenizer_config.json"):
        path = source / name
        path.chmod(0o644)
        data = json.loads(path.read_text())
        for key in ("bos_token_id", "bos_token"):
            data.pop(key, None)
        if name == "config.json":
            data["bos_token_id"] = None
        path.unlink()
        path.write_text(json.dumps(data))
    converters.convert(source, folder / "store.edgemem")
    return folder / "store.edgemem"


# Streams and signals


def test_text_appears_while_it_is_made(stories_store):
    arguments = edgemem_command("run", stories_store, "-p", PROMPT, "-n", 400)
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout.read(4)
        process.stdout.read()
    assert process.returncode == 0


@pytest.mark.skipif(not hasattr(signal, "SIGPIPE"), reason="pipes end otherwise on this system")
@pytest.mark.parametrize("more", [(), ("--json",)])
def test_a_reader_that_leaves(stories_store, more):
    arguments = edgemem_command("run", stories_store, "-p", PROMPT, "-n", 400, *more)
    reader, writer = os.pipe()
    os.close(reader)
    result = subprocess.run(arguments, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert result.returncode == 141 and result.stderr == ""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this system")
def test_a_full_disk_behind_stdout(stories_store):
    arguments = edgemem_command("run", stories_store, "-p", PROMPT, "--json")
    with open("/dev/full", "w") as full:
        result = subprocess.run(arguments, stdout=full, stderr=subprocess.PIPE, text=True)
    assert result.returncode == 1
    assert "writing the output" in one_line(result.stderr)


INTERRUPTS_ITSELF = """
import os, signal, sys
from edgemem.generation import Generation
step = Generation._next_piece
def interrupted(generation):
    if len(generation.token_ids) == 5:
        os.kill(os.getpid(), signal.SIGINT)
    return step(generation)
Generation._next_piece = interrupted
from edgemem.__main__ import main
main(sys.argv[1:])
"""


@pytest.mark.parametrize("more, text", [((), ", there was a"), (("--json",), "")])
def test_ctrl_c_in_a_generation(stories_store, more, text):
    command = [sys.executable, "-c", INTERRUPTS_ITSELF, "run", stories_store, "-p", PROMPT, *more]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 130
    assert result.stdout.startswith(text) and len(result.stdout) < 24
    assert result.stderr == "\nedgemem: interrupted\n"


def shell(script, *arguments, **environment):
    return subprocess.run(
        ["bash", "-c", script, "bash", *edgemem_command(*arguments)], text=True,
        capture_output=True, env=ENVIRONMENT | environment, timeout=120,
    )  # fmt: skip


def test_stdin_that_is_closed(stories_store):
    result = shell('"$@" <&-', "run", stories_store)
    assert result.returncode == 2 and "stdin: it is closed" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this system")
def test_help_on_a_full_disk():
    result = shell('"$@" > /dev/full', "--help")
    assert result.returncode == 1 and "writing the output" in one_line(result.stderr)


def test_ctrl_c_while_the_commands_are_imported():
    code = (
        "import sys\n"
        "class Interrupt:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'click': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupt())\n"
        "from edgemem.__main__ import main\n"
        "main(['--help'])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 130 and result.stderr == "\nedgemem: interrupted\n"


def test_nothing_is_said_of_streaming_that_this_version_cannot_do(tiny_moe_store):
    assert "bigger than" not in run("--help")[0] + edgemem.__doc__
    assert "streamable" in run("inspect", tiny_moe_store)[0]


def test_json_loses_nothing_in_any_encoding(stories_store, tmp_path):
    store = shutil.copy(stories_store, tmp_path / "né.edgemem")
    result = shell('"$@"', "inspect", store, "--json", PYTHONIOENCODING="ascii")
    assert json.loads(result.stdout)["path"] == str(store)
    assert "né" in run("inspect", store, "--json")[0]


def test_a_prompt_in_utf8_is_that_in_any_locale(stories_store):
    arguments = ("run", stories_store, "-p", "Café", "-n", 4, "--json")
    expected = json.loads(run(*arguments)[0])["token_ids"]
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    result = shell('"$@"', *arguments, **plain)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["token_ids"] == expected


def test_what_is_no_store_is_told_before_stdin_is_read(tmp_path):
    with subprocess.Popen(
        edgemem_command("run", tmp_path / "nosuch"), stdin=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.wait(60) == 1
        assert b"no such file" in process.stderr.read()


def test_demo_checks_its_arguments_before_it_prints():
    for wrong in (("--temperature", -1), ("--stop", "")):
        assert run("demo", *wrong, code=2)[0] == ""
    assert run("demo", "-p", "word " * 9000, code=1)[0] == ""
    assert json.loads(run("demo", "--stop", "e", "--json")[0])["finish_reason"] == "stop"


def test_a_text_of_any_length_is_refused_at_once(stories_store, tmp_path):
    text = tmp_path / "long"
    text.write_bytes(b"a" * 30_000_000)
    for arguments in (("run", stories_store, "-f", text), ("run", stories_store, "-f", "-")):
        with text.open() as stdin:
            stderr = run(*arguments, "--memory", "70M", code=1, stdin=stdin)[1]
        assert "at least" in one_line(stderr)
    measure = ("perplexity", stories_store, "-f", text, "--memory", "70M")
    assert "encoding 28.6 MiB of text does not fit the memory budget" in run(*measure, code=1)[1]
    run(*measure, "--limit", 100)


def test_the_engine_is_closed(stories_store):
    command = [sys.executable, "-X", "dev", *edgemem_command("run", stories_store, "-p", "x")[1:]]
    for more, code in (([], 0), (["--stop", ""], 2)):
        result = subprocess.run([*command, *more], capture_output=True, text=True)
        assert result.returncode == code and "ResourceWarning" not in result.stderr


ENDS_ITSELF = """
import os, signal, sys
from edgemem.writer import StoreWriter
finish = StoreWriter.finish
StoreWriter.finish = lambda *a, **k: os.kill(os.getpid(), int(sys.argv[1])) or finish(*a, **k)
from edgemem.__main__ import main
main(sys.argv[2:])
"""


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no such signals on this system")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_a_conversion_that_is_ended_leaves_nothing(name, shared, tmp_path):
    number, source = getattr(signal, name), shared / "models" / "stories260k"
    command = [sys.executable, "-c", ENDS_ITSELF, str(int(number)), "convert", str(source)]
    target = tmp_path / "x.edgemem"
    result = subprocess.run([*command, "-o", target], capture_output=True, text=True)
    assert result.returncode == 128 + number and "Traceback" not in result.stderr
    assert result.stderr.startswith("\nedgemem: ") and not list(tmp_path.iterdir())


def test_a_lack_of_memory_says_of_what_and_what_to_try():
    from edgemem.cli import _out_of_memory, cli

    for name in cli.commands:
        assert _out_of_memory(name, MemoryError()).startswith(f"{name}: the system has no more")
    message = _out_of_memory("run", MemoryError("reserving"))
    assert "(reserving); try" in message and "--context" in message


def test_what_cannot_be_read_is_for_the_library_to_say():
    from edgemem.cli import cli

    paths = [
        p.type for c in cli.commands.values() for p in c.params if p.type.name in ("path", "file")
    ]
    assert len(paths) >= 6 and not any(path.readable for path in paths)
