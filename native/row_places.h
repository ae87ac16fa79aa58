/* What only reads need to know of places: which slot each row has. */
#ifndef EM_ROW_PLACES_H
#define EM_ROW_PLACES_H

#include "flash.h"

/* Of a row that has a place. */
int32_t em_row_places_slot(const em_row_places *places, int32_t id);
/* A row that has a place loses it. */
void em_row_places_vacate(em_row_places *places, int32_t id);
/* Nothing is there any more, and nothing is known of what was used. */
void em_row_places_forget(em_row_places *places);

#endif
