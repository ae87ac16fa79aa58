"""Synthetic checkpoints: all forms hold the same values, and the values behave."""

import json

import numpy as np
import pytest

from bench.gguf_writer import rope_factors, tensor_name
from bench.shapes import SHAPES, config_of
from bench.synth import write
from bench.weights import COMMON, Weights
from edgemem.converters.configuration import describe
from edgemem.dtypes import BF16, F32, MXFP4, Q4_0, Q8_0
from edgemem.format import Kind
from edgemem.kernels.reference import Forward, StoreWeights, unpack
from edgemem.models.rope import inverse_frequencies
from edgemem.store import Store

SMALL = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 275, "max_position_embeddings": 131072,
}  # fmt: skip
EXPERTS = {"moe_intermediate_size": 32, "num_experts": 5, "num_experts_per_tok": 2}


def architecture(model_type: str, name: str, **facts) -> dict:
    plain = {"hidden_act": "silu", "rms_norm_eps": 1e-5, "model_type": model_type}
    return plain | SMALL | {"architectures": [f"{name}ForCausalLM"]} | facts


CONFIGS = {
    "llama": SHAPES["llama-3.2-1b"] | SMALL,
    "llama-untied": SHAPES["llama-3.1-8b"] | SMALL,
    "mistral": architecture("mistral", "Mistral", sliding_window=None),
    "mixtral": SHAPES["mixtral-8x7b"] | SMALL,
    "olmoe": SHAPES["olmoe-1b-7b"] | SMALL | {"num_experts": 5, "num_experts_per_tok": 2},
    "qwen2": architecture("qwen2", "Qwen2"),
    "qwen3": architecture("qwen3", "Qwen3"),
    "qwen2_moe": architecture(
        "qwen2_moe", "Qwen2Moe", shared_expert_intermediate_size=64, **EXPERTS
    ),
    "qwen3_moe": SHAPES["qwen3-30b-a3b"] | SMALL | EXPERTS,
}
SMALL_OPT = {
    "hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 96, "num_attention_heads": 4,
    "num_hidden_layers": 2, "vocab_size": 275, "max_position_embeddings": 50,
}  # fmt: skip
OWN = {
    "gemma2": SHAPES["gemma-2-2b"] | SMALL,
    "phimoe": SHAPES["phi-3.5-moe"] | SMALL | {"num_local_experts": 5},
    "glm4_moe": SHAPES["glm-4.5-air"] | SMALL | {"n_routed_experts": 5, "moe_intermediate_size": 32,
                                                 "num_experts_per_tok": 2},
}  # fmt: skip
FOLDERS = CONFIGS | {name: OWN[name] for name in ("phimoe", "glm4_moe")}
FOLDERS |= {"opt": SHAPES["opt-1.3b"] | SMALL_OPT}


def pages(store: Store) -> list:
    """Checksum and place of every bundle: what makes two stores equal."""
    return store.entries[["kind", "layer", "index", "payload_bytes", "crc32c"]].tolist()


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_a_folder_converts_to_the_store_that_is_written_directly(tmp_path, name, dtype):
    from edgemem.converters import convert

    write(FOLDERS[name], tmp_path / "folder", dtype, seed=5)
    convert(tmp_path / "folder", tmp_path / "converted.edgemem")
    write(FOLDERS[name], tmp_path / "direct.edgemem", dtype, seed=5)
    with Store.open(tmp_path / "direct.edgemem") as direct:
        assert direct.verify().ok
        with Store.open(tmp_path / "converted.edgemem") as converted:
            assert direct.spec == converted.spec
            if dtype == "bf16":  # routers are bf16 in a store of any format, f16 in such a folder
                assert pages(direct) == pages(converted)


def matrices(store: Store) -> dict[str, list[np.ndarray]]:
    """Values by the name of the GGUF tensor: one array for each bundle that is part of it."""
    found: dict[str, list[np.ndarray]] = {}
    for bundle, entry in enumerate(store.entries):
        payload = np.empty(int(entry["payload_bytes"]), np.uint8)
        store.read(bundle, payload)
        for s in store.layout_of(bundle).segments:
            values = unpack(payload[s.offset : s.end], s.dtype, s.rows, s.cols, s.lanes)
            kind, layer = Kind(int(entry["kind"])), int(entry["layer"])
            found.setdefault(tensor_name(store.spec, kind, layer, s.name), []).append(values)
    return found


def halves_apart(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's order of the rows of q and k."""
    return rows.reshape(heads, -1, 2, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", ["q4_0", "q8_0", "bf16", "f16"])
def test_a_gguf_file_holds_the_values_of_the_store(tmp_path, name, dtype):
    gguf = pytest.importorskip("gguf", reason="reading GGUF needs gguf: pip install gguf")
    write(CONFIGS[name], tmp_path / "a.edgemem", dtype, seed=6)
    size = write(CONFIGS[name], tmp_path / "a.gguf", dtype, seed=6)
    assert size == (tmp_path / "a.gguf").stat().st_size
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    with Store.open(tmp_path / "a.edgemem") as store:
        expected, spec = matrices(store), store.spec
    names = {tensor.name for tensor in reader.tensors} - {"rope_freqs.weight"}
    assert names == set(expected)
    for tensor in reader.tensors:
        if tensor.name == "rope_freqs.weight":
            continue
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        values = values.reshape(-1, values.shape[-1])
        if spec.model_type in ("llama", "mistral", "mixtral") and ".attn_q." in tensor.name:
            values = halves_apart(values, spec.n_heads)
        if spec.model_type in ("llama", "mistral", "mixtral") and ".attn_k." in tensor.name:
            values = halves_apart(values, spec.n_kv_heads)
        assert np.array_equal(values, np.concatenate(expected[tensor.name])), tensor.name


def test_the_same_seed_gives_the_same_file_and_another_does_not(tmp_path):
    files = [tmp_path / f"{i}.gguf" for i in range(3)]
    for file, seed in zip(files, (1, 1, 2), strict=True):
        write(CONFIGS["olmoe"], file, "q4_0", seed)
    data = [file.read_bytes() for file in files]
    assert data[0] == data[1] != data[2]


@pytest.mark.parametrize("dtype", ["q4_0", "q8_0", "bf16", "f16"])
def test_weights_have_no_mean_and_the_deviation_that_was_asked_for(dtype):
    config = SHAPES["qwen3-30b-a3b"] | {"num_hidden_layers": 1, "vocab_size": 4096}
    weights = Weights(describe(config, {}), 7, dtype)
    for kind, names in ((Kind.EXPERT, ("gate", "down")), (Kind.DENSE, ("q", "o", "router"))):
        layout = weights.layout(kind, 0)
        for name in names:
            s = layout[name]
            tile = weights.tiles(kind, 0, 0, s)[0]
            values = unpack(weights.draw(tile), s.dtype, tile.rows, s.cols, s.lanes)
            assert abs(values.mean()) < 5 * tile.std / np.sqrt(values.size)
            assert values.std() == pytest.approx(tile.std, rel=0.04)


@pytest.mark.parametrize("dtype", ["q8_0", "bf16"])
def test_embeddings_share_one_vector(dtype):
    config = SHAPES["qwen3-30b-a3b"] | {"num_hidden_layers": 1, "vocab_size": 4096}
    weights = Weights(describe(config, {}), 7, dtype)
    kind, layer, index, layout = next(iter(weights.bundles()))
    assert kind == Kind.EMBED and layout["rows"].dtype in (Q8_0, BF16)
    tile = weights.tiles(kind, layer, index, layout["rows"])[0]
    rows = unpack(weights.draw(tile), tile.segment.dtype, tile.rows, tile.segment.cols, 1)
    common = rows.mean(axis=0)
    noise = (rows - common).std()
    assert noise == pytest.approx(1, rel=0.05)
    assert np.abs(common).mean() == pytest.approx(COMMON, rel=0.05)


@pytest.mark.parametrize("neurons", (False, True))
def test_few_neurons_of_an_opt_are_active_and_mostly_the_same_ones(tmp_path, neurons):
    """Of OPT-6.7B 97 % are zero (arXiv 2312.11514)."""
    small = {
        "hidden_size": 256, "word_embed_proj_dim": 256, "ffn_dim": 1024, "vocab_size": 512,
        "num_attention_heads": 4, "num_hidden_layers": 4, "max_position_embeddings": 64,
    }  # fmt: skip
    write(SHAPES["opt-6.7b"] | small, tmp_path / "opt.edgemem", "q8_0", seed=3, neurons=neurons)
    active = []

    def watch(layer: int, name: str, value: np.ndarray) -> None:
        if name == "ffn_norm":
            ffn = weights.ffn(layer)
            active.append(value @ ffn["up"].T + ffn["up_bias"] > 0)

    with Store.open(tmp_path / "opt.edgemem") as store:
        assert store.verify().ok and store.spec.neurons == neurons
        weights = StoreWeights(store)
        ids = np.random.default_rng(1).integers(2, 512, 48)
        logits = Forward(store.spec, weights, watch=watch).feed(ids)
    assert np.isfinite(logits).all() and len(active) == 4
    for layer in active:
        often = np.sort(layer.mean(axis=0))[::-1]
        again = (layer[1:] & layer[:-1]).sum() / layer[1:].sum()
        assert 0.01 < layer.mean() < 0.06
        assert often[: len(often) // 10].sum() > 0.6 * often.sum(), "a tenth does most"
        assert again > 5 * layer.mean(), "what was active is likelier to be active again"


@pytest.mark.parametrize("name", OWN)
def test_blocks_add_a_few_per_cent_and_routers_have_favourites(tmp_path, name):
    large = {"hidden_size": 256, "num_hidden_layers": 3, "vocab_size": 512}
    write(OWN[name] | large, tmp_path / "a.edgemem", "q8_0", seed=3)
    added, routers = [], []

    def watch(layer: int, name: str, value: np.ndarray) -> None:
        if name in ("attention", "ffn"):
            added.append(np.sqrt((value**2).mean()) / np.sqrt(1 + COMMON**2))
        elif name == "router":
            routers.append(value)

    with Store.open(tmp_path / "a.edgemem") as store:
        assert store.verify().ok
        ids = np.random.default_rng(1).integers(2, 512, 32)
        forward = Forward(store.spec, StoreWeights(store), watch=watch)
        logits, cap = forward.feed(ids), store.spec.logit_cap
        assert len(routers) == sum(store.spec.routed)
    assert len(added) == 6 and 0.02 < min(added) and max(added) < 0.12
    assert 0.5 < logits.std() < 6 and np.abs(logits).max() < (0.9 * cap or np.inf)
    for found in routers:
        static, varying = found.mean(axis=0).std(), (found - found.mean(axis=0)).std()
        assert static > 0.4 and varying > 0.3


@pytest.mark.parametrize("dtype", ["bf16", "q4_0"])
def test_heads_that_share_latents_attend(tmp_path, dtype):
    """Neither to one position alone nor to all alike: what they find is as long as elsewhere."""
    small = {
        "hidden_size": 256, "num_attention_heads": 4, "num_hidden_layers": 3, "vocab_size": 512,
        "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32,
        "moe_intermediate_size": 64, "n_routed_experts": 8, "num_experts_per_tok": 2,
        "intermediate_size": 128, "num_key_value_heads": 4,
    }  # fmt: skip
    config, found = SHAPES["deepseek-v2-lite"] | small, []
    write(config, tmp_path / "a.edgemem", dtype, seed=3)

    def watch(layer: int, name: str, value: np.ndarray) -> None:
        if name == "heads":
            found.append(np.sqrt((value[8:] ** 2).mean()))

    with Store.open(tmp_path / "a.edgemem") as store:
        assert store.verify().ok and store.spec.latent == 64
        ids = np.random.default_rng(1).integers(2, 512, 48)
        logits = Forward(store.spec, StoreWeights(store), watch=watch).feed(ids)
    assert np.isfinite(logits).all() and len(found) == 3
    assert all(0.3 < length < 0.95 for length in found), found


def test_q4_0_uses_the_nibbles_1_to_15_alike():
    weights = Weights(describe(CONFIGS["olmoe"] | {"hidden_size": 1024}, {}), 0, "q4_0")
    s = weights.layout(Kind.EXPERT, 0)["gate"]
    assert s.dtype == Q4_0 and weights.layout(Kind.DENSE, 0)["attn_norm"].dtype == F32
    drawn = weights.draw(weights.tiles(Kind.EXPERT, 0, 0, s)[0])
    raw = drawn[:, 1024 // 32 * 16 * 2 :].ravel()
    counts = np.bincount(np.concatenate([raw & 15, raw >> 4]), minlength=16) / (2 * raw.size)
    assert counts[0] == 0
    assert counts[[*range(1, 8), *range(9, 16)]] == pytest.approx(1 / 16, rel=0.05)
    assert counts[8] == pytest.approx(2 / 16, rel=0.05)


def test_experts_of_gpt_oss_are_in_mxfp4_and_behave(tmp_path):
    small = {"num_local_experts": 6, "num_hidden_layers": 4, "intermediate_size": 96}
    config = SHAPES["gpt-oss-20b"] | SMALL | small
    write(config, tmp_path / "a.edgemem", "q4_0", seed=4)
    seen = {}

    def watch(layer: int, name: str, value: np.ndarray) -> None:
        seen.setdefault(name, []).append(np.sqrt((value**2).mean()))

    with Store.open(tmp_path / "a.edgemem") as store:
        assert store.verify().ok
        weights = StoreWeights(store)
        layout = store.layout_of(store.find(Kind.EXPERT, 0)[0])
        assert {layout[name].dtype for name in ("gate", "up", "down")} == {MXFP4}
        gate = weights.expert(0, 1)["gate"]
        assert abs(gate.mean()) < 5 * gate.std() / np.sqrt(gate.size)
        assert gate.std() == pytest.approx(1 / np.sqrt(64), rel=0.05)
        ids = np.random.default_rng(1).integers(2, 275, 48)
        Forward(store.spec, weights, watch=watch).feed(ids)
    stream = np.sqrt(1 + COMMON**2)
    added = np.array(seen["attention"] + seen["ffn"]) / stream
    assert (added > 0.02).all() and (added < 0.12).all(), added


def test_llama_3_frequencies_are_divided_as_the_model_scales_them():
    spec = describe(CONFIGS["llama"], {}).spec
    plain = spec.rope.theta ** (-np.arange(0, 16, 2) / 16)
    scaled = inverse_frequencies(spec.rope, 16, spec.max_positions, 1)
    assert np.allclose(plain / rope_factors(spec), scaled)
    assert rope_factors(describe(CONFIGS["qwen3"], {}).spec) is None


def test_shapes_are_known_or_explained(tmp_path):
    assert config_of("olmoe-1b-7b", 3)["num_hidden_layers"] == 3
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["qwen2"]))
    assert config_of(str(tmp_path / "config.json"))["model_type"] == "qwen2"
    with pytest.raises(ValueError, match="neither a config.json nor one of qwen3-30b-a3b"):
        config_of("gpt-9")
    for name in SHAPES:
        describe(config_of(name), {})


def test_what_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(ValueError, match="a folder holds bf16 or f16, not q4_0"):
        write(CONFIGS["llama"], tmp_path / "folder", "q4_0")
    with pytest.raises(ValueError, match="whole blocks of 32"):
        write(CONFIGS["llama"] | {"intermediate_size": 100}, tmp_path / "x.gguf", "q4_0")
    falcon = {"model_type": "falcon", "hidden_size": 64, "num_attention_heads": 4}
    for form, name, config in (
        ("a folder of type falcon", "folder", falcon),
        ("a folder of type gpt_oss", "folder", SHAPES["gpt-oss-20b"]),
        ("a folder of type gemma2", "folder", OWN["gemma2"]),
        ("a GGUF file of type phimoe", "z.gguf", OWN["phimoe"]),
        ("a GGUF file of type falcon", "z.gguf", falcon),
        ("a GGUF file of type opt", "z.gguf", SHAPES["opt-6.7b"]),
        ("a folder of type deepseek_v2", "folder", SHAPES["deepseek-v2-lite"]),
        ("a GGUF file of type deepseek_v2", "z.gguf", SHAPES["deepseek-v2-lite"]),
    ):
        with pytest.raises(ValueError, match=f"{form} cannot be made here"):
            write(config, tmp_path / name, "bf16")
        assert not (tmp_path / name).exists()
    (tmp_path / "y.gguf").touch()
    with pytest.raises(FileExistsError, match="it exists"):
        write(CONFIGS["llama"], tmp_path / "y.gguf", "q4_0")
