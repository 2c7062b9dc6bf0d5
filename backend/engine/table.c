/* Entries by (object, index), and objects by (pool, id).
 *
 * Both tables are linear hashing (Litwin, VLDB 1980) with chains: a bucket is split at a time, so no insertion stops
 * for a rehash of millions. All arrays are mapped at their largest size and cost only what is touched.
 */

#include <assert.h>
#include <errno.h>
#include <string.h>

#include "internal.h"

#define FIRST_BUCKETS 1024u

static uint64_t mix(uint64_t value) { /* the finalizer of MurmurHash3 */
    value ^= value >> 33;
    value *= UINT64_C(0xff51afd7ed558ccd);
    value ^= value >> 33;
    value *= UINT64_C(0xc4ceb9fe1a85ec53);
    return value ^ value >> 33;
}

static uint64_t seed_of(unsigned pool, uint64_t id) { return mix(mix(id * 64 + pool) + 1); }

static uint64_t hash_with(uint64_t seed, uint64_t index) { return mix(seed ^ index * UINT64_C(0x9e3779b97f4a7c15)); }

uint64_t handle_hash(unsigned pool, uint64_t id, uint64_t index) { return hash_with(seed_of(pool, id), index); }

uint64_t page_hash(const struct tmem *engine, uint32_t object, uint64_t index) {
    return hash_with(engine->objects[object].seed, index);
}

/* Return the bucket of a hash in a table of `count` buckets that grew from `base`, a power of two. */
static uint32_t bucket_of(uint64_t hash, uint32_t base, uint32_t count) {
    uint32_t bucket = (uint32_t)hash & (2 * base - 1);
    return bucket < count ? bucket : bucket & (base - 1);
}

static uint64_t key_of(uint32_t object, uint64_t index) {
    return (uint64_t)object << 40 | index << 4;
}

uint32_t entry_find(const struct tmem *engine, uint32_t object, uint64_t index) {
    uint64_t hash = page_hash(engine, object, index), key = key_of(object, index);
    uint32_t at = engine->buckets[bucket_of(hash, engine->bucket_base, engine->bucket_count)];
    while (at != NO_ENTRY && (engine->entries[at].key & ~UINT64_C(15)) != key)
        at = engine->entries[at].chain;
    return at;
}

/* Look up pages side by side. Each look-up misses the processor's caches twice, so those of several pages overlap. */
void entries_find(const struct tmem *engine, uint32_t object, uint64_t first, uint32_t count, uint32_t *entries) {
    enum { AHEAD = 8 };
    for (uint32_t at = 0; at < count + 2 * AHEAD; at++) {
        if (at < count) {
            uint64_t hash = page_hash(engine, object, first + at);
            entries[at] = bucket_of(hash, engine->bucket_base, engine->bucket_count);
            __builtin_prefetch(&engine->buckets[entries[at]]);
        }
        if (at >= AHEAD && at - AHEAD < count) {
            entries[at - AHEAD] = engine->buckets[entries[at - AHEAD]];
            __builtin_prefetch(&engine->entries[entries[at - AHEAD]]);
        }
        if (at >= 2 * AHEAD) {
            uint32_t *found = &entries[at - 2 * AHEAD];
            uint64_t key = key_of(object, first + at - 2 * AHEAD);
            while (*found != NO_ENTRY && (engine->entries[*found].key & ~UINT64_C(15)) != key)
                *found = engine->entries[*found].chain;
        }
    }
}

static uint64_t hash_of_entry(const struct tmem *engine, uint32_t entry) {
    const struct entry *e = &engine->entries[entry];
    return page_hash(engine, entry_object(e), entry_index(e));
}

static void entries_split(struct tmem *engine) {
    if (engine->bucket_count == engine->max_buckets)
        return;
    uint32_t old = engine->bucket_count - engine->bucket_base, new = engine->bucket_count++;
    uint32_t at = engine->buckets[old], *kept = &engine->buckets[old], *moved = &engine->buckets[new];
    *kept = *moved = NO_ENTRY;
    while (at != NO_ENTRY) {
        uint32_t next = engine->entries[at].chain;
        uint32_t *head = hash_of_entry(engine, at) & engine->bucket_base ? moved : kept;
        engine->entries[at].chain = *head;
        *head = at;
        at = next;
    }
    if (engine->bucket_count == 2 * engine->bucket_base)
        engine->bucket_base *= 2;
}

static void entry_link(struct tmem *engine, uint32_t entry) {
    uint32_t *head = &engine->buckets[bucket_of(
        hash_of_entry(engine, entry), engine->bucket_base, engine->bucket_count)];
    engine->entries[entry].chain = *head;
    *head = entry;
}

static void entry_unlink(struct tmem *engine, uint32_t entry) {
    uint32_t *link = &engine->buckets[bucket_of(
        hash_of_entry(engine, entry), engine->bucket_base, engine->bucket_count)];
    while (*link != entry)
        link = &engine->entries[*link].chain;
    *link = engine->entries[entry].chain;
}

static void object_count_in(struct object *object, uint64_t index) {
    if (!object->pages++) {
        object->lowest = object->highest = index;
    } else {
        object->lowest = index < object->lowest ? index : object->lowest;
        object->highest = index > object->highest ? index : object->highest;
    }
}

uint32_t entry_new(struct tmem *engine, uint32_t object, uint64_t index) {
    uint32_t entry = engine->free_entry;
    if (index > MAX_INDEX)
        return NO_ENTRY;
    if (entry != NO_ENTRY) {
        engine->free_entry = engine->entries[entry].chain;
    } else {
        if (engine->entries_used >= engine->max_entries)
            return NO_ENTRY;
        entry = engine->entries_used++;
    }
    /* Nine buckets for sixteen entries: a look-up compares 1.9 keys in the mean, and buckets cost 2.3 bytes a page. */
    if (engine->entries_used / 16 * 9 > engine->bucket_count)
        entries_split(engine);
    engine->entries[entry] = (struct entry){.key = key_of(object, index) | FLAG_USED};
    entry_link(engine, entry);
    object_count_in(&engine->objects[object], index);
    return entry;
}

void entry_free(struct tmem *engine, uint32_t entry) {
    struct object *object = &engine->objects[entry_object(&engine->entries[entry])];
    entry_unlink(engine, entry);
    object->pages--;
    engine->entries[entry] = (struct entry){.chain = engine->free_entry};
    engine->free_entry = entry;
}

void entry_rename(struct tmem *engine, uint32_t entry, uint32_t object) {
    struct entry *e = &engine->entries[entry];
    uint64_t index = entry_index(e);
    entry_unlink(engine, entry);
    engine->objects[entry_object(e)].pages--;
    e->key = key_of(object, index) | (e->key & 15);
    entry_link(engine, entry);
    object_count_in(&engine->objects[object], index);
}

/* -- objects ------------------------------------------------------------------------------------------------------ */

static uint64_t id_hash(unsigned pool, uint64_t id) {
    return mix(id * 64 + pool);
}

static void ids_split(struct tmem *engine) {
    if (engine->id_count >= MAX_OBJECTS)
        return;
    uint32_t old = engine->id_count - engine->id_base, new = engine->id_count++;
    uint32_t at = engine->ids[old], *kept = &engine->ids[old], *moved = &engine->ids[new];
    *kept = *moved = 0;
    while (at) {
        struct object *object = &engine->objects[at];
        uint32_t next = object->chain;
        uint32_t *head = id_hash(object->pool, object->id) & engine->id_base ? moved : kept;
        object->chain = *head;
        *head = at;
        at = next;
    }
    if (engine->id_count == 2 * engine->id_base)
        engine->id_base *= 2;
}

uint32_t object_find(const struct tmem *engine, unsigned pool, uint64_t id) {
    uint32_t at = engine->ids[bucket_of(id_hash(pool, id), engine->id_base, engine->id_count)];
    while (at && (engine->objects[at].id != id || engine->objects[at].pool != pool))
        at = engine->objects[at].chain;
    return at ? at : NONE;
}

uint32_t object_new(struct tmem *engine, unsigned pool, uint64_t id, uint32_t file) {
    uint32_t number = engine->free_object;
    if (number) {
        engine->free_object = engine->objects[number].chain;
    } else {
        if (engine->objects_used >= MAX_OBJECTS)
            return NONE;
        number = engine->objects_used++;
    }
    if (++engine->live_objects > engine->id_count)
        ids_split(engine);
    struct object *object = &engine->objects[number];
    *object = (struct object){
        .id = id, .seed = seed_of(pool, id), .file = file, .pool = (uint16_t)pool, .state = OBJECT_LIVE};
    uint32_t *head = &engine->ids[bucket_of(id_hash(pool, id), engine->id_base, engine->id_count)];
    object->chain = *head;
    *head = number;
    return number;
}

void object_unname(struct tmem *engine, uint32_t number) {
    struct object *object = &engine->objects[number];
    uint32_t *link = &engine->ids[bucket_of(id_hash(object->pool, object->id), engine->id_base, engine->id_count)];
    while (*link != number)
        link = &engine->objects[*link].chain;
    *link = object->chain;
    engine->live_objects--;
}

void object_free(struct tmem *engine, uint32_t number) {
    if (engine->objects[number].state == OBJECT_LIVE)
        object_unname(engine, number);
    engine->objects[number] = (struct object){.chain = engine->free_object};
    engine->free_object = number;
}

int table_init(struct tmem *engine) {
    engine->entries_used = engine->objects_used = 1;
    engine->bucket_base = engine->bucket_count = engine->id_base = engine->id_count = FIRST_BUCKETS;
    engine->max_buckets = engine->max_entries < FIRST_BUCKETS ? FIRST_BUCKETS : engine->max_entries;
    engine->entries = table_map((uint64_t)engine->max_entries * sizeof *engine->entries);
    engine->buckets = table_map((uint64_t)engine->max_buckets * sizeof *engine->buckets);
    engine->objects = table_map((uint64_t)MAX_OBJECTS * sizeof *engine->objects);
    engine->ids = table_map((uint64_t)MAX_OBJECTS * sizeof *engine->ids);
    return engine->entries && engine->buckets && engine->objects && engine->ids ? 0 : -ENOMEM;
}

void table_check(const struct tmem *engine) {
    uint64_t found = 0, listed = 0, pages = 0;
    for (uint32_t bucket = 0; bucket < engine->bucket_count; bucket++)
        for (uint32_t at = engine->buckets[bucket]; at != NO_ENTRY; at = engine->entries[at].chain) {
            assert(entry_is(&engine->entries[at], FLAG_USED));
            assert(bucket_of(hash_of_entry(engine, at), engine->bucket_base, engine->bucket_count) == bucket);
            assert(engine->objects[entry_object(&engine->entries[at])].state != OBJECT_FREE);
            found++;
        }
    for (uint32_t at = engine->free_entry; at != NO_ENTRY; at = engine->entries[at].chain)
        listed++;
    assert(found + listed + 1 == engine->entries_used);
    for (uint32_t number = 1; number < engine->objects_used; number++) {
        const struct object *object = &engine->objects[number];
        pages += object->pages;
        assert(object->state != OBJECT_FREE || !object->pages);
        assert(object->state != OBJECT_LIVE || object_find(engine, object->pool, object->id) == number);
        assert(object->state != OBJECT_LIVE || object->pages || object->file != NONE);
        assert(object->state != OBJECT_DEAD || object->pages);
    }
    assert(pages == found);
}
