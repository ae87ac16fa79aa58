"""gpt-oss: experts in MXFP4, from a folder and from GGUF, and files that are not what they say."""

from collections.abc import Iterator

import numpy as np
import pytest
import streaming
import tiny
import tiny_gguf
from gguf import GGMLQuantizationType as Type
from tiny_families import gpt_oss

import edgemem
from edgemem import converters
from edgemem.cli import facts
from edgemem.converters.configuration import describe
from edgemem.errors import CheckpointError, CorruptError, UnsupportedError
from edgemem.kernels.reference import StoreWeights
from edgemem.spec import ModelSpec
from edgemem.store import Store


@pytest.fixture
def model(tmp_path, seed_base) -> tiny.Tiny:
    """A checkpoint whose experts are in MXFP4."""
    return tiny.write(tmp_path / "hf", "gpt_oss", seed_base, dtype="BF16", **gpt_oss.MXFP4)


def formats(store: Store) -> set[str]:
    return {s.dtype.name for layout in store.layouts for s in layout.segments}


def test_a_gguf_is_its_folder(tmp_path, seed_base):
    """Though its blocks lie in another order, and gate and up apart."""
    model = tiny.write(tmp_path / "hf", "gpt_oss", seed_base, dtype="F32", **gpt_oss.MXFP4)
    path = tiny_gguf.write(
        tmp_path / "m.gguf", model, lambda name: Type.MXFP4 if "_exps.w" in name else Type.F32
    )
    converters.convert(model.folder, tmp_path / "hf.edgemem")
    converters.convert(path, tmp_path / "gguf.edgemem")
    stores = Store.open(tmp_path / "hf.edgemem"), Store.open(tmp_path / "gguf.edgemem")
    with stores[0] as ours, stores[1] as found:
        assert formats(found) == {"f32", "mxfp4"} and found.layouts == ours.layouts
        assert np.array_equal(found.entries, ours.entries)


def test_inspect_counts_blocks_and_their_scales_as_one(model, tmp_path):
    found = facts.of(model.folder)
    converters.convert(model.folder, tmp_path / "m.edgemem")
    store = facts.of(tmp_path / "m.edgemem")
    assert found["runs"] and set(found["dtype_bytes"]) == {"bf16", "mxfp4"}
    for key in ("spec", "parameters", "dense_bytes", "streamable_bytes", "bundles"):
        assert found[key] == store[key]


def test_experts_stream_with_one_answer(model, convert_store):
    path = str(convert_store(model.folder, "keep"))
    with edgemem.load(path) as engine:
        expected = streaming.answer(engine)
    for share in (0.0, 0.5):
        with streaming.opened(path, share) as engine:
            assert streaming.streams(engine) and streaming.answer(engine) == expected


@pytest.mark.parametrize("dtype", ["f16", "q8_0"])
def test_blocks_can_be_turned_into_another_format(dtype, model, tmp_path):
    converters.convert(model.folder, tmp_path / "m.edgemem", dtype=dtype)
    with Store.open(tmp_path / "m.edgemem") as store:
        found, kept = StoreWeights(store).expert(0, 3), model.weights.expert(0, 3)
        assert "mxfp4" not in formats(store)
    for name in ("gate", "up", "down"):
        assert np.abs(found[name] - kept[name]).max() <= {"f16": 0, "q8_0": 0.01}[dtype]


def test_sinks_are_asked_for(tmp_path):
    model = tiny.write(tmp_path / "hf", "gpt_oss", 3, dtype="F32")
    name = "model.layers.0.self_attn.sinks"
    for tensors, words in (
        ({n: v for n, v in model.tensors.items() if n != name}, f"lacks {name}"),
        (model.tensors | {name: model.tensors[name][:-1]}, f"{name} has the shape"),
        (model.tensors | {name: model.tensors[name] * np.nan}, f"{name}: it holds NaN"),
    ):
        refused(model, tensors, words, tmp_path)


def spoiled(tensors: dict) -> Iterator[tuple[dict, str]]:
    """What is wrong, and what is said of it."""
    base = "model.layers.0.mlp.experts.gate_up_proj_"
    blocks, scales = tensors[base + "blocks"], tensors[base + "scales"]
    without = {n: v for n, v in tensors.items() if n != base + "scales"}
    yield without, "comes without its _scales"
    yield {n: v for n, v in tensors.items() if n != base + "blocks"}, "lacks .*gate_up_proj_blocks"
    yield tensors | {base + "blocks": blocks[..., :15]}, "16 bytes for each scale"
    yield tensors | {base + "scales": scales[:, 1:]}, "16 bytes for each scale"
    yield tensors | {base + "scales": scales.astype(np.float32)}, "its scales are BF16"
    fewer = {base + "blocks": blocks[:, 1:], base + "scales": scales[:, 1:]}
    yield tensors | fewer, "has the shape .*config.json asks for"
    infinite = scales.copy()
    infinite[-1, -1, -1] = 255
    yield tensors | {base + "scales": infinite}, "gate_up_proj_blocks: it holds NaN or infinite"


def test_bad_blocks_are_named(model, tmp_path):
    for tensors, words in spoiled(model.tensors):
        refused(model, tensors, words, tmp_path)


def refused(model: tiny.Tiny, tensors: dict, words: str, tmp_path) -> None:
    for file in model.folder.glob("model*"):
        file.unlink()
    tiny.write_safetensors(model.folder / "model.safetensors", tensors, list(tensors), "BF16")
    with pytest.raises(CheckpointError, match=words):
        converters.convert(model.folder, tmp_path / "refused.edgemem")
    assert not (tmp_path / "refused.edgemem").exists()


def test_floats_that_lie_turned_around_may_not_be_blocks(tmp_path, monkeypatch):
    """A GGUF may have any names, those of a folder's too."""
    model, named = tiny.write(tmp_path / "hf", "gpt_oss", 5, **gpt_oss.MXFP4), tiny_gguf.tensors

    def renamed(spec, weights):
        found = named(spec, weights)
        down = found.pop("blk.1.ffn_down_exps.weight")
        return found | {"model.layers.1.mlp.experts.down_proj": down.swapaxes(1, 2)}

    monkeypatch.setattr(tiny_gguf, "tensors", renamed)
    path = tiny_gguf.write(tmp_path / "m.gguf", model, Type.Q8_0)
    with pytest.raises(UnsupportedError, match="experts.down_proj is in blocks of q8_0"):
        converters.convert(path, tmp_path / "m.edgemem")


def test_a_config_that_says_nothing_of_positions_means_yarn():
    spec = describe({"model_type": "gpt_oss", "num_hidden_layers": 2}, {}).spec
    assert spec.rope == gpt_oss.DEFAULT_ROPE
    assert spec.windows == (128, 0)


def test_gates_that_no_network_has_are_refused():
    spec = describe({"model_type": "gpt_oss", "num_hidden_layers": 2}, {}).spec.to_dict()
    with pytest.raises(CorruptError, match="activation"):
        ModelSpec.from_dict(spec | {"gated": False})
    with pytest.raises(CorruptError, match="activation"):
        neurons = {"routed": [False, True], "neurons": True, "thresholds": [0.0, 0.0]}
        ModelSpec.from_dict(spec | neurons)
