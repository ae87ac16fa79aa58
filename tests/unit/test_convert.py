"""Conversion end to end: every weight arrives, in the place and format that was asked for."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import tiny_gguf

from edgemem import converters
from edgemem.errors import CheckpointError, EdgeMemError, StoreError, UnsupportedError
from edgemem.format import Kind
from edgemem.kernels.reference import StoreWeights, unpack
from edgemem.store import Store


@pytest.fixture
def llama(tmp_path) -> tiny.Tiny:
    return tiny.write(tmp_path / "model", "llama", 3, dtype="F32", tied=False)


def rewrite(model: tiny.Tiny, tensors: dict, dtype: str = "F32") -> None:
    """Replace the checkpoint's weights by these, in one file."""
    for path in model.folder.glob("*.safetensors*"):
        path.unlink()
    tiny.write_safetensors(model.folder / "model.safetensors", tensors, list(tensors), dtype)


def configure(model: tiny.Tiny, **changes) -> None:
    path = model.folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# ---- values ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("model_type", tiny.MODEL_TYPES)
def test_every_weight_arrives(tmp_path, model_type, seed):
    """All spellings that `tiny` draws: formats, shards, fused experts, prefixes, ties, biases."""
    model = tiny.write(tmp_path / "model", model_type, seed)
    report = converters.convert(model.folder, tmp_path / "a.edgemem")
    with Store.open(tmp_path / "a.edgemem") as store:
        assert store.spec == model.spec and store.verify().ok
        weights = StoreWeights(store)
        np.testing.assert_array_equal(weights.table(), model.weights.table())
        np.testing.assert_array_equal(weights.head(), model.weights.head())
        for (kind, layer, index), expected in model.weights.bundles.items():
            found = weights.bundle(int(store.find(Kind[kind.upper()], layer)[index]))
            assert set(found) == set(expected)
            for name, value in expected.items():
                np.testing.assert_array_equal(found[name].reshape(value.shape), value)
        assert report.model_type == model_type and report.store_bytes == store.file_bytes
        assert report.bundles == len(store.entries)


STEPS = {
    "f16": 2**-11, "q8_0": 1 / 200, "q6_k": 1 / 40, "q5_k": 1 / 20, "q4_k": 1 / 10, "q4_0": 1 / 7.5,
    "q3_k": 1 / 4, "q2_k": 1 / 2,
}  # fmt: skip
"""The largest error, as a share of the largest weight."""


@pytest.mark.parametrize("dtype", STEPS)
@pytest.mark.parametrize("model_type", ["llama", "qwen2_moe"])
def test_which_segments_change_format(tmp_path, dtype, model_type):
    whole = tiny_gguf.facts(model_type, 5, blocks=256) if dtype.endswith("_k") else {}
    model = tiny.write(tmp_path / "model", model_type, 5, dtype="BF16", **whole | {"tied": False})
    report = converters.convert(model.folder, tmp_path / "a", dtype)
    step = STEPS[dtype]
    assert not report.notes
    with Store.open(tmp_path / "a") as store:
        assert store.recipe["dtype"] == dtype
        changed = StoreWeights(store)
        for i in range(len(store.entries)):
            for segment in store.layout_of(i).segments:
                wanted = dtype
                if segment.lanes == 1 and segment.name != "rows":
                    wanted = "f32"
                elif segment.name in ("router", "shared_gate"):
                    wanted = "bf16"
                elif segment.name == "rows" and dtype != "f16":
                    wanted = "q8_0"
                assert segment.dtype.name == wanted, segment.name
        for (kind, layer, index), bundle in model.weights.bundles.items():
            bundle_id = int(store.find(Kind[kind.upper()], layer)[index])
            for name, value in bundle.items():
                found = changed.bundle(bundle_id)[name].reshape(value.shape)
                tolerance = 0 if value.ndim == 1 else step
                assert np.abs(found - value).max() <= tolerance * np.abs(value).max()


@pytest.mark.parametrize("dtype, other", [
    ("q6_k", "q8_0"), ("q5_k", "q8_0"), ("q4_k", "q5_0"), ("q3_k", "q4_0"), ("q2_k", "q4_0"),
])  # fmt: skip
def test_rows_that_are_not_whole_blocks_have_another_format(dtype, other, tmp_path):
    """Of one matrix, whose rows are as long as the FFN is wide; the report names it."""
    facts = tiny_gguf.facts("llama", 0, blocks=256) | {"intermediate": 300, "tied": False}
    model = tiny.write(tmp_path / "model", "llama", 3, dtype="F32", **facts)
    (note,) = converters.convert(model.folder, tmp_path / "a", dtype).notes
    assert note == (
        f"{other} instead of {dtype}, whose blocks have 256 columns: for "
        "model.layers.0.mlp.down_proj.weight, which has 300, and 1 more"
    )
    with Store.open(tmp_path / "a") as store:
        assert store.verify().ok
        for layer in range(2):
            layout = store.layout_of(int(store.find(Kind.FFN, layer)[0]))
            assert layout["down"].dtype.name == other
            assert layout["up"].dtype.name == layout["gate"].dtype.name == dtype
            found, down = StoreWeights(store).ffn(layer), model.weights.ffn(layer)["down"]
            assert np.abs(found["down"] - down).max() <= STEPS["q4_0"] * np.abs(down).max()


def test_a_real_checkpoint_is_kept_bit_for_bit(shared, convert_store):
    """tiny-moe in bf16 against the safetensors library: each tensor, as raw bits."""
    import torch
    from safetensors.torch import load_file

    source = shared / "models" / "tiny-moe"
    tensors = load_file(source / "model.safetensors")
    with Store.open(convert_store(source)) as store:
        seen = 0
        for layer in range(store.spec.n_layers):
            for index, bundle_id in list(enumerate(store.find(Kind.EXPERT, layer)))[layer::6]:
                buffer = np.empty(store.layout_of(bundle_id).payload_bytes, np.uint8)
                store.read(bundle_id, buffer)
                for s in store.layout_of(bundle_id).segments:
                    name = f"model.layers.{layer}.mlp.experts.{index}.{s.name}_proj.weight"
                    values = unpack(buffer[s.offset : s.end], s.dtype, s.rows, s.cols, s.lanes)
                    assert s.dtype.name == "bf16"
                    assert np.array_equal(values, tensors[name].to(torch.float64).numpy())
                    seen += 1
        assert seen == 32 * 3


def test_fused_experts_give_the_same_store(tmp_path):
    model = tiny.write(tmp_path / "model", "qwen3_moe", 2, dtype="F32")
    apart = {n: v for n, v in model.tensors.items() if ".experts." not in n}
    fused = dict(apart)
    for layer, on in enumerate(model.spec.routed):
        for expert in range(model.spec.n_experts if on else 0):
            for name, value in model.weights.expert(layer, expert).items():
                apart[f"model.layers.{layer}.mlp.experts.{expert}.{name}_proj.weight"] = value
        fused |= tiny._fused(model.weights, layer, model.spec.n_experts) if on else {}
    payloads = []
    for tensors in (apart, fused):
        rewrite(model, tensors)
        converters.convert(model.folder, tmp_path / "a", "q4_0", force=True)
        with Store.open(tmp_path / "a") as store:
            payloads.append([bytes(e) for e in store.entries])
    assert payloads[0] == payloads[1]


def mixed_experts(model: tiny.Tiny, fused: bool) -> tuple[dict, dict, dict]:
    """The tensors as (odd ones of the experts, other experts, the rest); any float holds the first
    two. Odd are expert 0's `up` and, with `fused`, the tensors that hold all `down`."""
    odd, experts = {}, {}
    for layer in (i for i, on in enumerate(model.spec.routed) if on):
        stem = f"model.layers.{layer}.mlp.experts."
        for expert in range(model.spec.n_experts):
            for name, value in model.weights.expert(layer, expert).items():
                held = tiny._rounded(tiny._rounded(value, "BF16"), "F16")
                home = odd if (name, expert) == ("up", 0) else experts
                home[f"{stem}{expert}.{name}_proj.weight"] = held
        if fused:
            names = [f"{stem}{i}.down_proj.weight" for i in range(model.spec.n_experts)]
            odd[f"{stem}down_proj"] = np.stack([experts.pop(name) for name in names])
    return odd, experts, {n: v for n, v in model.tensors.items() if ".experts." not in n}


@pytest.mark.parametrize("dtype", ["keep", "f16", "q8_0"])
@pytest.mark.parametrize("formats", [("F16", "F32"), ("F16", "BF16"), ("F32", "BF16")])
@pytest.mark.parametrize("fused", [False, True])
def test_experts_of_one_layer_are_of_one_format(tmp_path, dtype, formats, fused):
    """Experts of mixed floats are widened, exactly: the values of an all-f32 conversion."""
    model = tiny.write(tmp_path / "model", "qwen3_moe", 2, dtype="F32")
    parts = mixed_experts(model, fused)
    rewrite(model, parts[0] | parts[1] | parts[2])
    converters.convert(model.folder, tmp_path / "wide", dtype)
    (model.folder / "model.safetensors").unlink()
    weight_map = {}
    for i, (tensors, source) in enumerate(zip(parts, (*formats, "F32"), strict=True)):
        tiny.write_safetensors(model.folder / f"{i}.safetensors", tensors, list(tensors), source)
        weight_map |= dict.fromkeys(tensors, f"{i}.safetensors")
    index = model.folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    converters.convert(model.folder, tmp_path / "mixed", dtype)
    with Store.open(tmp_path / "mixed") as mixed, Store.open(tmp_path / "wide") as wide:
        layout = mixed.layout_of(int(mixed.find(Kind.EXPERT, model.spec.routed.index(True))[0]))
        if dtype == "keep":  # only what differs is widened
            down = formats[0] if fused else formats[1]
            expected = {"gate": formats[1].lower(), "up": "f32", "down": down.lower()}
            assert {s.name: s.dtype.name for s in layout.segments} == expected
        found, expected = StoreWeights(mixed), StoreWeights(wide)
        for i in range(len(wide.entries)):
            for name, value in expected.bundle(i).items():
                np.testing.assert_array_equal(found.bundle(i)[name], value)


def test_a_bare_model_without_prefix(llama, tmp_path):
    tensors = {n.removeprefix("model."): v for n, v in llama.tensors.items()}
    rewrite(llama, tensors)
    converters.convert(llama.folder, tmp_path / "a")
    assert Store.open(tmp_path / "a").spec == llama.spec


# ---- ties --------------------------------------------------------------------------------------


def test_ties_follow_what_is_there(llama, tmp_path):
    """As in transformers: two tables that differ are not tied, whatever the config says."""
    configure(llama, tie_word_embeddings=True)
    table = "model.embed_tokens.weight"

    def tied(tensors: dict) -> bool:
        rewrite(llama, tensors)
        converters.convert(llama.folder, tmp_path / "a", force=True)
        with Store.open(tmp_path / "a") as store:
            weights = StoreWeights(store)
            head = tensors.get("lm_head.weight", tensors.get(table))
            np.testing.assert_array_equal(weights.head(), head)
            np.testing.assert_array_equal(weights.table(), tensors.get(table, head))
            assert (store.find(Kind.EMBED).size == 0) == store.spec.tied
            return store.spec.tied

    different = dict(llama.tensors)
    assert not tied(different)
    assert tied(different | {"lm_head.weight": different[table]})
    assert tied({n: v for n, v in different.items() if n != "lm_head.weight"})
    assert tied({n: v for n, v in different.items() if n != table} | {"model.x.rotary_emb.inv_freq":
                 np.ones(4)})  # fmt: skip


# ---- what goes along ---------------------------------------------------------------------------


def test_tokenizer_template_and_generation_go_along(llama, tmp_path):
    generation = {"temperature": 0.7, "eos_token_id": [5, 6]}
    (llama.folder / "generation_config.json").write_text(json.dumps(generation))
    (llama.folder / "chat_template.jinja").write_text("{{ messages }}")
    converters.convert(llama.folder, tmp_path / "a")
    with Store.open(tmp_path / "a") as store:
        assert store.tokenizer_json == (llama.folder / "tokenizer.json").read_bytes()
        assert store.generation == generation and store.chat_template == "{{ messages }}"
        assert store.tokenizer_config["bos_token"] == "<s>"
        assert set(store.spec.eos_ids) == {5, 6, *llama.spec.eos_ids}
        assert store.provenance["checkpoint"] == "model"
        assert store.provenance["tensors"] == {"F32": len(llama.tensors)}
        assert len(store.provenance["config_sha256"]) == 64


def test_the_same_checkpoint_gives_the_same_bytes(llama, tmp_path):
    stores = []
    for name in ("a", "b"):
        converters.convert(llama.folder, tmp_path / name, "q8_0", page_size=16384)
        stores.append((tmp_path / name).read_bytes())
    assert stores[0] == stores[1]
    assert Store.open(tmp_path / "a").page_size == 16384


def test_report_and_progress(llama, tmp_path):
    calls = []
    report = converters.convert(
        llama.folder, tmp_path / "a", progress=lambda done, total: calls.append((done, total))
    )
    assert calls == sorted(calls) and calls[-1] == (report.source_bytes, report.source_bytes)
    assert report.parameters == sum(v.size for n, v in llama.tensors.items() if "inv_freq" not in n)
    assert report.source_bytes == 4 * report.parameters
    assert report.peak_rss_bytes > 1 << 20 and report.seconds > 0
    assert report.target == str(tmp_path / "a") and report.dtype == "keep"


# ---- refusals: each before anything is written, with nothing left ------------------------------


def refused(model: tiny.Tiny, tmp_path: Path, words: str, error=CheckpointError, **options) -> None:
    folder = tmp_path / "out"
    folder.mkdir(exist_ok=True)
    with pytest.raises(error, match=words) as caught:
        converters.convert(model.folder, folder / "a.edgemem", **options)
    assert os.listdir(folder) == [] and "\n" not in str(caught.value)


def test_missing_tensors_are_named(llama, tmp_path):
    for name in list(llama.tensors):
        if "inv_freq" not in name:
            rewrite(llama, {n: v for n, v in llama.tensors.items() if n != name})
            refused(llama, tmp_path, f"lacks {name.replace('.', '[.]')}")


def test_left_over_tensors_are_named(llama, tmp_path):
    extra = "model.layers.0.self_attn.extra.weight"
    rewrite(llama, llama.tensors | {extra: np.ones((2, 2))})
    refused(llama, tmp_path, f"no use for: {extra}")
    rewrite(llama, llama.tensors)
    configure(llama, num_hidden_layers=llama.spec.n_layers + 1)
    refused(llama, tmp_path, f"lacks model.layers.{llama.spec.n_layers}.*more")


@pytest.mark.parametrize("change", ["transposed", "short", "flat", "deep"])
def test_misshapen_tensors_are_named(llama, tmp_path, change):
    name = "model.layers.0.mlp.down_proj.weight"
    value = llama.tensors[name]
    wrong = {"transposed": value.T, "short": value[:-1], "flat": value.ravel(), "deep": value[None]}
    rewrite(llama, llama.tensors | {name: wrong[change]})
    refused(llama, tmp_path, rf"{name} has the shape \[.*config.json asks for \[")


@pytest.mark.parametrize("dtype", converters.DTYPES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_named(llama, tmp_path, dtype, value):
    for name in ("model.norm.weight", "model.layers.0.mlp.up_proj.weight", "lm_head.weight"):
        spoiled = llama.tensors[name].copy()
        spoiled.flat[-1] = value
        rewrite(llama, llama.tensors | {name: spoiled})
        refused(llama, tmp_path, f"tensor {name}: it holds NaN or infinite", dtype=dtype)


def test_weights_beyond_the_format_are_named(llama, tmp_path):
    name = "model.layers.0.mlp.up_proj.weight"
    spoiled = llama.tensors[name].copy()
    spoiled[0, 0] = 1e9
    rewrite(llama, llama.tensors | {name: spoiled})
    refused(llama, tmp_path, f"tensor {name}: .*beyond f16", dtype="f16")
    refused(llama, tmp_path, f"tensor {name}: .*too large to quantise", dtype="q8_0")
    refused(llama, tmp_path, f"tensor {name}: .*too large to quantise", dtype="q4_0")
    refused(llama, tmp_path, f"tensor {name}: .*too large to quantise", dtype="q4_k")
    converters.convert(llama.folder, tmp_path / "kept")


def test_other_refusals(llama, tmp_path):
    refused(llama, tmp_path, "dtype 'q5_0' is none of keep, f16", ValueError, dtype="q5_0")
    refused(llama, tmp_path, "page size 5000", ValueError, page_size=5000)
    (llama.folder / "tokenizer.json").write_text('{"model": {"type": "Telepathy"}}')
    refused(llama, tmp_path, "tokenizer.json: ", UnsupportedError)
    configure(llama, model_type="gptj", architectures=["GPTJForCausalLM"])
    refused(llama, tmp_path, r"gptj \(GPTJForCausalLM\) is not supported", UnsupportedError)
    refused(replace(llama, folder=tmp_path / "nowhere"), tmp_path, "not a directory")


def test_an_existing_target_is_refused_before_the_source_is_read(tmp_path):
    target = tmp_path / "a.edgemem"
    target.write_text("precious")
    with pytest.raises(StoreError, match="it exists"):
        converters.convert(tmp_path / "nowhere", target)
    assert target.read_text() == "precious"


def test_force_does_not_replace_what_is_converted(llama, tmp_path):
    part, store = llama.folder / "config.json", llama.folder / "a.edgemem"
    before = part.read_bytes()
    with pytest.raises(StoreError, match="belongs to the checkpoint.*choose another name"):
        converters.convert(llama.folder, part, force=True)
    assert part.read_bytes() == before
    gguf = tmp_path / "a.gguf"
    gguf.write_bytes(b"GGUF and all its weights")
    with pytest.raises(StoreError, match="belongs to the checkpoint"):
        converters.convert(gguf, gguf, force=True)
    assert gguf.read_bytes() == b"GGUF and all its weights"
    for _ in range(2):  # a store beside the checkpoint's own files is not one of them
        converters.convert(llama.folder, store, force=True)


def test_a_disk_without_room_is_refused_before_writing(llama, tmp_path, monkeypatch):
    usage = type("usage", (), {"free": 1000, "total": 5000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    refused(llama, tmp_path, "the disk has 1,000 free", StoreError)


def test_integers_are_no_weights(llama, tmp_path):
    path = llama.folder / "model.safetensors"
    rewrite(llama, llama.tensors)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].replace(b'"F32"', b'"I32"', 1)
    path.write_bytes(data[:8] + header + data[8 + length :])
    with pytest.raises((UnsupportedError, EdgeMemError), match="is of type I32"):
        converters.convert(llama.folder, tmp_path / "a")


def test_messages_about_files(llama, tmp_path, monkeypatch):
    tokenizer = llama.folder / "tokenizer.json"
    good = tokenizer.read_bytes()
    tokenizer.write_bytes(b"")
    refused(llama, tmp_path, "tokenizer.json: it is empty; fetch it again")
    tokenizer.write_bytes(good)
    with pytest.raises(StoreError) as caught:
        converters.convert(llama.folder, "/proc/a.edgemem")
    assert "0 free" not in str(caught.value) and "writing /proc/a.edgemem: " in str(caught.value)
    rewrite(llama, llama.tensors)

    def denied(path, *_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("edgemem.converters.checkpoint.tensors.os.open", denied)
    refused(llama, tmp_path, "model.safetensors: Permission denied; check its permissions$")


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
def test_numbers_beyond_any_float_are_refused(llama, tmp_path, name):
    (llama.folder / name).write_text('{"temperature": -1e999}')
    refused(llama, tmp_path, f"{name}: the number -1e999 is too large")


def test_configs_that_make_no_model_are_errors_of_the_checkpoint(llama, tmp_path):
    configure(llama, head_dim=2, rope_scaling={"type": "dynamic", "factor": 2.0})
    refused(llama, tmp_path, "^config.json: head_dim = 2 is out of range; correct it")


def test_ids_outside_the_vocabulary_are_left_out_and_told(llama, tmp_path):
    configure(llama, eos_token_id=[99999, 2], bos_token_id=-7)
    report = converters.convert(llama.folder, tmp_path / "a")
    vocab = llama.spec.vocab_size
    assert sorted(report.notes) == [
        f"bos_token_id -7 is outside the vocabulary of {vocab}, and is left out",
        f"eos_token_id 99999 is outside the vocabulary of {vocab}, and is left out",
    ]
    with Store.open(tmp_path / "a") as store:
        assert store.spec.eos_ids == (2,) and store.spec.bos_id is None
    configure(llama, eos_token_id=2, bos_token_id=1)
    assert converters.convert(llama.folder, tmp_path / "b").notes == ()


# ---- memory ------------------------------------------------------------------------------------

PEAK = """
import sys
from edgemem import converters
print(converters.convert(sys.argv[1], sys.argv[2]).peak_rss_bytes)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a peak starts with the parent's")
def test_the_peak_is_that_of_this_process_alone(llama, tmp_path):
    ballast = b"x" * (300 << 20)
    command = [sys.executable, "-c", PEAK, llama.folder, tmp_path / "a"]
    peak = int(subprocess.run(command, check=True, capture_output=True).stdout)
    assert 10 << 20 < peak < 200 << 20
    del ballast


MEASURE = """
import sys, resource
from edgemem import converters
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
converters.convert(sys.argv[1], sys.argv[2], sys.argv[3])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in other units elsewhere")
@pytest.mark.parametrize("dtype", ["keep", "q4_0"])
def test_memory_does_not_grow_with_the_tensors(tmp_path, dtype):
    """Tables of 128 MiB take less than that; the promise is 3 × the largest tensor + 200 MiB."""
    model = tiny.write(tmp_path / "model", "llama", 3, dtype="F32", tied=False)
    vocab = (128 << 20) // 4 // model.spec.hidden
    table = np.resize(np.arange(1, 252, dtype=np.float32) / 64, (vocab, model.spec.hidden))
    configure(model, vocab_size=vocab)
    names = {"model.embed_tokens.weight": table, "lm_head.weight": table}
    rewrite(model, model.tensors | names)
    command = [sys.executable, "-c", MEASURE, model.folder, tmp_path / "a", dtype]
    grown = int(subprocess.run(command, check=True, capture_output=True).stdout)
    assert grown < 100 << 20
