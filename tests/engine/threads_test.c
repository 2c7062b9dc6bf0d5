/* Real threads on one engine: every read has bytes that its pages had between its beginning and its end.
 *
 * The backing of a file is an array of versions. A writer stores a new version in the backing and tells the engine, or
 * writes into dirty pages and into the backing later. Readers fill what is missing from the backing, as the mount does.
 * Meanwhile slabs come, are given back and are taken away, the cache is resized, and pools are used.
 */

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>

#include "ctest.h"

#define FILES 3u
#define PAGES 400u
#define SLABS 24u
#define FRAMES 256u
#define MOST 40u     /* pages of a read or a write */
#define WRITERS FILES

struct page {
    _Atomic uint32_t begun, done, backing; /* versions: of the last write that began, and ended; what the backing has */
};

struct file { uint32_t number; struct page pages[PAGES]; };

static tmem *engine;
static int arena;
static struct file files[FILES];
static _Atomic bool over;

/* Slabs that nobody has. The lock protects the array, and the order of punch, lose and grant. */
static pthread_mutex_t slabs_lock = PTHREAD_MUTEX_INITIALIZER;
static bool granted[SLABS], persistent_slab[SLABS];

static void nap(struct prng *rng) {
    struct timespec time = {.tv_nsec = 1000 + below(rng, 50000)};
    if (!below(rng, 4))
        nanosleep(&time, NULL);
}

/* -- readers ------------------------------------------------------------------------------------------------------ */

/* Read a word of a page that a writer may change. The compiler and TSan are told that this race is meant. */
__attribute__((no_sanitize("thread"))) static uint64_t word_at(const uint8_t *page, unsigned word) {
    return *(const volatile uint64_t *)(const void *)(page + word * sizeof(uint64_t));
}

/* Every word is that of a version between two; a page that becomes dirty is zero for a moment. */
static void check_words(uint32_t who, uint32_t index, const uint8_t *data, uint32_t least) {
    for (unsigned word = 0; word < WORDS; word++) {
        uint64_t found = word_at(data, word), plain = found ^ noise(word);
        uint32_t most = atomic_load(&files[who].pages[index].begun);
        if (found == 0 && least < most)
            continue;
        uint64_t tag = found >> 32 == tag_of(who, index, 0) >> 32 ? found : plain;
        uint32_t version = (uint32_t)tag;
        CHECK(tag >> 32 == tag_of(who, index, 0) >> 32);
        CHECK(version >= least && version <= most);
        CHECK((tag == plain) == (word < noisy_words(index, version)));
    }
}

static void fill(uint32_t who, uint32_t first, uint32_t last, struct prng *rng, uint8_t *buffer) {
    uint32_t count = last - first + 1;
    uint32_t number = tmem_fill_begin(
        engine, files[who].number, first, last, below(rng, 2) ? TMEM_AHEAD : 0, below(rng, 2) ? first : UINT64_MAX);
    if (!number)
        return;
    for (uint32_t at = 0; at < count; at++)
        page_make(buffer + at * TMEM_PAGE, who, first + at, atomic_load(&files[who].pages[first + at].backing));
    nap(rng);
    bool poisoned = tmem_fill_poisoned(engine, number);
    int64_t stored = tmem_fill_store(engine, number, buffer, (uint64_t)count * TMEM_PAGE, below(rng, 8) == 0);
    CHECK(stored >= 0 && stored <= count && !(poisoned && stored));
    tmem_fill_end(engine, number);
}

static void *reader(void *argument) {
    struct prng rng = prng_of(100 + (uint64_t)(uintptr_t)argument);
    struct tmem_lease *lease = tmem_lease_new(engine);
    uint8_t *buffer = malloc((size_t)MOST * TMEM_PAGE);
    CHECK(lease && buffer);
    while (!atomic_load(&over)) {
        struct tmem_reply reply;
        uint32_t who = below(&rng, FILES), first = below(&rng, PAGES), least[MOST];
        uint32_t count = 1 + (below(&rng, 2) ? 0 : below(&rng, MOST));
        int flags = (below(&rng, 2) ? TMEM_SEQUENTIAL : 0) | (below(&rng, 4) ? 0 : TMEM_PARTIAL);
        count = first + count > PAGES ? PAGES - first : count;
        for (uint32_t at = 0; at < count; at++)
            least[at] = atomic_load(&files[who].pages[first + at].done);
        int error = tmem_read(
            lease, files[who].number, (uint64_t)first * TMEM_PAGE, (uint64_t)count * TMEM_PAGE, flags, &reply);
        CHECK(!error || (error == -ENODATA && !(flags & TMEM_PARTIAL)));
        if (!error) {
            nap(&rng); /* a pinned frame keeps its page whatever happens */
            for (uint32_t at = 0; at < count; at++)
                if (reply.state[at] == TMEM_PRESENT)
                    check_words(who, first + at, reply.data + at * TMEM_PAGE, least[at]);
        }
        if (below(&rng, 2))
            tmem_release(lease);
        if (error || reply.absent)
            fill(who, first, first + count - 1, &rng, buffer);
    }
    free(buffer);
    tmem_lease_free(lease);
    return NULL;
}

/* -- writers: one a file ------------------------------------------------------------------------------------------ */

static void begin_write(uint32_t who, uint32_t first, uint32_t last, uint8_t *buffer) {
    for (uint32_t index = first; index <= last; index++) {
        uint32_t version = atomic_load(&files[who].pages[index].begun) + 1;
        atomic_store(&files[who].pages[index].begun, version);
        if (buffer)
            page_make(buffer + (index - first) * TMEM_PAGE, who, index, version);
    }
}

static void to_backing(uint32_t who, uint32_t index) {
    atomic_store(&files[who].pages[index].backing, atomic_load(&files[who].pages[index].begun));
}

static void end_write(uint32_t who, uint32_t first, uint32_t last) {
    for (uint32_t index = first; index <= last; index++)
        atomic_store(&files[who].pages[index].done, atomic_load(&files[who].pages[index].begun));
}

static void write_through(uint32_t who, uint32_t first, uint32_t last, uint8_t *buffer) {
    begin_write(who, first, last, buffer);
    for (uint32_t index = first; index <= last; index++)
        to_backing(who, index);
    tmem_file_overwrite(
        engine, files[who].number, (uint64_t)first * TMEM_PAGE, buffer, (uint64_t)(last - first + 1) * TMEM_PAGE);
    end_write(who, first, last);
}

static void write_back(uint32_t who, struct prng *rng, uint8_t *buffer) {
    uint64_t dirty[PAGES];
    uint32_t count = tmem_file_dirty_pages(engine, files[who].number, dirty, PAGES);
    for (uint32_t at = 0; at < count; at++) {
        uint32_t index = (uint32_t)dirty[at];
        CHECK(!tmem_file_copy_out(engine, files[who].number, index, index, buffer));
        uint32_t version = atomic_load(&files[who].pages[index].done);
        CHECK(page_is(buffer, who, index, version));
        atomic_store(&files[who].pages[index].backing, version);
        nap(rng);
        tmem_file_mark_clean(engine, files[who].number, index, index);
    }
}

static void write_dirty(uint32_t who, uint32_t first, uint32_t last, struct prng *rng, uint8_t *buffer) {
    begin_write(who, first, last, buffer);
    int error = tmem_file_make_dirty(engine, files[who].number, first, last, 0);
    CHECK(!error || error == -ENOMEM);
    if (error) { /* all frames are dirty: as a mount does, write what there is, then this through */
        write_back(who, rng, buffer);
        write_through(who, first, last, buffer);
        return;
    }
    tmem_file_overwrite(
        engine, files[who].number, (uint64_t)first * TMEM_PAGE, buffer, (uint64_t)(last - first + 1) * TMEM_PAGE);
    for (uint32_t index = first; index <= last; index++)
        CHECK(tmem_file_is_dirty(engine, files[who].number, index));
    end_write(who, first, last);
}

static void truncate_file(uint32_t who, uint32_t first) {
    begin_write(who, first, PAGES - 1, NULL);
    for (uint32_t index = first; index < PAGES; index++)
        to_backing(who, index);
    tmem_file_truncate(engine, files[who].number, (uint64_t)first * TMEM_PAGE);
    tmem_file_set_size(engine, files[who].number, (int64_t)PAGES * TMEM_PAGE);
    end_write(who, first, PAGES - 1);
}

static void *writer(void *argument) {
    uint32_t who = (uint32_t)(uintptr_t)argument;
    struct prng rng = prng_of(200 + who);
    uint8_t *buffer = malloc((size_t)MOST * TMEM_PAGE);
    struct tmem_facts facts;
    CHECK(buffer);
    while (!atomic_load(&over)) {
        uint32_t first = below(&rng, PAGES), last = first + below(&rng, below(&rng, 2) ? 1 : MOST);
        uint32_t what = below(&rng, 100);
        last = last < PAGES ? last : PAGES - 1;
        if (what < 40) {
            write_through(who, first, last, buffer);
        } else if (what < 75) {
            write_dirty(who, first, last, &rng, buffer);
        } else if (what < 90) {
            write_back(who, &rng, buffer);
        } else if (what < 93) {
            tmem_file_drop_clean(engine, files[who].number);
        } else if (what < 95) {
            truncate_file(who, PAGES / 2 + first / 2);
        } else if (what < 97) {
            tmem_file_flush_pool(engine, files[who].number, first, last);
        } else {
            tmem_file_facts(engine, files[who].number, &facts);
            CHECK(facts.size == (int64_t)PAGES * TMEM_PAGE && facts.dirty_pages <= facts.pages);
        }
        nap(&rng);
    }
    write_back(who, &rng, buffer);
    free(buffer);
    return NULL;
}

/* -- slabs -------------------------------------------------------------------------------------------------------- */

static bool grant_one(bool persistent) {
    for (uint32_t slab = 0; slab < SLABS; slab++)
        if (!granted[slab]) {
            granted[slab] = true;
            persistent_slab[slab] = persistent;
            CHECK(!tmem_grant(engine, slab, persistent));
            return true;
        }
    tmem_deny(engine);
    return false;
}

static void *slab_source(void *argument) {
    struct prng rng = prng_of(300);
    (void)argument;
    while (!atomic_load(&over)) {
        uint64_t wants;
        ssize_t read_bytes = read(tmem_event_fd(engine), &wants, sizeof wants);
        (void)read_bytes; /* EAGAIN: nothing is wanted, and it is asked all the same */
        pthread_mutex_lock(&slabs_lock);
        for (uint32_t wanted = tmem_wanted(engine); wanted && grant_one(false); wanted--)
            ;
        if (!below(&rng, 8)) {
            uint32_t slabs[3], count = tmem_give_up(engine, 1 + below(&rng, 3), 1 + (int)below(&rng, 3), slabs);
            for (uint32_t at = 0; at < count; at++) {
                uint32_t slab = slabs[at] >> 1;
                CHECK(slab < SLABS && granted[slab] && persistent_slab[slab] == (slabs[at] & 1));
                granted[slab] = false;
                arena_punch(arena, slab);
            }
        }
        uint32_t slab = below(&rng, SLABS);
        if (!below(&rng, 8) && granted[slab] && !persistent_slab[slab]) {
            arena_punch(arena, slab);
            nap(&rng);
            CHECK(tmem_lose(engine, slab) >= 0);
            granted[slab] = false;
        }
        pthread_mutex_unlock(&slabs_lock);
        nanosleep(&(struct timespec){.tv_nsec = 500000}, NULL);
    }
    return NULL;
}

/* -- the cache's size --------------------------------------------------------------------------------------------- */

static void *resizer(void *argument) {
    struct prng rng = prng_of(400);
    struct tmem_stats stats;
    (void)argument;
    while (!atomic_load(&over)) {
        uint32_t what = below(&rng, 8);
        if (what == 0) {
            tmem_resize(engine, 64 + below(&rng, FRAMES - 63));
            for (int tries = 0; tries < 50 && tmem_shrink(engine, 16) == 1; tries++)
                ;
        } else if (what == 1) {
            CHECK(tmem_evict_from_cache(engine, 1 + below(&rng, 32)) <= FRAMES);
        } else if (what == 2) {
            tmem_drain(engine, 1 + below(&rng, 32));
        } else if (what == 3) {
            tmem_check(engine);
        } else {
            tmem_stats(engine, &stats);
            CHECK(stats.slabs <= SLABS && stats.used_bytes <= stats.slabs * TMEM_SLAB);
            CHECK(stats.used_frames <= FRAMES);
        }
        nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
    }
    return NULL;
}

/* -- pools: each thread has objects of its own -------------------------------------------------------------------- */

#define KEPT 60u

struct pools { uint32_t object; int shared, persistent; };

static void *pool_user(void *argument) {
    const struct pools *pools = argument;
    struct prng rng = prng_of(500 + pools->object);
    uint32_t kept[KEPT] = {0}, lent[KEPT] = {0}, version = 0;
    uint8_t page[TMEM_PAGE];
    while (!atomic_load(&over)) {
        bool persistent = below(&rng, 2);
        int pool = persistent ? pools->persistent : pools->shared;
        uint32_t index = below(&rng, KEPT), *model = persistent ? &kept[index] : &lent[index], what = below(&rng, 8);
        if (what < 4) {
            page_make(page, pools->object, index, ++version);
            int result = tmem_put(engine, pool, pools->object, index, page, TMEM_ASK);
            if (result == TMEM_NEEDS_SLAB) {
                pthread_mutex_lock(&slabs_lock);
                grant_one(persistent);
                pthread_mutex_unlock(&slabs_lock);
                result = tmem_put(engine, pool, pools->object, index, page, TMEM_AGAIN);
            }
            CHECK(result == TMEM_OK || result == TMEM_NO_SLOT || result == TMEM_SAME_FILLED);
            *model = result == TMEM_OK ? version : 0;
        } else if (what < 7) {
            int result = tmem_get(engine, pool, pools->object, index, page);
            if (result == TMEM_OK)
                CHECK(*model && page_is(page, pools->object, index, *model));
            else
                CHECK(persistent ? result == TMEM_MISS && !*model : result == TMEM_MISS || result == TMEM_CORRUPT);
        } else if (below(&rng, 8)) {
            CHECK(tmem_flush_page(engine, pool, pools->object, index) || !persistent || !*model);
            *model = 0;
        } else {
            CHECK(tmem_flush_object(engine, pool, pools->object) <= KEPT);
            memset(persistent ? kept : lent, 0, sizeof kept);
        }
        if (!below(&rng, 16)) { /* a file that comes and goes */
            int64_t number = tmem_file_new(engine);
            CHECK(number >= 0);
            uint32_t new = tmem_fill_begin(engine, (uint32_t)number, 0, 0, 0, 0);
            if (new) {
                tmem_fill_store(engine, new, page, TMEM_PAGE, false);
                tmem_fill_end(engine, new);
            }
            tmem_file_free(engine, (uint32_t)number);
        }
    }
    for (uint32_t index = 0; index < KEPT; index++) {
        int result = tmem_get(engine, pools->persistent, pools->object, index, page);
        CHECK(kept[index] ? result == TMEM_OK && page_is(page, pools->object, index, kept[index])
                          : result == TMEM_MISS);
    }
    return NULL;
}

/* ----------------------------------------------------------------------------------------------------------------- */

int main(int argc, char **argv) {
    pthread_t threads[16];
    struct pools users[2];
    unsigned count = 0;
    int error = 0;
    ctest_begin(argc, argv);
    arena = arena_new(SLABS);
    engine = tmem_new(
        &(struct tmem_config){
            .arena_fd = arena, .arena_slabs = SLABS, .compress = true, .thread = true, .frames = FRAMES / 2,
            .frame_limit = FRAMES},
        &error);
    CHECK(engine && !error);
    tmem_set_capacity(engine, (uint64_t)SLABS * TMEM_SLAB, (uint64_t)SLABS * TMEM_SLAB);
    users[0] = (struct pools){1, tmem_pool_new(engine, false, true), tmem_pool_new(engine, true, false)};
    users[1] = (struct pools){2, users[0].shared, users[0].persistent};
    for (uint32_t who = 0; who < FILES; who++) {
        int64_t number = tmem_file_new(engine);
        CHECK(number >= 0);
        files[who].number = (uint32_t)number;
        tmem_file_set_size(engine, files[who].number, (int64_t)PAGES * TMEM_PAGE);
    }
    for (uintptr_t number = 0; number < 3; number++)
        CHECK(!pthread_create(&threads[count++], NULL, reader, (void *)number));
    for (uintptr_t number = 0; number < WRITERS; number++)
        CHECK(!pthread_create(&threads[count++], NULL, writer, (void *)number));
    for (int number = 0; number < 2; number++)
        CHECK(!pthread_create(&threads[count++], NULL, pool_user, &users[number]));
    CHECK(!pthread_create(&threads[count++], NULL, slab_source, NULL));
    CHECK(!pthread_create(&threads[count++], NULL, resizer, NULL));
    while (ctest_goes_on())
        nanosleep(&(struct timespec){.tv_nsec = 10000000}, NULL);
    atomic_store(&over, true);
    while (count)
        pthread_join(threads[--count], NULL);
    tmem_check(engine);
    for (uint32_t who = 0; who < FILES; who++)
        tmem_file_free(engine, files[who].number);
    tmem_check(engine);
    tmem_free(engine);
    close(arena);
    return 0;
}
