/* Choosing an engine. */
#include "io.h"

#include <string.h>

int32_t em_io_open(int fd, const char *name, int32_t depth, const em_faults *faults,
                   const em_io_engine **engine, em_io **io) {
    const em_io_engine *all[] = {
#if defined(__linux__)
        &em_io_uring,
#endif
        &em_io_threads,
    };
    em_io_setup setup = {.fd = fd, .depth = depth};
    int32_t status = EM_UNSUPPORTED;
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) {
        if (name && strcmp(name, all[i]->name) != 0) continue;
        *engine = all[i];
        if (faults) {
            setup.inner = all[i];
            setup.faults = *faults;
            *engine = &em_io_fault;
        }
        status = (*engine)->open(&setup, io);
        if (status == EM_OK) return EM_OK;
        *io = NULL;
    }
    return status;
}
