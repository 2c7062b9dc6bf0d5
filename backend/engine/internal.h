/* The engine's tables, and the functions that its own modules share.
 *
 * Lock: `lock` of struct tmem protects everything in it. It is the only lock, and is held for short stretches: table
 * look-ups, and copies of at most a few pages. Nobody compresses or decompresses under it. Pages that are read or
 * compressed outside of it are pinned (frames), or were copied under it (slots). Measured: a lock and an unlock cost
 * 12 ns, a whole hit of a random page 80 to 130 ns, of 20,000 ns of a read through a mount: a finer lock gains nothing.
 */

#ifndef TMEM_INTERNAL_H
#define TMEM_INTERNAL_H

#include <pthread.h>
#include <stdatomic.h>

#include "engine.h"
#include "entries.h"
#include "policy.h"

#define NONE UINT32_MAX
#define MAX_INDEX ((UINT64_C(1) << 36) - 1)
#define MAX_OBJECTS (UINT32_C(1) << 24)

enum { FLAG_USED = 1, FLAG_FRAME = 2 }; /* of an entry's key; a flag is left for pinned pages */

static inline uint32_t entry_object(const struct entry *entry) { return (uint32_t)(entry->key >> 40); }
static inline uint64_t entry_index(const struct entry *entry) { return entry->key >> 4 & MAX_INDEX; }
static inline bool entry_is(const struct entry *entry, unsigned flag) { return entry->key & flag; }

/* -- objects: one generation of a file, or an object of a pool ----------------------------------------------------- */

enum object_state { OBJECT_FREE, OBJECT_LIVE, OBJECT_DEAD };

struct object {
    uint64_t id;              /* within its pool; the engine's files have numbers of their own */
    uint64_t seed;            /* of the hashes of its pages */
    uint64_t lowest, highest; /* bounds of the indexes that it ever had */
    uint32_t pages;
    uint32_t chain;           /* in the table of ids, or the free list */
    uint32_t file;            /* NONE: of a pool, and free once it has no pages */
    uint16_t pool;
    uint8_t state;            /* DEAD: nobody finds its pages any more, and the sweep frees them */
};

/* -- slabs -------------------------------------------------------------------------------------------------------- */

#define SLOT_UNIT 64u
#define COMPRESSED_MAX 3072u
#define RAW_CLASS (COMPRESSED_MAX / SLOT_UNIT)
#define CLASSES (RAW_CLASS + 1)
#define SLOT_BITS 10 /* a place is a slab's record number and a slot's number in it */

enum slab_state { SLAB_UNKNOWN, SLAB_SPARE, SLAB_USED };

struct slab {
    uint32_t *entries;        /* of each slot its entry, or FREE_SLOT and the next free slot */
    uint32_t number;          /* in the arena */
    uint32_t next, previous;  /* in the list of its class's slabs with free slots; next: of the spares */
    uint16_t free_slots, first_free;
    uint8_t size_class, state;
    bool persistent;
};

struct space {                /* all slabs of one kind */
    bool persistent;
    uint32_t slabs, spares;   /* numbers of used and spare slabs */
    uint32_t first_spare;
    uint64_t open, ripe;      /* classes with a free slot; with as many free slots as a slab has */
    uint32_t partial[CLASSES];/* heads of the lists of slabs with free slots */
    uint32_t free[CLASSES];   /* free slots */
};

/* -- frames ------------------------------------------------------------------------------------------------------- */

enum frame_flags {
    FRAME_REFERENCED = 1,     /* CLOCK's bit */
    FRAME_UNREAD = 2,         /* read ahead, and not requested yet */
    FRAME_BYPASS = 4,         /* of a first scan: dropped when it is evicted */
    FRAME_DIRTY = 8,
    FRAME_MOVING = 16,        /* its page is being compressed; a use or a change takes the mark away */
    FRAME_TAKEN = 32          /* in nobody's list: a page is being brought into it */
};

struct frame {
    uint32_t entry;           /* NO_ENTRY: free, or its page was removed while it was pinned */
    uint32_t slot;            /* of the compressed copy that its page kept, or NONE */
    uint32_t slot_checksum;
    uint32_t dirty_next, dirty_previous; /* in the list of its file's dirty frames; free frames: next */
    uint16_t slot_length;
    uint16_t pins;
    uint8_t flags;
};

/* -- files and fills ---------------------------------------------------------------------------------------------- */

struct file {
    uint32_t object;
    uint32_t first_fill, first_dirty, dirty_pages;
    uint32_t own_changes;
    bool used, has_version, provisional;
    int64_t size, true_size;
    struct tmem_version version;
    double settles_at;
    uint64_t stat_seq, change_seq;
};

struct fill {
    uint64_t first, last, unread_from;
    uint32_t file, next;      /* next: of its file, or of the free list */
    bool used, ahead, poisoned, detached;
};

struct stored {               /* a page as it is stored */
    unsigned length;          /* 0: same-filled; ENTRY_RAW: the page itself */
    uint32_t checksum;        /* or half of the word */
    uint32_t word;            /* the other half */
    uint8_t bytes[TMEM_PAGE + TMEM_PAGE / 255 + 16];
};

/* -- the engine --------------------------------------------------------------------------------------------------- */

#define MAX_POOLS 64

struct pool {
    bool used, persistent, shared, frozen, destroyed;
    struct tmem_pool_stats stats;
};

struct list { uint32_t oldest, newest; uint64_t count; };

struct tmem {
    pthread_mutex_t lock;
    pthread_cond_t work;      /* the drain has something to do */
    pthread_cond_t granted;   /* slabs came, or there are none */
    pthread_t thread;
    bool has_thread, ending;
    int event_fd;
    double fixed_time;        /* NAN: use the clock */

    /* the arena */
    int arena_fd;
    uint8_t *arena;           /* NULL: not mapped */
    uint32_t arena_slabs;
    uint64_t capacity_bytes, ceiling_bytes;
    bool compress, exhausted, asked;
    bool denied;              /* the source had no slab once: C follows the slabs held, not what may be given at most */
    struct slab *slabs;       /* by record number */
    uint32_t slabs_used, free_slab;
    uint32_t *record_of;      /* slab number -> record number + 1 */
    struct space space[2];    /* ephemeral, persistent */
    struct stored asking;     /* the page of the last put that returned TMEM_NEEDS_SLAB, and its handle */
    uint64_t asking_id, asking_index;
    int asking_pool;

    /* entries */
    struct entry *entries;
    uint32_t entries_used, max_entries, free_entry;
    uint32_t *buckets;
    uint32_t bucket_count, bucket_base, max_buckets;
    struct object *objects;
    uint32_t objects_used, free_object;
    uint32_t *ids;            /* heads of the chains of objects, by pool and id */
    uint32_t id_count, id_base, live_objects;
    uint64_t next_id;
    struct pool pools[MAX_POOLS];
    uint32_t pool_count;

    /* pages of dead objects */
    uint64_t dead_pages;
    uint32_t sweep_at;        /* the entry that the sweep looks at next */

    /* the policy */
    struct policy policy;
    struct list same;         /* ephemeral same-filled pages that are in no frame */
    uint64_t capacity_pages;  /* C */
    uint64_t slot_pages, slot_bytes; /* ephemeral pages in slots, and what their slots take of a slab */
    uint64_t evictions, lost_slabs, used_bytes, pool_pages, same_pages, raw_pages, duplicates;
    uint32_t duplicate_hand;

    /* the cache */
    uint8_t *pages, *pages_map;
    struct frame *frames;
    uint32_t frame_limit, frame_target;
    uint32_t frame_end;       /* frames from here on were never used; above the target while a shrink goes on */
    uint32_t free_frames, first_free, last_free; /* a queue: frames that were freed side by side are used so again */
    uint32_t pool_hits;       /* random reads of pages in slots, modulo 2^32 */
    uint32_t hand, used_frames, dirty_frames, announced, reserve;
    uint64_t hits, readahead_hits, misses, cache_evictions, dropped, bypassed, unused;

    struct file *files;
    uint32_t files_used, max_files, free_file;
    struct fill *fills;
    uint32_t fills_used, max_fills, free_fill;
};

#define FILES_POOL 0

static inline unsigned stored_bytes(unsigned length) { return length == ENTRY_RAW ? TMEM_PAGE : length; }

/* table.c */
uint64_t handle_hash(unsigned pool, uint64_t id, uint64_t index);
uint64_t page_hash(const struct tmem *, uint32_t object, uint64_t index);
uint32_t entry_find(const struct tmem *, uint32_t object, uint64_t index);
void entries_find(const struct tmem *, uint32_t object, uint64_t first, uint32_t count, uint32_t *entries);
uint32_t entry_new(struct tmem *, uint32_t object, uint64_t index); /* NO_ENTRY: no room */
void entry_free(struct tmem *, uint32_t entry); /* out of the hash table; the object stays */
void entry_rename(struct tmem *, uint32_t entry, uint32_t object);
uint32_t object_find(const struct tmem *, unsigned pool, uint64_t id);
uint32_t object_new(struct tmem *, unsigned pool, uint64_t id, uint32_t file); /* NONE: no room */
void object_free(struct tmem *, uint32_t object);
void object_unname(struct tmem *, uint32_t object); /* out of the table of ids */
int table_init(struct tmem *);
void table_check(const struct tmem *);

/* slots.c */
static inline unsigned class_of(unsigned length) {
    return length > COMPRESSED_MAX ? RAW_CLASS : (length - 1) / SLOT_UNIT;
}
unsigned slot_size(unsigned size_class);
unsigned slot_count(unsigned size_class);
uint64_t slot_offset(const struct tmem *, uint32_t place);
uint32_t slot_take(struct tmem *, struct space *, unsigned size_class, uint32_t entry);
uint32_t slot_take_larger(struct tmem *, struct space *, unsigned size_class, unsigned most, uint32_t entry);
uint32_t slot_take_spare(struct tmem *, struct space *, unsigned size_class, uint32_t entry);
void slot_drop(struct tmem *, uint32_t place);
void slot_rename(struct tmem *, uint32_t place, uint32_t entry);
bool slots_compact(struct tmem *, struct space *);
int slab_add(struct tmem *, struct space *, uint32_t number);
bool slab_remove_spare(struct tmem *, struct space *, uint32_t *number);
uint32_t slot_entry(const struct tmem *, uint32_t record, unsigned slot); /* NO_ENTRY: free */
void slab_forget_spare(struct tmem *, struct space *, uint32_t record);
void slots_init(struct tmem *);
void slots_check(const struct tmem *);

/* codec.c */
bool page_encode(const uint8_t *page, bool compress, struct stored *);
bool page_decode(const uint8_t *bytes, unsigned length, uint32_t checksum, uint8_t *page);
void page_fill(uint32_t word, uint32_t checksum, uint8_t *page);
void slot_prefetch(const struct tmem *, uint32_t place, unsigned bytes); /* its bytes, and its place in its slab */
const uint8_t *arena_read(const struct tmem *, uint32_t place, unsigned bytes, uint8_t *buffer); /* NULL: failed */
bool arena_write(const struct tmem *, uint32_t place, const uint8_t *bytes, unsigned length);

/* pool.c */
double engine_now(const struct tmem *);
void page_leave(struct tmem *, uint32_t entry, bool evicted); /* out of memory; evicted: it may leave a ghost */
void page_flush(struct tmem *, uint32_t entry); /* the same, as it was changed or dropped; counted of files' slots */
void slot_release(struct tmem *, uint32_t entry); /* free the slot of a page that is in no frame */
void slot_book(struct tmem *, uint32_t entry, bool ephemeral, int sign);
uint32_t room_find(struct tmem *, struct space *, unsigned length, uint32_t entry, int flags, int *result);
int room_for_same(struct tmem *);
bool policy_evict_one(struct tmem *);
void object_drop(struct tmem *, uint32_t object); /* all of its pages, at once or by the sweep */
bool sweep(struct tmem *, uint32_t most); /* free pages of dead objects; false: there are none */
void capacity_update(struct tmem *);
void same_link(struct tmem *, uint32_t entry);
void same_unlink(struct tmem *, uint32_t entry);
void notify(struct tmem *);

/* cache.c */
/* Frames, and the buffers of replies, lie 64 bytes off page boundaries. The kernel copies a reply with `rep movsb`,
 * which is three times slower where source and target have the same place in their pages (1-MiB reads, null filesystem:
 * 713 against 2362 MiB/s). */
#define SKEW 64

static inline uint8_t *frame_page(const struct tmem *engine, uint32_t frame) {
    return engine->pages + ((uint64_t)frame << 12);
}
uint32_t frame_take(struct tmem *, bool may_evict); /* a free frame, or NONE */
void frame_give_back(struct tmem *, uint32_t frame); /* one that was taken and not used */
void frame_bind(struct tmem *, uint32_t frame, uint32_t entry, unsigned flags);
void frame_release(struct tmem *, uint32_t frame); /* its page leaves it; free once nobody pins it */
void frame_unpin(struct tmem *, uint32_t frame);
void frame_drop_slot(struct tmem *, uint32_t frame);
bool duplicate_reclaim(struct tmem *);
bool cache_wants_page(struct tmem *, bool sequential); /* whether a page that is read in its slot is to move up */
void cache_wake(struct tmem *);
uint32_t page_insert(struct tmem *, uint32_t object, uint64_t index, unsigned flags); /* a new page in a frame */
void page_use(struct tmem *, uint32_t entry, uint64_t hash);
bool demote_to_slot(struct tmem *, uint32_t frame, const struct stored *);
void *drain_thread(void *engine);
int cache_init(struct tmem *);
void cache_check(const struct tmem *);

/* file.c */
int files_init(struct tmem *);
void files_check(const struct tmem *);
void file_unlink_dirty(struct tmem *, uint32_t frame);
void file_moved_dirty(struct tmem *, uint32_t from, uint32_t to);

/* engine.c */
void *table_map(uint64_t bytes); /* zeroed memory that costs nothing until it is touched; NULL */

#endif
