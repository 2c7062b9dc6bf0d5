/* The policy alone: random operations keep its queues whole, and what a caller relies on holds. */

#include <math.h>

#include "ctest.h"
#include "policy.h"

#define PAGES 4000u
#define MOST 3000u

static struct prng rng;
static struct entry entries[PAGES + 1]; /* entry n has page n */
static struct policy policy;
static double now;

static uint64_t hash_of(uint32_t page) {
    struct prng prng = {page * UINT64_C(0x9e3779b97f4a7c15)};
    return prng_next(&prng);
}

static bool is_resident(uint32_t page) { return entry_queue(&entries[page]) != QUEUE_NONE; }

static void begin(uint64_t capacity, bool choose) {
    memset(entries, 0, sizeof entries);
    now = 0;
    policy_init(&policy, entries);
    if (choose)
        policy_choose_share(&policy);
    policy_set_capacity(&policy, capacity);
}

static void insert(uint32_t page, bool came_back) {
    policy_insert(&policy, page, hash_of(page), came_back, now);
    CHECK(is_resident(page) && !policy_is_ghost(&policy, hash_of(page)));
}

static void evict_down_to(uint64_t pages) {
    while (policy_pages(&policy) > pages) {
        uint32_t victim = policy_victim(&policy);
        CHECK(victim != NO_ENTRY && is_resident(victim));
        bool small = entry_queue(&entries[victim]) == QUEUE_SMALL;
        policy_evict(&policy, victim, hash_of(victim));
        CHECK(!is_resident(victim));
        CHECK(policy_is_ghost(&policy, hash_of(victim)) == small);
    }
}

static void access_page(uint32_t page) {
    if (is_resident(page)) {
        policy_hit(&policy, page, hash_of(page));
        return;
    }
    evict_down_to(policy.capacity - 1);
    insert(page, false);
}

/* Every operation, and capacities that change at any time. */
static void test_random(void) {
    begin(1 + below(&rng, MOST), below(&rng, 4));
    uint64_t resident = 0;
    uint32_t width = 1 + below(&rng, PAGES);
    for (unsigned step = 0; step < 30000 && ctest_goes_on(); step++) {
        uint32_t page = 1 + below(&rng, width);
        now += below(&rng, 100) ? 0.0 : 0.1 * below(&rng, 50);
        switch (below(&rng, 200)) {
        case 0:
            policy_set_capacity(&policy, below(&rng, MOST)); /* fewer pages than are there: evicted from now on */
            break;
        case 1:
            policy_set_capacity(&policy, policy.capacity + below(&rng, 20));
            break;
        case 2:
            policy_check(&policy);
            break;
        case 3:
            width = 1 + below(&rng, PAGES);
            break;
        case 4:
            CHECK(!(policy_oldest(&policy, now) > now));
            break;
        case 5:
            evict_down_to(policy_pages(&policy) / 2);
            break;
        case 6:
        case 7:
            if (is_resident(page))
                policy_remove(&policy, page);
            else
                insert(page, true);
            break;
        default:
            access_page(page);
        }
    }
    policy_check(&policy);
    for (uint32_t page = 1; page <= PAGES; page++)
        resident += is_resident(page);
    CHECK(resident == policy_pages(&policy));
    evict_down_to(0);
    CHECK(policy_victim(&policy) == NO_ENTRY);
    CHECK(isnan(policy_oldest(&policy, now)));
    policy_check(&policy);
    policy_free(&policy);
}

static void test_a_removed_page_leaves_no_ghost(void) {
    begin(10, false);
    for (uint32_t page = 1; page <= 10; page++)
        insert(page, false);
    policy_remove(&policy, 10);
    CHECK(!policy_is_ghost(&policy, hash_of(10)));
    policy_free(&policy);
}

static void test_a_page_that_came_back_enters_main(void) {
    begin(100, false);
    for (uint32_t page = 1; page <= 100; page++)
        access_page(page);
    evict_down_to(99);
    insert(101, true);
    CHECK(entry_queue(&entries[101]) == QUEUE_MAIN);
    policy_free(&policy);
}

/* The age of the coldest page is known to a few seconds, though nothing is missed. */
static void test_the_oldest_page(void) {
    begin(1000, true);
    insert(1, false);
    for (now = 0; now < 100; now += 0.25) {
        policy_hit(&policy, 1, hash_of(1));
        policy_oldest(&policy, now);
    }
    double last = now - 0.25;
    CHECK(last - policy_oldest(&policy, now) <= 3.0);
    now += 1000;
    CHECK(last - policy_oldest(&policy, now) <= 3.0);
    CHECK(policy_oldest(&policy, now) <= last + 3.0);
    policy_free(&policy);
}

/* A loop that fits stays at last, though a phase before filled main with pages that were used often. */
static void test_main_gives_way(void) {
    begin(1000, true);
    for (unsigned round = 0; round < 10; round++)
        for (uint32_t page = 1; page <= 1000; page++)
            access_page(page);
    for (unsigned round = 0; round < 25; round++)
        for (uint32_t page = 2001; page <= 2800; page++)
            access_page(page);
    unsigned resident = 0;
    for (uint32_t page = 2001; page <= 2800; page++)
        resident += is_resident(page);
    CHECK(resident == 800);
    policy_free(&policy);
}

/* Ghosts outlive a table of another size. */
static void test_ghosts_survive_a_resize(void) {
    begin(200, false);
    for (uint32_t page = 1; page <= 300; page++)
        access_page(page);
    uint64_t kept[2] = {0, 0};
    for (unsigned after = 0; after < 2; after++) {
        for (uint32_t page = 1; page <= 300; page++)
            kept[after] += policy_is_ghost(&policy, hash_of(page));
        policy_set_capacity(&policy, 2000);
    }
    CHECK(kept[0] >= 80 && kept[1] == kept[0]);
    policy_free(&policy);
}

int main(int argc, char **argv) {
    ctest_begin(argc, argv);
    rng = prng_of(0);
    test_a_removed_page_leaves_no_ghost();
    test_a_page_that_came_back_enters_main();
    test_the_oldest_page();
    test_main_gives_way();
    test_ghosts_survive_a_resize();
    do
        test_random();
    while (ctest_goes_on());
    return 0;
}
