"""llama.cpp's own product, through the C interface of the ggml that llama-cpp-python brings.

Weights lie as llama.cpp would load them: repacked for this processor where it has such a form.
"""

import ctypes
from ctypes import POINTER, c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p

import numpy as np

from edgemem.dtypes import BLOCK, BY_NAME

TYPES = {
    "f32": 0, "f16": 1, "bf16": 30, "q8_0": 8, "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7,
    "q2_k": 10, "q3_k": 11, "q4_k": 12, "q5_k": 13, "q6_k": 14, "iq4_nl": 20, "iq4_xs": 23,
    "mxfp4": 39,
}  # fmt: skip
"""ggml's codes of number formats."""
OUTPUT_BYTES = 64 << 20
"""What the results of all products of one `GgmlProduct` may take."""
_TENSOR_BYTES = 4096  # of ggml's own notes on one tensor and one node: far more than they take


class NoGgml(Exception):
    """llama-cpp-python is not installed, or its ggml is not one that is known here."""


class _InitParams(ctypes.Structure):
    _fields_ = [("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool)]


_QUIET = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)(lambda *_: None)
"""What ggml logs with, for the whole process: it must outlive every `Ggml`."""
_SIGNATURES = {
    "ggml_log_set": (None, [c_void_p, c_void_p]),
    "ggml_init": (c_void_p, [_InitParams]),
    "ggml_free": (None, [c_void_p]),
    "ggml_new_tensor_2d": (c_void_p, [c_void_p, c_int, c_int64, c_int64]),
    "ggml_nbytes": (c_size_t, [c_void_p]),
    "ggml_mul_mat": (c_void_p, [c_void_p, c_void_p, c_void_p]),
    "ggml_new_graph_custom": (c_void_p, [c_void_p, c_size_t, c_bool]),
    "ggml_build_forward_expand": (None, [c_void_p, c_void_p]),
    "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, [c_void_p, c_void_p]),
    "ggml_backend_alloc_ctx_tensors": (c_void_p, [c_void_p, c_void_p]),
    "ggml_backend_buffer_free": (None, [c_void_p]),
    "ggml_backend_buft_name": (c_char_p, [c_void_p]),
    "ggml_backend_dev_buffer_type": (c_void_p, [c_void_p]),
    "ggml_backend_dev_supports_op": (c_bool, [c_void_p, c_void_p]),
    "ggml_backend_get_device": (c_void_p, [c_void_p]),
    "ggml_backend_graph_compute": (c_int, [c_void_p, c_void_p]),
    "ggml_backend_reg_get_proc_address": (c_void_p, [c_void_p, c_char_p]),
    "ggml_backend_tensor_get": (None, [c_void_p, c_void_p, c_size_t, c_size_t]),
    "ggml_backend_tensor_set": (None, [c_void_p, c_void_p, c_size_t, c_size_t]),
    "ggml_backend_cpu_init": (c_void_p, []),
    "ggml_backend_cpu_reg": (c_void_p, []),
    "ggml_backend_cpu_set_n_threads": (None, [c_void_p, c_int]),
}


class Ggml:
    """ggml's functions and its processor backend. Raises NoGgml."""

    def __init__(self):
        try:
            import llama_cpp.llama_cpp
        except (ImportError, OSError, RuntimeError) as error:
            raise NoGgml(f"llama-cpp-python is not to be had: {error}") from error
        self.version = llama_cpp.__version__
        # What it has loaded and what that needs: the files beside it are copies with another state.
        library = ctypes.CDLL(None, handle=llama_cpp.llama_cpp._lib._handle)
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, name, None)
            if function is None:
                raise NoGgml(f"the ggml of llama-cpp-python {self.version} has no {name}")
            function.restype, function.argtypes = result, arguments
            setattr(self, name.removeprefix("ggml_"), function)
        self.log_set(_QUIET, None)
        self.backend = self.backend_cpu_init()
        self.device = self.backend_get_device(self.backend)

    def context(self, tensors: int) -> int:
        """Room for notes on so many tensors; their data is allocated later."""
        return self.init(_InitParams((tensors + 64) * _TENSOR_BYTES, None, True))

    def weight_layouts(self) -> list[int]:
        """Buffer types in the order in which llama.cpp tries them: repacking ones, then plain."""
        find = self.backend_reg_get_proc_address(
            self.backend_cpu_reg(), b"ggml_backend_dev_get_extra_bufts"
        )
        found = []
        if find:
            extra = ctypes.CFUNCTYPE(POINTER(c_void_p), c_void_p)(find)(self.device)
            while extra and extra[len(found)]:
                found.append(extra[len(found)])
        return [*found, self.backend_dev_buffer_type(self.device)]


class GgmlProduct:
    """`places` matrices of one form, each in memory of its own, times x [tokens, cols].

    `layout` is ggml's name of how the weights lie. Close it when done. Raises NoGgml, and
    ValueError for columns that are no whole blocks: ggml would end the process.
    """

    def __init__(self, ggml: Ggml, dtype: str, rows: int, cols: int, tokens: int, places: int):
        block = max(BLOCK, BY_NAME[dtype].block)
        if cols % block:
            raise ValueError(f"ggml multiplies whole blocks of {block} columns: {cols}")
        self._ggml, self._form = ggml, (TYPES[dtype], rows, cols, tokens)
        self._buffers, self._contexts, self._graphs, self._at = [], [], {}, 0
        places = max(1, min(places, OUTPUT_BYTES // (4 * rows * tokens)))
        layout = self._best_layout()
        self.layout = ggml.backend_buft_name(layout).decode()
        self._weights, self._x, self._outputs = self._tensors(places, layout)
        self._size = ggml.nbytes(self._weights[0])

    def _tensors(self, places: int, layout: int) -> tuple[list[int], int, list[int]]:
        """Weights, x and products, with memory for all of them."""
        ggml, (dtype, rows, cols, tokens) = self._ggml, self._form
        weights_context, context = ggml.context(places), ggml.context(places + 1)
        self._contexts += [weights_context, context]
        weights = [ggml.new_tensor_2d(weights_context, dtype, cols, rows) for _ in range(places)]
        x = ggml.new_tensor_2d(context, TYPES["f32"], cols, tokens)
        outputs = [ggml.mul_mat(context, w, x) for w in weights]
        for buffer in (
            ggml.backend_alloc_ctx_tensors_from_buft(weights_context, layout),
            ggml.backend_alloc_ctx_tensors(context, ggml.backend),
        ):
            if not buffer:
                raise NoGgml(f"llama.cpp found no memory for {places} matrices of {rows}x{cols}")
            self._buffers.append(buffer)
        return weights, x, outputs

    def _best_layout(self) -> int:
        """The first in which this processor has the product."""
        *repacking, plain = self._ggml.weight_layouts()
        for layout in repacking:
            _, _, outputs = self._tensors(1, layout)
            fits = self._ggml.backend_dev_supports_op(self._ggml.device, outputs[0])
            self.close()
            if fits:
                return layout
        return plain

    def fill(self, weights: np.ndarray, x: np.ndarray) -> None:
        """The same weights everywhere, as bytes of ggml's own form (more than they are may be
        given), repacked where that is due; and x, float32 [tokens, cols]."""
        put = self._ggml.backend_tensor_set
        for tensor in self._weights:
            put(tensor, weights.ctypes.data, 0, self._size)
        put(self._x, x.ctypes.data, 0, x.nbytes)

    def result(self) -> np.ndarray:
        """What the first place gave when it was run last, float32 [tokens, rows]."""
        _, rows, _, tokens = self._form
        out = np.empty((tokens, rows), np.float32)
        self._ggml.backend_tensor_get(self._outputs[0], out.ctypes.data, 0, out.nbytes)
        return out

    def run(self, calls: int, threads: int) -> None:
        """So many products, at the places that follow the last one's; in one graph, as a model's
        layers are, or where there are too few places in several."""
        self._ggml.backend_cpu_set_n_threads(self._ggml.backend, threads)
        if self._at + calls > len(self._outputs):
            self._at = 0  # the same few graphs again: making them is not what a product takes
        while calls > 0:
            here = min(calls, len(self._outputs) - self._at)
            graph = self._graph(self._at, here)
            if self._ggml.backend_graph_compute(self._ggml.backend, graph):
                raise NoGgml("llama.cpp did not compute a product")
            self._at = (self._at + here) % len(self._outputs)
            calls -= here

    def _graph(self, start: int, count: int) -> int:
        if (start, count) not in self._graphs:
            context = self._ggml.context(2 * count)
            self._contexts.append(context)
            graph = self._ggml.new_graph_custom(context, 2 * count + 8, False)
            for output in self._outputs[start : start + count]:
                self._ggml.build_forward_expand(graph, output)
            self._graphs[start, count] = graph
        return self._graphs[start, count]

    def close(self) -> None:
        """Give all memory back."""
        for buffer in self._buffers:
            self._ggml.backend_buffer_free(buffer)
        for context in self._contexts:
            self._ggml.free(context)
        self._buffers, self._contexts, self._graphs = [], [], {}
