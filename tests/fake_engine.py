"""An engine without a model: its logits are a function of the tokens so far; it counts steps.

Sessions, generations and sequences see of an engine only what this class has.
"""

from types import SimpleNamespace

import numpy as np
from tokenizers import Tokenizer as Inner
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from edgemem.tokenizer import Tokenizer


class FakeKv:
    """Remembers the tokens themselves where a real cache holds their keys and values, and the
    factors that longrope gave each."""

    def __init__(self):
        self.ids, self.long = [], []
        self.rope_length = 0

    @property
    def position(self):
        return len(self.ids)

    def truncate(self, position):
        assert 0 <= position <= len(self.ids)
        del self.ids[position:], self.long[position:]


class FakeEngine:
    """`follow(ids) -> next id` makes greedy decoding follow a script; else it is pseudo-random.

    `fail` is called at the start and at the end of every step, and may raise. `ropes` are those of
    a spec: of a step's keys all must have the same factors.
    """

    def __init__(
        self, tokenizer, context=64, chunk_tokens=8, eos_ids=(), bos_id=None, follow=None, ropes=()
    ):
        self.tokenizer = tokenizer
        self.spec = SimpleNamespace(vocab_size=tokenizer.vocab_size, ropes=ropes)
        self.context, self.context_limit = context, 4 * context
        self.chunk_tokens = self.logits_tokens = chunk_tokens
        self.eos_ids, self.bos_id = frozenset(eos_ids), bos_id
        self.follow = follow
        self.fail = lambda: None
        self.steps = []
        self.caches = 0

    def new_kv(self):
        self.caches += 1
        return FakeKv()

    def free_kv(self):
        self.caches -= 1

    def promise_all_logits(self):
        pass

    def promise_text(self, size):
        pass

    def logits_after(self, ids):
        rng = np.random.default_rng([len(ids), *ids])
        logits = rng.normal(size=self.spec.vocab_size).astype(np.float32)
        if self.follow is not None:
            logits[self.follow(list(ids))] += 100
        return logits

    def step(self, ids, kv, phase, out):
        assert 1 <= len(ids) <= self.chunk_tokens
        assert kv.position + len(ids) <= self.context
        assert kv.rope_length >= kv.position + len(ids)
        self.fail()
        self.steps.append((phase, len(ids)))
        start = kv.position
        kv.ids += ids.tolist()
        long = [rope.is_long(kv.rope_length) for rope in self.spec.ropes]
        kv.long += [long] * len(ids)
        assert kv.long == [long] * len(kv.long)
        if out is not None and out.ndim == 2:
            for i in range(len(ids)):
                out[i] = self.logits_after(kv.ids[: start + i + 1])
        elif out is not None:
            out[:] = self.logits_after(kv.ids)
        self.fail()


def byte_level(merges=(), special=("<|end|>",)) -> Tokenizer:
    """A GPT-2-like tokenizer: one token a byte, plus `merges`, plus special tokens at the end."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: id for id, char in enumerate(alphabet)}
    for left, right in merges:
        vocab[left + right] = len(vocab)
    inner = Inner(models.BPE(vocab=vocab, merges=list(merges)))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(list(special))
    return Tokenizer(inner.to_str().encode())


def byte_fallback(words=("▁", "a", "b", "é", "▁a", "▁▁", "<", "0x"), bos=True) -> Tokenizer:
    """A Llama-2-like tokenizer: some pieces, 256 byte tokens; its decoder strips one space."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for piece in [f"<0x{byte:02X}>" for byte in range(256)] + list(words):
        vocab[piece] = len(vocab)
    inner = Inner(
        models.BPE(vocab=vocab, merges=[("▁", "a")], unk_token="<unk>", byte_fallback=True)
    )
    inner.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    inner.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    inner.add_special_tokens(["<unk>", "<s>", "</s>"])
    if bos:
        inner.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
        )
    return Tokenizer(inner.to_str().encode(), {"bos_token": "<s>"})
