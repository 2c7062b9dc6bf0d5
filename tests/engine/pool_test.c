/* Pools against arrays: an ephemeral pool may lose pages, a persistent one may refuse a put; a get never gives other
 * bytes. */

#include "ctest.h"

#define SLABS 6u
#define OBJECTS 3u
#define INDEXES 96u

enum kind { PRIVATE, SHARED, PERSISTENT, KINDS };

struct model {
    int pool;
    bool frozen;
    uint32_t version[OBJECTS][INDEXES]; /* 0: no page */
};

static struct prng rng;
static tmem *engine;
static struct model models[KINDS];
static int arena;
static bool granted[SLABS], persistent_slab[SLABS];
static uint32_t last_version;

static uint32_t slabs_out(void) {
    uint32_t out = 0;
    for (uint32_t slab = 0; slab < SLABS; slab++)
        out += granted[slab];
    return out;
}

static void supply(bool persistent) {
    for (uint32_t slab = 0; slab < SLABS; slab++)
        if (!granted[slab] && below(&rng, 4)) {
            CHECK(!tmem_grant(engine, slab, persistent));
            granted[slab] = true;
            persistent_slab[slab] = persistent;
            return;
        }
    tmem_deny(engine);
}

static void take_back(const uint32_t *slabs, uint32_t count) {
    for (uint32_t at = 0; at < count; at++) {
        uint32_t slab = slabs[at] >> 1;
        CHECK(slab < SLABS && granted[slab] && persistent_slab[slab] == (slabs[at] & 1));
        granted[slab] = false;
        arena_punch(arena, slab);
    }
}

static void new_pool(enum kind kind) {
    models[kind] = (struct model){.pool = tmem_pool_new(engine, kind == PERSISTENT, kind == SHARED)};
    CHECK(models[kind].pool > 0);
}

static uint32_t known_pages(enum kind kind, uint32_t object) {
    uint32_t pages = 0;
    for (uint32_t index = 0; index < INDEXES; index++)
        pages += models[kind].version[object][index] != 0;
    return pages;
}

static void put(enum kind kind, uint32_t object, uint32_t index) {
    struct model *model = &models[kind];
    uint8_t page[TMEM_PAGE];
    uint32_t version = ++last_version;
    int flags = (below(&rng, 2) ? TMEM_ASK : 0) | (below(&rng, 8) ? 0 : TMEM_HOT);
    page_make(page, object, index, version);
    int result = tmem_put(engine, model->pool, object, index, page, flags);
    if (result == TMEM_NEEDS_SLAB) {
        CHECK(!tmem_holds(engine, model->pool, object, index));
        supply(kind == PERSISTENT);
        result = tmem_put(engine, model->pool, object, index, page, (flags & ~TMEM_ASK) | TMEM_AGAIN);
    }
    CHECK(result == TMEM_OK || result >= TMEM_FROZEN);
    CHECK((result == TMEM_FROZEN) == model->frozen);
    CHECK(tmem_holds(engine, model->pool, object, index) == (result == TMEM_OK));
    model->version[object][index] = result == TMEM_OK ? version : 0;
}

static void get(enum kind kind, uint32_t object, uint32_t index) {
    struct model *model = &models[kind];
    uint8_t page[TMEM_PAGE];
    uint32_t *version = &model->version[object][index];
    int result = tmem_get(engine, model->pool, object, index, page);
    if (result == TMEM_OK)
        CHECK(*version && page_is(page, object, index, *version));
    else if (kind == PERSISTENT)
        CHECK(result == TMEM_MISS && !*version);
    else
        *version = 0;
    if (kind == PRIVATE) {
        *version = 0;
        CHECK(!tmem_holds(engine, model->pool, object, index));
    }
}

static void flush_object(enum kind kind, uint32_t object) {
    uint64_t held = tmem_pages_of(engine, models[kind].pool, object), known = known_pages(kind, object);
    CHECK(kind == PERSISTENT ? held == known : held <= known);
    CHECK(tmem_flush_object(engine, models[kind].pool, object) == held);
    CHECK(!tmem_pages_of(engine, models[kind].pool, object));
    memset(models[kind].version[object], 0, sizeof models[kind].version[object]);
}

/* A slab is taken away. What is in it may be read before the engine hears of it. */
static void lose(void) {
    uint32_t slab = below(&rng, SLABS);
    if (!granted[slab] || persistent_slab[slab])
        return;
    arena_punch(arena, slab);
    if (below(&rng, 2))
        for (uint32_t index = 0; index < INDEXES; index += 1 + below(&rng, 4))
            get((enum kind)below(&rng, PERSISTENT), below(&rng, OBJECTS), index);
    CHECK(tmem_lose(engine, slab) >= 0);
    granted[slab] = false;
}

static void step(void) {
    enum kind kind = (enum kind)below(&rng, KINDS);
    uint32_t object = below(&rng, OBJECTS), index = below(&rng, INDEXES), what = below(&rng, 1000), slabs[3];
    struct model *model = &models[kind];
    if (what < 450) {
        put(kind, object, index);
    } else if (what < 850) {
        get(kind, object, index);
    } else if (what < 940) {
        bool held = tmem_holds(engine, model->pool, object, index);
        CHECK(tmem_flush_page(engine, model->pool, object, index) == held);
        model->version[object][index] = 0;
    } else if (what < 950) {
        flush_object(kind, object);
    } else if (what < 962) {
        model->frozen = !model->frozen;
        tmem_pool_freeze(engine, model->pool, model->frozen);
        CHECK(tmem_pool_frozen(engine, model->pool) == model->frozen);
    } else if (what < 975) {
        take_back(slabs, tmem_give_up(engine, 1 + below(&rng, 3), 1 + (int)below(&rng, 3), slabs));
    } else if (what < 985) {
        lose();
    } else if (what < 990) {
        bool persistent = below(&rng, 2);
        uint32_t slab;
        if (!tmem_take_spare(engine, persistent, &slab))
            take_back((uint32_t[]){slab << 1 | persistent}, 1);
    } else if (what < 995) {
        tmem_set_capacity(engine, (uint64_t)(1 + below(&rng, SLABS)) * TMEM_SLAB, (uint64_t)SLABS * TMEM_SLAB);
    } else {
        tmem_set_time(engine, (double)last_version);
    }
}

static void check(void) {
    struct tmem_stats stats;
    struct tmem_pool_stats counts;
    uint64_t pages = 0, known = 0;
    tmem_check(engine);
    tmem_stats(engine, &stats);
    CHECK(stats.slabs == slabs_out());
    CHECK(stats.used_bytes <= stats.slabs * TMEM_SLAB);
    for (int kind = 0; kind < KINDS; kind++) {
        tmem_pool_stats(engine, models[kind].pool, &counts);
        pages += counts.pages;
    }
    CHECK(pages == stats.pool_pages);
    tmem_pool_stats(engine, models[PERSISTENT].pool, &counts);
    for (uint32_t object = 0; object < OBJECTS; object++)
        known += known_pages(PERSISTENT, object);
    CHECK(counts.pages == known);
}

/* One engine, until it is over or so many steps are done; all pools are destroyed at the end. */
static void life(uint32_t steps) {
    int error = 0;
    memset(granted, 0, sizeof granted);
    engine = tmem_new(
        &(struct tmem_config){
            .arena_fd = arena, .arena_slabs = SLABS, .arena_mapped = below(&rng, 2), .compress = below(&rng, 8)},
        &error);
    CHECK(engine && !error);
    tmem_set_capacity(engine, (uint64_t)SLABS * TMEM_SLAB, (uint64_t)SLABS * TMEM_SLAB);
    for (int kind = 0; kind < KINDS; kind++)
        new_pool((enum kind)kind);
    while (steps-- && ctest_goes_on()) {
        step();
        if (!below(&rng, 16))
            check();
    }
    for (uint32_t object = 0; object < OBJECTS; object++)
        for (uint32_t index = 0; index < INDEXES; index++)
            get(PERSISTENT, object, index);
    for (int kind = 0; kind < KINDS; kind++)
        tmem_pool_destroy(engine, models[kind].pool);
    memset(models[PERSISTENT].version, 0, sizeof models[PERSISTENT].version);
    check();
    tmem_free(engine);
    for (uint32_t slab = 0; slab < SLABS; slab++)
        arena_punch(arena, slab);
}

int main(int argc, char **argv) {
    ctest_begin(argc, argv);
    rng = prng_of(0);
    arena = arena_new(SLABS);
    do
        life(20000);
    while (ctest_goes_on());
    close(arena);
    return 0;
}
