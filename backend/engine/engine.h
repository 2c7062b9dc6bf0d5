/* The data path of tmemfs: pages of files in frames and in compressed slots, and the pools of transcendent memory.
 *
 * One engine has one arena (a memfd that is cut into slabs; the caller brings them and takes them back), optionally a
 * cache of frames, and any number of pools. All functions may be called from any thread. A function that returns int
 * returns a negative errno when it fails.
 *
 * Handles are numbers: files, fills and pools. A handle that is not in use is a mistake of the caller (assertion in
 * debug builds).
 *
 * What is to come has a place: a page that is missing is asked for elsewhere in tmem_read, before it reports the page
 * as missing; a page that leaves memory passes through one function (page_leave in pool.c); a flag of the entry is left
 * for pinned pages; entries, buckets, objects and slabs are arrays without pointers, so they can be written out beside
 * the arena and checked when they are taken up again.
 */

#ifndef TMEM_ENGINE_H
#define TMEM_ENGINE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* The declarations below are read by cffi as well: no preprocessor lines but the constants in between. */
/* BEGIN CDEF */

#define TMEM_PAGE 4096
#define TMEM_SLAB 65536
#define TMEM_MAX_SLABS 4194302 /* that an engine can hold: 256 GiB */

typedef struct tmem tmem;

struct tmem_config {
    int arena_fd;         /* -1: no pool */
    uint32_t arena_slabs; /* slabs that the arena has room for */
    bool arena_mapped;    /* map the arena: only where nobody else punches it */
    bool compress;
    bool thread;          /* drain in a thread of the engine; otherwise the caller calls tmem_drain */
    uint64_t frames;      /* of the cache; 0: no cache */
    uint64_t frame_limit; /* the largest number of frames that a resize may ask for */
};

tmem *tmem_new(const struct tmem_config *config, int *error);
void tmem_free(tmem *engine);
int tmem_event_fd(tmem *engine); /* readable when slabs are wanted: clear it, then ask tmem_wanted */
void tmem_clear_event(tmem *engine);
void tmem_set_time(tmem *engine, double now); /* use this time in place of the monotonic clock */
bool tmem_is_debug(void); /* built with -DTMEM_DEBUG: to be checked at the end */
void tmem_check(tmem *engine); /* aborts when an invariant is broken */

/* -- slabs -------------------------------------------------------------------------------------------------------- */

/* Bytes of slabs that may be held now, which bound same-filled pages and coarsen the classes of small arenas; and those
 * that the source may ever give. */
void tmem_set_capacity(tmem *engine, uint64_t bytes, uint64_t ceiling);
int tmem_grant(tmem *engine, uint32_t slab, bool persistent); /* a slab whose memory is allocated */
void tmem_deny(tmem *engine); /* there are no more slabs until the next grant, or until tmem_ask_again */
void tmem_ask_again(tmem *engine); /* the next want of a slab makes the event again */
uint32_t tmem_wanted(tmem *engine); /* slabs that the drain would use; the next want makes the event again */

/* Free up to `most` slabs of the kinds of a mask (1: ephemeral, 2: persistent), if need be for the coldest ephemeral
 * pages, but with 4 only spare ones; write their numbers and kinds (`slab << 1 | persistent`), return how many. */
uint32_t tmem_give_up(tmem *engine, uint32_t most, int kinds, uint32_t *slabs);
int64_t tmem_lose(tmem *engine, uint32_t slab); /* a slab was taken away; returns the pages lost, -EINVAL: persistent */
uint32_t tmem_spares(tmem *engine, bool persistent); /* slabs of a kind without a page */
int tmem_take_spare(tmem *engine, bool persistent, uint32_t *slab); /* remove one of them; -ENOENT: there is none */

/* -- pools: the contract of docs/design/pool.md ------------------------------------------------------------------- */

enum tmem_result {
    TMEM_OK,
    TMEM_MISS,          /* no page with this handle */
    TMEM_CORRUPT,       /* its stored bytes are not those that were put; an ephemeral page was removed */
    TMEM_NEEDS_SLAB,    /* nothing is stored yet: grant a slab or not, and put again with TMEM_AGAIN */
    TMEM_FROZEN,        /* refused: the pool is frozen */
    TMEM_NO_SLOT,       /* refused: no slot, and nothing that may be evicted */
    TMEM_SAME_FILLED,   /* refused: persistent pages use up the bound of same-filled pages */
    TMEM_CODEC,         /* refused: the compressor failed */
    TMEM_MEMORY         /* refused: the arena could not be written, or no memory for the index */
};

enum tmem_put_flags {
    TMEM_HOT = 1,       /* the page was in the pool before */
    TMEM_ASK = 2,       /* return TMEM_NEEDS_SLAB when there is no slot of its class and no spare slab */
    TMEM_AGAIN = 4,     /* the same page after TMEM_NEEDS_SLAB; with TMEM_ASK: ask once more before it is refused */
    TMEM_FAILED = 8     /* the slabs' source failed: a refusal is counted as rejected_source */
};

struct tmem_pool_stats {
    uint64_t puts;      /* accepted or refused */
    uint64_t rejected_frozen, rejected_no_slot, rejected_same_filled, rejected_source, rejected_codec, rejected_memory;
    uint64_t succ_gets, reads, failed_gets;
    uint64_t flushes, corrupt, evictions, ghost_hits;
    uint64_t pages;     /* held now, not in frames */
};

int tmem_pool_new(tmem *engine, bool persistent, bool shared);
void tmem_pool_freeze(tmem *engine, int pool, bool frozen);
bool tmem_pool_frozen(tmem *engine, int pool);
void tmem_pool_destroy(tmem *engine, int pool); /* its number stays, frozen for good */
void tmem_pool_stats(tmem *engine, int pool, struct tmem_pool_stats *stats);

int tmem_put(tmem *engine, int pool, uint64_t object, uint64_t index, const void *page, int flags);
int tmem_get(tmem *engine, int pool, uint64_t object, uint64_t index, void *page);
bool tmem_holds(tmem *engine, int pool, uint64_t object, uint64_t index);
uint64_t tmem_pages_of(tmem *engine, int pool, uint64_t object);
bool tmem_flush_page(tmem *engine, int pool, uint64_t object, uint64_t index);
uint64_t tmem_flush_object(tmem *engine, int pool, uint64_t object);

/* -- files: the pages of pool `files` in frames and slots ---------------------------------------------------------- */

struct tmem_version {
    int64_t field[4];   /* size, mtime, ctime, inode number: as many as the caller compares; the others are 0 */
};

struct tmem_facts {
    int64_t size, true_size; /* true_size: -1 when it is not known */
    struct tmem_version version;
    bool has_version, provisional;
    double settles_at;
    uint64_t stat_seq, change_seq;
    uint32_t own_changes, dirty_pages, fills; /* fills: that may be joined */
    uint64_t pages;     /* in frames and in slots */
    uint64_t content;   /* a number that no other content has; another one after all clean pages were dropped */
};

enum tmem_merge { TMEM_STALE, TMEM_SAME, TMEM_NEW, TMEM_CHANGED };

int64_t tmem_file_new(tmem *engine);
void tmem_file_free(tmem *engine, uint32_t file); /* drops its pages, dirty ones too */
void tmem_file_facts(tmem *engine, uint32_t file, struct tmem_facts *facts);
int64_t tmem_file_size(tmem *engine, uint32_t file);
void tmem_file_set_size(tmem *engine, uint32_t file, int64_t size);
void tmem_file_set_true_size(tmem *engine, uint32_t file, int64_t size);
void tmem_file_set_provisional(tmem *engine, uint32_t file, bool provisional);
void tmem_file_set_settles_at(tmem *engine, uint32_t file, double settles_at);
bool tmem_file_is_stale(tmem *engine, uint32_t file, uint64_t started);
bool tmem_file_matches(tmem *engine, uint32_t file, const struct tmem_version *version); /* true without a version */
/* Merge a stat that was taken from tick `started` on. CHANGED: others changed the file; its clean pages are dropped. */
int tmem_file_merge_stat(
    tmem *engine, uint32_t file, const struct tmem_version *version, int64_t size, uint64_t started);
uint64_t tmem_file_stat_seq(tmem *engine, uint32_t file);
void tmem_file_set_stat_seq(tmem *engine, uint32_t file, uint64_t seq); /* stats that began before are stale */
void tmem_file_begin_change(tmem *engine, uint32_t file); /* all stats are stale until it ends */
void tmem_file_end_change(tmem *engine, uint32_t file, uint64_t seq);
/* Record a change of our own. A version of NULL keeps the recorded one. */
void tmem_file_record_own_change(tmem *engine, uint32_t file, const struct tmem_version *version, uint64_t seq);

/* Reads. Frames of a reply are pinned by its lease until the next read with the lease, or tmem_release. */
enum tmem_read_flags {
    TMEM_SEQUENTIAL = 1, /* pages in slots are read there and stay */
    TMEM_PARTIAL = 2     /* copy what is in memory; otherwise all pages must be there, or nothing is counted */
};

enum tmem_page_state { TMEM_ABSENT, TMEM_PRESENT, TMEM_IN_FLIGHT };

#define TMEM_MAX_READ 257 /* pages of a request: 1 MiB at any alignment */

struct tmem_lease;

struct tmem_reply {
    const uint8_t *data;  /* in the frames, or in the lease's buffer: valid as long as the lease */
    uint64_t size;
    uint32_t absent;      /* pages that are absent or in flight */
    uint8_t state[257];   /* of each page, an enum tmem_page_state */
};

struct tmem_lease *tmem_lease_new(tmem *engine);
void tmem_lease_free(struct tmem_lease *lease);
void tmem_release(struct tmem_lease *lease);
/* Read `size` bytes of at most TMEM_MAX_READ pages. Returns 0, or -ENODATA when not all are there. With TMEM_PARTIAL
 * `data` begins at the first page, not at the offset. */
int tmem_read(
    struct tmem_lease *lease, uint32_t file, uint64_t offset, uint64_t size, int flags, struct tmem_reply *reply);

/* The shortest way: answer a read that lies within the file, from frames side by side. Returns where its bytes are,
 * counted from tmem_frames; -1, and nothing is counted, when it takes more than that. */
int64_t tmem_hit(struct tmem_lease *lease, uint32_t file, uint64_t offset, uint64_t size, int flags);
uint8_t *tmem_frames(tmem *engine);

bool tmem_file_has(tmem *engine, uint32_t file, uint64_t index);     /* in memory or in flight */
bool tmem_file_cached(tmem *engine, uint32_t file, uint64_t index);  /* in a frame */
bool tmem_file_pooled(tmem *engine, uint32_t file, uint64_t index);  /* in a slot only */
void tmem_file_mark_read(tmem *engine, uint32_t file, uint64_t first, uint64_t last);

/* Fills: reads of the backing in flight. A change of their pages poisons them: their bytes enter no frame. */
enum tmem_fill_flags { TMEM_AHEAD = 1 };
uint32_t tmem_fill_begin(
    tmem *engine, uint32_t file, uint64_t first, uint64_t last, int flags, uint64_t unread_from); /* 0: no memory */
uint32_t tmem_fill_of(tmem *engine, uint32_t file, uint64_t index); /* 0: not in flight */
bool tmem_fill_poisoned(tmem *engine, uint32_t fill);
/* Insert the bytes, unless poisoned. `bypass`: pages of a first scan, which are dropped when they are evicted.
 * Returns the pages stored. The fill stays valid until tmem_fill_end. */
int64_t tmem_fill_store(tmem *engine, uint32_t fill, const void *data, uint64_t length, bool bypass);
void tmem_fill_end(tmem *engine, uint32_t fill);

/* Changes. */
void tmem_file_drop(tmem *engine, uint32_t file, uint64_t first, uint64_t last);
void tmem_file_drop_clean(tmem *engine, uint32_t file);
void tmem_file_forget(tmem *engine, uint32_t file); /* dirty pages too */
void tmem_file_flush_pool(tmem *engine, uint32_t file, uint64_t first, uint64_t last);
void tmem_file_overwrite(tmem *engine, uint32_t file, uint64_t offset, const void *data, uint64_t length);
void tmem_file_truncate(tmem *engine, uint32_t file, uint64_t size); /* sets the size as well */

/* Dirty pages: they stay in their frames until they are clean. */
enum tmem_dirty_flags { TMEM_FIRST_STAYS = 1, TMEM_LAST_STAYS = 2 }; /* the bytes of that page are needed */
/* What is in no frame becomes zeros. -ENOENT, and nothing changed: a page whose bytes are needed is in no frame (the
 * drain may have moved it since the caller looked); -ENOMEM: frames run out. */
int tmem_file_make_dirty(tmem *engine, uint32_t file, uint64_t first, uint64_t last, int flags);
void tmem_file_mark_clean(tmem *engine, uint32_t file, uint64_t first, uint64_t last);
bool tmem_file_is_dirty(tmem *engine, uint32_t file, uint64_t index);
uint32_t tmem_file_dirty_pages(tmem *engine, uint32_t file, uint64_t *indexes, uint32_t most); /* in no order */
int tmem_file_copy_out(tmem *engine, uint32_t file, uint64_t first, uint64_t last, void *data); /* -ENOENT */

/* -- the cache ---------------------------------------------------------------------------------------------------- */

void tmem_resize(tmem *engine, uint64_t frames);      /* at most frame_limit; a shrink is finished by tmem_shrink */
/* Returns 1: there is more to do, 0: done, -EAGAIN: dirty pages remain, -EBUSY: pinned ones do. */
int tmem_shrink(tmem *engine, uint32_t most);
/* Free frames until the reserve is full; return how many pages moved or left. */
uint32_t tmem_drain(tmem *engine, uint32_t most);
bool tmem_sweep(tmem *engine, uint32_t most);         /* free dropped pages, of so many entries; true: there are more */
uint32_t tmem_evict_from_cache(tmem *engine, uint32_t most); /* move the coldest clean pages to the pool; how many */

struct tmem_stats {
    uint64_t frames, used_frames, dirty_pages, reserve_frames;
    uint64_t hits, readahead_hits, misses;
    uint64_t cache_evictions, dropped, bypassed, unused;
    uint64_t slabs, used_bytes, pool_pages, same_filled_pages, raw_pages, duplicate_pages;
    uint64_t evictions, lost_slabs, index_bytes, ghost_hits;
    uint64_t capacity_pages; /* C: pages that fit into frames and slots at the present compression */
    uint64_t resident_pages; /* of files, in frames or slots */
    bool settled; /* no shrink waits */
};

void tmem_stats(tmem *engine, struct tmem_stats *stats);
double tmem_oldest(tmem *engine); /* the time of the last use of the coldest page; NAN without pages */

/* -- measures ----------------------------------------------------------------------------------------------------- */

/* Return the misses of the policy alone on a trace; fixed_share < 0: the miniatures choose. -1: no memory. */
int64_t tmem_replay(const uint64_t *pages, size_t count, uint64_t capacity, double fixed_share);

/* END CDEF */

#endif
