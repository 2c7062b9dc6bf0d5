/* Files: their versions, pages, fills in flight and dirty pages; reads and changes of them.
 *
 * The race that must not be: a backing read begins, a write to its pages completes, and the read then brings the old
 * bytes into the cache. So each change poisons the fills that overlap it. A poisoned fill still answers the requests
 * that waited for it (they were concurrent with the change), but its bytes enter no frame and nobody joins it any more.
 *
 * A file that loses many pages at once takes a new object. The pages of the old one are found by nobody from then on,
 * and the sweep frees them in steps.
 */

#include <assert.h>
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "internal.h"

#define LAST_PAGE UINT64_MAX
#define MANY 4096u  /* pages: where a range has more, all clean pages of the file go */
#define PART 16u    /* pages that are copied under one lock */
#define CHUNK 32u   /* pages of a read that are looked up and copied under one lock */

static struct file *file_of(const struct tmem *engine, uint32_t number) {
    assert(number < engine->files_used && engine->files[number].used);
    return &engine->files[number];
}

static uint32_t page_of(const struct tmem *engine, const struct file *file, uint64_t index) {
    return index > MAX_INDEX ? NO_ENTRY : entry_find(engine, file->object, index);
}

static struct frame *frame_of(const struct tmem *engine, uint32_t entry) {
    const struct entry *e = &engine->entries[entry];
    return entry != NO_ENTRY && entry_is(e, FLAG_FRAME) ? &engine->frames[e->place] : NULL;
}

/* -- what is known of a file -------------------------------------------------------------------------------------- */

int64_t tmem_file_new(tmem *engine) {
    int64_t number = -ENFILE;
    pthread_mutex_lock(&engine->lock);
    if (engine->free_file != NONE)
        number = engine->free_file;
    else if (engine->files_used < engine->max_files)
        number = engine->files_used;
    if (number >= 0) {
        uint32_t object = object_new(engine, FILES_POOL, engine->next_id++, (uint32_t)number);
        if (object == NONE) {
            number = -ENFILE;
        } else {
            if (engine->free_file != NONE)
                engine->free_file = engine->files[number].object;
            else
                engine->files_used++;
            engine->files[number] = (struct file){
                .object = object, .first_fill = 0, .first_dirty = NONE, .used = true, .true_size = -1};
        }
    }
    pthread_mutex_unlock(&engine->lock);
    return number;
}

void tmem_file_facts(tmem *engine, uint32_t number, struct tmem_facts *facts) {
    pthread_mutex_lock(&engine->lock);
    const struct file *file = file_of(engine, number);
    *facts = (struct tmem_facts){
        .size = file->size, .true_size = file->true_size, .version = file->version,
        .has_version = file->has_version, .provisional = file->provisional, .settles_at = file->settles_at,
        .stat_seq = file->stat_seq, .change_seq = file->change_seq, .own_changes = file->own_changes,
        .dirty_pages = file->dirty_pages, .pages = engine->objects[file->object].pages,
        .content = engine->objects[file->object].id};
    for (uint32_t fill = file->first_fill; fill; fill = engine->fills[fill].next)
        facts->fills += !engine->fills[fill].detached;
    pthread_mutex_unlock(&engine->lock);
}

int64_t tmem_file_size(tmem *engine, uint32_t number) {
    pthread_mutex_lock(&engine->lock);
    int64_t size = file_of(engine, number)->size;
    pthread_mutex_unlock(&engine->lock);
    return size;
}

#define SETTER(name, type, field)                                         \
    void tmem_file_set_##name(tmem *engine, uint32_t number, type value) { \
        pthread_mutex_lock(&engine->lock);                                \
        file_of(engine, number)->field = value;                           \
        pthread_mutex_unlock(&engine->lock);                              \
    }

SETTER(size, int64_t, size)
SETTER(true_size, int64_t, true_size)
SETTER(provisional, bool, provisional)
SETTER(settles_at, double, settles_at)
SETTER(stat_seq, uint64_t, stat_seq)

static bool matches(const struct file *file, const struct tmem_version *version) {
    return !file->has_version || !memcmp(&file->version, version, sizeof *version);
}

bool tmem_file_is_stale(tmem *engine, uint32_t number, uint64_t started) {
    pthread_mutex_lock(&engine->lock);
    const struct file *file = file_of(engine, number);
    bool stale = file->own_changes || started < file->stat_seq;
    pthread_mutex_unlock(&engine->lock);
    return stale;
}

bool tmem_file_matches(tmem *engine, uint32_t number, const struct tmem_version *version) {
    pthread_mutex_lock(&engine->lock);
    bool same = matches(file_of(engine, number), version);
    pthread_mutex_unlock(&engine->lock);
    return same;
}

uint64_t tmem_file_stat_seq(tmem *engine, uint32_t number) {
    pthread_mutex_lock(&engine->lock);
    uint64_t seq = file_of(engine, number)->stat_seq;
    pthread_mutex_unlock(&engine->lock);
    return seq;
}

void tmem_file_begin_change(tmem *engine, uint32_t number) {
    pthread_mutex_lock(&engine->lock);
    file_of(engine, number)->own_changes++;
    pthread_mutex_unlock(&engine->lock);
}

void tmem_file_end_change(tmem *engine, uint32_t number, uint64_t seq) {
    pthread_mutex_lock(&engine->lock);
    struct file *file = file_of(engine, number);
    assert(file->own_changes);
    file->own_changes--;
    file->stat_seq = seq;
    pthread_mutex_unlock(&engine->lock);
}

void tmem_file_record_own_change(
    tmem *engine, uint32_t number, const struct tmem_version *version, uint64_t seq) {
    pthread_mutex_lock(&engine->lock);
    struct file *file = file_of(engine, number);
    file->stat_seq = file->change_seq = seq;
    if (version) {
        file->version = *version;
        file->has_version = true;
        file->true_size = -1;
        if (!file->dirty_pages && !file->own_changes) /* else it is a change of names, whose stat may be older */
            file->size = version->field[0];
    }
    pthread_mutex_unlock(&engine->lock);
}

/* -- fills -------------------------------------------------------------------------------------------------------- */

uint32_t tmem_fill_begin(
    tmem *engine, uint32_t number, uint64_t first, uint64_t last, int flags, uint64_t unread_from) {
    pthread_mutex_lock(&engine->lock);
    uint32_t new = engine->free_fill;
    if (new)
        engine->free_fill = engine->fills[new].next;
    else if (engine->fills_used < engine->max_fills)
        new = engine->fills_used++;
    if (new) {
        struct fill *fill = &engine->fills[new];
        uint32_t *link = &file_of(engine, number)->first_fill;
        *fill = (struct fill){
            .first = first, .last = last, .unread_from = unread_from, .file = number, .used = true,
            .ahead = flags & TMEM_AHEAD};
        for (; *link; link = &engine->fills[*link].next) {
            const struct fill *other = &engine->fills[*link];
            /* A change of the page that both have poisons the other only, which is found first. */
            if (!other->detached && other->first <= last && other->last >= first)
                fill->poisoned = true;
        }
        *link = new;
        engine->announced += (uint32_t)(last - first + 1);
        cache_wake(engine);
    }
    pthread_mutex_unlock(&engine->lock);
    return new;
}

static uint32_t fill_of(const struct tmem *engine, const struct file *file, uint64_t index) {
    uint32_t at = file->first_fill;
    while (at && (engine->fills[at].detached || index < engine->fills[at].first || index > engine->fills[at].last))
        at = engine->fills[at].next;
    return at;
}

uint32_t tmem_fill_of(tmem *engine, uint32_t number, uint64_t index) {
    pthread_mutex_lock(&engine->lock);
    uint32_t found = fill_of(engine, file_of(engine, number), index);
    pthread_mutex_unlock(&engine->lock);
    return found;
}

bool tmem_fill_poisoned(tmem *engine, uint32_t fill) {
    pthread_mutex_lock(&engine->lock);
    bool poisoned = engine->fills[fill].poisoned;
    pthread_mutex_unlock(&engine->lock);
    return poisoned;
}

int64_t tmem_fill_store(tmem *engine, uint32_t number, const void *data, uint64_t length, bool bypass) {
    const uint8_t *bytes = data;
    uint64_t count = (length + TMEM_PAGE - 1) / TMEM_PAGE, stored = 0;
    bool full = false;
    while (stored < count && !full) {
        pthread_mutex_lock(&engine->lock);
        const struct fill *fill = &engine->fills[number];
        const struct file *file = &engine->files[fill->file];
        full = fill->poisoned;
        for (unsigned part = 0; part < PART && stored < count && !full; part++) {
            uint64_t index = fill->first + stored, start = stored * TMEM_PAGE;
            if (page_of(engine, file, index) == NO_ENTRY) {
                unsigned flags = (fill->ahead ? FRAME_REFERENCED : 0u) | (bypass ? FRAME_BYPASS : 0u) |
                                 (index >= fill->unread_from ? FRAME_UNREAD : 0u);
                uint32_t entry = page_insert(engine, file->object, index, flags);
                if (entry == NO_ENTRY) {
                    full = true;
                    break;
                }
                uint64_t rest = length - start, bytes_here = rest < TMEM_PAGE ? rest : TMEM_PAGE;
                uint8_t *page = frame_page(engine, engine->entries[entry].place);
                memcpy(page, bytes + start, bytes_here);
                memset(page + bytes_here, 0, TMEM_PAGE - bytes_here);
            }
            stored++;
        }
        pthread_mutex_unlock(&engine->lock);
    }
    return (int64_t)stored;
}

void tmem_fill_end(tmem *engine, uint32_t number) {
    pthread_mutex_lock(&engine->lock);
    struct fill *fill = &engine->fills[number];
    uint32_t *link = &engine->files[fill->file].first_fill;
    while (*link != number)
        link = &engine->fills[*link].next;
    *link = fill->next;
    engine->announced -= (uint32_t)(fill->last - fill->first + 1);
    *fill = (struct fill){.next = engine->free_fill};
    engine->free_fill = number;
    cache_wake(engine);
    pthread_mutex_unlock(&engine->lock);
}

static void poison(struct tmem *engine, const struct file *file, uint64_t first, uint64_t last) {
    for (uint32_t at = file->first_fill; at; at = engine->fills[at].next) {
        struct fill *fill = &engine->fills[at];
        if (fill->first <= last && fill->last >= first)
            fill->poisoned = fill->detached = true;
    }
}

/* -- dirty pages -------------------------------------------------------------------------------------------------- */

static struct file *file_of_frame(struct tmem *engine, uint32_t frame) {
    return &engine->files[engine->objects[entry_object(&engine->entries[engine->frames[frame].entry])].file];
}

static void link_dirty(struct tmem *engine, uint32_t frame) {
    struct frame *f = &engine->frames[frame];
    struct file *file = file_of_frame(engine, frame);
    f->flags = (uint8_t)((f->flags & ~FRAME_MOVING) | FRAME_DIRTY | FRAME_REFERENCED);
    f->dirty_previous = NONE;
    f->dirty_next = file->first_dirty;
    if (f->dirty_next != NONE)
        engine->frames[f->dirty_next].dirty_previous = frame;
    file->first_dirty = frame;
    file->dirty_pages++;
    engine->dirty_frames++;
}

void file_unlink_dirty(struct tmem *engine, uint32_t frame) {
    struct frame *f = &engine->frames[frame];
    struct file *file = file_of_frame(engine, frame);
    if (f->dirty_previous != NONE)
        engine->frames[f->dirty_previous].dirty_next = f->dirty_next;
    else
        file->first_dirty = f->dirty_next;
    if (f->dirty_next != NONE)
        engine->frames[f->dirty_next].dirty_previous = f->dirty_previous;
    f->flags &= (uint8_t)~FRAME_DIRTY;
    file->dirty_pages--;
    engine->dirty_frames--;
}

void file_moved_dirty(struct tmem *engine, uint32_t from, uint32_t to) {
    const struct frame *f = &engine->frames[to];
    if (f->dirty_previous != NONE)
        engine->frames[f->dirty_previous].dirty_next = to;
    else
        file_of_frame(engine, from)->first_dirty = to;
    if (f->dirty_next != NONE)
        engine->frames[f->dirty_next].dirty_previous = to;
}

/* A page in a frame was changed, or is about to be: its compressed copies are void. */
static void frame_changed(struct tmem *engine, uint32_t frame) {
    struct frame *f = &engine->frames[frame];
    frame_drop_slot(engine, frame);
    f->flags = (uint8_t)((f->flags & ~FRAME_MOVING) | FRAME_REFERENCED);
}

int tmem_file_make_dirty(tmem *engine, uint32_t number, uint64_t first, uint64_t last, int flags) {
    uint64_t count = last - first + 1, failed = 0;
    uint8_t *was = calloc(count, 1); /* 1: clean before, 2: not there */
    if (!was)
        return -ENOMEM;
    pthread_mutex_lock(&engine->lock);
    const struct file *file = file_of(engine, number);
    if ((flags & TMEM_FIRST_STAYS && !frame_of(engine, page_of(engine, file, first))) ||
        (flags & TMEM_LAST_STAYS && !frame_of(engine, page_of(engine, file, last)))) {
        pthread_mutex_unlock(&engine->lock);
        free(was);
        return -ENOENT;
    }
    /* What is there first, or the insertions could evict it. */
    for (uint64_t index = first; index <= last; index++) {
        uint32_t entry = page_of(engine, file, index);
        struct frame *f = frame_of(engine, entry);
        if (f && !(f->flags & FRAME_DIRTY)) {
            link_dirty(engine, engine->entries[entry].place);
            was[index - first] = 1;
        }
    }
    for (uint64_t index = first; index <= last && !failed; index++) {
        uint32_t entry = page_of(engine, file, index);
        if (frame_of(engine, entry))
            continue;
        if (entry != NO_ENTRY)
            page_flush(engine, entry);
        entry = page_insert(engine, file->object, index, 0);
        if (entry == NO_ENTRY) {
            failed = 1;
        } else {
            memset(frame_page(engine, engine->entries[entry].place), 0, TMEM_PAGE);
            link_dirty(engine, engine->entries[entry].place);
            was[index - first] = 2;
        }
    }
    for (uint64_t index = first; index <= last; index++) {
        uint32_t entry = page_of(engine, file, index);
        if (!failed && entry != NO_ENTRY)
            frame_changed(engine, engine->entries[entry].place);
        else if (failed && was[index - first] == 1)
            file_unlink_dirty(engine, engine->entries[entry].place);
        else if (failed && was[index - first] == 2)
            page_flush(engine, entry);
    }
    cache_wake(engine);
    pthread_mutex_unlock(&engine->lock);
    free(was);
    return failed ? -ENOMEM : 0;
}

void tmem_file_mark_clean(tmem *engine, uint32_t number, uint64_t first, uint64_t last) {
    pthread_mutex_lock(&engine->lock);
    const struct file *file = file_of(engine, number);
    for (uint64_t index = first; index <= last; index++) {
        uint32_t entry = page_of(engine, file, index);
        const struct frame *f = frame_of(engine, entry);
        if (f && f->flags & FRAME_DIRTY) {
            file_unlink_dirty(engine, engine->entries[entry].place);
            poison(engine, file, index, index); /* a fill may have begun before the page was written back */
        }
    }
    cache_wake(engine);
    pthread_mutex_unlock(&engine->lock);
}

bool tmem_file_is_dirty(tmem *engine, uint32_t number, uint64_t index) {
    pthread_mutex_lock(&engine->lock);
    const struct frame *f = frame_of(engine, page_of(engine, file_of(engine, number), index));
    bool dirty = f && f->flags & FRAME_DIRTY;
    pthread_mutex_unlock(&engine->lock);
    return dirty;
}

uint32_t tmem_file_dirty_pages(tmem *engine, uint32_t number, uint64_t *indexes, uint32_t most) {
    uint32_t count = 0;
    pthread_mutex_lock(&engine->lock);
    const struct file *file = file_of(engine, number);
    for (uint32_t frame = file->first_dirty; frame != NONE && count < most; frame = engine->frames[frame].dirty_next)
        indexes[count++] = entry_index(&engine->entries[engine->frames[frame].entry]);
    pthread_mutex_unlock(&engine->lock);
    return count;
}

int tmem_file_copy_out(tmem *engine, uint32_t number, uint64_t first, uint64_t last, void *data) {
    uint8_t *out = data;
    for (uint64_t index = first; index <= last;) {
        pthread_mutex_lock(&engine->lock);
        const struct file *file = file_of(engine, number);
        for (unsigned part = 0; part < PART && index <= last; part++, index++, out += TMEM_PAGE) {
            uint32_t entry = page_of(engine, file, index);
            if (!frame_of(engine, entry)) {
                pthread_mutex_unlock(&engine->lock);
                return -ENOENT;
            }
            memcpy(out, frame_page(engine, engine->entries[entry].place), TMEM_PAGE);
        }
        pthread_mutex_unlock(&engine->lock);
    }
    return 0;
}

/* -- changes ------------------------------------------------------------------------------------------------------ */

/* Give a file a new object, which takes over its dirty pages; drop the old one with all clean pages. */
static void drop_clean(struct tmem *engine, uint32_t number) {
    struct file *file = &engine->files[number];
    uint32_t old = file->object;
    poison(engine, file, 0, LAST_PAGE);
    if (!engine->objects[old].pages)
        return;
    uint32_t new = object_new(engine, FILES_POOL, engine->next_id++, number);
    if (new == NONE) { /* as many objects as there can be: free the pages here, however long it takes */
        for (uint32_t entry = 1; entry < engine->entries_used; entry++) {
            const struct entry *e = &engine->entries[entry];
            const struct frame *f = frame_of(engine, entry);
            if (entry_is(e, FLAG_USED) && entry_object(e) == old && !(f && f->flags & FRAME_DIRTY))
                page_flush(engine, entry);
        }
        return;
    }
    for (uint32_t frame = file->first_dirty; frame != NONE; frame = engine->frames[frame].dirty_next)
        entry_rename(engine, engine->frames[frame].entry, new);
    file->object = new;
    object_drop(engine, old);
}

static void drop_dirty(struct tmem *engine, const struct file *file, uint64_t first, uint64_t last) {
    for (uint32_t frame = file->first_dirty, next; frame != NONE; frame = next) {
        uint32_t entry = engine->frames[frame].entry;
        uint64_t index = entry_index(&engine->entries[entry]);
        next = engine->frames[frame].dirty_next;
        if (first <= index && index <= last)
            page_flush(engine, entry);
    }
}

/* Drop the pages of a range, of those in slots only if so asked; all clean pages where the range is long. */
static void drop_range(struct tmem *engine, uint32_t number, uint64_t first, uint64_t last, bool only_slots) {
    const struct file *file = &engine->files[number];
    const struct object *object = &engine->objects[file->object];
    if (!object->pages)
        return;
    first = first > object->lowest ? first : object->lowest;
    last = last < object->highest ? last : object->highest;
    if (first > last)
        return;
    if (last - first >= MANY) {
        drop_clean(engine, number);
        return;
    }
    for (uint64_t index = first; index <= last; index++) {
        uint32_t entry = page_of(engine, file, index);
        if (entry == NO_ENTRY)
            continue;
        if (!only_slots || !frame_of(engine, entry))
            page_flush(engine, entry);
        else
            frame_drop_slot(engine, engine->entries[entry].place);
    }
}

void tmem_file_free(tmem *engine, uint32_t number) {
    pthread_mutex_lock(&engine->lock);
    struct file *file = file_of(engine, number);
    drop_dirty(engine, file, 0, LAST_PAGE);
    poison(engine, file, 0, LAST_PAGE);
    assert(!file->first_fill);
    object_drop(engine, file->object);
    *file = (struct file){.object = engine->free_file};
    engine->free_file = number;
    pthread_mutex_unlock(&engine->lock);
}

void tmem_file_drop(tmem *engine, uint32_t number, uint64_t first, uint64_t last) {
    pthread_mutex_lock(&engine->lock);
    struct file *file = file_of(engine, number);
    poison(engine, file, first, last);
    drop_dirty(engine, file, first, last);
    drop_range(engine, number, first, last, false);
    pthread_mutex_unlock(&engine->lock);
}

void tmem_file_drop_clean(tmem *engine, uint32_t number) {
    pthread_mutex_lock(&engine->lock);
    file_of(engine, number);
    drop_clean(engine, number);
    pthread_mutex_unlock(&engine->lock);
}

void tmem_file_forget(tmem *engine, uint32_t number) {
    pthread_mutex_lock(&engine->lock);
    drop_dirty(engine, file_of(engine, number), 0, LAST_PAGE);
    drop_clean(engine, number);
    pthread_mutex_unlock(&engine->lock);
}

void tmem_file_flush_pool(tmem *engine, uint32_t number, uint64_t first, uint64_t last) {
    pthread_mutex_lock(&engine->lock);
    file_of(engine, number);
    drop_range(engine, number, first, last, true);
    pthread_mutex_unlock(&engine->lock);
}

void tmem_file_overwrite(tmem *engine, uint32_t number, uint64_t offset, const void *data, uint64_t length) {
    const uint8_t *bytes = data;
    uint64_t end = offset + length, at = offset;
    while (at < end) {
        pthread_mutex_lock(&engine->lock);
        const struct file *file = file_of(engine, number);
        poison(engine, file, offset / TMEM_PAGE, (end - 1) / TMEM_PAGE);
        for (unsigned part = 0; part < PART && at < end; part++) {
            uint64_t index = at / TMEM_PAGE, skip = at % TMEM_PAGE;
            uint64_t here = end - at < TMEM_PAGE - skip ? end - at : TMEM_PAGE - skip;
            uint32_t entry = page_of(engine, file, index);
            if (frame_of(engine, entry)) {
                uint32_t frame = engine->entries[entry].place;
                memcpy(frame_page(engine, frame) + skip, bytes + (at - offset), here);
                frame_changed(engine, frame);
            } else if (entry != NO_ENTRY) {
                page_flush(engine, entry);
            }
            at += here;
        }
        pthread_mutex_unlock(&engine->lock);
    }
}

void tmem_file_truncate(tmem *engine, uint32_t number, uint64_t size) {
    pthread_mutex_lock(&engine->lock);
    struct file *file = file_of(engine, number);
    uint64_t boundary = size / TMEM_PAGE, rest = size % TMEM_PAGE;
    poison(engine, file, boundary, LAST_PAGE);
    drop_dirty(engine, file, boundary + (rest > 0), LAST_PAGE);
    drop_range(engine, number, boundary + (rest > 0), LAST_PAGE, false);
    uint32_t entry = rest ? page_of(engine, file, boundary) : NO_ENTRY;
    if (frame_of(engine, entry)) {
        memset(frame_page(engine, engine->entries[entry].place) + rest, 0, TMEM_PAGE - rest);
        frame_changed(engine, engine->entries[entry].place);
    } else if (entry != NO_ENTRY) {
        page_flush(engine, entry);
    }
    file->size = (int64_t)size;
    pthread_mutex_unlock(&engine->lock);
}

int tmem_file_merge_stat(
    tmem *engine, uint32_t number, const struct tmem_version *version, int64_t size, uint64_t started) {
    int result = TMEM_SAME;
    pthread_mutex_lock(&engine->lock);
    struct file *file = file_of(engine, number);
    if (file->own_changes || started < file->stat_seq) {
        pthread_mutex_unlock(&engine->lock);
        return TMEM_STALE;
    }
    file->stat_seq = started;
    if (!matches(file, version)) {
        result = TMEM_CHANGED;
        drop_clean(engine, number);
        file->provisional = false;
    } else if (!file->has_version) {
        result = TMEM_NEW;
    }
    if (result != TMEM_SAME) {
        file->version = *version;
        file->has_version = true;
        file->true_size = -1;
        file->settles_at = INFINITY; /* until the caller says when */
    }
    if (!file->dirty_pages) /* until they are written back, the size is ours */
        file->size = file->true_size < 0 ? size : file->true_size;
    pthread_mutex_unlock(&engine->lock);
    return result;
}

/* -- reads -------------------------------------------------------------------------------------------------------- */

struct tmem_lease {
    tmem *engine;
    uint32_t count;
    uint32_t frames[TMEM_MAX_READ]; /* pinned */
    uint8_t *memory, *buffer;       /* TMEM_MAX_READ pages; the buffer begins within the memory */
    uint8_t *stored;                /* CHUNK pages as they are stored */
};

struct tmem_lease *tmem_lease_new(tmem *engine) {
    struct tmem_lease *lease = calloc(1, sizeof *lease);
    if (!lease)
        return NULL;
    lease->engine = engine;
    lease->memory = aligned_alloc(TMEM_PAGE, (TMEM_MAX_READ + 1) * TMEM_PAGE);
    lease->stored = malloc(CHUNK * TMEM_PAGE);
    if (!lease->memory || !lease->stored) {
        tmem_lease_free(lease);
        return NULL;
    }
    lease->buffer = lease->memory + SKEW;
    return lease;
}

static void release(struct tmem_lease *lease) {
    while (lease->count)
        frame_unpin(lease->engine, lease->frames[--lease->count]);
}

void tmem_release(struct tmem_lease *lease) {
    pthread_mutex_lock(&lease->engine->lock);
    release(lease);
    pthread_mutex_unlock(&lease->engine->lock);
}

void tmem_lease_free(struct tmem_lease *lease) {
    if (lease->count)
        tmem_release(lease);
    free(lease->memory);
    free(lease->stored);
    free(lease);
}

static void pin(struct tmem_lease *lease, uint32_t frame) {
    lease->engine->frames[frame].pins++;
    lease->frames[lease->count++] = frame;
}

/* Use and pin frames that lie side by side, from `base` on. Locked. */
static void use_in_place(
    struct tmem_lease *lease, const struct file *file, const uint32_t *entries, uint64_t first, uint32_t count,
    int flags) {
    struct tmem *engine = lease->engine;
    uint32_t base = engine->entries[entries[0]].place;
    if (count == 1 && !(flags & TMEM_SEQUENTIAL))
        engine->frames[base].flags &= (uint8_t)~FRAME_BYPASS; /* used apart from the stream that brought it */
    for (uint32_t at = 0; at < count; at++) {
        page_use(engine, entries[at], page_hash(engine, file->object, first + at));
        pin(lease, base + at);
    }
}

/* Look up pages, which a page number fits. Locked. */
static void find_pages(
    const struct tmem *engine, const struct file *file, uint64_t first, uint32_t count, uint32_t *entries) {
    if (first + count - 1 <= MAX_INDEX)
        entries_find(engine, file->object, first, count, entries);
    else
        for (uint32_t at = 0; at < count; at++)
            entries[at] = page_of(engine, file, first + at);
}

/* Return whether all of the pages are in frames side by side. Locked. */
static bool are_in_place(const struct tmem *engine, uint32_t count, const uint32_t *entries) {
    for (uint32_t at = 0; at < count; at++) {
        const struct entry *e = &engine->entries[entries[at]];
        if (entries[at] == NO_ENTRY || !entry_is(e, FLAG_FRAME) ||
            e->place != engine->entries[entries[0]].place + at)
            return false;
    }
    return true;
}

int64_t tmem_hit(struct tmem_lease *lease, uint32_t number, uint64_t offset, uint64_t size, int flags) {
    struct tmem *engine = lease->engine;
    uint64_t first = offset / TMEM_PAGE, last = (offset + size - 1) / TMEM_PAGE;
    uint32_t entries[TMEM_MAX_READ];
    int64_t found = -1;
    if (!size || last - first >= TMEM_MAX_READ)
        return -1;
    pthread_mutex_lock(&engine->lock);
    release(lease);
    const struct file *file = file_of(engine, number);
    uint32_t count = (uint32_t)(last - first + 1);
    if (file->size >= 0 && offset + size <= (uint64_t)file->size) {
        find_pages(engine, file, first, count, entries);
        if (are_in_place(engine, count, entries)) {
            use_in_place(lease, file, entries, first, count, flags);
            found = ((int64_t)engine->entries[entries[0]].place << 12) + (int64_t)(offset % TMEM_PAGE);
        }
    }
    pthread_mutex_unlock(&engine->lock);
    return found;
}

uint8_t *tmem_frames(tmem *engine) { return engine->pages; }

/* A page of a chunk, between the two locks. */
struct item {
    uint64_t key;
    uint32_t entry, place, checksum, frame; /* frame: read from, or taken to bring the page into; NONE */
    unsigned length;
    enum { ITEM_NONE, ITEM_FRAME, ITEM_WORD, ITEM_SLOT } kind;
};

/* Note that a page is missing. Locked. */
static void count_miss(struct tmem *engine, const struct file *file, uint64_t index, uint8_t *state) {
    struct tmem_pool_stats *stats = &engine->pools[FILES_POOL].stats;
    *state = fill_of(engine, file, index) ? TMEM_IN_FLIGHT : TMEM_ABSENT;
    engine->misses++;
    if (*state == TMEM_IN_FLIGHT || engine->arena_fd < 0)
        return;
    stats->failed_gets++;
    if (policy_is_ghost(&engine->policy, page_hash(engine, file->object, index)))
        stats->ghost_hits++;
}

/* Look a page up and take what the copy outside of the lock needs. Locked. */
static void item_begin(
    struct tmem_lease *lease, const struct file *file, uint32_t entry, uint64_t index, int flags, struct item *item,
    uint8_t *stored) {
    struct tmem *engine = lease->engine;
    struct entry *e = &engine->entries[entry];
    struct tmem_pool_stats *stats = &engine->pools[FILES_POOL].stats;
    *item = (struct item){.entry = entry, .key = e->key, .place = e->place, .frame = NONE, .checksum = e->checksum};
    if (entry_is(e, FLAG_FRAME)) {
        if (!(flags & TMEM_SEQUENTIAL))
            engine->frames[e->place].flags &= (uint8_t)~FRAME_BYPASS; /* used apart from the stream that brought it */
        page_use(engine, entry, page_hash(engine, file->object, index));
        item->kind = ITEM_FRAME;
        item->frame = e->place;
        engine->frames[item->frame].pins++;
        return;
    }
    engine->misses++;
    item->length = entry_length(e);
    if (!item->length) { /* it is filled as fast as it is copied, so it needs no frame */
        item->kind = ITEM_WORD;
        stats->reads++;
        same_unlink(engine, entry);
        same_link(engine, entry);
        return;
    }
    item->kind = ITEM_SLOT;
    page_use(engine, entry, page_hash(engine, file->object, index));
    if (!arena_read(engine, e->place, stored_bytes(item->length), stored))
        item->checksum = ~item->checksum; /* no such bytes: the check fails */
    if (cache_wants_page(engine, flags & TMEM_SEQUENTIAL))
        item->frame = frame_take(engine, false);
}

/* Copy a page out, not locked. Return false when its stored bytes are not those that were put. */
static bool item_copy(const struct tmem *engine, const struct item *item, const uint8_t *stored, uint8_t *out) {
    switch (item->kind) {
    case ITEM_FRAME:
        memcpy(out, frame_page(engine, item->frame), TMEM_PAGE);
        return true;
    case ITEM_WORD:
        page_fill(item->place, item->checksum, out);
        return true;
    case ITEM_SLOT:
        if (item->frame == NONE)
            return page_decode(stored, item->length, item->checksum, out);
        if (!page_decode(stored, item->length, item->checksum, frame_page(engine, item->frame)))
            return false;
        memcpy(out, frame_page(engine, item->frame), TMEM_PAGE);
        return true;
    default:
        return true;
    }
}

/* Finish a page: unpin its frame, or bring it into the frame that it was decompressed to. Locked. */
static void item_end(struct tmem *engine, const struct item *item, bool good) {
    struct tmem_pool_stats *stats = &engine->pools[FILES_POOL].stats;
    struct entry *e = &engine->entries[item->entry];
    if (item->kind == ITEM_FRAME) {
        frame_unpin(engine, item->frame);
        return;
    }
    if (item->kind != ITEM_SLOT)
        return;
    bool same = e->key == item->key && e->place == item->place && (!good || e->checksum == item->checksum);
    if (!good) {
        stats->failed_gets++;
        stats->corrupt++;
        if (same)
            page_leave(engine, item->entry, false);
    }
    if (good && same && item->frame != NONE) {
        slot_book(engine, item->entry, true, -1);
        struct frame *f = &engine->frames[item->frame];
        frame_bind(engine, item->frame, item->entry, 0);
        f->slot = item->place;
        f->slot_length = (uint16_t)item->length;
        f->slot_checksum = item->checksum;
        engine->duplicates++;
        stats->succ_gets++;
    } else {
        stats->reads += good;
        if (item->frame != NONE)
            frame_give_back(engine, item->frame);
    }
}

int tmem_read(
    struct tmem_lease *lease, uint32_t number, uint64_t offset, uint64_t size, int flags, struct tmem_reply *reply) {
    struct tmem *engine = lease->engine;
    uint64_t first = offset / TMEM_PAGE, last = (offset + size - 1) / TMEM_PAGE;
    uint32_t count = (uint32_t)(last - first + 1), entries[TMEM_MAX_READ];
    bool partial = flags & TMEM_PARTIAL, whole = true;
    if (!size || last - first >= TMEM_MAX_READ)
        return -EINVAL;
    reply->absent = 0;
    reply->size = partial ? (uint64_t)count * TMEM_PAGE : size;
    pthread_mutex_lock(&engine->lock);
    release(lease);
    const struct file *file = file_of(engine, number);
    find_pages(engine, file, first, count, entries);
    for (uint32_t at = 0; at < count; at++)
        whole = whole && entries[at] != NO_ENTRY;
    if (!whole && !partial) {
        pthread_mutex_unlock(&engine->lock);
        return -ENODATA;
    }
    if (whole && are_in_place(engine, count, entries)) {
        use_in_place(lease, file, entries, first, count, flags);
        reply->data = frame_page(engine, engine->entries[entries[0]].place);
        pthread_mutex_unlock(&engine->lock);
        memset(reply->state, TMEM_PRESENT, count);
        if (!partial)
            reply->data += offset % TMEM_PAGE;
        return 0;
    }
    reply->data = lease->buffer + (partial ? 0 : offset % TMEM_PAGE);
    for (uint32_t start = 0; start < count; start += CHUNK) {
        uint32_t end = start + CHUNK < count ? start + CHUNK : count;
        struct item items[CHUNK];
        bool good[CHUNK];
        for (uint32_t at = start; at < end; at++) {
            struct item *item = &items[at - start];
            uint32_t entry = start ? page_of(engine, file, first + at) : entries[at];
            item->kind = ITEM_NONE;
            reply->state[at] = TMEM_PRESENT;
            if (entry != NO_ENTRY)
                item_begin(lease, file, entry, first + at, flags, item, lease->stored + (at - start) * TMEM_PAGE);
            else
                count_miss(engine, file, first + at, &reply->state[at]);
        }
        cache_wake(engine);
        pthread_mutex_unlock(&engine->lock);
        for (uint32_t at = start; at < end; at++)
            good[at - start] = item_copy(
                engine, &items[at - start], lease->stored + (at - start) * TMEM_PAGE,
                lease->buffer + (uint64_t)at * TMEM_PAGE);
        pthread_mutex_lock(&engine->lock);
        for (uint32_t at = start; at < end; at++) {
            item_end(engine, &items[at - start], good[at - start]);
            if (!good[at - start])
                reply->state[at] = TMEM_ABSENT;
            reply->absent += reply->state[at] != TMEM_PRESENT;
        }
    }
    pthread_mutex_unlock(&engine->lock);
    return reply->absent && !partial ? -ENODATA : 0;
}

bool tmem_file_has(tmem *engine, uint32_t number, uint64_t index) {
    pthread_mutex_lock(&engine->lock);
    const struct file *file = file_of(engine, number);
    bool found = page_of(engine, file, index) != NO_ENTRY || fill_of(engine, file, index);
    pthread_mutex_unlock(&engine->lock);
    return found;
}

bool tmem_file_cached(tmem *engine, uint32_t number, uint64_t index) {
    pthread_mutex_lock(&engine->lock);
    bool found = frame_of(engine, page_of(engine, file_of(engine, number), index));
    pthread_mutex_unlock(&engine->lock);
    return found;
}

bool tmem_file_pooled(tmem *engine, uint32_t number, uint64_t index) {
    pthread_mutex_lock(&engine->lock);
    uint32_t entry = page_of(engine, file_of(engine, number), index);
    bool found = entry != NO_ENTRY && !frame_of(engine, entry);
    pthread_mutex_unlock(&engine->lock);
    return found;
}

void tmem_file_mark_read(tmem *engine, uint32_t number, uint64_t first, uint64_t last) {
    pthread_mutex_lock(&engine->lock);
    const struct file *file = file_of(engine, number);
    for (uint64_t index = first; index <= last; index++) {
        struct frame *f = frame_of(engine, page_of(engine, file, index));
        if (f)
            f->flags &= (uint8_t)~FRAME_UNREAD;
    }
    pthread_mutex_unlock(&engine->lock);
}

/* -- beginning and checks ----------------------------------------------------------------------------------------- */

int files_init(struct tmem *engine) {
    engine->free_file = NONE;
    engine->next_id = 1;
    engine->fills_used = 1;
    engine->max_files = MAX_OBJECTS / 2;
    engine->max_fills = UINT32_C(1) << 20;
    engine->files = table_map((uint64_t)engine->max_files * sizeof *engine->files);
    engine->fills = table_map((uint64_t)engine->max_fills * sizeof *engine->fills);
    return engine->files && engine->fills ? 0 : -ENOMEM;
}

void files_check(const struct tmem *engine) {
    uint64_t dirty = 0, announced = 0;
    for (uint32_t number = 0; number < engine->files_used; number++) {
        const struct file *file = &engine->files[number];
        if (!file->used)
            continue;
        uint32_t count = 0;
        assert(engine->objects[file->object].state == OBJECT_LIVE && engine->objects[file->object].file == number);
        for (uint32_t frame = file->first_dirty; frame != NONE; frame = engine->frames[frame].dirty_next, count++) {
            assert(engine->frames[frame].flags & FRAME_DIRTY);
            assert(entry_object(&engine->entries[engine->frames[frame].entry]) == file->object);
        }
        assert(count == file->dirty_pages);
        dirty += count;
        for (uint32_t at = file->first_fill; at; at = engine->fills[at].next) {
            assert(engine->fills[at].used && engine->fills[at].file == number);
            announced += engine->fills[at].last - engine->fills[at].first + 1;
        }
    }
    assert(dirty == engine->dirty_frames && announced == engine->announced);
}
