/* Attention over the pages of the KV cache: stores a step's keys and values, and shares out the
queries. */
#include "kernels.h"
#include "team.h"

enum { ELEMENTS_PER_THREAD = 1 << 15, MOST_DECODES = 4, ITEMS_PER_THREAD = 4 };

static void store(const Attention *a) {
    const long row = a->kv_heads * a->dim, size = a->type == BFLOAT16 ? 2 : 4;
    for (long t = 0; t < a->tokens; t++) {
        memcpy((char *)a->keys + a->slots[t] * row * size, at(a->k, t * a->kv_stride, a->type),
               row * size);
        memcpy((char *)a->values + a->slots[t] * row * size, at(a->v, t * a->kv_stride, a->type),
               row * size);
    }
}

typedef struct {
    const Attention *a;
    long decodes_per_item, decodes; /* each with all its heads, or with those of one KV head */
} Shares;

/* A prompt's items take longest, so they come first. */
static void attend_item(void *data, long item) {
    const Shares *shares = data;
    const Attention *a = shares->a;
    if (item < a->prompt_items) attend_prompt(a, item);
    else {
        const long first = (item - a->prompt_items) * shares->decodes_per_item;
        const long end = first + shares->decodes_per_item;
        attend_decodes(a, first, end < shares->decodes ? end : shares->decodes);
    }
}

static long count_seen(const Attention *a) {
    long seen = 0;
    for (const int64_t *d = a->decodes; d < a->decodes + 3 * a->count; d += 3) seen += d[2];
    for (const int64_t *p = a->prompts; p < a->prompts + 4 * a->prompt_count; p += 4)
        seen += p[3] * p[2];
    return seen;
}

/* Several are one item, so that each one's keys come from memory beside the one before; but the
threads must be able to share them out evenly. With less than one for each thread, all are apart. */
static long decodes_per_item(long count, int threads) {
    const long most = count / (ITEMS_PER_THREAD * threads);
    return most > MOST_DECODES ? MOST_DECODES : most > 1 ? most : 1;
}

/* Stores all new keys and values, then attends from all queries. */
EXPORT void paged_attention(Attention *a, int threads) {
    store(a);
    long most = count_seen(a) * a->heads * a->dim / ELEMENTS_PER_THREAD;
    if (most < threads) threads = most > 1 ? (int)most : 1;
    /* All heads of a page lie side by side: read together, they are one stream of memory. */
    a->kv_per_item = a->count < threads ? 1 : a->kv_heads;
    a->splits = a->kv_heads / a->kv_per_item;
    a->prompt_items = count_prompt_items(a);
    const long decodes = a->count * a->splits, size = decodes_per_item(a->count, threads);
    Shares shares = {a, size, decodes};
    each_item(attend_item, &shares, a->prompt_items + (decodes + size - 1) / size, threads);
}
