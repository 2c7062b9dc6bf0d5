/* What the C tests share: CHECK, a seeded generator of numbers, a time limit, pages with versions, and an arena.
 *
 * Every program takes two arguments: seconds and a seed. A failed check prints the seed, which repeats the run of a
 * single thread. Nothing waits without a bound: a program that hangs is ended by SIGALRM.
 */

#ifndef CTEST_H
#define CTEST_H

#include <fcntl.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "engine.h"

static uint64_t ctest_seed;
static double ctest_end;

#define CHECK(condition)                                                                                         \
    do {                                                                                                         \
        if (!(condition)) {                                                                                      \
            fprintf(stderr, "%s:%d: seed %llu: not so: %s\n", __FILE__, __LINE__, (unsigned long long)ctest_seed, \
                    #condition);                                                                                 \
            abort();                                                                                             \
        }                                                                                                        \
    } while (0)

static inline double ctest_now(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

static inline void ctest_begin(int argc, char **argv) {
    double seconds = argc > 1 ? strtod(argv[1], NULL) : 2.0;
    ctest_seed = argc > 2 ? strtoull(argv[2], NULL, 10) : 1;
    ctest_end = ctest_now() + seconds;
    alarm((unsigned)seconds + 60);
}

static inline bool ctest_goes_on(void) { return ctest_now() < ctest_end; }

/* Marsaglia's xorshift64*. */
struct prng { uint64_t state; };

static inline struct prng prng_of(uint64_t number) {
    return (struct prng){(ctest_seed * UINT64_C(0x9e3779b97f4a7c15)) ^ ((number + 1) * UINT64_C(0xd1342543de82ef95))};
}

static inline uint64_t prng_next(struct prng *prng) {
    prng->state ^= prng->state >> 12;
    prng->state ^= prng->state << 25;
    prng->state ^= prng->state >> 27;
    return prng->state * UINT64_C(0x2545f4914f6cdd1d);
}

static inline uint32_t below(struct prng *prng, uint32_t limit) { return (uint32_t)((prng_next(prng) >> 32) % limit); }

/* -- pages --------------------------------------------------------------------------------------------------------
 *
 * Each word of a page says whose page it is and which version: who:8 | index:24 | version:32, mixed with noise in the
 * first words. So a page that was read while it was written can be checked word by word. The noise decides how the page
 * is stored: same-filled, in a small slot, 2:1, or uncompressed.
 */

#define WORDS (TMEM_PAGE / 8)

static inline unsigned noisy_words(uint32_t index, uint32_t version) {
    static const unsigned counts[8] = {0, 8, 40, 120, 256, 256, 300, WORDS};
    return counts[(index * 7 + version * 3) % 8];
}

static inline uint64_t noise(unsigned word) {
    uint64_t mixed = (word + 1) * UINT64_C(0x9e3779b97f4a7c15);
    mixed = (mixed ^ mixed >> 29) * UINT64_C(0xbf58476d1ce4e5b9);
    return (mixed ^ mixed >> 32) | 1;
}

static inline uint64_t tag_of(uint32_t who, uint32_t index, uint32_t version) {
    return (uint64_t)who << 56 | (uint64_t)index << 32 | version;
}

static inline void page_make(void *page, uint32_t who, uint32_t index, uint32_t version) {
    uint64_t words[WORDS];
    unsigned noisy = noisy_words(index, version);
    for (unsigned word = 0; word < WORDS; word++)
        words[word] = tag_of(who, index, version) ^ (word < noisy ? noise(word) : 0);
    memcpy(page, words, TMEM_PAGE);
}

static inline bool page_is(const void *page, uint32_t who, uint32_t index, uint32_t version) {
    uint8_t wanted[TMEM_PAGE];
    page_make(wanted, who, index, version);
    return !memcmp(page, wanted, TMEM_PAGE);
}

/* -- the arena ---------------------------------------------------------------------------------------------------- */

static inline int arena_new(uint32_t slabs) {
    int fd = memfd_create("ctest", MFD_CLOEXEC);
    CHECK(fd >= 0);
    CHECK(!ftruncate(fd, (off_t)slabs * TMEM_SLAB));
    return fd;
}

static inline void arena_punch(int fd, uint32_t slab) {
    CHECK(!fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)slab * TMEM_SLAB, TMEM_SLAB));
}

#endif
