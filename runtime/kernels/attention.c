/* Attention of single queries over the pages of the KV cache.

One item of work is one query's group of heads: they share a KV head, so each key and value is read
once for all of them. The softmax is taken along the way, page by page, and nothing but what a query
may see is ever read. Source: Milakov and Gimelshein, "Online normalizer calculation for softmax"
(2018). */
#include "numbers.h"
#include "team.h"

enum { ELEMENTS_PER_THREAD = 1 << 15 };

typedef struct {
    const void *q;           /* [tokens, heads * dim], rows `q_stride` apart */
    const void *k, *v;       /* the step's new keys and values, rows `kv_stride` apart */
    void *out;               /* [tokens, heads * dim] */
    void *keys, *values;     /* one layer: [blocks, page, kv_heads, dim] */
    const int64_t *slots;    /* where each token's key goes, in tokens of the cache */
    const int64_t *tables;   /* [sequences, table_width] blocks */
    const int64_t *queries;  /* [count, 3]: a query's token, its sequence, how many keys it sees */
    const float *slopes;     /* one per head, or NULL */
    long q_stride, kv_stride, tokens, count, table_width;
    long heads, kv_heads, dim, page, window; /* window 0: all keys are seen */
    float scale;
    int type;
} Attention;

INLINE float dot(const float *a, const float *b, long dim) {
    float sum = 0.0f;
    SUM(sum)
    for (long i = 0; i < dim; i++) sum += a[i] * b[i];
    return sum;
}

/* Turns a page's scores into weights, and returns what the sums so far must be multiplied by. */
INLINE float soften(float *scores, long first, long last, float *highest, float *total) {
    float top = *highest;
    for (long t = first; t < last; t++) top = scores[t] > top ? scores[t] : top;
    float fade = *highest == -INFINITY ? 0.0f : exponential(*highest - top);
    float sum = 0.0f;
    SUM(sum)
    for (long t = first; t < last; t++) sum += scores[t] = exponential(scores[t] - top);
    *total = *total * fade + sum;
    *highest = top;
    return fade;
}

INLINE void attend(const Attention *a, long item, int type) {
    const long dim = a->dim, page = a->page, group = a->heads / a->kv_heads;
    const long kv = item % a->kv_heads, row_of_page = a->kv_heads * dim;
    const int64_t *query = a->queries + item / a->kv_heads * 3;
    const long token = query[0], seen = query[2], head = kv * group;
    const long from = a->window && seen > a->window ? seen - a->window : 0;
    float q[group * dim], sums[group * dim], scores[group][page], wide[dim];
    float highest[group], total[group];
    for (long i = 0; i < group * dim; i++) {
        q[i] = get(a->q, token * a->q_stride + head * dim + i, type) * a->scale;
        sums[i] = 0.0f;
    }
    for (long g = 0; g < group; g++) highest[g] = -INFINITY, total[g] = 0.0f;
    for (long start = from / page * page; start < seen; start += page) {
        const long block = a->tables[query[1] * a->table_width + start / page];
        const long first = start < from ? from - start : 0;
        const long last = seen - start < page ? seen - start : page;
        const void *keys = at(a->keys, block * page * row_of_page + kv * dim, type);
        const void *values = at(a->values, block * page * row_of_page + kv * dim, type);
        for (long t = first; t < last; t++) {
            for (long i = 0; i < dim; i++) wide[i] = get(keys, t * row_of_page + i, type);
            for (long g = 0; g < group; g++) {
                scores[g][t] = dot(q + g * dim, wide, dim);
                if (a->slopes) scores[g][t] += a->slopes[head + g] * (float)(start + t + 1 - seen);
            }
        }
        for (long g = 0; g < group; g++) {
            float fade = soften(scores[g], first, last, highest + g, total + g);
            for (long i = 0; i < dim; i++) sums[g * dim + i] *= fade;
        }
        for (long t = first; t < last; t++) {
            for (long i = 0; i < dim; i++) wide[i] = get(values, t * row_of_page + i, type);
            for (long g = 0; g < group; g++)
                for (long i = 0; i < dim; i++) sums[g * dim + i] += scores[g][t] * wide[i];
        }
    }
    for (long g = 0; g < group; g++)
        for (long i = 0; i < dim; i++)
            put(a->out, (token * a->heads + head + g) * dim + i, sums[g * dim + i] / total[g], type);
}

static void attend_item(void *data, long item) {
    const Attention *a = data;
    BY_TYPE(a->type, attend, a, item);
}

static void store(const Attention *a) {
    const long row = a->kv_heads * a->dim, size = a->type == BFLOAT16 ? 2 : 4;
    for (long t = 0; t < a->tokens; t++) {
        memcpy((char *)a->keys + a->slots[t] * row * size, at(a->k, t * a->kv_stride, a->type),
               row * size);
        memcpy((char *)a->values + a->slots[t] * row * size, at(a->v, t * a->kv_stride, a->type),
               row * size);
    }
}

/* Stores all new keys and values, then attends from the `count` queries. */
EXPORT void paged_attention(const Attention *a, int threads) {
    store(a);
    long seen = 0;
    for (long i = 0; i < a->count; i++) seen += a->queries[3 * i + 2];
    long most = seen * a->heads * a->dim / ELEMENTS_PER_THREAD;
    if (most < threads) threads = most > 1 ? (int)most : 1;
    each_item(attend_item, (void *)a, a->count * a->kv_heads, threads);
}
