/* Shares work among the threads of torch's own OpenMP runtime.

A second runtime beside it would fight it for the same cores, so none is linked: the loader hands
over the entry point of the one that torch has loaded. Without one, all work is done by the caller.
Each thread begins with a share of its own, in order, for what lies after an item in memory is on
its way already; then it takes from the others' shares: one that is held up holds up one item. */
#include "team.h"
#include "numbers.h"
#include <stdatomic.h>
#include <stddef.h>

typedef void (*Start)(void (*run)(void *), void *data, unsigned threads, unsigned flags);

static Start start_team = NULL;

typedef struct {
    atomic_long next;
    long end;
    char apart[64 - sizeof(atomic_long) - sizeof(long)]; /* of what other threads write */
} Share;

typedef struct {
    Work work;
    void *data;
    Share *shares;
    int threads;
    atomic_int arrived;
} Team;

EXPORT void use_team(void *gomp_parallel) { start_team = (Start)gomp_parallel; }

static void take_items(void *argument) {
    Team *team = argument;
    const int own = atomic_fetch_add_explicit(&team->arrived, 1, memory_order_relaxed);
    for (int i = 0; i < team->threads; i++) {
        Share *share = team->shares + (own + i) % team->threads;
        long item;
        while ((item = atomic_fetch_add_explicit(&share->next, 1, memory_order_relaxed)) < share->end)
            team->work(team->data, item);
    }
}

void each_item(Work work, void *data, long items, int threads) {
    if (threads > items) threads = (int)items;
    if (threads <= 1 || !start_team) {
        for (long item = 0; item < items; item++) work(data, item);
        return;
    }
    Share shares[threads];
    for (int i = 0; i < threads; i++) {
        atomic_init(&shares[i].next, items * i / threads);
        shares[i].end = items * (i + 1) / threads;
    }
    Team team = {.work = work, .data = data, .shares = shares, .threads = threads};
    start_team(take_items, &team, (unsigned)threads, 0);
}
