/* Shares work among the threads of torch's own OpenMP runtime.

A second runtime beside it would fight it for the same cores, so none is linked: the loader hands
over the entry point of the one that torch has loaded. Without one, all work is done by the caller.
Threads take the next item when they are ready for it: one that is held up holds up one item. */
#include "team.h"
#include "numbers.h"
#include <stdatomic.h>
#include <stddef.h>

typedef void (*Start)(void (*run)(void *), void *data, unsigned threads, unsigned flags);

static Start start_team = NULL;

typedef struct {
    Work work;
    void *data;
    long items;
    atomic_long next;
} Queue;

EXPORT void use_team(void *gomp_parallel) { start_team = (Start)gomp_parallel; }

static void take_items(void *argument) {
    Queue *queue = argument;
    long item;
    while ((item = atomic_fetch_add_explicit(&queue->next, 1, memory_order_relaxed)) < queue->items)
        queue->work(queue->data, item);
}

void each_item(Work work, void *data, long items, int threads) {
    Queue queue = {.work = work, .data = data, .items = items};
    if (threads > items) threads = (int)items;
    if (threads > 1 && start_team) start_team(take_items, &queue, (unsigned)threads, 0);
    else take_items(&queue);
}
