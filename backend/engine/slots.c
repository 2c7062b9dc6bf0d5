/* Slots within slabs: size classes, and the slabs of one kind.
 *
 * A slab belongs to one class, so that freeing a slot needs no search and an emptied slab can serve any class. Classes
 * are 64 bytes apart up to 3,072 bytes, which wastes 1 to 2 % on file pages; one more is for raw pages. A slab without
 * pages is a spare.
 */

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "internal.h"

#define FREE_SLOT UINT32_C(0x80000000)
#define NO_SLOT UINT16_MAX
#define CANDIDATES 16 /* slabs that compaction looks at to find an empty one; more would make it a search */

unsigned slot_size(unsigned size_class) {
    return size_class == RAW_CLASS ? TMEM_PAGE : (size_class + 1) * SLOT_UNIT;
}

unsigned slot_count(unsigned size_class) { return TMEM_SLAB / slot_size(size_class); }

static struct slab *slab_of(const struct tmem *engine, uint32_t place) { return &engine->slabs[place >> SLOT_BITS]; }

uint64_t slot_offset(const struct tmem *engine, uint32_t place) {
    const struct slab *slab = slab_of(engine, place);
    return (uint64_t)slab->number * TMEM_SLAB + (place & ((1u << SLOT_BITS) - 1)) * slot_size(slab->size_class);
}

static void partial_add(struct tmem *engine, struct space *space, uint32_t record) {
    struct slab *slab = &engine->slabs[record];
    slab->previous = NONE;
    slab->next = space->partial[slab->size_class];
    if (slab->next != NONE)
        engine->slabs[slab->next].previous = record;
    space->partial[slab->size_class] = record;
    space->open |= UINT64_C(1) << slab->size_class;
}

static void partial_remove(struct tmem *engine, struct space *space, uint32_t record) {
    struct slab *slab = &engine->slabs[record];
    if (slab->previous != NONE)
        engine->slabs[slab->previous].next = slab->next;
    else
        space->partial[slab->size_class] = slab->next;
    if (slab->next != NONE)
        engine->slabs[slab->next].previous = slab->previous;
    if (space->partial[slab->size_class] == NONE)
        space->open &= ~(UINT64_C(1) << slab->size_class);
}

uint32_t slot_take(struct tmem *engine, struct space *space, unsigned size_class, uint32_t entry) {
    uint32_t record = space->partial[size_class];
    if (record == NONE)
        return NONE;
    struct slab *slab = &engine->slabs[record];
    uint16_t slot = slab->first_free;
    uint32_t next = slab->entries[slot] & ~FREE_SLOT;
    slab->first_free = (uint16_t)next;
    slab->entries[slot] = entry;
    space->free[size_class]--;
    if (!--slab->free_slots)
        partial_remove(engine, space, record);
    return record << SLOT_BITS | slot;
}

uint32_t slot_take_larger(
    struct tmem *engine, struct space *space, unsigned size_class, unsigned most, uint32_t entry) {
    uint64_t larger = space->open >> size_class >> 1;
    if (!larger)
        return NONE;
    unsigned smallest = size_class + 1 + (unsigned)__builtin_ctzll(larger);
    return slot_size(smallest) <= most ? slot_take(engine, space, smallest, entry) : NONE;
}

uint32_t slot_take_spare(struct tmem *engine, struct space *space, unsigned size_class, uint32_t entry) {
    uint32_t record = space->first_spare;
    if (record == NONE)
        return NONE;
    struct slab *slab = &engine->slabs[record];
    unsigned count = slot_count(size_class);
    uint32_t *entries = malloc(count * sizeof *entries);
    if (!entries)
        return NONE;
    for (unsigned slot = 0; slot < count; slot++)
        entries[slot] = FREE_SLOT | (slot + 1 < count ? slot + 1 : NO_SLOT);
    space->first_spare = slab->next;
    space->spares--;
    space->slabs++;
    slab->entries = entries;
    slab->state = SLAB_USED;
    slab->size_class = (uint8_t)size_class;
    slab->free_slots = (uint16_t)count;
    slab->first_free = 0;
    space->free[size_class] += count;
    partial_add(engine, space, record);
    return slot_take(engine, space, size_class, entry);
}

static void make_spare(struct tmem *engine, struct space *space, uint32_t record) {
    struct slab *slab = &engine->slabs[record];
    free(slab->entries);
    slab->entries = NULL;
    slab->state = SLAB_SPARE;
    slab->next = space->first_spare;
    space->first_spare = record;
    space->spares++;
    space->slabs--;
}

void slot_drop(struct tmem *engine, uint32_t place) {
    uint32_t record = place >> SLOT_BITS;
    uint16_t slot = (uint16_t)(place & ((1u << SLOT_BITS) - 1));
    struct slab *slab = &engine->slabs[record];
    struct space *space = &engine->space[slab->persistent];
    unsigned size_class = slab->size_class, count = slot_count(size_class);
    assert(slab->state == SLAB_USED && !(slab->entries[slot] & FREE_SLOT));
    slab->entries[slot] = FREE_SLOT | (slab->free_slots ? slab->first_free : NO_SLOT);
    slab->first_free = slot;
    space->free[size_class]++;
    if (!slab->free_slots++)
        partial_add(engine, space, record);
    if (slab->free_slots == count) {
        partial_remove(engine, space, record);
        space->free[size_class] -= count;
        make_spare(engine, space, record);
    }
    if (space->free[size_class] >= count)
        space->ripe |= UINT64_C(1) << size_class;
}

void slot_rename(struct tmem *engine, uint32_t place, uint32_t entry) {
    slab_of(engine, place)->entries[place & ((1u << SLOT_BITS) - 1)] = entry;
}

/* Return a slab whose pages fit into the free slots of the other slabs of its class; NONE without one. */
static uint32_t emptiest(struct tmem *engine, struct space *space) {
    while (space->ripe) {
        unsigned size_class = (unsigned)__builtin_ctzll(space->ripe);
        uint32_t best = NONE, at = space->partial[size_class];
        if (space->free[size_class] >= slot_count(size_class))
            for (int tried = 0; at != NONE && tried < CANDIDATES; tried++, at = engine->slabs[at].next)
                if (best == NONE || engine->slabs[at].free_slots > engine->slabs[best].free_slots)
                    best = at;
        if (best != NONE)
            return best;
        space->ripe &= ~(UINT64_C(1) << size_class);
    }
    return NONE;
}

/* Tell the page in a slot that it moved: it is a frame's copy, or the page itself. */
static void moved(struct tmem *engine, uint32_t entry, uint32_t place) {
    struct entry *e = &engine->entries[entry];
    if (entry_is(e, FLAG_FRAME))
        engine->frames[e->place].slot = place;
    else
        e->place = place;
}

static unsigned length_in_slot(const struct tmem *engine, uint32_t entry) {
    const struct entry *e = &engine->entries[entry];
    return stored_bytes(entry_is(e, FLAG_FRAME) ? engine->frames[e->place].slot_length : entry_length(e));
}

bool slots_compact(struct tmem *engine, struct space *space) {
    uint32_t record = emptiest(engine, space);
    if (record == NONE)
        return false;
    struct slab *slab = &engine->slabs[record];
    unsigned size_class = slab->size_class, count = slot_count(size_class);
    partial_remove(engine, space, record); /* so that no page is moved into it */
    space->free[size_class] -= slab->free_slots;
    for (uint16_t slot = 0; slot < count; slot++) {
        uint32_t entry = slab->entries[slot], old = record << SLOT_BITS | slot;
        uint8_t buffer[TMEM_PAGE];
        if (entry & FREE_SLOT)
            continue;
        unsigned bytes = length_in_slot(engine, entry);
        const uint8_t *stored = arena_read(engine, old, bytes, buffer);
        uint32_t place = stored ? slot_take(engine, space, size_class, entry) : NONE;
        if (place == NONE)
            break;
        if (!arena_write(engine, place, stored, bytes)) {
            slot_drop(engine, place);
            break;
        }
        moved(engine, entry, place);
        slab->entries[slot] = FREE_SLOT | (slab->free_slots ? slab->first_free : NO_SLOT);
        slab->first_free = slot;
        slab->free_slots++;
    }
    if (slab->free_slots == count) {
        make_spare(engine, space, record);
        return true;
    }
    space->free[size_class] += slab->free_slots;
    if (slab->free_slots)
        partial_add(engine, space, record);
    return false;
}

int slab_add(struct tmem *engine, struct space *space, uint32_t number) {
    if (number >= engine->arena_slabs || engine->record_of[number])
        return -EINVAL;
    uint32_t record = engine->free_slab;
    if (record != NONE)
        engine->free_slab = engine->slabs[record].next;
    else if (engine->slabs_used < TMEM_MAX_SLABS)
        record = engine->slabs_used++;
    else
        return -ENOSPC;
    engine->slabs[record] = (struct slab){
        .number = number, .next = space->first_spare, .state = SLAB_SPARE, .persistent = space->persistent};
    engine->record_of[number] = record + 1;
    space->first_spare = record;
    space->spares++;
    return 0;
}

bool slab_remove_spare(struct tmem *engine, struct space *space, uint32_t *number) {
    uint32_t record = space->first_spare;
    if (record == NONE)
        return false;
    struct slab *slab = &engine->slabs[record];
    *number = slab->number;
    space->first_spare = slab->next;
    space->spares--;
    engine->record_of[slab->number] = 0;
    slab->state = SLAB_UNKNOWN;
    slab->next = engine->free_slab;
    engine->free_slab = record;
    return true;
}

uint32_t slot_entry(const struct tmem *engine, uint32_t record, unsigned slot) {
    uint32_t entry = engine->slabs[record].entries[slot];
    return entry & FREE_SLOT ? NO_ENTRY : entry;
}

/* Remove one certain spare. */
void slab_forget_spare(struct tmem *engine, struct space *space, uint32_t record) {
    uint32_t *link = &space->first_spare, number;
    while (*link != record)
        link = &engine->slabs[*link].next;
    *link = engine->slabs[record].next; /* to the front, where spares are removed from */
    engine->slabs[record].next = space->first_spare;
    space->first_spare = record;
    slab_remove_spare(engine, space, &number);
}

void slots_init(struct tmem *engine) {
    engine->free_slab = NONE;
    for (int kind = 0; kind < 2; kind++) {
        engine->space[kind] = (struct space){.persistent = kind, .first_spare = NONE};
        for (unsigned size_class = 0; size_class < CLASSES; size_class++)
            engine->space[kind].partial[size_class] = NONE;
    }
}

void slots_check(const struct tmem *engine) {
    for (int kind = 0; kind < 2; kind++) {
        const struct space *space = &engine->space[kind];
        uint32_t used = 0, spares = 0, free[CLASSES] = {0}, partial[CLASSES] = {0}, listed[CLASSES] = {0};
        for (uint32_t record = 0; record < engine->slabs_used; record++) {
            const struct slab *slab = &engine->slabs[record];
            if (slab->state == SLAB_UNKNOWN || slab->persistent != space->persistent)
                continue;
            assert(engine->record_of[slab->number] == record + 1);
            if (slab->state == SLAB_SPARE) {
                spares++;
                continue;
            }
            used++;
            unsigned count = slot_count(slab->size_class), empty = 0;
            for (unsigned slot = 0; slot < count; slot++) {
                uint32_t entry = slab->entries[slot];
                if (entry & FREE_SLOT) {
                    empty++;
                    continue;
                }
                const struct entry *e = &engine->entries[entry];
                uint32_t place = entry_is(e, FLAG_FRAME) ? engine->frames[e->place].slot : e->place;
                assert(entry_is(e, FLAG_USED));
                assert(place == (record << SLOT_BITS | slot));
                assert(length_in_slot(engine, entry) <= slot_size(slab->size_class));
            }
            assert(empty == slab->free_slots && empty < count);
            free[slab->size_class] += empty;
            partial[slab->size_class] += empty > 0;
        }
        assert(used == space->slabs && spares == space->spares);
        for (unsigned size_class = 0; size_class < CLASSES; size_class++) {
            for (uint32_t at = space->partial[size_class]; at != NONE; at = engine->slabs[at].next)
                listed[size_class]++;
            assert(listed[size_class] == partial[size_class]);
            assert(free[size_class] == space->free[size_class]);
            assert((space->open >> size_class & 1) == (partial[size_class] > 0));
            assert(free[size_class] < slot_count(size_class) || space->ripe >> size_class & 1);
        }
    }
}
