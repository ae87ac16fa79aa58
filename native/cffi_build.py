"""Write the C source of the Python module `edgemem._core` from the marked regions of the core's
headers, each after those that it includes.

Usage: cffi_build.py HEADER... OUTPUT.c
"""

import re
import sys

import cffi

CALLED_BACK = """
extern "Python" int32_t edgemem_observe(void *, int32_t, uint32_t const *, int32_t,
                                        int32_t const *, int32_t);
extern "Python" int32_t edgemem_pause(void *, int32_t, uint32_t const *, int32_t,
                                      int32_t const *, int32_t);
extern "Python" int32_t edgemem_record(void *, int32_t, uint32_t const *, int32_t,
                                       int32_t const *, int32_t);
extern "Python" int32_t edgemem_record_rows(void *, int32_t, uint32_t const *, int32_t,
                                            int32_t const *, int32_t);
"""
"""What the core calls in Python, each an em_observer; edgemem/streamer.py says what they do."""


def main(*paths: str) -> None:
    *headers, output = paths
    builder = cffi.FFI()
    for header in headers:
        with open(header, encoding="utf-8") as file:
            marked = re.search(r"/\* cdef:.*?\*/(.*)/\* end cdef \*/", file.read(), re.S)
        builder.cdef(marked.group(1))
    builder.cdef(CALLED_BACK)
    builder.set_source("edgemem._core", '#include "edgemem.h"')
    builder.emit_c_code(output)


if __name__ == "__main__":
    main(*sys.argv[1:])
