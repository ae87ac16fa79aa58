"""One measurement of `bench.peers` or `bench.offload`: `python -m bench.peer_models JSON`.

It is a process of its own, and prints one JSON object a line as soon as it is known, so that
whoever ends it knows how far it came: `facts`, `prefill` (seconds), `step` (seconds, once a token),
`peak_rss`.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import random
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

BATCH = 512
"""Tokens that llama.cpp takes at once."""
READ_BYTES = 1 << 30
"""What is read to learn the rates of device and memory."""
_PIECE_BYTES, _DEPTH = 1 << 20, 8


class EdgeMem:
    """A store, inside `memory` bytes, or all of this machine's."""

    def __init__(self, case: dict):
        import edgemem

        memory = case["memory"] or "100%"
        self._engine = edgemem.load(
            case["path"], memory=memory, context=case["context"], threads=case["threads"]
        )
        self.facts = {"isa": self._engine.isa, "threads": self._engine.threads}
        self.restart()

    def restart(self) -> None:
        """Forget all tokens."""
        self._session = None  # its KV cache first: only one is in the budget
        self._session = self._engine.session()

    def feed(self, ids: np.ndarray) -> np.ndarray:
        """One prefill or step; the logits of the last id."""
        return self._session.feed(ids)

    def last_facts(self) -> dict:
        """How many bytes streamed in all; 0 where the model is resident."""
        return {"read_bytes": sum(s.counters["read_bytes"] for s in self._engine.trace.recent)}


class LlamaCpp:
    """A GGUF file in llama.cpp, by its C interface: nothing of Python between its steps.

    Mapped weights stay as they are in the file: repacked they would be a second, unmapped copy.
    """

    def __init__(self, case: dict):
        import llama_cpp

        self._lib = llama_cpp
        self._quiet = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._quiet, ctypes.c_void_p())
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 0
        params.use_extra_bufts = case["repack"]
        if hasattr(params, "load_mode"):
            modes = llama_cpp.LLAMA_LOAD_MODE_NONE, llama_cpp.LLAMA_LOAD_MODE_MMAP
            params.load_mode = modes[case["mmap"]]
        else:  # before llama-cpp-python 0.3.3x
            params.use_mmap = case["mmap"]
        self._model = llama_cpp.llama_model_load_from_file(case["path"].encode(), params)
        if not self._model:
            sys.exit(f"llama.cpp did not load {case['path']}")
        self._context = self._new_context(case)
        info = llama_cpp.llama_print_system_info().decode()
        self.facts = {"version": llama_cpp.__version__, "system_info": " ".join(info.split())}

    def _new_context(self, case: dict):
        params = self._lib.llama_context_default_params()
        params.n_ctx = case["context"]
        params.n_batch = params.n_ubatch = BATCH
        params.n_threads = params.n_threads_batch = case["threads"]
        params.flash_attn_type = int(case["flash"])
        params.no_perf = True
        context = self._lib.llama_init_from_model(self._model, params)
        return context or sys.exit("llama.cpp made no context")

    def restart(self) -> None:
        """Forget all tokens."""
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)

    def feed(self, ids: np.ndarray) -> None:
        """One prefill or step; makes the logits of the last id."""
        for start in range(0, len(ids), BATCH):
            part = ids[start : start + BATCH].tolist()
            tokens = (self._lib.llama_token * len(part))(*part)
            batch = self._lib.llama_batch_get_one(tokens, len(part))
            status = self._lib.llama_decode(self._context, batch)
            if status:
                sys.exit(f"llama_decode failed: {status}")
        self._lib.llama_get_logits_ith(self._context, -1)

    def last_facts(self) -> dict:
        """Nothing more is known."""
        return {}


class Transformers:
    """A Hugging Face folder in transformers: all of it in memory, or as much as fits `keep` bytes,
    and accelerate fetches the rest from the disk, layer by layer, for every step."""

    def __init__(self, case: dict):
        # Threads that spin while others have the processors made a step 5 to 8 times as long.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        import torch
        import transformers

        torch.set_num_threads(case["threads"])
        options, self.facts = {}, {"version": transformers.__version__, "torch": torch.__version__}
        if case["keep"] is not None:
            import accelerate

            self.facts["accelerate"] = accelerate.__version__
            options = {
                "device_map": "auto", "max_memory": {"cpu": case["keep"]},
                "offload_folder": case["offload"],
            }  # fmt: skip
        load = transformers.AutoModelForCausalLM.from_pretrained
        self._torch, self._model = torch, load(case["path"], dtype="auto", **options).eval()
        places = getattr(self._model, "hf_device_map", {}).values()
        self.facts["modules_on_disk"] = sum(place == "disk" for place in places)
        self.restart()

    def restart(self) -> None:
        """Forget all tokens."""
        self._cache = None

    def feed(self, ids: np.ndarray) -> np.ndarray:
        """One prefill or step; the logits of the last id."""
        with self._torch.inference_mode():
            found = self._model(
                input_ids=self._torch.from_numpy(ids.astype(np.int64))[None],
                past_key_values=self._cache, use_cache=True, logits_to_keep=1,
            )  # fmt: skip
            self._cache = found.past_key_values
            return found.logits[0, -1].float().numpy()

    def last_facts(self) -> dict:
        """Nothing more is known."""
        return {}


ENGINES = {"edgemem": EdgeMem, "llama.cpp": LlamaCpp, "transformers": Transformers}


def measure(case: dict) -> None:
    """Prefill of `prompt` tokens and `tokens` single steps; `warm`: after one run of the same.

    With `logits`, the name of a file, those after the prompt and after each step are kept there,
    float32 [1 + tokens, vocab].
    """
    ids = np.random.default_rng(case["seed"]).integers(2, case["vocab"], case["context"])
    ids = ids.astype(np.int32)
    started = time.perf_counter()
    model = ENGINES[case["engine"]](case)
    tell(facts={"load_seconds": time.perf_counter() - started} | model.facts)
    prompt, tokens = case["prompt"], case["tokens"]
    if case["warm"]:
        model.feed(ids[:prompt])
        model.feed(ids[prompt : prompt + 1])
        model.restart()
    tell(warm=True)
    started = time.perf_counter()
    logits = [model.feed(ids[:prompt])]
    tell(prefill=time.perf_counter() - started)
    reads = [bytes_read()]
    for at in range(prompt, prompt + tokens):
        started = time.perf_counter()
        found = model.feed(ids[at : at + 1])
        tell(step=time.perf_counter() - started)
        reads.append(bytes_read())
        if "logits" in case:
            logits.append(found)
    if "logits" in case:
        np.save(case["logits"], logits)
    tell(facts=model.last_facts() | {"step_reads": np.diff(reads).tolist()})
    tell(peak_rss=peak_rss("self"))


def tell(**facts) -> None:
    """One line for the parent, at once."""
    print(json.dumps(facts), flush=True)


def peak_rss(pid: int | str) -> int:
    """The largest number of resident bytes that a process has had; 0 where it is not known."""
    try:
        with open(f"/proc/{pid}/status", encoding="ascii") as file:
            return next(int(line.split()[1]) << 10 for line in file if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return 0


def bytes_read() -> int:
    """What this process has had read from devices, mapped files too; 0 where it is not known."""
    try:
        with open("/proc/self/io", encoding="ascii") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("read_bytes"))
    except (OSError, StopIteration):
        return 0


def ceilings(case: dict) -> None:
    """Bytes per second of plain reads: of the store past the page cache, and of memory."""
    from bench.harness import PlainRead
    from edgemem.kernels import Core

    tell(device=device_rate(case["path"], case.get("round", 0)))
    read = PlainRead(Core(case["threads"]), min(READ_BYTES, os.path.getsize(case["path"])))
    rates = []
    for _ in range(4):
        started = time.perf_counter()
        rates.append(read() / (time.perf_counter() - started))
    tell(memory=statistics.median(rates[1:]))


def device_rate(path: str, seed: int) -> float:
    """Reads some of a file with O_DIRECT, in order from anywhere, several pieces in flight."""
    fd = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
    pieces = max(1, os.path.getsize(path) // _PIECE_BYTES)
    count = min(pieces, READ_BYTES // _PIECE_BYTES)
    first = random.Random(seed).randint(0, pieces - count)
    buffers = [mmap.mmap(-1, _PIECE_BYTES) for _ in range(_DEPTH)]

    def read(lane: int) -> int:
        places = range(first + lane, first + count, _DEPTH)
        return sum(os.preadv(fd, [buffers[lane]], at * _PIECE_BYTES) for at in places)

    try:
        with ThreadPoolExecutor(_DEPTH) as pool:
            started = time.perf_counter()
            return sum(pool.map(read, range(_DEPTH))) / (time.perf_counter() - started)
    finally:
        os.close(fd)


def die_first() -> None:
    """Should memory run out, the system is to end this process and no other."""
    try:
        with open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
            file.write("1000")
    except OSError:  # not Linux
        pass


def main() -> None:
    case = json.loads(sys.argv[1])
    die_first()
    ceilings(case) if case["engine"] == "ceilings" else measure(case)


if __name__ == "__main__":
    main()
