/* What only reads need to know of slots: which one each row has. */
#ifndef EM_ROW_SLOTS_H
#define EM_ROW_SLOTS_H

#include "flash.h"

/* Of a row that has a slot. */
int32_t em_row_slots_of(const em_row_slots *slots, int32_t id);
/* A row that has a slot loses it. */
void em_row_slots_vacate(em_row_slots *slots, int32_t id);
/* Nothing is there any more, and nothing is known of what was used. */
void em_row_slots_forget(em_row_slots *slots);

#endif
