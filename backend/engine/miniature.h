/* A cache that is simulated: the policy over the hashes of pages, without the pages. */

#ifndef TMEM_MINIATURE_H
#define TMEM_MINIATURE_H

#include "policy.h"

struct miniature {
    struct policy policy;
    struct entry *entries;        /* key: the hash of the page */
    uint32_t *buckets;
    uint32_t bucket_count, free_entry;
    uint64_t capacity, most;      /* pages now, and those that there is room for */
    uint64_t misses;
};

struct miniature *miniature_new(uint64_t capacity, double share); /* NULL: no memory */
void miniature_free(struct miniature *);
bool miniature_resize(struct miniature *, uint64_t capacity); /* false: it has no room for so many */
bool miniature_access(struct miniature *, uint64_t hash); /* true: a miss */
uint64_t miniature_bytes(const struct miniature *);

#endif
