"""A GGUF and its store: llama.cpp's logits and greedy text, where llama-cpp-python is installed.

Products of quantised weights are llama.cpp's: both round activations to the same 8 bits and the
same scales. Attention is not: where its KV cache is of f16, llama.cpp rounds queries and
probabilities to f16 too, edgemem does not. That is 1e-4 of a float model's logits. In a quantised
model it moves some activations across a rounding of theirs to 8 bits, each of which moves others,
up to about one per cent of the logits: what rounding to 8 bits itself costs, and what llama.cpp
differs by from itself if it is told to attend in another way. Each step of this is a test here.
Build llama-cpp-python with CMAKE_ARGS="-DGGML_NATIVE=OFF" where its own detection picks
instructions that the processor refuses.
"""

import shutil
from types import SimpleNamespace

import numpy as np
import oracle
import pytest
import tiny
import tiny_gguf
from gguf import GGMLQuantizationType as Type
from tiny_config import ROPE_TYPES
from tiny_families import FAMILIES, gpt_oss

import edgemem
from edgemem import converters
from edgemem.kernels.reference import Forward, StoreWeights
from edgemem.spec import RopeSpec
from edgemem.store import Store

KINDS = {Type.F32: 1e-3, Type.F16: 5e-3, Type.Q8_0: 3e-2, Type.Q4_0: 3e-2}
"""Number formats, and how far logits may differ, over the largest."""
BLOCKS_BOUND = 3e-2
FLOAT_BOUND, GELU_BOUND = 1e-5, 1e-3
CONTEXT = 128
SEEDS = 10
TIES = {Type.F32: 0.0, Type.Q8_0: 2e-2, Type.Q4_0: 2e-2}
"""How near two tokens may be, over the largest logit, for greedy text to go the other way."""
SAME = 1e-6
"""Logits that differ by less, over the largest, went through the same roundings everywhere."""
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
CACHES = {"f16": {}, "f32": {"type_k": Type.F32, "type_v": Type.F32}}
"""What llama.cpp is told, for each type of KV cache."""


@pytest.fixture(scope="module")
def llama():
    """llama(path, **options) → a model in llama.cpp that keeps the logits of all tokens."""
    try:
        import llama_cpp
    except ImportError:
        pytest.skip("llama-cpp-python is not installed: no parity with llama.cpp was tested")
    return lambda path, **options: llama_cpp.Llama(
        str(path), n_ctx=CONTEXT, n_threads=2, n_gpu_layers=0, logits_all=True, verbose=False,
        **options,
    )  # fmt: skip


def logits(model, ids) -> np.ndarray:
    """llama.cpp's logits of ids as a sequence of their own."""
    model.reset()
    model.eval([int(id) for id in ids])
    return np.array(model.scores[: len(ids)])


def computable(folder, model_type: str, first_seed: int, blocks: int = 32) -> tiny.Tiny:
    """A tiny model that llama.cpp can compute: it has fewer options than transformers."""
    facts = tiny_gguf.facts(model_type, 0, blocks) | {"norm_eps": 1e-5, "tied": False}
    if blocks == 32:
        facts |= {"hidden": 128, "n_heads": 4, "head_dim": 32}
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
@pytest.mark.parametrize("model_type", ROPE_TYPES)
def test_logits_agree(model_type, kind, llama, tmp_path, seed_base):
    model = computable(tmp_path, model_type, seed_base)
    path = tiny_gguf.write(tmp_path / "m.gguf", model, kind)
    converters.convert(path, tmp_path / "m.edgemem")
    found = edgemem.load(tmp_path / "m.edgemem", context=CONTEXT).logits(model.ids)
    error = oracle.relative_error(found, logits(llama(path), model.ids))
    print(f"{model_type} {kind.name}: logits differ by {error:.1e} of the largest")
    assert error <= KINDS[kind]


@pytest.mark.parametrize("kind", [*tiny_gguf.BLOCKS, tiny_gguf.q4_k_m],
                         ids=lambda k: getattr(k, "name", None) or k.__name__)  # fmt: skip
@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe"])
def test_logits_of_blocks_agree(model_type, kind, llama, tmp_path, seed_base):
    """As near as both are to what the numbers mean: llama.cpp rounds activations to 8 bits too, in
    some formats with one scale for 256 of them. Of most tokens: either rounding may turn a near tie
    of a router."""
    model = computable(tmp_path, model_type, seed_base, 256)
    path = tiny_gguf.write(tmp_path / "m.gguf", model, kind)
    converters.convert(path, tmp_path / "m.edgemem")
    found = edgemem.load(tmp_path / "m.edgemem", context=CONTEXT).logits(model.ids)
    theirs = logits(llama(path), model.ids)
    with Store.open(tmp_path / "m.edgemem") as store:
        exact = Forward(store.spec, StoreWeights(store), "f16").feed(model.ids)
    ours, judges, apart = (
        np.median(np.abs(a - b).max(axis=1)) / np.abs(exact).max()
        for a, b in ((found, exact), (theirs, exact), (found, theirs))
    )
    print(f"{model_type} {kind}: from float64 {ours:.1e} here, {judges:.1e} in llama.cpp")
    assert ours <= 1.5 * judges + 1e-3 and apart <= BLOCKS_BOUND


def decided(model: tiny.Tiny, seed: int) -> SimpleNamespace:
    """The model with a vocabulary by which every token has one that follows it.

    Plain random models leave 64 tokens to chance: their two likeliest are nearer than the noise
    every few tokens, so that llama.cpp itself, told to attend in another way, ends in another text
    for half of them (bench/LOG.md). Here layers move logits by a tenth to a half of the largest,
    and most tokens are as sure as most of a trained model's.
    """
    rng, shape = np.random.default_rng(seed), model.weights.table().shape
    table = rng.standard_normal(shape).astype(np.float32)
    head = table[rng.permutation(len(table))] / np.float32(20)
    weights = SimpleNamespace(
        bundles=model.weights.bundles, table=lambda: 3 * table, head=lambda: head
    )
    return SimpleNamespace(spec=model.spec, weights=weights)


@pytest.mark.parametrize("kind", [*KINDS, Type.BF16, *tiny_gguf.BLOCKS, tiny_gguf.q4_k_m],
                         ids=lambda k: getattr(k, "name", None) or k.__name__)  # fmt: skip
@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe"])
def test_greedy_text_of_every_type(model_type, kind, llama, tmp_path, seed_base, measured):
    """With layers in one type, ten random models go on as llama.cpp does, for 64 tokens."""

    def type_of(name: str):
        if name.startswith(("token_embd", "output.")):
            return Type.F32
        return kind if isinstance(kind, Type) else kind(name)

    equal = 0
    for seed in range(seed_base, seed_base + SEEDS):
        drawn = computable(tmp_path / "drawn", model_type, 1000 * seed, 256)
        path = tiny_gguf.write(tmp_path / "m.gguf", decided(drawn, seed), type_of)
        converters.convert(path, tmp_path / "m.edgemem", force=True)
        with edgemem.load(tmp_path / "m.edgemem", context=CONTEXT) as engine:
            other = engine.session().feed
            equal += not gaps(feeder(llama(path)), other, drawn.ids[:16]).any()
        shutil.rmtree(tmp_path / "drawn")
    name = getattr(kind, "name", None) or kind.__name__
    measured(f"{model_type} {name}: {equal} of {SEEDS} greedy texts equal")
    assert equal >= SEEDS - 1


def computable_of_family(folder, family: str, first_seed: int) -> tiny.Tiny:
    """Likewise; of Phi-3 without windows, which llama.cpp leaves out, and with the long factors,
    which it takes for short texts too where the context is long; of GLM without groups; of
    Gemma 3 with the scaling that there is, since of YaRN it leaves a part to layers that slide; of
    gpt-oss with whole numbers as YaRN's bounds, since it rounds them."""
    facts = tiny_gguf.facts(family, first_seed) | FAMILY_FACTS.get(family, {})
    facts |= {"norm_eps": 1e-5, "max_positions": 512}
    biased = {"gpt_neox": True, "gpt_oss": True, "gemma2": False, "gemma3_text": False}.get(family)
    for seed in range(first_seed, first_seed + 100):
        model = tiny.write(folder / str(seed), family, seed, dtype="F32", **facts)
        rope = model.spec.rope
        short = rope.type == "longrope" and not rope.is_long(tiny.IDS_COUNT)
        if not short and biased in (None, "q_bias" in model.weights.dense(0)):
            return model
    raise AssertionError("no seed draws what llama.cpp computes")


FAMILY_FACTS = {
    "gemma2": {"attention_cap": 50.0, "logit_cap": 30.0}, "gpt_neox": {"tied": False},
    "gemma3_text": {"rope": RopeSpec("linear", 1e6, 8.0)},
    "phi3": {"n_layers": 2, "routed": (False, False), "windows": (0, 0)},
    "glm4_moe": {"n_groups": 0, "top_groups": 0},
    "gpt_oss": {
        "hidden": 64, "n_heads": 4, "n_kv_heads": 2, "head_dim": 16, "tied": False,
        "windows": (16, 0, 16),
        "rope": RopeSpec("yarn", round((128 / (2 * np.pi)) ** 4) + 1.0, 4.0, 128, truncate=False),
    },
}  # fmt: skip
JUDGED = [f for f in FAMILIES if f != "phimoe" and not f.startswith("deepseek")]
"""Of Phi-3.5-MoE llama.cpp takes no mean off in norms, and weighs experts by a softmax; latents are
below."""


@pytest.mark.parametrize("family", JUDGED)
@pytest.mark.parametrize("nth", range(2))
def test_logits_of_families_agree(family, nth, llama, tmp_path, seed_base):
    """llama.cpp looks GELU up in a table of f16."""
    model = computable_of_family(tmp_path, family, seed_base + 101 * nth)
    path = tiny_gguf.write(tmp_path / "m.gguf", model)
    converters.convert(path, tmp_path / "m.edgemem")
    with edgemem.load(tmp_path / "m.edgemem", context=CONTEXT, kv="f32") as engine:
        found = engine.logits(model.ids)
    error = oracle.relative_error(found, logits(llama(path, **CACHES["f32"]), model.ids))
    print(f"{family}: logits differ by {error:.1e} of the largest")
    assert error <= (GELU_BOUND if model.spec.activation.startswith("gelu") else FLOAT_BOUND)


def test_logits_of_experts_in_mxfp4_agree(llama, tmp_path, seed_base):
    facts = gpt_oss.MXFP4 | FAMILY_FACTS["gpt_oss"]
    for seed in range(seed_base, seed_base + 100):
        model = tiny.write(tmp_path / str(seed), "gpt_oss", seed, dtype="F32", **facts)
        if "q_bias" in model.weights.dense(0):
            break
    path = tiny_gguf.write(
        tmp_path / "m.gguf", model, lambda name: Type.MXFP4 if "_exps.w" in name else Type.F32
    )
    converters.convert(path, tmp_path / "m.edgemem")
    found = edgemem.load(tmp_path / "m.edgemem", context=CONTEXT).logits(model.ids)
    error = oracle.relative_error(found, logits(llama(path), model.ids))
    print(f"gpt_oss with experts in MXFP4: logits differ by {error:.1e} of the largest")
    assert error <= BLOCKS_BOUND


@pytest.mark.parametrize("seed", range(4))  # files of both layouts, with yarn and without
@pytest.mark.parametrize("model_type", ["deepseek_v2", "deepseek_v3"])
def test_logits_of_latents_agree(model_type, seed, llama, tmp_path, seed_base):
    """Where llama.cpp computes what transformers does: it judges groups of experts by two of each,
    whatever scores are, and has one epsilon for all norms."""
    facts = tiny_gguf.facts(model_type, seed) | {"norm_eps": 1e-6, "tied": False, "q_rank": 16}
    groups = (0, 0) if model_type == "deepseek_v2" else (4, 2)
    facts |= {"n_experts": 8, "top_k": 2, "n_groups": groups[0], "top_groups": groups[1]}
    for attempt in range(100):
        where, drawn = tmp_path / f"{attempt}", seed_base + seed + 10 * attempt
        model = tiny.write(where, model_type, drawn, dtype="F32", **facts)
        if "k_bias" not in model.weights.dense(0):
            break
    path = tiny_gguf.write(tmp_path / "m.gguf", model)
    converters.convert(path, tmp_path / "m.edgemem")
    found = edgemem.load(tmp_path / "m.edgemem", context=CONTEXT).logits(model.ids)
    error = oracle.relative_error(found, logits(llama(path), model.ids))
    print(f"{model_type} {seed}: logits differ by {error:.1e} of the largest")
    assert error <= KINDS[Type.F32]


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


class Trained:
    """A trained checkpoint as a GGUF of one number format: in llama.cpp, and as a store here."""

    def __init__(self, name: str, kind, kv, folder, llama, convert_store, wikitext, shared):
        source, path = shared / "models" / name, folder / "m.gguf"
        as_gguf(path, convert_store(source), kind)
        converters.convert(path, folder / "m.edgemem")
        self.engine = edgemem.load(folder / "m.edgemem", context=CONTEXT, kv=kv)
        self.judge = llama(path, **CACHES[kv])
        self.flash = llama(path, **CACHES[kv], flash_attn=True)
        tokenizer = oracle.tokenizer(source)
        pieces = wikitext.split("\n =")[1 : SEEDS + 1]
        texts = STARTS if name == "stories260k" else pieces
        self.prompts = [tokenizer.encode(text[:200]).ids[:24] for text in texts]
        self.pieces = [tokenizer.encode(text).ids[:8] for text in wikitext.split("\n =")[1:61]]

    def same(self, sequences) -> np.ndarray:
        """For each sequence, whether all logits are llama.cpp's but for the order of sums."""
        errors = [
            oracle.relative_error(self.engine.logits(ids), logits(self.judge, ids))
            for ids in sequences
        ]
        return np.array(errors) <= SAME

    def gaps(self, other=None) -> np.ndarray:
        """`gaps` of all prompts between llama.cpp and the engine (or `other`): [SEEDS, tokens]."""
        return np.array([
            gaps(feeder(self.judge), feeder(other) if other else self.engine.session().feed, prompt)
            for prompt in self.prompts
        ])  # fmt: skip


@pytest.fixture
def trained(llama, convert_store, tmp_path, wikitext, shared):
    """trained(name, kind, kv="f16") → a `Trained`, with caches of that type on both sides."""

    def make(name: str, kind, kv: str = "f16") -> Trained:
        folder = tmp_path / kv
        folder.mkdir()
        return Trained(name, kind, kv, folder, llama, convert_store, wikitext, shared)

    return make


trained_models = pytest.mark.parametrize("name", ["stories260k", "tiny-moe"])
quantised = pytest.mark.parametrize("kind", [Type.Q8_0, Type.Q4_0], ids=lambda k: k.name)


@quantised
@trained_models
def test_products_are_the_same(name, kind, trained, measured):
    """A token alone attends to itself, so attention rounds nothing: the rest is llama.cpp's."""
    model = trained(name, kind)
    same = model.same([[id] for id in range(300)])
    measured(f"{name} {kind.name}: of 300 tokens alone {same.mean():.0%} have the same logits")
    assert same.mean() >= 0.9


def gaps(judge, other, prompt) -> np.ndarray:
    """Where `other` would continue the judge's greedy text otherwise, and by how little, [tokens].

    0 where both choose the same; else how much likelier the judge finds its own choice, over its
    largest logit. Both go on with the judge's.
    """
    found = np.zeros(GREEDY_TOKENS)
    theirs, ours = judge(prompt), other(prompt)
    for i in range(GREEDY_TOKENS):
        chosen = int(theirs.argmax())
        found[i] = (theirs[chosen] - theirs[int(ours.argmax())]) / np.abs(theirs).max()
        theirs, ours = judge([chosen]), other([chosen])
    return found


def feeder(model):
    """feed(ids) → the logits after them, for a new sequence in llama.cpp."""
    model.reset()

    def feed(ids) -> np.ndarray:
        model.eval(ids)
        return model.scores[model.n_tokens - 1].copy()

    return feed


@pytest.mark.parametrize("kind", TIES, ids=lambda k: k.name)
@trained_models
def test_greedy_tokens_are_equal(name, kind, trained, measured):
    """Trained models continue ten pieces of text alike, but for near ties.

    Where llama.cpp itself finds two tokens about as likely, either may come first; the text then
    goes on with llama.cpp's. llama.cpp with flash attention shows how many ties to expect.
    """
    model = trained(name, kind)
    ours, theirs = model.gaps(), model.gaps(model.flash)
    measured(
        f"{name} {kind.name}: {sum(~ours.any(1))} of {SEEDS} texts equal, {np.mean(ours == 0):.1%} "
        f"of tokens, others likelier by {np.sort(ours[ours > 0])[::-1]}; llama.cpp's own flash "
        f"attention: {sum(~theirs.any(1))}, {np.mean(theirs == 0):.1%}, {theirs.max():.4f}"
    )
    assert ours.shape == (SEEDS, GREEDY_TOKENS)
    assert ours.max() <= TIES[kind]
    assert np.mean(ours > 0) <= 0.02


@quantised
@trained_models
def test_attention_is_all_that_differs(name, kind, trained, measured):
    """With caches of f32 nobody rounds anything in attention: short texts have the same logits, and
    the greedy texts are equal. The order of sums is left, and it turns a rounding now and then:
    more often in the larger model, which rounds four times as many numbers for a token, and whose
    two likeliest tokens are often nearer than that."""
    rounded, exact = trained(name, kind), trained(name, kind, "f32")
    before, same = rounded.same(rounded.pieces), exact.same(exact.pieces)
    found = exact.gaps()
    equal = int(sum(~found.any(1)))
    measured(
        f"{name} {kind.name} with f32 caches: {same.mean():.0%} of {len(same)} texts have the same "
        f"logits ({before.mean():.0%} with f16), {equal} of {SEEDS} greedy texts are equal, other "
        f"tokens likelier by at most {found.max():.4f}"
    )
    same_texts, equal_texts = {"stories260k": (0.9, 9), "tiny-moe": (0.3, 5)}[name]
    assert before.mean() <= 0.1 and same.mean() >= same_texts and equal >= equal_texts
    assert found.max() <= TIES[kind] / 5
