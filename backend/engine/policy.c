#include "policy.h"

#include <assert.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "hugepages.h"
#include "miniature.h"

#define MAX_USES 3u
#define TICKS 256u
#define WAYS 8u
#define SECONDS_A_TICK 2.0     /* at most: so that the age of pages is known where nothing is missed */
#define CORRELATED 0.3         /* of s: uses of a page within so many insertions after its own are one use */
#define FIRST_SHARE 0.1

/* -- queues ------------------------------------------------------------------------------------------------------- */

static struct queue *queue_of(struct policy *policy, unsigned number) {
    return number == QUEUE_SMALL ? &policy->small : &policy->main;
}

static void push(struct policy *policy, uint32_t entry, unsigned number) {
    struct queue *queue = queue_of(policy, number);
    struct entry *e = &policy->entries[entry];
    e->newer = NO_ENTRY;
    e->older = queue->newest;
    if (queue->newest != NO_ENTRY)
        policy->entries[queue->newest].newer = entry;
    else
        queue->oldest = entry;
    queue->newest = entry;
    queue->pages++;
    entry_set_queue(e, number);
}

static void unlink_page(struct policy *policy, uint32_t entry) {
    struct entry *e = &policy->entries[entry];
    struct queue *queue = queue_of(policy, entry_queue(e));
    if (e->newer != NO_ENTRY)
        policy->entries[e->newer].older = e->older;
    else
        queue->newest = e->older;
    if (e->older != NO_ENTRY)
        policy->entries[e->older].newer = e->newer;
    else
        queue->oldest = e->newer;
    queue->pages--;
    entry_set_queue(e, QUEUE_NONE);
}

/* Move main's used pages from its tail to its head, a use less each, until the tail is one without uses. */
static void settle(struct policy *policy) {
    uint32_t tail;
    while ((tail = policy->main.oldest) != NO_ENTRY && entry_uses(&policy->entries[tail])) {
        unlink_page(policy, tail);
        entry_set_uses(&policy->entries[tail], entry_uses(&policy->entries[tail]) - 1);
        push(policy, tail, QUEUE_MAIN);
    }
}

/* -- ghosts ------------------------------------------------------------------------------------------------------- */

static uint32_t tag_of(uint64_t hash) {
    uint32_t tag = (uint32_t)(hash >> 32);
    return tag ? tag : 1; /* 0 marks an empty place */
}

static struct ghost *bucket_of(const struct policy *policy, uint32_t tag) {
    return policy->ghosts + ((uint64_t)tag * policy->ghost_buckets >> 32) * WAYS;
}

static bool is_kept(const struct policy *policy, const struct ghost *ghost) {
    return (uint16_t)(policy->turn - ghost->turn) <= policy->turns_kept;
}

/* Return the ghost of a page, which may be too old to be kept; NULL without one. */
static struct ghost *ghost_find(const struct policy *policy, uint64_t hash) {
    if (!policy->ghosts)
        return NULL;
    uint32_t tag = tag_of(hash);
    struct ghost *bucket = bucket_of(policy, tag);
    for (unsigned way = 0; way < WAYS; way++)
        if (bucket[way].tag == tag)
            return &bucket[way];
    return NULL;
}

static void ghost_add(struct policy *policy, uint64_t hash, uint16_t stamp) {
    if (++policy->evictions_in_turn >= policy->tick_pages) {
        policy->evictions_in_turn = 0;
        policy->turn++;
    }
    if (!policy->ghosts)
        return;
    struct ghost *bucket = bucket_of(policy, tag_of(hash));
    memmove(bucket + 1, bucket, (WAYS - 1) * sizeof *bucket);
    bucket[0] = (struct ghost){.tag = tag_of(hash), .stamp = stamp, .turn = policy->turn};
}

/* Make the table as large as two ghosts a page of the capacity need. A bucket is chosen by the upper bits of the tag,
 * so the ghosts of a table of another size are copied in one pass from its beginning to its end. */
static void ghosts_resize(struct policy *policy) {
    uint64_t buckets = 2 * policy->capacity / WAYS + 1, old = policy->ghost_buckets;
    if (policy->ghosts && buckets <= old && buckets >= old / 2)
        return;
    if (policy->ghosts && buckets > old)
        buckets += buckets / 8; /* the capacity often grows in small steps */
    struct ghost *ghosts = calloc(buckets * WAYS, sizeof *ghosts);
    if (!ghosts)
        return; /* fewer ghosts */
    use_huge_pages(ghosts, buckets * WAYS * sizeof *ghosts);
    struct ghost *before = policy->ghosts;
    policy->ghosts = ghosts;
    policy->ghost_buckets = buckets;
    for (uint64_t at = 0; before && at < old; at++)
        for (unsigned way = WAYS; way-- > 0;) {
            const struct ghost ghost = before[at * WAYS + way];
            if (!ghost.tag || !is_kept(policy, &ghost))
                continue;
            struct ghost *bucket = bucket_of(policy, ghost.tag);
            memmove(bucket + 1, bucket, (WAYS - 1) * sizeof *bucket);
            bucket[0] = ghost;
        }
    free(before);
}

/* -- the share of small ------------------------------------------------------------------------------------------- */

#define MINIATURES 4u
#define SAMPLED_PAGES 512u /* that a miniature has at least, if the cache has so many */
#define MAX_SHIFT 6u       /* at least one page of 64 is sampled */

static const double shares[MINIATURES] = {0.03, 0.1, 0.3, 0.9};

struct chooser {
    struct miniature *miniatures[MINIATURES];
    unsigned shift;            /* one page of 2^shift is sampled */
    unsigned chosen;
    uint64_t accesses;         /* since the scores were updated */
    uint64_t misses[MINIATURES]; /* at that time */
    double score[MINIATURES];
};

static void miniatures_free(struct chooser *chooser) {
    for (unsigned at = 0; at < MINIATURES; at++) {
        miniature_free(chooser->miniatures[at]);
        chooser->miniatures[at] = NULL;
    }
}

static void set_small(struct policy *policy) {
    uint64_t pages = (uint64_t)(policy->share * (double)policy->capacity);
    policy->small_pages = pages ? pages : 1;
}

void policy_set_share(struct policy *policy, double share) {
    policy->share = share;
    set_small(policy);
}

static void chooser_resize(struct policy *policy) {
    struct chooser *chooser = policy->chooser;
    unsigned shift = chooser->shift;
    /* The capacity follows the compression. If it changes a little and back, the miniatures keep what they learned. */
    if (policy->capacity >> shift < SAMPLED_PAGES * 3 / 4 || policy->capacity >> shift > SAMPLED_PAGES * 5 / 2)
        for (shift = 0; shift < MAX_SHIFT && policy->capacity >> (shift + 1) >= SAMPLED_PAGES;)
            shift++;
    uint64_t pages = policy->capacity >> shift;
    bool resized = shift == chooser->shift && chooser->miniatures[0];
    for (unsigned at = 0; resized && at < MINIATURES; at++)
        resized = miniature_resize(chooser->miniatures[at], pages);
    if (resized)
        return;
    miniatures_free(chooser);
    chooser->shift = shift;
    chooser->accesses = 0;
    for (unsigned at = 0; at < MINIATURES; at++) {
        chooser->misses[at] = 0;
        chooser->miniatures[at] = miniature_new(pages, shares[at]);
        if (!chooser->miniatures[at]) {
            miniatures_free(chooser);
            return; /* the share stays */
        }
    }
}

/* Simulate an access of a sampled page, and choose anew when each miniature has seen as many as it has pages. */
static void chooser_access(struct policy *policy, uint64_t hash) {
    struct chooser *chooser = policy->chooser;
    if (hash >> 8 & ((1u << chooser->shift) - 1) || !chooser->miniatures[0])
        return;
    for (unsigned at = 0; at < MINIATURES; at++)
        miniature_access(chooser->miniatures[at], hash);
    if (++chooser->accesses < chooser->miniatures[0]->capacity)
        return;
    chooser->accesses = 0;
    unsigned best = chooser->chosen;
    for (unsigned at = 0; at < MINIATURES; at++) {
        uint64_t misses = chooser->miniatures[at]->misses;
        chooser->score[at] = 0.7 * chooser->score[at] + (double)(misses - chooser->misses[at]);
        chooser->misses[at] = misses;
    }
    for (unsigned at = 0; at < MINIATURES; at++)
        if (chooser->score[at] < chooser->score[best])
            best = at;
    if (chooser->score[best] < 0.98 * chooser->score[chooser->chosen]) {
        chooser->chosen = best;
        policy_set_share(policy, shares[best]);
    }
}

void policy_choose_share(struct policy *policy) {
    policy->chooser = calloc(1, sizeof *policy->chooser);
    if (!policy->chooser)
        return;
    policy->chooser->chosen = 1;
    policy_set_share(policy, shares[1]);
    chooser_resize(policy);
}

/* -- the policy --------------------------------------------------------------------------------------------------- */

void policy_init(struct policy *policy, struct entry *entries) {
    *policy = (struct policy){.entries = entries, .share = FIRST_SHARE};
    policy_set_capacity(policy, 1);
}

void policy_free(struct policy *policy) {
    free(policy->ghosts);
    if (policy->chooser)
        miniatures_free(policy->chooser);
    free(policy->chooser);
    policy->ghosts = NULL;
    policy->chooser = NULL;
}

void policy_set_capacity(struct policy *policy, uint64_t pages) {
    policy->capacity = pages ? pages : 1;
    uint64_t tick_pages = policy->capacity / TICKS ? policy->capacity / TICKS : 1;
    policy->tick_pages = (uint32_t)tick_pages;
    policy->ticks_in_capacity = (uint32_t)(policy->capacity / tick_pages);
    policy->turns_kept = 2 * policy->ticks_in_capacity;
    set_small(policy);
    ghosts_resize(policy);
    if (policy->chooser)
        chooser_resize(policy);
}

static void next_tick(struct policy *policy, double now) {
    policy->tick++;
    policy->misses_in_tick = 0;
    policy->used_in_tick = false;
    policy->times[policy->tick % POLICY_TIMES] = now;
}

static uint16_t age_of(const struct policy *policy, uint16_t stamp) { return (uint16_t)(policy->tick - stamp); }

void policy_insert(struct policy *policy, uint32_t entry, uint64_t hash, bool came_back, double now) {
    struct entry *e = &policy->entries[entry];
    if (policy->chooser)
        chooser_access(policy, hash);
    if (++policy->misses_in_tick >= policy->tick_pages ||
        now - policy->times[policy->tick % POLICY_TIMES] >= SECONDS_A_TICK)
        next_tick(policy, now);
    bool to_main = came_back;
    struct ghost *ghost = ghost_find(policy, hash);
    if (ghost && is_kept(policy, ghost)) {
        /* It was used since the coldest page of main was, or main is not full. */
        if (policy->main.pages + policy->small_pages < policy->capacity) {
            to_main = true;
        } else {
            settle(policy);
            uint32_t tail = policy->main.oldest;
            /* Ages, not stamps: a cold tail may be older than half the range of a stamp, a ghost is not. */
            to_main |= tail == NO_ENTRY || age_of(policy, ghost->stamp) < age_of(policy, policy->entries[tail].stamp);
        }
    } else if (policy_pages(policy) + 1 + policy->small_pages <= policy->capacity) {
        to_main = true;
    }
    if (ghost)
        ghost->tag = 0; /* a larger capacity would keep an old one again */
    entry_set_uses(e, 0);
    e->stamp = policy->tick;
    push(policy, entry, to_main ? QUEUE_MAIN : QUEUE_SMALL);
}

void policy_hit(struct policy *policy, uint32_t entry, uint64_t hash) {
    struct entry *e = &policy->entries[entry];
    unsigned uses = entry_uses(e);
    if (policy->chooser)
        chooser_access(policy, hash);
    policy->used_in_tick = true;
    if (entry_queue(e) == QUEUE_SMALL && !uses &&
        age_of(policy, e->stamp) < CORRELATED * policy->share * policy->ticks_in_capacity)
        return;
    if (uses < MAX_USES)
        entry_set_uses(e, uses + 1);
    e->stamp = policy->tick;
}

uint32_t policy_victim(struct policy *policy) {
    while (policy->small.pages && (policy->small.pages >= policy->small_pages || !policy->main.pages)) {
        uint32_t tail = policy->small.oldest;
        if (!entry_uses(&policy->entries[tail]))
            return tail;
        unlink_page(policy, tail);
        entry_set_uses(&policy->entries[tail], 0);
        push(policy, tail, QUEUE_MAIN);
    }
    settle(policy);
    return policy->main.oldest;
}

uint32_t policy_main_victim(struct policy *policy) {
    if (policy->main.pages)
        settle(policy);
    return policy->main.oldest;
}

void policy_evict(struct policy *policy, uint32_t entry, uint64_t hash) {
    const struct entry *e = &policy->entries[entry];
    bool was_small = entry_queue(e) == QUEUE_SMALL;
    unlink_page(policy, entry);
    if (was_small)
        ghost_add(policy, hash, e->stamp);
}

void policy_remove(struct policy *policy, uint32_t entry) { unlink_page(policy, entry); }

bool policy_is_ghost(const struct policy *policy, uint64_t hash) {
    const struct ghost *ghost = ghost_find(policy, hash);
    return ghost && is_kept(policy, ghost);
}

double policy_oldest(struct policy *policy, double now) {
    /* Uses since the tick began count as uses at its beginning: end it. */
    if (policy->used_in_tick && now - policy->times[policy->tick % POLICY_TIMES] >= SECONDS_A_TICK / 4)
        next_tick(policy, now);
    const uint32_t tails[] = {policy->small.oldest, policy->main.oldest};
    double oldest = NAN;
    for (unsigned at = 0; at < 2; at++) {
        if (tails[at] == NO_ENTRY)
            continue;
        unsigned age = age_of(policy, policy->entries[tails[at]].stamp);
        unsigned known = age < POLICY_TIMES ? age : POLICY_TIMES - 1;
        double time = policy->times[(uint16_t)(policy->tick - known) % POLICY_TIMES];
        oldest = isnan(oldest) || time < oldest ? time : oldest;
    }
    return oldest;
}

uint64_t policy_bytes(const struct policy *policy) {
    uint64_t bytes = policy->ghosts ? policy->ghost_buckets * WAYS * sizeof *policy->ghosts : 0;
    for (unsigned at = 0; policy->chooser && policy->chooser->miniatures[0] && at < MINIATURES; at++)
        bytes += miniature_bytes(policy->chooser->miniatures[at]);
    return bytes;
}

void policy_check(const struct policy *policy) {
    const struct queue *queues[] = {&policy->small, &policy->main};
    for (unsigned at = 0; at < 2; at++) {
        uint64_t seen = 0;
        uint32_t before = NO_ENTRY;
        for (uint32_t entry = queues[at]->oldest; entry != NO_ENTRY; entry = policy->entries[entry].newer) {
            assert(entry_queue(&policy->entries[entry]) == QUEUE_SMALL + at);
            assert(policy->entries[entry].older == before);
            before = entry;
            seen++;
        }
        assert(queues[at]->newest == before && seen == queues[at]->pages);
    }
}
