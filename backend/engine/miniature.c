#include "miniature.h"

#include <stdlib.h>

#include "engine.h"

static uint32_t *bucket_of(const struct miniature *miniature, uint64_t hash) {
    return &miniature->buckets[(hash & UINT32_MAX) * miniature->bucket_count >> 32];
}

struct miniature *miniature_new(uint64_t capacity, double share) {
    struct miniature *miniature = calloc(1, sizeof *miniature);
    if (!miniature)
        return NULL;
    capacity = capacity ? capacity : 1;
    miniature->most = capacity + capacity / 4 + 1;
    miniature->bucket_count = (uint32_t)miniature->most;
    miniature->entries = calloc(miniature->most + 1, sizeof *miniature->entries);
    miniature->buckets = calloc(miniature->bucket_count, sizeof *miniature->buckets);
    if (!miniature->entries || !miniature->buckets) {
        miniature_free(miniature);
        return NULL;
    }
    for (uint32_t entry = 1; entry <= miniature->most; entry++) {
        miniature->entries[entry].chain = miniature->free_entry;
        miniature->free_entry = entry;
    }
    policy_init(&miniature->policy, miniature->entries);
    policy_set_share(&miniature->policy, share);
    miniature_resize(miniature, capacity);
    return miniature;
}

void miniature_free(struct miniature *miniature) {
    if (!miniature)
        return;
    policy_free(&miniature->policy);
    free(miniature->entries);
    free(miniature->buckets);
    free(miniature);
}

bool miniature_resize(struct miniature *miniature, uint64_t capacity) {
    if (capacity > miniature->most || capacity < miniature->most / 4)
        return false;
    miniature->capacity = capacity;
    policy_set_capacity(&miniature->policy, capacity);
    return true;
}

static void evict(struct miniature *miniature) {
    uint32_t victim = policy_victim(&miniature->policy);
    struct entry *e = &miniature->entries[victim];
    uint32_t *link = bucket_of(miniature, e->key);
    policy_evict(&miniature->policy, victim, e->key);
    while (*link != victim)
        link = &miniature->entries[*link].chain;
    *link = e->chain;
    *e = (struct entry){.chain = miniature->free_entry};
    miniature->free_entry = victim;
}

bool miniature_access(struct miniature *miniature, uint64_t hash) {
    uint32_t *head = bucket_of(miniature, hash), entry = *head;
    while (entry != NO_ENTRY && miniature->entries[entry].key != hash)
        entry = miniature->entries[entry].chain;
    if (entry != NO_ENTRY) {
        policy_hit(&miniature->policy, entry, hash);
        return false;
    }
    miniature->misses++;
    while (policy_pages(&miniature->policy) >= miniature->capacity)
        evict(miniature);
    entry = miniature->free_entry;
    struct entry *e = &miniature->entries[entry];
    miniature->free_entry = e->chain;
    *e = (struct entry){.key = hash, .chain = *head};
    *head = entry;
    policy_insert(&miniature->policy, entry, hash, false, 0.0);
    return true;
}

uint64_t miniature_bytes(const struct miniature *miniature) {
    return sizeof *miniature + (miniature->most + 1) * sizeof *miniature->entries +
           miniature->bucket_count * sizeof *miniature->buckets + policy_bytes(&miniature->policy);
}

int64_t tmem_replay(const uint64_t *pages, size_t count, uint64_t capacity, double fixed_share) {
    struct miniature *cache = miniature_new(capacity, fixed_share < 0 ? 0.1 : fixed_share);
    if (!cache)
        return -1;
    if (fixed_share < 0)
        policy_choose_share(&cache->policy);
    for (size_t at = 0; at < count; at++) {
        uint64_t hash = (pages[at] + 1) * UINT64_C(0x9e3779b97f4a7c15);
        hash = (hash ^ hash >> 32) * UINT64_C(0xd6e8feb86659fd93);
        miniature_access(cache, hash ^ hash >> 32);
    }
    int64_t misses = (int64_t)cache->misses;
    miniature_free(cache);
    return misses;
}
