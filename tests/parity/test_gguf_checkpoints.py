"""A GGUF gives what the checkpoint that it was made from gives, and what llama.cpp makes of it.

The judges: the store that the Hugging Face twin of the same weights converts to, the `gguf`
package's own values of quantised tensors, and llama.cpp itself where llama-cpp-python is installed.
"""

import numpy as np
import oracle
import pytest
import tiny
import tiny_gguf
from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader
from gguf.quants import dequantize
from tiny_config import ROPE_TYPES
from tiny_families import FAMILIES

import edgemem
from edgemem import converters
from edgemem.errors import CheckpointError
from edgemem.format import Kind
from edgemem.kernels.reference import StoreWeights
from edgemem.spec import RopeSpec
from edgemem.store import Store

SEEDS = range(4)
KINDS = (Type.F32, Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0)
CONTEXT = tiny.IDS_COUNT + 2


def mixed(name: str) -> Type:
    """Types as llama.cpp mixes them: some tensors get more bits, by layer and by part."""
    if "attn_v" in name or "ffn_down" in name or name == "output.weight":
        return Type.Q8_0
    return Type.F16 if name.startswith("blk.0.attn_k") else Type.Q4_0


@pytest.mark.parametrize("model_type", (*ROPE_TYPES, *FAMILIES))
@pytest.mark.parametrize("seed", SEEDS)
def test_a_gguf_is_its_checkpoint(model_type, seed, tmp_path, seed_base):
    """Same bundles to the byte, so same logits; and the same spec, but for what GGUF cannot say."""
    facts = tiny_gguf.facts(model_type, seed)
    model = tiny.write(tmp_path / "hf", model_type, seed_base + seed, dtype="F32", **facts)
    path = tiny_gguf.write(tmp_path / "m.gguf", model, split=7 * (seed % 2))
    converters.convert(model.folder, tmp_path / "hf.edgemem")
    converters.convert(path, tmp_path / "gguf.edgemem")
    stores = Store.open(tmp_path / "hf.edgemem"), Store.open(tmp_path / "gguf.edgemem")
    with stores[0] as ours, stores[1] as found:
        assert spec_of(found) == spec_of(ours)
        assert found.layouts == ours.layouts
        assert np.array_equal(found.entries, ours.entries)
    expected = edgemem.load(tmp_path / "hf.edgemem", context=CONTEXT).logits(model.ids)
    logits = edgemem.load(tmp_path / "gguf.edgemem", context=CONTEXT).logits(model.ids)
    if model.spec.rope.type == "yarn":  # GGUF has its attention factor in 32 bits
        assert oracle.relative_error(logits, expected) <= 2e-5
    else:
        assert np.array_equal(logits, expected)


def spec_of(store: Store) -> dict:
    """A spec but for eos_ids (GGUF names one, the rest are known by their text), for what routed
    layers alone do not use, and for which of its three names a llama goes by."""
    spec = store.spec.to_dict()
    del spec["eos_ids"]
    if all(spec["routed"]):
        del spec["intermediate"]
    if spec["model_type"] == "mistral" and not any(spec["windows"]):
        spec["model_type"] = "llama"
    spec["rope"]["attention_factor"] = round(spec["rope"]["attention_factor"], 6)
    return spec


@pytest.mark.parametrize("kind", [*KINDS, mixed], ids=lambda k: getattr(k, "name", "mixed"))
@pytest.mark.parametrize("model_type", ROPE_TYPES)
def test_values_are_those_of_the_package(model_type, kind, tmp_path, seed_base):
    facts = tiny_gguf.facts(model_type, 0, blocks=32)
    formats = values_of_a_store(model_type, kind, facts, tmp_path, seed_base)
    assert kind.name.lower() in formats if kind != mixed else {"q8_0", "q4_0"} < formats


MIXES = (tiny_gguf.q4_k_m, tiny_gguf.of_every_type)


@pytest.mark.parametrize(
    "kind, tied",
    [*((kind, False) for kind in (*tiny_gguf.BLOCKS, *MIXES)), (Type.Q6_K, True), (MIXES[1], True)],
    ids=lambda k: getattr(k, "name", None) or getattr(k, "__name__", None),
)
def test_blocks_are_taken_over(kind, tied, tmp_path, seed_base):
    """Bit for bit, whatever lies beside what; the tables of tied models too."""
    model_type = "llama" if tied else "qwen3_moe"
    facts = tiny_gguf.facts(model_type, 0, blocks=256) | {"tied": tied}
    formats = values_of_a_store(model_type, kind, facts, tmp_path, seed_base)
    least = {tiny_gguf.q4_k_m: 3, tiny_gguf.of_every_type: 10}.get(kind, 2)  # f32 is one
    assert len(formats - {"u32"}) >= least


def values_of_a_store(model_type, kind, facts, tmp_path, seed) -> set[str]:
    """Holds a GGUF's store to the values of the `gguf` package; the formats that it has."""
    model = tiny.write(tmp_path / "hf", model_type, seed, **facts)
    path = tiny_gguf.write(tmp_path / "m.gguf", model, kind)
    expected = {t.name: dequantize(t.data, t.tensor_type) for t in GGUFReader(path).tensors}
    converters.convert(path, tmp_path / "m.edgemem")
    with Store.open(tmp_path / "m.edgemem") as store:
        weights = StoreWeights(store)
        assert same(weights.table(), expected["token_embd.weight"])
        assert same(weights.head(), expected.get("output.weight", expected["token_embd.weight"]))
        for bundle in model.weights.bundles:
            where = bundle[1:] if bundle[0] == "expert" else bundle[1:2]
            found = getattr(weights, bundle[0])(*where)
            for part, values in found.items():
                name = tiny_gguf.name_of(bundle[0], bundle[1], part)
                wanted = expected[name]
                heads = tiny_gguf.heads_of(store.spec, name)
                if bundle[0] == "expert":
                    wanted = wanted[bundle[2]]
                if heads:
                    pairs = wanted.reshape(heads, -1, 2, *wanted.shape[1:])
                    wanted = pairs.swapaxes(1, 2).reshape(wanted.shape)
                assert same(values, np.atleast_2d(wanted)), f"{bundle} {part}"
        formats = {s.dtype.name for layout in store.layouts for s in layout.segments}
    logits = edgemem.load(tmp_path / "m.edgemem", context=CONTEXT).logits(model.ids)
    assert np.isfinite(logits).all()
    return formats


def same(found: np.ndarray, expected: np.ndarray) -> bool:
    """Bit for bit."""
    found = found.astype(np.float32)
    return expected.dtype == np.float32 and np.array_equal(found.view("u4"), expected.view("u4"))


def file_of_latents(tmp_path, seed: int, seed_base: int):
    """A GGUF of DeepSeek-V2 in q8_0, all of whose rows are whole blocks; older for even seeds."""
    facts = tiny_gguf.facts("deepseek_v2", seed) | {
        "rope": RopeSpec(dims=8), "attention_scale": 0.0, "head_dim": 40, "latent": 64,
        "value_dim": 32, "hidden": 96,
    }  # fmt: skip
    model = tiny.write(tmp_path / "hf", "deepseek_v2", seed_base + seed, **facts)
    return tiny_gguf.write(tmp_path / "m.gguf", model, Type.Q8_0)


def test_bad_scales_of_what_latents_are_multiplied_by_are_refused(tmp_path, seed_base):
    """Of what is turned into numbers as it is read."""
    path, infinity = file_of_latents(tmp_path, 0, seed_base), np.float16(np.inf).tobytes()
    offsets = {t.name: int(t.data_offset) for t in GGUFReader(path).tensors}
    with path.open("r+b") as file:
        file.seek(offsets["blk.0.attn_kv_b.weight"])
        file.write(infinity)
    with pytest.raises(CheckpointError, match="tensor .*kv_b.*: it holds NaN or infinite"):
        converters.convert(path, tmp_path / "m.edgemem")
    assert not (tmp_path / "m.edgemem").exists()


@pytest.mark.parametrize("seed", range(2))
def test_what_latents_are_multiplied_by_keeps_its_values(seed, tmp_path, seed_base):
    """Older files have blocks along the other side of what a store has turned around: of those it
    has the numbers, in 32 bits."""
    path = file_of_latents(tmp_path, seed, seed_base)
    theirs = {t.name: dequantize(t.data, t.tensor_type) for t in GGUFReader(path).tensors}
    converters.convert(path, tmp_path / "m.edgemem")
    with Store.open(tmp_path / "m.edgemem") as store:
        found, layout = StoreWeights(store).dense(0), store.layout_of(store.find(Kind.DENSE, 0)[0])
    if "blk.0.attn_kv_b.weight" in theirs:
        both = theirs["blk.0.attn_kv_b.weight"].reshape(-1, 64, 64)
        absorb, expand = both[:, :32].swapaxes(1, 2).reshape(-1, 32), both[:, 32:].reshape(-1, 64)
    else:
        absorb, expand = (theirs[f"blk.0.attn_{x}_b.weight"] for x in "kv")
        absorb, expand = absorb.reshape(-1, 32), expand.reshape(-1, 64)
    assert same(found["absorb"], absorb) and same(found["expand"], expand)
    older = "blk.0.attn_kv_b.weight" in theirs
    assert older == (seed == 0)
    assert layout["absorb"].dtype.name == ("f32" if older else "q8_0")
    assert layout["expand"].dtype.name == "q8_0"


def test_templates_and_sampling_travel(tmp_path, seed_base):
    def more(writer):
        writer.add_chat_template("{{ messages[0].content }}")
        writer.add_float32("general.sampling.temp", 0.7)
        writer.add_int32("general.sampling.top_k", 20)

    model = tiny.write(tmp_path / "hf", "llama", seed_base, **tiny_gguf.facts("llama", 0))
    path = tiny_gguf.write(tmp_path / "m.gguf", model, more=more)
    report = converters.convert(path, tmp_path / "m.edgemem")
    assert report.tensors == len(GGUFReader(path).tensors)
    with Store.open(tmp_path / "m.edgemem") as store:
        assert store.chat_template == "{{ messages[0].content }}"
        assert store.generation == {"temperature": 0.7, "top_k": 20}
        assert store.provenance["checkpoint"] == "m.gguf"


@pytest.mark.parametrize("dtype", ["f16", "q8_0", "q4_0", "q4_k"])
def test_requantising_is_that_of_the_checkpoint(dtype, tmp_path, seed_base):
    facts = tiny_gguf.facts("qwen3_moe", 0, blocks=32)
    model = tiny.write(tmp_path / "hf", "qwen3_moe", seed_base, dtype="F32", **facts)
    path = tiny_gguf.write(tmp_path / "m.gguf", model)
    converters.convert(model.folder, tmp_path / "hf.edgemem", dtype=dtype)
    converters.convert(path, tmp_path / "gguf.edgemem", dtype=dtype)
    stores = Store.open(tmp_path / "hf.edgemem"), Store.open(tmp_path / "gguf.edgemem")
    with stores[0] as ours, stores[1] as found:
        assert np.array_equal(found.entries, ours.entries)


@pytest.mark.parametrize("dtype", ["f16", "q4_0"])
def test_blocks_can_be_turned_into_another_format(dtype, tmp_path, seed_base):
    """From q8_0: the numbers that it holds, rounded or quantised once more."""
    facts = tiny_gguf.facts("qwen3", 0, blocks=32)
    model = tiny.write(tmp_path / "hf", "qwen3", seed_base, **facts)
    path = tiny_gguf.write(tmp_path / "m.gguf", model, Type.Q8_0)
    values = {t.name: dequantize(t.data, t.tensor_type) for t in GGUFReader(path).tensors}
    converters.convert(path, tmp_path / "m.edgemem", dtype=dtype)
    with Store.open(tmp_path / "m.edgemem") as store:
        found = StoreWeights(store).ffn(0)["up"]
    up = values["blk.0.ffn_up.weight"]
    if dtype == "f16":
        assert same(found, up.astype(np.float16).astype(np.float32))
        return
    assert oracle.relative_error(found, up) < 0.1
