/* What is known of each page in memory: 32 bytes, keyed by entry number, without pointers. */

#ifndef TMEM_ENTRIES_H
#define TMEM_ENTRIES_H

#include <stdint.h>

#define NO_ENTRY 0u /* entry 0 is never used */

struct entry {
    uint64_t key;          /* object:24 | index:36 | flags:4 */
    uint32_t chain;        /* the next entry of its hash bucket, or of the free list */
    uint32_t newer, older; /* links of its queue; NO_ENTRY at the ends */
    uint32_t place;        /* a frame, a slot, or half of the word of a same-filled page */
    uint32_t checksum;     /* of the stored bytes, or the other half of the word */
    uint16_t stamp;        /* tick of the last use; of the insertion while uses == 0 */
    uint16_t bits;         /* length:12 | queue:2 | uses:2 */
};

_Static_assert(sizeof(struct entry) == 32, "an entry has 32 bytes");

enum entry_queue { QUEUE_NONE, QUEUE_SMALL, QUEUE_MAIN, QUEUE_SAME };

static inline unsigned entry_queue(const struct entry *entry) { return entry->bits >> 2 & 3u; }

static inline void entry_set_queue(struct entry *entry, unsigned queue) {
    entry->bits = (uint16_t)((entry->bits & ~0xcu) | queue << 2);
}

static inline unsigned entry_uses(const struct entry *entry) { return entry->bits & 3u; }

static inline void entry_set_uses(struct entry *entry, unsigned uses) {
    entry->bits = (uint16_t)((entry->bits & ~3u) | uses);
}

/* The stored bytes: 0 for a same-filled page, ENTRY_RAW for an uncompressed one. */
#define ENTRY_RAW 4095u

static inline unsigned entry_length(const struct entry *entry) { return entry->bits >> 4; }

static inline void entry_set_length(struct entry *entry, unsigned length) {
    entry->bits = (uint16_t)((entry->bits & 0xfu) | length << 4);
}

#endif
