/* Loops over many pages for bench.poolalone, so that C is compared with C: puts and gets of the engine's pool, and bare
 * lz4 and xxh3 on the same pages in the same order.
 *
 * Every loop returns the nanoseconds that it took, negative when something failed. The bare side keeps only the pages
 * that are measured, and finds them by their place in the order: it has no table, no slots and no lock.
 */

#include <fcntl.h>
#include <lz4.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>
#define XXH_INLINE_ALL
#include <xxhash.h>

#include "engine.h"

#define OBJECT 1
#define ROOM (TMEM_PAGE + TMEM_PAGE / 255 + 16)

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec * 1e9 + (double)time.tv_nsec;
}

/* Return the number of a page, which is in its first bytes: no two pages are alike. */
static uint64_t number_of(const uint8_t *page) {
    uint64_t number;
    memcpy(&number, page, sizeof number);
    return number;
}

void make_pages(uint8_t *pages, const uint8_t *templates, uint32_t count, const uint64_t *numbers, uint64_t most) {
    for (uint64_t at = 0; at < most; at++) {
        memcpy(pages + at * TMEM_PAGE, templates + numbers[at] % count * TMEM_PAGE, TMEM_PAGE);
        memcpy(pages + at * TMEM_PAGE, &numbers[at], sizeof *numbers);
    }
}

/* -- the pool ----------------------------------------------------------------------------------------------------- */

struct pool { tmem *engine; int fd, number; uint32_t slabs, used; };

void pool_free(struct pool *pool) {
    if (pool->engine)
        tmem_free(pool->engine);
    close(pool->fd);
    free(pool);
}

/* A pool with an arena of its own, mapped as that of a mount without a lender. */
struct pool *pool_new(uint32_t slabs) {
    struct pool *pool = calloc(1, sizeof *pool);
    int error;
    if (!pool)
        return NULL;
    pool->slabs = slabs;
    pool->fd = memfd_create("poolalone", MFD_CLOEXEC);
    if (pool->fd >= 0 && !ftruncate(pool->fd, (off_t)slabs * TMEM_SLAB))
        pool->engine = tmem_new(
            &(struct tmem_config){.arena_fd = pool->fd, .arena_slabs = slabs, .arena_mapped = true, .compress = true},
            &error);
    if (!pool->engine || (pool->number = tmem_pool_new(pool->engine, false, false)) < 0) {
        pool_free(pool);
        return NULL;
    }
    tmem_set_capacity(pool->engine, (uint64_t)slabs * TMEM_SLAB, (uint64_t)slabs * TMEM_SLAB);
    return pool;
}

static bool put(struct pool *pool, uint64_t number, const uint8_t *page) {
    int result = tmem_put(pool->engine, pool->number, OBJECT, number, page, TMEM_ASK);
    if (result == TMEM_NEEDS_SLAB) {
        if (pool->used < pool->slabs &&
            !fallocate(pool->fd, FALLOC_FL_KEEP_SIZE, (off_t)pool->used * TMEM_SLAB, TMEM_SLAB))
            tmem_grant(pool->engine, pool->used++, false);
        result = tmem_put(pool->engine, pool->number, OBJECT, number, page, TMEM_AGAIN);
    }
    return result == TMEM_OK;
}

double pool_fill(struct pool *pool, const uint8_t *templates, uint32_t count, uint64_t pages) {
    uint8_t page[TMEM_PAGE];
    double began = now();
    for (uint64_t number = 0; number < pages; number++) {
        make_pages(page, templates, count, &number, 1);
        if (!put(pool, number, page))
            return -1;
    }
    return now() - began;
}

double pool_put(struct pool *pool, const uint8_t *pages, uint64_t count) {
    double began = now();
    for (uint64_t at = 0; at < count; at++)
        if (!put(pool, number_of(pages + at * TMEM_PAGE), pages + at * TMEM_PAGE))
            return -1;
    return now() - began;
}

/* Get pages, which removes them from this private pool. */
double pool_get(struct pool *pool, const uint64_t *numbers, uint64_t count) {
    uint8_t page[TMEM_PAGE];
    double began = now();
    for (uint64_t at = 0; at < count; at++)
        if (tmem_get(pool->engine, pool->number, OBJECT, numbers[at], page) != TMEM_OK ||
            number_of(page) != numbers[at])
            return -1;
    return now() - began;
}

/* Ask for pages that are not there. */
double pool_miss(struct pool *pool, const uint64_t *numbers, uint64_t count) {
    uint8_t page[TMEM_PAGE];
    double began = now();
    for (uint64_t at = 0; at < count; at++)
        if (tmem_get(pool->engine, pool->number, OBJECT, numbers[at], page) != TMEM_MISS)
            return -1;
    return now() - began;
}

/* -- bare lz4 and xxh3 -------------------------------------------------------------------------------------------- */

struct bare { uint64_t count; uint8_t *bytes; int *lengths; uint64_t *checksums; };

void bare_free(struct bare *bare) {
    free(bare->bytes);
    free(bare->lengths);
    free(bare->checksums);
    free(bare);
}

struct bare *bare_new(uint64_t count) {
    struct bare *bare = calloc(1, sizeof *bare);
    if (!bare)
        return NULL;
    *bare = (struct bare){count, calloc(count, ROOM), calloc(count, sizeof(int)), calloc(count, sizeof(uint64_t))};
    if (!bare->bytes || !bare->lengths || !bare->checksums) {
        bare_free(bare);
        return NULL;
    }
    memset(bare->bytes, 1, count * ROOM); /* its memory is there before the first measure */
    return bare;
}

double bare_put(struct bare *bare, const uint8_t *pages, uint64_t count) {
    double began = now();
    for (uint64_t at = 0; at < count; at++) {
        char *to = (char *)bare->bytes + at * ROOM;
        bare->lengths[at] = LZ4_compress_default((const char *)pages + at * TMEM_PAGE, to, TMEM_PAGE, ROOM);
        if (bare->lengths[at] <= 0)
            return -1;
        bare->checksums[at] = XXH3_64bits(to, (size_t)bare->lengths[at]);
    }
    return now() - began;
}

double bare_get(struct bare *bare, const uint64_t *numbers, uint64_t count) {
    uint8_t page[TMEM_PAGE];
    double began = now();
    for (uint64_t at = 0; at < count; at++) {
        const char *from = (const char *)bare->bytes + at * ROOM;
        if (XXH3_64bits(from, (size_t)bare->lengths[at]) != bare->checksums[at] ||
            LZ4_decompress_safe(from, (char *)page, bare->lengths[at], TMEM_PAGE) != TMEM_PAGE ||
            number_of(page) != numbers[at])
            return -1;
    }
    return now() - began;
}
