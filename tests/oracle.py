"""The judges of parity: transformers in float32, with eager attention, on the same folder.

Everything here runs outside the product. Loading turns all weights to float32, as the engine's
arithmetic does, so what differs is rounding alone.
"""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch
import transformers

torch.set_num_threads(2)
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


class Oracle:
    """A checkpoint in transformers; feed ids, get the logits of each, feed more."""

    def __init__(self, folder: Path):
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            attn_implementation="eager",
            experts_implementation="eager",  # others refuse rows that are no multiple of 16 bytes
        ).eval()
        self.reset()

    def reset(self) -> None:
        """Forget what was fed.

        The cache is made without the config, so that it keeps all keys and the mask alone cuts the
        window: transformers' sliding cache keeps too many keys for a window of 1. Dynamic rope is
        put back to how it is in a model just loaded; by itself it remembers its longest sequence.
        """
        self._past = transformers.DynamicCache()
        rope = getattr(self.model.base_model, "rotary_emb", None)
        if rope is not None:
            for kind in ("", "full_attention_", "sliding_attention_"):
                if hasattr(rope, f"{kind}original_inv_freq"):
                    setattr(rope, f"{kind}max_seq_len_cached", rope.original_max_seq_len)
                    original = getattr(rope, f"{kind}original_inv_freq")
                    setattr(rope, f"{kind}inv_freq", original.clone())

    @torch.inference_mode()
    def feed(self, ids) -> np.ndarray:
        """Append ids and return their logits, float32 [n, vocab]."""
        out = self.model(torch.tensor([list(ids)]), past_key_values=self._past, use_cache=True)
        return out.logits[0].numpy()

    def logits(self, ids) -> np.ndarray:
        """The logits of ids as a sequence of their own."""
        self.reset()
        return self.feed(ids)

    def greedy(self, ids, count: int, stop=()) -> list[int]:
        """The likeliest tokens after ids, one by one: `count`, or up to one that is in `stop`."""
        out, last = [], self.logits(ids)[-1]
        while len(out) < count:
            out.append(int(last.argmax()))
            if out[-1] in stop:
                break
            last = self.feed(out[-1:])[-1]
        return out

    @torch.inference_mode()
    def negative_log_likelihoods(self, ids, window: int) -> np.ndarray:
        """−log p of every token but the first of each window of `window` ids, float64."""
        parts = []
        for start in range(0, len(ids), window):
            part = torch.tensor(ids[start : start + window])
            if len(part) < 2:
                continue
            logits = self.model(part[None], use_cache=False).logits[0, :-1]
            parts.append(torch.nn.functional.cross_entropy(logits, part[1:], reduction="none"))
        return torch.cat(parts).double().numpy()


def tokenizer(folder: Path):
    """The folder's tokenizer as the tokenizers library reads it."""
    import tokenizers

    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


def relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """max |ours − theirs| / max |theirs|: the norm of every parity bound in these tests."""
    theirs = np.asarray(theirs, np.float64)
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())
