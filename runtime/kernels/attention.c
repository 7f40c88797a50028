/* Attention over the pages of the KV cache: stores a step's keys and values, and shares out the
queries. */
#include "kernels.h"
#include "team.h"

enum { ELEMENTS_PER_THREAD = 1 << 15 };

static void store(const Attention *a) {
    const long row = a->kv_heads * a->dim, size = a->type == BFLOAT16 ? 2 : 4;
    for (long t = 0; t < a->tokens; t++) {
        memcpy((char *)a->keys + a->slots[t] * row * size, at(a->k, t * a->kv_stride, a->type),
               row * size);
        memcpy((char *)a->values + a->slots[t] * row * size, at(a->v, t * a->kv_stride, a->type),
               row * size);
    }
}

/* Prompts' items come first, then those of decodes, which fetch one another's keys. */
static void attend_item(void *data, long item) {
    const Attention *a = data;
    if (item < a->prompt_items) attend_prompt(a, item);
    else attend_decode(a, item - a->prompt_items);
}

static long count_seen(const Attention *a) {
    long seen = 0;
    for (const int64_t *d = a->decodes; d < a->decodes + 3 * a->count; d += 3) seen += d[2];
    for (const int64_t *p = a->prompts; p < a->prompts + 4 * a->prompt_count; p += 4)
        seen += p[3] * p[2];
    return seen;
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
    each_item(attend_item, a, a->prompt_items + a->count * a->splits, threads);
}
