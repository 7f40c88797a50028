/* What both kinds of attention know: the step's tensors, and where a sequence's keys lie. */
#pragma once
#include "softmax.h"
#include "tiles.h"
#include <stddef.h>

enum { KEYS = 128 }; /* so many are attended between two corrections of the sums */

typedef struct {
    const void *q;           /* [tokens, heads * dim], rows `q_stride` apart */
    const void *k, *v;       /* the step's new keys and values, rows `kv_stride` apart */
    void *out;               /* [tokens, heads * dim] */
    void *keys, *values;     /* one layer: [blocks, page, kv_heads, dim] */
    const int64_t *slots;    /* where each token's key goes, in tokens of the cache */
    const int64_t *tables;   /* [sequences, table_width] blocks */
    const int64_t *decodes;  /* [count, 3]: a query's token, its sequence, how many keys it sees */
    const int64_t *prompts;  /* [prompt_count, 4]: the same of a first query, and how many */
    const float *slopes;     /* one per head, or NULL */
    long q_stride, kv_stride, tokens, count, prompt_count, table_width;
    long heads, kv_heads, dim, page, window; /* window 0: all keys are seen */
    float scale;
    int type;
    /* Set by `paged_attention`: KV heads of a decode's item, its items, and all prompts' items. */
    long kv_per_item, splits, prompt_items;
} Attention;

void attend_decode(const Attention *a, long item);
void attend_prompt(const Attention *a, long item);
long count_prompt_items(const Attention *a);

/* Where a sequence's keys, and values, of the first KV head lie in the cache. */
INLINE void find_keys(const Attention *a, long sequence, long start, long count, long *places) {
    const int64_t *block = a->tables + sequence * a->table_width + start / a->page;
    long in_page = start % a->page;
    for (long t = 0; t < count; t++, in_page++) {
        if (in_page == a->page) in_page = 0, block++;
        places[t] = (*block * a->page + in_page) * a->kv_heads * a->dim;
    }
}
