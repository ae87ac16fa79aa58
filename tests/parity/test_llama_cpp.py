"""A GGUF and its store: llama.cpp's logits and greedy text, where llama-cpp-python is installed.

llama.cpp rounds activations to 8 bits before it multiplies them with quantised weights, and so does
edgemem, each in its own order; in float formats both round much less. Bounds say how much. Build
llama-cpp-python with CMAKE_ARGS="-DGGML_NATIVE=OFF" where its own detection picks instructions
that the processor refuses.
"""

from types import SimpleNamespace

import numpy as np
import oracle
import pytest
import tiny
import tiny_gguf
from gguf import GGMLQuantizationType as Type
from tiny_config import MODEL_TYPES

import edgemem
from edgemem import converters
from edgemem.kernels.reference import StoreWeights
from edgemem.store import Store

KINDS = {Type.F32: 1e-3, Type.F16: 5e-3, Type.Q8_0: 3e-2, Type.Q4_0: 3e-2}
"""Number formats, and how far logits may differ, over the largest."""
CONTEXT = 128
SEEDS = 10
TIES = {Type.F32: 0.0, Type.Q8_0: 5e-3, Type.Q4_0: 1e-2}
"""How near two tokens may be, over the largest logit, for greedy text to go the other way."""
STARTS = (
    "Once upon a time",
    "Lily and Tom went to the park",
    "The little dog",
    "One day, a girl",
    "There was a big tree",
    "Mom said",
    "Ben had a red ball",
    "In the garden",
    "The sun",
    "A cat",
)
GREEDY_TOKENS = 64


@pytest.fixture(scope="module")
def llama():
    """llama(path) → a model in llama.cpp that keeps the logits of all tokens."""
    try:
        import llama_cpp
    except ImportError:
        pytest.skip("llama-cpp-python is not installed: no parity with llama.cpp was tested")
    return lambda path: llama_cpp.Llama(
        str(path), n_ctx=CONTEXT, n_threads=2, n_gpu_layers=0, logits_all=True, verbose=False
    )


def logits(model, ids) -> np.ndarray:
    """llama.cpp's logits of ids as a sequence of their own."""
    model.reset()
    model.eval([int(id) for id in ids])
    return np.array(model.scores[: len(ids)])


def computable(folder, model_type: str, first_seed: int) -> tiny.Tiny:
    """A tiny model that llama.cpp can compute: it has fewer options than transformers."""
    facts = tiny_gguf.facts(model_type, 0, blocks=True) | {"hidden": 128, "n_heads": 4}
    facts |= {"head_dim": 32, "norm_eps": 1e-5, "tied": False}
    if model_type == "olmoe":
        facts["n_kv_heads"] = 4
    if any(facts["routed"]):
        facts |= {"normalize_top_k": model_type in ("mixtral", "qwen3_moe"), "top_k": 2,
                  "routed": (True, True), "n_experts": 8}  # fmt: skip
    biased = {"llama": None, "qwen2": True, "qwen2_moe": True}.get(model_type, False)
    for seed in range(first_seed, first_seed + 100):
        model = tiny.write(folder / str(seed), model_type, seed, dtype="F32", **facts)
        if biased in (None, "q_bias" in model.weights.dense(0)):
            return model
    raise AssertionError("no seed draws the biases that llama.cpp wants")


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_logits_agree(model_type, kind, llama, tmp_path, seed_base):
    model = computable(tmp_path, model_type, seed_base)
    path = tiny_gguf.write(tmp_path / "m.gguf", model, kind)
    converters.convert(path, tmp_path / "m.edgemem")
    found = edgemem.load(tmp_path / "m.edgemem", context=CONTEXT).logits(model.ids)
    error = oracle.relative_error(found, logits(llama(path), model.ids))
    print(f"{model_type} {kind.name}: logits differ by {error:.1e} of the largest")
    assert error <= KINDS[kind]


def as_gguf(path, store_path, kind):
    """A trained model as GGUF, by way of its store; its vocabulary is that of `tiny`."""
    with Store.open(store_path) as store:
        spec, kept = store.spec, StoreWeights(store)
        bundles = {}
        for layer in range(spec.n_layers + 1):
            bundles["dense", layer, 0] = kept.dense(layer)
        for layer, routed in enumerate(spec.routed):
            if not routed:
                bundles["ffn", layer, 0] = kept.ffn(layer)
            for index in range(spec.n_experts if routed else 0):
                bundles["expert", layer, index] = kept.expert(layer, index)
        flat = {
            key: {name: v[0] if len(v) == 1 else v for name, v in bundle.items()}
            for key, bundle in bundles.items()
        }
        weights = SimpleNamespace(bundles=flat, table=kept.table, head=kept.head)
        return tiny_gguf.write(path, SimpleNamespace(spec=spec, weights=weights), kind)


def continuations(engine, judge, prompt) -> tuple[int, float]:
    """How many greedy tokens are equal before the first that is not; and there, how much likelier
    llama.cpp finds its own choice, over its largest logit (0 where all are equal)."""
    last = logits(judge, prompt)[-1]
    with engine.session() as session:
        ours = session.feed(prompt)
        for count in range(GREEDY_TOKENS):
            theirs, found = int(last.argmax()), int(np.argmax(ours))
            if theirs != found:
                return count, float((last[theirs] - last[found]) / np.abs(last).max())
            ours = session.feed([found])
            judge.eval([theirs])
            last = judge.scores[judge.n_tokens - 1]
    return GREEDY_TOKENS, 0.0


@pytest.mark.parametrize("kind", [Type.F32, Type.Q8_0, Type.Q4_0], ids=lambda k: k.name)
@pytest.mark.parametrize("name", ["stories260k", "tiny-moe"])
def test_greedy_tokens_are_equal(name, kind, llama, convert_store, tmp_path, wikitext, shared):
    """Trained models continue ten pieces of text to the last token, but for near ties: those that
    differ do so where llama.cpp itself finds both tokens as likely, to its rounding."""
    store = convert_store(shared / "models" / name)
    path = as_gguf(tmp_path / "m.gguf", store, kind)
    converters.convert(path, tmp_path / "m.edgemem")
    engine, judge = edgemem.load(tmp_path / "m.edgemem", context=CONTEXT), llama(path)
    tokenizer = oracle.tokenizer(shared / "models" / name)
    texts = STARTS if name == "stories260k" else wikitext.split("\n =")[1 : SEEDS + 1]
    results = [
        continuations(engine, judge, tokenizer.encode(text[:200]).ids[:24]) for text in texts
    ]
    equal = sum(count == GREEDY_TOKENS for count, _ in results)
    print(f"{name} {kind.name}: {equal} of {SEEDS} equal; others {[r for r in results if r[1]]}")
    assert len(results) == SEEDS
    assert max(gap for _, gap in results) <= TIES[kind]
