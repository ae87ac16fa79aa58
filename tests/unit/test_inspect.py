"""`edgemem inspect` of checkpoints: it says before a conversion what the store says after."""

import json
import subprocess
import sys
from dataclasses import asdict

import gguf_bytes as raw
import numpy as np
import pytest
import tiny
import tiny_gguf
from gguf import GGMLQuantizationType as Type
from safetensors.numpy import load_file, save_file
from test_gguf import part

from edgemem import converters
from edgemem.cli import facts
from edgemem.errors import CheckpointError, EdgeMemError
from edgemem.spec import RopeSpec

SAME = ("spec", "parameters", "dense_bytes", "streamable_bytes", "kv_bytes_per_token", "bundles",
        "tokenizer", "generation")  # fmt: skip
"""What is said alike of a checkpoint and of the store that is made of it."""


def check(path, tmp_path) -> dict:
    """A checkpoint's facts, which are its store's."""
    found = facts.of(path)
    converters.convert(path, tmp_path / "m.edgemem")
    store = facts.of(tmp_path / "m.edgemem")
    assert {key: found[key] for key in SAME} == {key: store[key] for key in SAME}
    assert found["runs"] and found["obstacles"] == []
    for name, text in facts.summarize(store)[:9]:
        assert name == "formats" or (name, text) in facts.summarize(found)
    assert ("runs", "yes") in facts.summarize(found)
    return found


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "mixtral", "qwen2_moe", "qwen3_moe"])
def test_gguf(model_type, tmp_path, seed_base):
    model = tiny.write(
        tmp_path / "hf", model_type, seed_base, **tiny_gguf.facts(model_type, 0, blocks=32)
    )
    path = tiny_gguf.write(tmp_path / "m.gguf", model, Type.Q8_0)
    found = check(path, tmp_path)
    assert found["architecture"] == tiny_gguf.ARCHITECTURES.get(model_type, model_type)
    assert (found["file_count"], found["file_bytes"]) == (1, path.stat().st_size)
    assert set(found["dtype_bytes"]) <= {"f32", "q8_0"}


def test_any_part_of_a_split_file(tmp_path):
    model = tiny.write(tmp_path / "hf", "llama", 1, **tiny_gguf.facts("llama", 1, blocks=32))
    first = tiny_gguf.write(tmp_path / "m.gguf", model, Type.F16, split=5)
    parts = sorted(tmp_path.glob("m-*.gguf"))
    found = check(first, tmp_path)
    assert found["file_count"] == len(parts) > 1
    assert found["file_bytes"] == sum(path.stat().st_size for path in parts)
    assert facts.of(parts[-1]) == found | {"path": str(parts[-1])}
    assert ("files", f"{len(parts)},") in [(n, t.split()[0]) for n, t in facts.summarize(found)]


@pytest.mark.parametrize("model_type", ["opt", "falcon", "mistral", "olmoe"])
def test_folders(model_type, tmp_path):
    tiny.write(tmp_path / "hf", model_type, 1)
    assert check(tmp_path / "hf", tmp_path)["architecture"] == model_type


@pytest.mark.parametrize(
    ("rope", "words"),
    [
        (RopeSpec(theta=1e6), "RoPE 1e+06"),
        (RopeSpec("linear", 1e4, 4.0), "RoPE 10000 linear × 4"),
        (RopeSpec(dims=6), "RoPE 10000 of 6 numbers"),
        (RopeSpec("longrope", original_positions=4096, short_factors=(1.0,), long_factors=(2.0,)),
         "RoPE 10000 longrope, long beyond 4096 tokens"),
    ],
)  # fmt: skip
def test_ropes_are_told(rope, words, tmp_path):
    found = facts.of(tiny.write(tmp_path, "llama", 1).folder)
    found["spec"] |= {"rope": asdict(rope)}
    (text,) = (text for name, text in facts.summarize(found) if name == "attention")
    assert text.endswith(words)


@pytest.mark.parametrize(
    "model_type, words", [("deepseek_v3", "latents of "), ("gpt_oss", "sinks")]
)
def test_other_kinds_of_heads_are_told(model_type, words, tmp_path):
    found = facts.of(tiny.write(tmp_path, model_type, 1).folder)
    (text,) = (text for name, text in facts.summarize(found) if name == "attention")
    assert words in text and found["runs"]


def test_masks_are_no_weights(tmp_path):
    """Pythia's checkpoints carry them, in a type that no weight has."""
    model = tiny.write(tmp_path / "hf", "gpt_neox", 1, dtype="F32")
    plain = facts.of(model.folder)
    path = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(path) | {"gpt_neox.layers.0.attention.bias": np.ones((1, 1, 4, 4), bool)}
    save_file(tensors, path)
    found = check(model.folder, tmp_path)
    assert "bool" not in found["dtype_bytes"] and found["parameters"] == plain["parameters"]


def foreign() -> bytes:
    """A file of an architecture, a pre-tokenizer and a type of tensors that edgemem lacks."""
    keys = {"general.architecture": "new", "tokenizer.ggml.model": "gpt2"}
    keys = [raw.key(k, raw.STRING, raw.text(v)) for k, v in keys.items()]
    keys.append(raw.key("tokenizer.ggml.pre", raw.STRING, raw.text("newer")))
    keys.append(raw.array("tokenizer.ggml.tokens", raw.STRING, 2, raw.text("a") + raw.text("b")))
    tensors = [
        raw.tensor("token_embd.weight", (8, 2), 0, 0),
        raw.tensor("output.weight", (8, 2), 0, 64),
        raw.tensor("blk.0.ffn_up_exps.weight", (256, 2, 2), 19, 128),
        raw.tensor("blk.0.ffn_up_shexp.weight", (8, 1), 0, 352),
        raw.tensor("rope_freqs.weight", (8,), 0, 384),
    ]
    return raw.file(keys, tensors, bytes(416))


def test_what_edgemem_does_not_run_is_described_and_every_reason_given(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(foreign())
    found = facts.of(path)
    assert (found["architecture"], found["spec"], found["runs"]) == ("new", None, False)
    assert found["parameters"] == 16 + 16 + 1024 + 8 and found["tensor_count"] == 5
    assert found["dtype_bytes"] == {"f32": 160, "iq1_s": 200}
    assert (found["dense_bytes"], found["streamable_bytes"]) == (64 + 32, 64 + 200)
    assert found["tokenizer"]["vocab_size"] == 2 and found["bundles"] == {}
    reasons = "\n".join(found["obstacles"])
    assert len(found["obstacles"]) == 3
    for words in ("architecture = 'new'", "ffn_up_exps.weight is of type IQ1_S", "pre = 'newer'"):
        assert words in reasons
    lines = facts.summarize(found)
    assert [text[:4] for name, text in lines if name == "runs"] == ["no: "] * 3
    assert ("tokenizer", "2 tokens, BOS none, EOS none") in lines


def test_a_config_that_edgemem_does_not_know(tmp_path):
    tiny.write(tmp_path, "llama", 1)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "new", "architectures": ["NewForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = facts.of(tmp_path)
    assert (found["architecture"], found["runs"], found["spec"]) == ("new", False, None)
    assert found["parameters"] > 0 and found["streamable_bytes"] > 0
    assert "NewForCausalLM" in found["obstacles"][0]


def test_missing_tensors_are_an_obstacle(tmp_path):
    model = tiny.write(tmp_path / "hf", "llama", 1, **tiny_gguf.facts("llama", 0, blocks=32))
    data = bytearray(tiny_gguf.write(tmp_path / "m.gguf", model, Type.F16).read_bytes())
    at = data.index(b"blk.1.ffn_down")
    data[at : at + 14] = b"blk.1.ffn_dawn"
    (tmp_path / "m.gguf").write_bytes(data)
    found = facts.of(tmp_path / "m.gguf")
    assert "lacks model.layers.1.mlp.down_proj.weight" in found["obstacles"][0]
    assert found["spec"]["n_layers"] == 2 and not found["runs"]


def run(*arguments):
    command = [sys.executable, "-m", "edgemem", "inspect", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_command(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(foreign())
    result = run(path)
    assert result.returncode == 0 and "no: reading" in result.stdout and not result.stderr
    assert json.loads(run(path, "--json").stdout) == json.loads(json.dumps(facts.of(path)))
    path.write_bytes(foreign()[:200])
    result = run(path)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (1, "", 1)
    assert result.stderr.startswith("edgemem: reading") and "truncated" in result.stderr


@pytest.mark.parametrize(
    "data, words",
    [
        (b"", "no GGUF file"),
        (b"garbage" * 9, "does not start with the letters GGUF"),
        (foreign()[:200], "truncated"),
        (foreign()[:-40], "fetch it again"),
        (part(0, 2, 2, "a"), "fetch all parts"),
    ],
)
def test_damaged_files_are_errors(data, words, tmp_path):
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(CheckpointError, match=words):
        facts.of(tmp_path / "m.gguf")


def test_folders_that_hold_nothing(tmp_path):
    with pytest.raises(CheckpointError, match="no config.json"):
        facts.of(tmp_path)


@pytest.mark.parametrize("seed", range(60))
def test_hostile_files_end_with_an_answer_or_an_error(seed, tmp_path, seed_base):
    rng, data = np.random.default_rng([seed_base, seed]), bytearray(foreign())
    for at in rng.integers(4, len(data) - 416, int(rng.integers(1, 4))).tolist():
        data[at] = int(rng.integers(256))
    (tmp_path / "m.gguf").write_bytes(data)
    try:
        facts.summarize(facts.of(tmp_path / "m.gguf"))
    except EdgeMemError as error:
        assert str(error)
