/* The engine as a whole: its beginning and end, its thread, its counters and its check. */

#include <assert.h>
#include <errno.h>
#include <math.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include "hugepages.h"
#include "internal.h"

#define MAX_ENTRIES (UINT64_C(1) << 28) /* 1 TiB of pages */
#define SLOTS_A_SLAB 1024u

void *table_map(uint64_t bytes) {
    void *memory = mmap(
        NULL, bytes ? bytes : 1, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED)
        return NULL;
    use_huge_pages(memory, bytes);
    return memory;
}

static uint64_t slab_records(const struct tmem *engine) {
    uint64_t most = UINT64_C(1) << (32 - SLOT_BITS);
    return engine->arena_slabs < most ? engine->arena_slabs : most;
}

static int start(struct tmem *engine, const struct tmem_config *config) {
    uint64_t entries = config->frame_limit + (uint64_t)config->arena_slabs * SLOTS_A_SLAB + SLOTS_A_SLAB;
    pthread_condattr_t monotonic;
    pthread_mutexattr_t adaptive;
    engine->arena_slabs = config->arena_fd < 0 ? 0 : config->arena_slabs;
    engine->max_entries = (uint32_t)(entries < MAX_ENTRIES ? entries : MAX_ENTRIES);
    engine->frame_limit = (uint32_t)(config->frame_limit < MAX_ENTRIES ? config->frame_limit : MAX_ENTRIES);
    engine->frame_target = (uint32_t)(config->frames < engine->frame_limit ? config->frames : engine->frame_limit);
    engine->compress = config->compress;
    engine->fixed_time = NAN;
    engine->asking_pool = -1;
    engine->pool_count = 1; /* pool 0 is that of the files: private and ephemeral */
    engine->pools[FILES_POOL].used = true;
    /* A waiter spins first: the lock is held for less than a sleep and a wake-up cost. */
    pthread_mutexattr_init(&adaptive);
    pthread_mutexattr_settype(&adaptive, PTHREAD_MUTEX_ADAPTIVE_NP);
    pthread_mutex_init(&engine->lock, &adaptive);
    pthread_mutexattr_destroy(&adaptive);
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&engine->work, &monotonic);
    pthread_cond_init(&engine->granted, &monotonic);
    pthread_condattr_destroy(&monotonic);
    engine->event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (engine->event_fd < 0)
        return -errno;
    slots_init(engine);
    engine->slabs = table_map(slab_records(engine) * sizeof *engine->slabs);
    engine->record_of = table_map((uint64_t)engine->arena_slabs * sizeof *engine->record_of);
    if (!engine->slabs || !engine->record_of || table_init(engine) || files_init(engine))
        return -ENOMEM;
    policy_init(&engine->policy, engine->entries);
    policy_choose_share(&engine->policy);
    if (engine->arena_fd >= 0 && config->arena_mapped) {
        void *map = mmap(
            NULL, (uint64_t)engine->arena_slabs * TMEM_SLAB, PROT_READ | PROT_WRITE, MAP_SHARED, engine->arena_fd, 0);
        if (map == MAP_FAILED)
            return -errno;
        engine->arena = map;
    }
    if (cache_init(engine))
        return -ENOMEM;
    capacity_update(engine);
    if (config->thread) {
        sigset_t all, before; /* signals are for the threads of the caller */
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
        int error = pthread_create(&engine->thread, NULL, drain_thread, engine);
        pthread_sigmask(SIG_SETMASK, &before, NULL);
        if (error)
            return -error;
        engine->has_thread = true;
    }
    return 0;
}

tmem *tmem_new(const struct tmem_config *config, int *error) {
    struct tmem *engine = calloc(1, sizeof *engine);
    if (!engine) {
        *error = -ENOMEM;
        return NULL;
    }
    engine->arena_fd = config->arena_fd < 0 ? -1 : dup(config->arena_fd);
    engine->event_fd = -1;
    *error = config->arena_fd >= 0 && engine->arena_fd < 0 ? -errno : start(engine, config);
    if (*error) {
        tmem_free(engine);
        return NULL;
    }
    return engine;
}

static void unmap(void *memory, uint64_t bytes) {
    if (memory)
        munmap(memory, bytes ? bytes : 1);
}

void tmem_free(tmem *engine) {
    if (engine->has_thread) {
        pthread_mutex_lock(&engine->lock);
        engine->ending = true;
        pthread_cond_broadcast(&engine->work);
        pthread_cond_broadcast(&engine->granted);
        pthread_mutex_unlock(&engine->lock);
        pthread_join(engine->thread, NULL);
    }
    for (uint32_t record = 0; record < engine->slabs_used; record++)
        free(engine->slabs[record].entries);
    policy_free(&engine->policy);
    unmap(engine->slabs, slab_records(engine) * sizeof *engine->slabs);
    unmap(engine->record_of, (uint64_t)engine->arena_slabs * sizeof *engine->record_of);
    unmap(engine->entries, (uint64_t)engine->max_entries * sizeof *engine->entries);
    unmap(engine->buckets, (uint64_t)engine->max_buckets * sizeof *engine->buckets);
    unmap(engine->objects, (uint64_t)MAX_OBJECTS * sizeof *engine->objects);
    unmap(engine->ids, (uint64_t)MAX_OBJECTS * sizeof *engine->ids);
    unmap(engine->files, (uint64_t)engine->max_files * sizeof *engine->files);
    unmap(engine->fills, (uint64_t)engine->max_fills * sizeof *engine->fills);
    unmap(engine->frames, (uint64_t)engine->frame_limit * sizeof *engine->frames);
    unmap(engine->pages_map, ((uint64_t)engine->frame_limit + 1) << 12);
    unmap(engine->arena, (uint64_t)engine->arena_slabs * TMEM_SLAB);
    if (engine->arena_fd >= 0)
        close(engine->arena_fd);
    if (engine->event_fd >= 0)
        close(engine->event_fd);
    free(engine);
}

int tmem_event_fd(tmem *engine) { return engine->event_fd; }

void tmem_clear_event(tmem *engine) {
    uint64_t count;
    ssize_t got = read(engine->event_fd, &count, sizeof count);
    (void)got; /* EAGAIN: it was cleared already */
}

void tmem_set_time(tmem *engine, double now) {
    pthread_mutex_lock(&engine->lock);
    engine->fixed_time = now;
    pthread_mutex_unlock(&engine->lock);
}

/* Bytes of the tables, without those of the frames. */
static uint64_t index_bytes(const struct tmem *engine) {
    uint64_t bytes = (uint64_t)engine->entries_used * sizeof *engine->entries +
                     (uint64_t)engine->bucket_count * sizeof *engine->buckets +
                     (uint64_t)engine->objects_used * sizeof *engine->objects +
                     (uint64_t)engine->id_count * sizeof *engine->ids +
                     (uint64_t)engine->slabs_used * (sizeof *engine->slabs + 16) + policy_bytes(&engine->policy);
    for (int kind = 0; kind < 2; kind++)
        for (unsigned size_class = 0; size_class < CLASSES; size_class++)
            bytes += (uint64_t)engine->space[kind].free[size_class] * sizeof(uint32_t);
    return bytes + (engine->pool_pages + engine->duplicates) * sizeof(uint32_t);
}

void tmem_stats(tmem *engine, struct tmem_stats *stats) {
    pthread_mutex_lock(&engine->lock);
    uint64_t slabs = 0, ghost_hits = 0;
    for (int kind = 0; kind < 2; kind++)
        slabs += (uint64_t)engine->space[kind].slabs + engine->space[kind].spares;
    for (uint32_t pool = 0; pool < engine->pool_count; pool++)
        ghost_hits += engine->pools[pool].stats.ghost_hits;
    *stats = (struct tmem_stats){
        .frames = engine->frame_target, .used_frames = engine->used_frames,
        .dirty_pages = engine->dirty_frames, .reserve_frames = engine->reserve, .hits = engine->hits,
        .readahead_hits = engine->readahead_hits, .misses = engine->misses,
        .cache_evictions = engine->cache_evictions, .dropped = engine->dropped, .bypassed = engine->bypassed,
        .unused = engine->unused, .slabs = slabs, .used_bytes = engine->used_bytes,
        .pool_pages = engine->pool_pages, .same_filled_pages = engine->same_pages, .raw_pages = engine->raw_pages,
        .duplicate_pages = engine->duplicates, .evictions = engine->evictions, .lost_slabs = engine->lost_slabs,
        .index_bytes = index_bytes(engine), .ghost_hits = ghost_hits, .capacity_pages = engine->capacity_pages,
        .resident_pages = policy_pages(&engine->policy), .settled = engine->frame_end <= engine->frame_target};
    pthread_mutex_unlock(&engine->lock);
}

double tmem_oldest(tmem *engine) {
    pthread_mutex_lock(&engine->lock);
    double oldest = policy_oldest(&engine->policy, engine_now(engine));
    pthread_mutex_unlock(&engine->lock);
    return oldest;
}

bool tmem_is_debug(void) {
#ifdef TMEM_DEBUG
    return true;
#else
    return false;
#endif
}

void tmem_check(tmem *engine) {
    uint64_t pages[MAX_POOLS] = {0}, total = 0, used = 0, same = 0, raw = 0, queued = 0, slot_pages = 0, dead = 0;
    pthread_mutex_lock(&engine->lock);
    table_check(engine);
    slots_check(engine);
    cache_check(engine);
    files_check(engine);
    policy_check(&engine->policy);
    for (uint32_t entry = 1; entry < engine->entries_used; entry++) {
        const struct entry *e = &engine->entries[entry];
        if (!entry_is(e, FLAG_USED))
            continue;
        const struct object *object = &engine->objects[entry_object(e)];
        unsigned queue = entry_queue(e);
        bool policed = queue == QUEUE_SMALL || queue == QUEUE_MAIN;
        queued += policed;
        dead += object->state == OBJECT_DEAD;
        if (entry_is(e, FLAG_FRAME)) {
            assert(policed && engine->frames[e->place].entry == entry);
            continue;
        }
        bool ephemeral = !engine->pools[object->pool].persistent;
        pages[object->pool]++;
        total++;
        same += !entry_length(e);
        raw += entry_length(e) == ENTRY_RAW;
        used += stored_bytes(entry_length(e));
        slot_pages += ephemeral && entry_length(e);
        assert(ephemeral ? (entry_length(e) ? policed : queue == QUEUE_SAME) : queue == QUEUE_NONE);
    }
    for (uint32_t pool = 0; pool < engine->pool_count; pool++)
        assert(pages[pool] == engine->pools[pool].stats.pages);
    assert(total == engine->pool_pages && used == engine->used_bytes && same == engine->same_pages);
    assert(raw == engine->raw_pages && slot_pages == engine->slot_pages && dead == engine->dead_pages);
    assert(queued == policy_pages(&engine->policy));
    (void)pages, (void)total, (void)used, (void)same, (void)raw, (void)queued, (void)slot_pages, (void)dead;
    pthread_mutex_unlock(&engine->lock);
}
