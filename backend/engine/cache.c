/* Frames: pages as they are read and written. Which page moves down into a slot is decided by CLOCK (Corbato 1968);
 * which page leaves memory, by the policy.
 *
 * Some frames are kept free (`reserve`), and fills in flight announce theirs, so that readers find frames and the drain
 * compresses beside them. Where these run out, the coldest page is dropped and counted: no reader waits.
 *
 * The drain pins a frame, marks it FRAME_MOVING and compresses outside of the lock. A use or a change of the page takes
 * the mark away, and the compressed bytes are forgotten.
 */

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include "internal.h"

#define MAX_RESERVE 512u
#define MAX_AHEAD 4096u
#define BATCH 16u            /* pages that are compressed between two locks */
#define EXTRA 32u            /* frames freed beyond what is missing: one wake-up of the drain for many */
#define EVICTIONS 64u        /* pages that one insertion evicts at most, when the capacity shrank */
#define SWEEP_PART 1024u     /* entries that the drain sweeps between two locks */
#define GRANT_WAIT 50000000L /* ns that the drain waits for slabs; then it goes on as in a full pool */

#ifndef MADV_DONTNEED_LOCKED
#define MADV_DONTNEED_LOCKED 24
#endif

static bool has_pool(const struct tmem *engine) { return engine->arena_fd >= 0; }

static void set_reserve(struct tmem *engine) {
    uint32_t part = engine->frame_target / 32;
    engine->reserve = !has_pool(engine) ? 0 : part > MAX_RESERVE ? MAX_RESERVE : part ? part : 1;
    if (engine->reserve >= engine->frame_target)
        engine->reserve = engine->frame_target ? engine->frame_target - 1 : 0;
}

/* Return how many frames are to be free now. */
static uint32_t frames_wanted(const struct tmem *engine) {
    uint32_t quarter = engine->frame_target / 4, limit = quarter > MAX_AHEAD ? MAX_AHEAD : quarter;
    uint32_t wanted = engine->reserve + engine->announced;
    limit = limit > engine->reserve ? limit : engine->reserve;
    return wanted > limit ? limit : wanted;
}

void cache_wake(struct tmem *engine) {
    if (engine->has_thread && has_pool(engine) &&
        (engine->free_frames < frames_wanted(engine) || engine->dead_pages))
        pthread_cond_signal(&engine->work);
}

/* A page that is read in its slot costs 1.4 us. One that moves up costs 3.4 us, as another one has to be compressed for
 * it, and is free from then on. So while all frames are in use, every fourth such read moves its page: what is read
 * often is in a frame soon, and what is read once in a while does not push out what is.
 * A stream moves no other page out, but it fills frames that nobody uses, as after a growth of the cache. */
bool cache_wants_page(struct tmem *engine, bool sequential) {
    if (sequential)
        return engine->free_frames > 2 * engine->reserve + engine->announced;
    bool full = engine->used_frames + frames_wanted(engine) >= engine->frame_target;
    return !full || engine->pool_hits++ % 4 == 0;
}

/* -- free frames -------------------------------------------------------------------------------------------------- */

static void frame_free(struct tmem *engine, uint32_t frame) {
    engine->frames[frame].flags = 0;
    if (frame >= engine->frame_target)
        return; /* a shrink takes it away */
    engine->frames[frame].dirty_next = NONE;
    if (engine->first_free == NONE)
        engine->first_free = frame;
    else
        engine->frames[engine->last_free].dirty_next = frame;
    engine->last_free = frame;
    engine->free_frames++;
}

static uint32_t frame_pop(struct tmem *engine) {
    uint32_t frame = engine->first_free;
    if (frame != NONE)
        engine->first_free = engine->frames[frame].dirty_next;
    else if (engine->frame_end < engine->frame_target)
        frame = engine->frame_end++;
    else
        return NONE;
    engine->free_frames--;
    engine->frames[frame] = (struct frame){.slot = NONE, .flags = FRAME_TAKEN};
    return frame;
}

void frame_give_back(struct tmem *engine, uint32_t frame) { frame_free(engine, frame); }

void frame_bind(struct tmem *engine, uint32_t frame, uint32_t entry, unsigned flags) {
    struct entry *e = &engine->entries[entry];
    engine->frames[frame] = (struct frame){.entry = entry, .slot = NONE, .flags = (uint8_t)flags};
    e->place = frame;
    e->key |= FLAG_FRAME;
    engine->used_frames++;
}

void frame_drop_slot(struct tmem *engine, uint32_t frame) {
    struct frame *f = &engine->frames[frame];
    if (f->slot == NONE)
        return;
    slot_drop(engine, f->slot);
    f->slot = NONE;
    engine->duplicates--;
}

void frame_release(struct tmem *engine, uint32_t frame) {
    struct frame *f = &engine->frames[frame];
    if (f->flags & FRAME_DIRTY)
        file_unlink_dirty(engine, frame);
    engine->unused += f->flags & FRAME_UNREAD ? 1 : 0;
    frame_drop_slot(engine, frame);
    f->entry = NO_ENTRY;
    f->flags = 0;
    engine->used_frames--;
    if (!f->pins)
        frame_free(engine, frame);
}

void frame_unpin(struct tmem *engine, uint32_t frame) {
    struct frame *f = &engine->frames[frame];
    if (!--f->pins && f->entry == NO_ENTRY)
        frame_free(engine, frame);
}

bool duplicate_reclaim(struct tmem *engine) {
    for (uint32_t tried = 0; engine->duplicates && tried < engine->frame_end; tried++) {
        uint32_t frame = engine->duplicate_hand++;
        if (engine->duplicate_hand >= engine->frame_end)
            engine->duplicate_hand = 0;
        if (frame < engine->frame_end && engine->frames[frame].slot != NONE) {
            frame_drop_slot(engine, frame);
            return true;
        }
    }
    return false;
}

/* Move the hand to the next clean frame that was not referenced; NONE when there is none. */
static uint32_t clock_victim(struct tmem *engine) {
    /* The first round may only clear bits, the second finds; the third is for the hand's start. */
    for (uint64_t tried = 0; tried < 3 * (uint64_t)engine->frame_end; tried++) {
        if (engine->hand >= engine->frame_end)
            engine->hand = 0;
        uint32_t frame = engine->hand++;
        struct frame *f = &engine->frames[frame];
        if (f->entry == NO_ENTRY || f->pins || f->flags & FRAME_DIRTY)
            continue;
        if (!(f->flags & FRAME_REFERENCED))
            return frame;
        f->flags &= (uint8_t)~FRAME_REFERENCED;
    }
    return NONE;
}

/* The page in a frame goes back to the slot that it kept. */
static void return_to_slot(struct tmem *engine, uint32_t frame) {
    struct frame *f = &engine->frames[frame];
    uint32_t entry = f->entry;
    struct entry *e = &engine->entries[entry];
    e->place = f->slot;
    e->checksum = f->slot_checksum;
    entry_set_length(e, f->slot_length);
    e->key &= ~(uint64_t)FLAG_FRAME;
    f->slot = NONE;
    engine->duplicates--;
    engine->cache_evictions++;
    engine->pools[FILES_POOL].stats.puts++;
    frame_release(engine, frame);
    slot_book(engine, entry, true, 1);
}

/* Empty a frame without compressing: false when its page has to be compressed for that. */
static bool empty_at_once(struct tmem *engine, uint32_t frame) {
    struct frame *f = &engine->frames[frame];
    struct pool *pool = &engine->pools[FILES_POOL];
    if (f->slot != NONE && !pool->frozen) {
        return_to_slot(engine, frame);
        return true;
    }
    if (has_pool(engine) && !(f->flags & FRAME_BYPASS) && !pool->frozen)
        return false;
    if (has_pool(engine) && f->flags & FRAME_BYPASS) {
        engine->bypassed++;
    } else if (has_pool(engine)) {
        pool->stats.puts++;
        pool->stats.rejected_frozen++;
    }
    page_leave(engine, f->entry, true);
    return true;
}

uint32_t frame_take(struct tmem *engine, bool may_evict) {
    while (!engine->free_frames && may_evict) {
        uint32_t frame = clock_victim(engine);
        if (frame == NONE)
            return NONE;
        if (empty_at_once(engine, frame))
            continue;
        engine->dropped++;
        page_leave(engine, engine->frames[frame].entry, true);
    }
    return frame_pop(engine);
}

/* -- pages -------------------------------------------------------------------------------------------------------- */

uint32_t page_insert(struct tmem *engine, uint32_t object, uint64_t index, unsigned flags) {
    if (index > MAX_INDEX)
        return NO_ENTRY;
    capacity_update(engine);
    for (unsigned evicted = 0; evicted < EVICTIONS; evicted++)
        if (policy_pages(&engine->policy) + 1 <= engine->capacity_pages || !policy_evict_one(engine))
            break;
        else if (engine->has_thread && engine->denied)
            notify(engine); /* the source may have slabs again */
    uint32_t frame = frame_take(engine, true);
    if (frame == NONE)
        return NO_ENTRY;
    uint32_t entry = entry_new(engine, object, index);
    if (entry == NO_ENTRY) {
        frame_give_back(engine, frame);
        return NO_ENTRY;
    }
    policy_insert(&engine->policy, entry, page_hash(engine, object, index), false, engine_now(engine));
    frame_bind(engine, frame, entry, flags);
    return entry;
}

void page_use(struct tmem *engine, uint32_t entry, uint64_t hash) {
    struct entry *e = &engine->entries[entry];
    if (entry_is(e, FLAG_FRAME)) {
        struct frame *f = &engine->frames[e->place];
        bool unread = f->flags & FRAME_UNREAD;
        f->flags = (uint8_t)((f->flags & ~(FRAME_UNREAD | FRAME_MOVING)) | FRAME_REFERENCED);
        engine->hits++;
        engine->readahead_hits += unread;
        if (unread)
            return; /* the first use of a page that was read ahead is what it was brought for */
    }
    policy_hit(&engine->policy, entry, hash);
}

/* Move the page of a frame into a slot, as it was encoded. The frame is not pinned. Return false when it stays. */
bool demote_to_slot(struct tmem *engine, uint32_t frame, const struct stored *stored) {
    struct pool *pool = &engine->pools[FILES_POOL];
    uint32_t entry = engine->frames[frame].entry;
    struct entry *e = &engine->entries[entry];
    int result = TMEM_OK;
    uint32_t place = stored->word;
    pool->stats.puts++;
    if (pool->frozen) {
        pool->stats.rejected_frozen++;
    } else if (!stored->length) {
        result = room_for_same(engine);
        pool->stats.rejected_same_filled += result != TMEM_OK;
    } else {
        place = room_find(engine, &engine->space[0], stored->length, entry, 0, &result);
        if (engine->frames[frame].entry != entry || !entry_is(e, FLAG_USED)) { /* it was the victim itself */
            if (place != NONE)
                slot_drop(engine, place);
            return true;
        }
        if (place == NONE && result == TMEM_OK) { /* another frame became free */
            pool->stats.puts--;
            engine->frames[frame].flags &= (uint8_t)~FRAME_MOVING;
            return false;
        }
        pool->stats.rejected_no_slot += result == TMEM_NO_SLOT;
        if (place != NONE && !arena_write(engine, place, stored->bytes, stored_bytes(stored->length))) {
            slot_drop(engine, place);
            pool->stats.rejected_memory++;
            result = TMEM_MEMORY;
        }
    }
    if (pool->frozen || result != TMEM_OK) {
        page_leave(engine, entry, true);
        return true;
    }
    e->key &= ~(uint64_t)FLAG_FRAME;
    e->place = place;
    e->checksum = stored->checksum;
    entry_set_length(e, stored->length);
    if (!stored->length) {
        policy_remove(&engine->policy, entry);
        same_link(engine, entry);
    }
    engine->cache_evictions++;
    frame_release(engine, frame);
    slot_book(engine, entry, true, 1);
    return true;
}

/* -- the drain ---------------------------------------------------------------------------------------------------- */

struct batch {
    uint32_t count;
    uint32_t frame[BATCH], entry[BATCH];
    struct stored stored[BATCH];
};

/* Empty up to `most` frames in CLOCK's order; locked at the beginning and at the end. Returns how many became free or
 * were tried; 0 when there is nothing to empty. */
static uint32_t demote_some(struct tmem *engine, struct batch *batch, uint32_t most) {
    uint32_t done = 0;
    batch->count = 0;
    while (done + batch->count < most && batch->count < BATCH) {
        uint32_t frame = clock_victim(engine);
        if (frame == NONE)
            break;
        if (empty_at_once(engine, frame)) {
            done++;
            continue;
        }
        struct frame *f = &engine->frames[frame];
        f->pins++;
        f->flags |= FRAME_MOVING;
        batch->frame[batch->count] = frame;
        batch->entry[batch->count++] = f->entry;
    }
    if (!batch->count)
        return done;
    pthread_mutex_unlock(&engine->lock);
    bool encoded[BATCH];
    for (uint32_t at = 0; at < batch->count; at++)
        encoded[at] = page_encode(frame_page(engine, batch->frame[at]), engine->compress, &batch->stored[at]);
    pthread_mutex_lock(&engine->lock);
    for (uint32_t at = 0; at < batch->count; at++) {
        struct frame *f = &engine->frames[batch->frame[at]];
        bool same = f->entry == batch->entry[at] && f->flags & FRAME_MOVING;
        frame_unpin(engine, batch->frame[at]);
        if (!same)
            continue;
        if (encoded[at]) {
            demote_to_slot(engine, batch->frame[at], &batch->stored[at]);
        } else {
            engine->pools[FILES_POOL].stats.puts++;
            engine->pools[FILES_POOL].stats.rejected_codec++;
            page_leave(engine, batch->entry[at], true);
        }
    }
    return done + batch->count;
}

/* Free some frames, until so many are free; 0 when there is nothing to do. Pages that do not fit into memory any more
 * leave first, without being compressed. */
static uint32_t drain_some(struct tmem *engine, struct batch *batch, uint32_t wanted) {
    uint32_t evicted = 0;
    if (engine->free_frames >= wanted)
        return 0;
    capacity_update(engine);
    uint32_t missing = wanted - engine->free_frames;
    while (evicted < EVICTIONS && engine->free_frames < wanted &&
           policy_pages(&engine->policy) + engine->announced > engine->capacity_pages && policy_evict_one(engine))
        evicted++;
    if (evicted && engine->has_thread && engine->denied)
        notify(engine); /* as above */
    if (engine->free_frames >= wanted || evicted == EVICTIONS)
        return evicted;
    return evicted + demote_some(engine, batch, missing < BATCH ? missing : BATCH);
}

uint32_t tmem_drain(tmem *engine, uint32_t most) {
    struct batch *batch = malloc(sizeof *batch);
    uint32_t done = 0, now = 1;
    if (!batch)
        return 0;
    pthread_mutex_lock(&engine->lock);
    while (done < most && (now = drain_some(engine, batch, frames_wanted(engine))))
        done += now;
    pthread_mutex_unlock(&engine->lock);
    free(batch);
    return done;
}

uint32_t tmem_evict_from_cache(tmem *engine, uint32_t most) {
    struct batch *batch = malloc(sizeof *batch);
    uint32_t done = 0, now = 1;
    if (!batch)
        return 0;
    pthread_mutex_lock(&engine->lock);
    while (done < most && (now = demote_some(engine, batch, most - done)))
        done += now;
    pthread_mutex_unlock(&engine->lock);
    free(batch);
    return done;
}

/* Wait for slabs that the caller was asked for; locked. */
static void wait_for_slabs(struct tmem *engine) {
    struct timespec until;
    notify(engine);
    clock_gettime(CLOCK_MONOTONIC, &until); /* which the condition was made with */
    until.tv_nsec += GRANT_WAIT;
    until.tv_sec += until.tv_nsec / 1000000000L;
    until.tv_nsec %= 1000000000L;
    pthread_cond_timedwait(&engine->granted, &engine->lock, &until);
}

static bool may_get_slabs(const struct tmem *engine) {
    uint64_t held = (uint64_t)engine->space[0].slabs + engine->space[0].spares + engine->space[1].slabs +
                    engine->space[1].spares;
    return !engine->exhausted && held < engine->ceiling_bytes / TMEM_SLAB;
}

void *drain_thread(void *argument) {
    struct tmem *engine = argument;
    struct batch *batch = malloc(sizeof *batch);
    pthread_mutex_lock(&engine->lock);
    while (batch && !engine->ending) {
        uint32_t wanted = frames_wanted(engine);
        if (engine->free_frames >= wanted && !engine->dead_pages) {
            pthread_cond_wait(&engine->work, &engine->lock);
            continue;
        }
        if (engine->dead_pages)
            sweep(engine, SWEEP_PART);
        if (engine->free_frames < wanted) { /* a sweep of a large table takes long: readers need frames meanwhile */
            if (!engine->space[0].spares && may_get_slabs(engine)) {
                wait_for_slabs(engine);
                if (!engine->space[0].spares)
                    engine->exhausted = true; /* until the next grant: pages are not worth waiting for again */
            }
            uint32_t extra = engine->reserve / 2 < EXTRA ? engine->reserve / 2 : EXTRA;
            if (!drain_some(engine, batch, wanted + extra) && engine->free_frames < wanted && !engine->dead_pages &&
                !engine->ending)
                pthread_cond_wait(&engine->work, &engine->lock); /* all frames are dirty or pinned */
        }
        pthread_mutex_unlock(&engine->lock);
        pthread_mutex_lock(&engine->lock);
    }
    pthread_mutex_unlock(&engine->lock);
    free(batch);
    return NULL;
}

/* -- resize ------------------------------------------------------------------------------------------------------- */

void tmem_resize(tmem *engine, uint64_t frames) {
    pthread_mutex_lock(&engine->lock);
    uint32_t target = frames > engine->frame_limit ? engine->frame_limit : (uint32_t)frames;
    uint32_t touched = target < engine->frame_end ? target : engine->frame_end;
    engine->frame_target = target;
    engine->first_free = NONE;
    engine->free_frames = target - touched;
    for (uint32_t frame = 0; frame < touched; frame++) {
        const struct frame *f = &engine->frames[frame];
        if (f->entry == NO_ENTRY && !f->pins && !(f->flags & FRAME_TAKEN))
            frame_free(engine, frame);
    }
    for (uint32_t frame = 0; frame < engine->frame_end; frame++)
        if (engine->used_frames > target)
            engine->frames[frame].flags &= (uint8_t)~FRAME_BYPASS; /* a shrink keeps what it can */
    set_reserve(engine);
    capacity_update(engine);
    pthread_mutex_unlock(&engine->lock);
}

/* Move the page of a frame that is taken away into a free frame. */
static void frame_move(struct tmem *engine, uint32_t from, uint32_t to) {
    struct frame *f = &engine->frames[from], *t = &engine->frames[to];
    memcpy(frame_page(engine, to), frame_page(engine, from), TMEM_PAGE);
    *t = *f;
    engine->entries[f->entry].place = to;
    if (f->flags & FRAME_DIRTY)
        file_moved_dirty(engine, from, to);
    *f = (struct frame){.slot = NONE};
}

int tmem_shrink(tmem *engine, uint32_t most) {
    struct batch *batch = malloc(sizeof *batch);
    int result = 0;
    if (!batch)
        return -ENOMEM;
    pthread_mutex_lock(&engine->lock);
    if (engine->used_frames > engine->frame_target) {
        uint32_t surplus = engine->used_frames - engine->frame_target;
        if (demote_some(engine, batch, surplus < BATCH ? surplus : BATCH))
            result = 1;
        else
            result = engine->dirty_frames < engine->used_frames ? -EBUSY : -EAGAIN;
    }
    uint32_t first = engine->frame_end > most ? engine->frame_end - most : 0, end = engine->frame_end;
    first = first > engine->frame_target ? first : engine->frame_target;
    for (uint32_t frame = first; result == 0 && frame < end; frame++) {
        struct frame *f = &engine->frames[frame];
        uint32_t target;
        if (f->pins || f->flags & FRAME_TAKEN) {
            result = -EBUSY;
        } else if (f->entry != NO_ENTRY) {
            if ((target = frame_pop(engine)) != NONE)
                frame_move(engine, frame, target);
            else if (f->flags & FRAME_DIRTY)
                result = -EAGAIN;
            else if (!empty_at_once(engine, frame)) {
                engine->dropped++;
                page_leave(engine, f->entry, true);
            }
        }
    }
    if (result == 0 && first < end) {
        engine->frame_end = first;
        result = first > engine->frame_target;
        /* The page before is shared with the last frame, because of SKEW. */
        uint8_t *start = engine->pages_map + ((uint64_t)(first + 1) << 12);
        uint64_t size = (uint64_t)(end - first) << 12;
        if (madvise(start, size, MADV_DONTNEED))
            madvise(start, size, MADV_DONTNEED_LOCKED); /* EINVAL: the memory is locked */
    }
    pthread_mutex_unlock(&engine->lock);
    free(batch);
    return result;
}

/* -- beginning and checks ----------------------------------------------------------------------------------------- */

int cache_init(struct tmem *engine) {
    engine->first_free = NONE;
    if (!engine->frame_limit)
        return 0;
    uint64_t size = ((uint64_t)engine->frame_limit + 1) << 12;
    engine->pages_map = table_map(size);
    engine->frames = table_map((uint64_t)engine->frame_limit * sizeof *engine->frames);
    if (!engine->pages_map || !engine->frames)
        return -ENOMEM;
    madvise(engine->pages_map, size, MADV_HUGEPAGE); /* what is resident is what is accounted */
    engine->pages = engine->pages_map + SKEW;
    uint32_t frames = engine->frame_target;
    engine->frame_target = 0;
    tmem_resize(engine, frames);
    return 0;
}

void cache_check(const struct tmem *engine) {
    uint64_t used = 0, dirty = 0, duplicates = 0, free = 0, listed = 0;
    for (uint32_t frame = 0; frame < engine->frame_end; frame++) {
        const struct frame *f = &engine->frames[frame];
        dirty += f->flags & FRAME_DIRTY ? 1 : 0;
        duplicates += f->slot != NONE;
        if (f->entry == NO_ENTRY) {
            assert(!(f->flags & FRAME_DIRTY) && f->slot == NONE);
            free += !f->pins && !(f->flags & FRAME_TAKEN) && frame < engine->frame_target;
            continue;
        }
        used++;
        assert(entry_is(&engine->entries[f->entry], FLAG_FRAME));
        assert(engine->entries[f->entry].place == frame);
    }
    for (uint32_t frame = engine->first_free; frame != NONE; frame = engine->frames[frame].dirty_next) {
        assert(engine->frames[frame].entry == NO_ENTRY && frame < engine->frame_target);
        listed++;
    }
    assert(used == engine->used_frames && dirty == engine->dirty_frames && duplicates == engine->duplicates);
    uint32_t fresh = engine->frame_target > engine->frame_end ? engine->frame_target - engine->frame_end : 0;
    assert(free + fresh == engine->free_frames && listed == free);
    assert(engine->frame_end > engine->frame_target || used <= engine->frame_target);
}
