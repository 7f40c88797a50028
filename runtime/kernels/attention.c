/* Attention of single queries over the pages of the KV cache.

The query heads that share a KV head are done together, so each key and value is read once for all
of them. The softmax is taken along the way, page by page, and nothing but what a query
may see counts (the matrix unit reads a page's other keys too; their scores are dropped). Source: Milakov and Gimelshein, "Online normalizer calculation for softmax"
(2018). */
#include "numbers.h"
#include "team.h"
#include "tiles.h"
#include <stddef.h>

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
    long kv_per_item, splits; /* set here: KV heads of an item, and items per query */
} Attention;

/* Widens one head's part of a page: `count` rows, `stride` apart. */
INLINE void widen_rows(const void *rows, long stride, long count, float *wide, long dim, int type) {
    for (long t = 0; t < count; t++)
        for (long i = 0; i < dim; i++) wide[t * dim + i] = get(rows, t * stride + i, type);
}

INLINE float dot(const float *a, const float *b, long dim) {
    float sum = 0.0f;
    SUM(sum)
    for (long i = 0; i < dim; i++) sum += a[i] * b[i];
    return sum;
}

/* Sixteen numbers that stay in registers while a loop adds to them. */
typedef float Lanes __attribute__((vector_size(64), aligned(4), may_alias));

/* sums = sums * fade + weights times values */
INLINE void mix(float *sums, float fade, const float *weights, const float *values, long count,
                long dim) {
    long i = 0;
    for (; i + 64 <= dim; i += 64) {
        Lanes *sum = (Lanes *)(sums + i);
        Lanes a = sum[0] * fade, b = sum[1] * fade, c = sum[2] * fade, d = sum[3] * fade;
        for (long t = 0; t < count; t++) {
            const Lanes *value = (const Lanes *)(values + t * dim + i);
            a += weights[t] * value[0];
            b += weights[t] * value[1];
            c += weights[t] * value[2];
            d += weights[t] * value[3];
        }
        sum[0] = a, sum[1] = b, sum[2] = c, sum[3] = d;
    }
    for (; i < dim; i++) {
        float mixed = sums[i] * fade;
        for (long t = 0; t < count; t++) mixed += weights[t] * values[t * dim + i];
        sums[i] = mixed;
    }
}

/* Turns a page's scores into weights, and returns what the sums so far must be multiplied by. */
INLINE float soften(float *scores, long count, float *highest, float *total) {
    float top = *highest;
    LARGEST(top)
    for (long t = 0; t < count; t++) top = scores[t] > top ? scores[t] : top;
    float fade = *highest == -INFINITY ? 0.0f : exponential(*highest - top);
    float sum = 0.0f;
    SUM(sum)
    for (long t = 0; t < count; t++) sum += scores[t] = exponential(scores[t] - top);
    *total = *total * fade + sum;
    *highest = top;
    return fade;
}

/* One KV head's part of a page, for the query heads that share it. */
typedef struct {
    const void *keys, *values; /* of the page's first key */
    long first, count;         /* the keys that are seen */
    long distance;             /* how far the first of them lies from the query: 0 or less */
} Part;

/* scores[g, t] = query g times key t, one row of `page` numbers per query. */
INLINE void score(const Attention *a, const Part *part, const float *q, float *wide, float *scores,
                  long dim, int type) {
    const long group = a->heads / a->kv_heads, stride = a->kv_heads * dim;
    widen_rows(at(part->keys, part->first * stride, type), stride, part->count, wide, dim, type);
    for (long g = 0; g < group; g++)
        for (long t = 0; t < part->count; t++)
            scores[g * a->page + t] = dot(q + g * dim, wide + t * dim, dim) * a->scale;
}

#ifdef __AMX_BF16__
/* The matrix unit multiplies a page's keys by all queries of their group at once: the keys as they
lie in memory, the queries as pairs of numbers, [dim / 2][group][2]. */
INLINE int uses_unit(const Attention *a, long dim, int type) {
    return type == BFLOAT16 && dim % 32 == 0 && a->page <= 16 && a->heads / a->kv_heads <= 16;
}

/* Tile 0 holds scores, 1 keys, 2 queries. */
static void shape_tiles(long page, long group) {
    TileShapes shapes = {.palette = 1, .rows = {page, page, 16}};
    shapes.row_bytes[0] = shapes.row_bytes[2] = (uint16_t)(group * 4);
    shapes.row_bytes[1] = 64;
    _tile_loadconfig(&shapes);
}

INLINE void pair_up(const uint16_t *q, uint16_t *pairs, long group, long dim) {
    for (long g = 0; g < group; g++)
        for (long i = 0; i < dim; i++) pairs[(i / 2 * group + g) * 2 + i % 2] = q[g * dim + i];
}

INLINE void score_by_unit(const Attention *a, const Part *part, const uint16_t *pairs,
                          float *by_key, float *scores, long dim) {
    const long group = a->heads / a->kv_heads, stride = a->kv_heads * dim;
    _tile_zero(0);
    for (long i = 0; i < dim; i += 32) {
        _tile_loadd(1, (const uint16_t *)part->keys + i, stride * 2);
        _tile_loadd(2, pairs + i * group, group * 4);
        _tile_dpbf16ps(0, 1, 2);
    }
    _tile_stored(0, by_key, group * 4);
    const __m512i lanes =
        _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i places = _mm512_mullo_epi32(lanes, _mm512_set1_epi32((int)group));
    const __mmask16 seen = (__mmask16)((1u << part->count) - 1);
    const float *from = by_key + part->first * group;
    for (long g = 0; g < group; g++) {
        __m512 row = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), seen, places, from + g, 4);
        row = _mm512_mul_ps(row, _mm512_set1_ps(a->scale));
        _mm512_mask_storeu_ps(scores + g * a->page, seen, row);
    }
}
#endif

INLINE void attend_keys(const Attention *a, const Part *part, const float *slopes, const float *q,
                        const uint16_t *pairs, float *sums, float *highest, float *total, long dim,
                        int type, const long count) {
    const long group = a->heads / a->kv_heads, stride = a->kv_heads * dim;
    float wide[a->page * dim], weights[group * a->page], fades[group];
#ifdef __AMX_BF16__
    if (uses_unit(a, dim, type)) score_by_unit(a, part, pairs, wide, weights, dim);
    else
#else
    (void)pairs;
#endif
        score(a, part, q, wide, weights, dim, type);
    for (long g = 0; g < group; g++) {
        float *scores = weights + g * a->page;
        if (slopes)
            for (long t = 0; t < count; t++)
                scores[t] += slopes[g] * (float)(part->distance + t);
        fades[g] = soften(scores, count, highest + g, total + g);
    }
    widen_rows(at(part->values, part->first * stride, type), stride, count, wide, dim, type);
    for (long g = 0; g < group; g++)
        mix(sums + g * dim, fades[g], weights + g * a->page, wide, count, dim);
}

/* Most pages are whole; loops of a known length stay in registers. */
INLINE void attend_part(const Attention *a, const Part *part, const float *slopes, const float *q,
                        const uint16_t *pairs, float *sums, float *highest, float *total, long dim,
                        int type) {
    if (part->count == 16)
        attend_keys(a, part, slopes, q, pairs, sums, highest, total, dim, type, 16);
    else attend_keys(a, part, slopes, q, pairs, sums, highest, total, dim, type, part->count);
}

/* Has the next page's keys and values on their way while this one is attended. */
INLINE void fetch_page(const Attention *a, long block, long dim, int type) {
    const long size = a->page * a->kv_heads * dim, bytes = size * (type == BFLOAT16 ? 2 : 4);
    const char *keys = at(a->keys, block * size, type), *values = at(a->values, block * size, type);
    for (long i = 0; i < bytes; i += 64) {
        __builtin_prefetch(keys + i);
        __builtin_prefetch(values + i);
    }
}

INLINE void attend(const Attention *a, long item, long dim, int type) {
    const long page = a->page, group = a->heads / a->kv_heads, stride = a->kv_heads * dim;
    const long first_kv = item % a->splits * a->kv_per_item;
    const int64_t *query = a->queries + item / a->splits * 3;
    const long token = query[0], seen = query[2];
    const long last_kv = first_kv + a->kv_per_item, head = first_kv * group;
    const long heads = a->kv_per_item * group;
    const long from = a->window && seen > a->window ? seen - a->window : 0;
    float q[heads * dim], sums[heads * dim], highest[heads], total[heads];
    uint16_t pairs[heads * dim]; /* for the matrix unit */
    const long place = token * a->q_stride + head * dim;
    for (long i = 0; i < heads * dim; i++) q[i] = get(a->q, place + i, type), sums[i] = 0.0f;
#ifdef __AMX_BF16__
    if (uses_unit(a, dim, type)) {
        shape_tiles(page, group);
        for (long h = 0; h < heads; h += group)
            pair_up((const uint16_t *)a->q + place + h * dim, pairs + h * dim, group, dim);
    }
#endif
    for (long h = 0; h < heads; h++) highest[h] = -INFINITY, total[h] = 0.0f;
    for (long start = from / page * page; start < seen; start += page) {
        const long block = a->tables[query[1] * a->table_width + start / page];
        if (start + page < seen)
            fetch_page(a, a->tables[query[1] * a->table_width + start / page + 1], dim, type);
        const long first = start < from ? from - start : 0;
        const long count = (seen - start < page ? seen - start : page) - first;
        for (long kv = first_kv; kv < last_kv; kv++) {
            const long in_cache = block * page * stride + kv * dim;
            const long h = (kv - first_kv) * group;
            Part part = {at(a->keys, in_cache, type), at(a->values, in_cache, type), first, count,
                         start + first + 1 - seen};
            attend_part(a, &part, a->slopes ? a->slopes + head + h : NULL, q + h * dim,
                        pairs + h * dim, sums + h * dim, highest + h, total + h, dim, type);
        }
    }
    for (long h = 0; h < heads; h++)
        for (long i = 0; i < dim; i++)
            put(a->out, (token * a->heads + head + h) * dim + i, sums[h * dim + i] / total[h], type);
#ifdef __AMX_BF16__
    if (uses_unit(a, dim, type)) _tile_release();
#endif
}

/* Most models' heads have one of two sizes; loops of a known length are twice as fast. */
static void attend_item(void *data, long item) {
    const Attention *a = data;
    if (a->dim == 64) BY_TYPE(a->type, attend, a, item, 64);
    else if (a->dim == 128) BY_TYPE(a->type, attend, a, item, 128);
    else BY_TYPE(a->type, attend, a, item, a->dim);
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
EXPORT void paged_attention(Attention *a, int threads) {
    store(a);
    long seen = 0;
    for (long i = 0; i < a->count; i++) seen += a->queries[3 * i + 2];
    long most = seen * a->heads * a->dim / ELEMENTS_PER_THREAD;
    if (most < threads) threads = most > 1 ? (int)most : 1;
    /* All heads of a page lie side by side: read together, they are one stream of memory. */
    a->kv_per_item = a->count < threads ? 1 : a->kv_heads;
    a->splits = a->kv_heads / a->kv_per_item;
    each_item(attend_item, a, a->count * a->splits, threads);
}
