/* Which page leaves memory: S3-FIFO's queues (Yang et al., SOSP 2023) with three changes, over frames and slots as one.
 *
 *     small   pages that were not used again yet: a share s of the capacity C
 *     main    pages that were
 *     ghosts  the last 2 C pages that left from small: a tag and the time of the last use each
 *
 * 1. Uses soon after the insertion count as one: a page in small is used again when 0.3 s pages were inserted since.
 * 2. A ghost enters main only if it was used since main's coldest page was (the test of LIRS, Jiang and Zhang 2002,
 *    without its stack).
 * 3. Main is filled first while there is room, so that a loop keeps a part of itself.
 *
 * The share of small is chosen by miniatures: four simulations with fixed shares over a sample of the pages (as
 * Waldspurger et al., USENIX ATC 2017, do for cache sizes). The one with the fewest misses lately wins.
 *
 * Time is counted in ticks of 1/256 C misses. No clock, no lock, no I/O: times are handed in, and the caller holds the
 * engine's lock.
 */

#ifndef TMEM_POLICY_H
#define TMEM_POLICY_H

#include <stdbool.h>
#include <stdint.h>

#include "entries.h"

#define POLICY_TIMES 1024

struct queue { uint32_t oldest, newest; uint64_t pages; };

struct ghost { uint32_t tag; uint16_t stamp, turn; };

struct chooser;

struct policy {
    struct entry *entries;
    struct queue small, main;
    uint64_t capacity;            /* C, at least 1 */
    double share;                 /* s / C */
    uint64_t small_pages;         /* s */
    uint32_t tick_pages, ticks_in_capacity; /* misses of a tick; ticks of C misses */
    uint32_t misses_in_tick, evictions_in_turn, turns_kept;
    uint16_t tick, turn;
    bool used_in_tick;
    double times[POLICY_TIMES];   /* when each of the last ticks began */
    struct ghost *ghosts;         /* buckets of 8, newest first */
    uint64_t ghost_buckets;
    struct chooser *chooser;      /* NULL: the share is fixed */
};

void policy_init(struct policy *, struct entry *entries);
void policy_free(struct policy *);
/* Choose the share by miniatures from now on. Without memory for them it stays as it is. */
void policy_choose_share(struct policy *);
void policy_set_share(struct policy *, double share);
void policy_set_capacity(struct policy *, uint64_t pages);

/* A page enters memory. `came_back`: it is known to have been used before, so it enters main. */
void policy_insert(struct policy *, uint32_t entry, uint64_t hash, bool came_back, double now);
void policy_hit(struct policy *, uint32_t entry, uint64_t hash);
/* Return the page that leaves next, still linked; NO_ENTRY without one. */
uint32_t policy_victim(struct policy *);
uint32_t policy_main_victim(struct policy *); /* the same of main, whatever the share is */
void policy_evict(struct policy *, uint32_t entry, uint64_t hash); /* unlink; a ghost if it was in small */
void policy_remove(struct policy *, uint32_t entry); /* unlink without a ghost */
bool policy_is_ghost(const struct policy *, uint64_t hash);

/* Return the time of the last use of the coldest page, NAN without pages. `now` is the present time. */
double policy_oldest(struct policy *, double now);
static inline uint64_t policy_pages(const struct policy *policy) { return policy->small.pages + policy->main.pages; }
uint64_t policy_bytes(const struct policy *); /* of ghosts and miniatures */
void policy_check(const struct policy *);

#endif
