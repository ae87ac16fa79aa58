/* Prints the instruction set that the core picks on the machine it finds itself on. */
#include "edgemem.h"

#include <stdio.h>

int main(void) {
    em_core *core;
    if (em_core_open(1, NULL, &core) != EM_OK) return 1;
    puts(em_core_isa(core));
    em_core_close(core);
    return 0;
}
