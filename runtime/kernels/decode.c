/* Attention of single queries over the pages of the KV cache.

An item is one query with all its heads, or with those of one KV head. Each head is a lane: scores
lie by key, then head, and the softmax is taken along the way, `KEYS` keys at a time. The heads that
share a KV head are done together, so that each key and value is read once for all of them. */
#include "attention.h"

/* A key is read once for `HEADS` heads, a value for `MIXED`, with sums of `TOGETHER` vectors each;
those of a single head are `WIDTH`. */
#ifdef __AVX512F__
enum { HEADS = 4, MIXED = 3, TOGETHER = 4, WIDTH = 4 };
#else
enum { HEADS = 3, MIXED = 3, TOGETHER = 2, WIDTH = 4 };
#endif

typedef struct {
    const Attention *a;
    long token, sequence, seen, first_kv; /* `seen` keys, and the item's first KV head */
    long group, vectors;                  /* heads of a KV head; vectors of a key's scores */
} Item;

/* Keys that are attended at once, and where they lie. */
typedef struct {
    long start, count, places[KEYS];
} Part;

static Item find_item(const Attention *a, long item) {
    const int64_t *query = a->decodes + item / a->splits * 3;
    const long group = a->heads / a->kv_heads;
    return (Item){.a = a, .token = query[0], .sequence = query[1], .seen = query[2],
                  .first_kv = item % a->splits * a->kv_per_item, .group = group,
                  .vectors = (a->kv_per_item * group + LANES - 1) / LANES};
}

/* The first key that is seen, or one before it in its page. */
INLINE long first_key(const Item *item) {
    const Attention *a = item->a;
    return a->window && item->seen > a->window ? (item->seen - a->window) / a->page * a->page : 0;
}

INLINE void find_part(const Item *item, long start, Part *part) {
    const long left = item->seen - start;
    part->start = start, part->count = left < KEYS ? left : KEYS;
    find_keys(item->a, item->sequence, start, part->count, part->places);
}

/* Are a key's numbers multiplied by a query's as they are, two at a time? */
INLINE int has_pairs(long dim, int type) {
#ifdef __AVX512BF16__
    return type == BFLOAT16 && dim % 32 == 0;
#else
    return (void)dim, (void)type, 0;
#endif
}

#ifdef __AVX512BF16__
INLINE void dot_pairs(const uint16_t *q, const uint16_t *key, const int heads, float *scores,
                      long dim) {
    Lanes sums[HEADS];
    for (int h = 0; h < heads; h++) sums[h] = (Lanes){0};
    for (long i = 0; i < dim; i += 32) {
        const __m512bh numbers = (__m512bh)_mm512_loadu_si512(key + i);
        for (int h = 0; h < heads; h++) {
            const __m512bh of_query = (__m512bh)_mm512_loadu_si512(q + h * dim + i);
            sums[h] = (Lanes)_mm512_dpbf16_ps((__m512)sums[h], numbers, of_query);
        }
    }
    add_up_each(sums, heads, scores);
}
#endif

/* The products of some heads' queries with a key, which is read once for them. Queries are float32,
or as they came where there are pairs. */
INLINE void dot(const void *queries, const void *key, const int heads, float *scores, long dim,
                int type) {
#ifdef __AVX512BF16__
    if (has_pairs(dim, type)) return dot_pairs(queries, key, heads, scores, dim);
#endif
    const float *q = queries;
    Lanes sums[HEADS], numbers, of_query;
    long i = 0;
    for (int h = 0; h < heads; h++) sums[h] = (Lanes){0};
    for (; i + LANES <= dim; i += LANES) {
        load(&numbers, at(key, i, type), type);
        for (int h = 0; h < heads; h++) {
            load(&of_query, q + h * dim + i, FLOAT32);
            sums[h] += numbers * of_query;
        }
    }
    add_up_each(sums, heads, scores);
    for (; i < dim; i++)
        for (int h = 0; h < heads; h++) scores[h] += q[h * dim + i] * get(key, i, type);
}

/* Has numbers on their way, `count` of a row in memory. */
INLINE void fetch(const void *from, long index, long count, int type) {
    const char *first = at(from, index, type), *end = at(from, index + count, type);
    for (; first < end; first += 64) __builtin_prefetch(first, 0, 2);
}

#define DOT(count)                                                                             \
    case count:                                                                                \
        dot(query, key, count, scores, dim, type);                                             \
        break

/* The products of a group's queries with its key. */
INLINE void score_group(const void *q, const void *key, long group, float *scores, long dim,
                        int type) {
    const int query_type = has_pairs(dim, type) ? BFLOAT16 : FLOAT32;
    for (long h = 0; h < group; h += HEADS, scores += HEADS) {
        const void *query = at(q, h * dim, query_type);
        switch (group - h < HEADS ? group - h : HEADS) {
            DOT(1);
            DOT(2);
            DOT(3);
#ifdef __AVX512F__
            DOT(4);
#endif
        }
    }
}

/* scores[t, h] = query h times key t. Meanwhile the values come from memory. */
INLINE void score(const Item *item, const void *q, const long *places, long count, Lanes *scores,
                  long dim, int type) {
    const Attention *a = item->a;
    const long group = item->group;
    const int query_type = has_pairs(dim, type) ? BFLOAT16 : FLOAT32;
    for (long t = 0; t < count; t++) {
        const long place = places[t] + item->first_kv * dim;
        fetch(a->values, place, a->kv_per_item * dim, type);
        for (long kv = 0; kv < a->kv_per_item; kv++)
            score_group(at(q, kv * group * dim, query_type), at(a->keys, place + kv * dim, type),
                        group, (float *)(scores + t * item->vectors) + kv * group, dim, type);
    }
}

#ifdef __AMX_BF16__
/* The matrix unit multiplies a page's keys, as they lie in memory, by the queries of their group,
which are pairs of numbers: [dim / 2][group][2]. */
INLINE int uses_unit(const Attention *a, long dim, int type) {
    return type == BFLOAT16 && dim % 32 == 0 && a->page % 16 == 0 && a->heads / a->kv_heads <= 16;
}

/* Tile 0 holds scores, 1 keys, 2 queries. */
static void shape_tiles(long group) {
    TileShapes shapes = {.palette = 1, .rows = {16, 16, 16}};
    shapes.row_bytes[0] = shapes.row_bytes[2] = (uint16_t)(group * 4);
    shapes.row_bytes[1] = 64;
    _tile_loadconfig(&shapes);
}

INLINE void pair_up(const uint16_t *q, uint16_t *pairs, long heads, long group, long dim) {
    for (long h = 0; h < heads; h++)
        for (long i = 0; i < dim; i++)
            pairs[(h - h % group) * dim + (i / 2 * group + h % group) * 2 + i % 2] = q[h * dim + i];
}

/* Beyond the last key of a page it reads what is nobody's, and nobody reads those scores. */
INLINE void score_by_unit(const Item *item, const uint16_t *pairs, const long *places, long count,
                          Lanes *scores, long dim) {
    const Attention *a = item->a;
    for (long t = 0; t < count; t += 16)
        for (long kv = 0; kv < a->kv_per_item; kv++) {
            const long kv_at = (item->first_kv + kv) * dim, place = places[t] + kv_at;
            for (long of = t; of < t + 16 && of < count; of++)
                fetch(a->values, places[of] + kv_at, dim, BFLOAT16);
            const uint16_t *keys = (const uint16_t *)a->keys + place;
            _tile_zero(0);
            for (long i = 0; i < dim; i += 32) {
                _tile_loadd(1, keys + i, a->kv_heads * dim * 2);
                _tile_loadd(2, pairs + (kv * dim + i) * item->group, item->group * 4);
                _tile_dpbf16ps(0, 1, 2);
            }
            float *out = (float *)(scores + t * item->vectors) + kv * item->group;
            _tile_stored(0, out, item->vectors * sizeof *scores);
        }
}
#endif

/* What some heads of a group add up: `sums` [heads, dim]; `weights` are [count, vectors] Lanes. */
typedef struct {
    const void *values;
    const long *places;
    const void *next_keys; /* to have on their way meanwhile: as many; NULL: none */
    const long *next_places;
    const float *weights;
    float *sums;
    long count, stride;
} Mix;

/* Adds to `width` vectors of some heads' sums, from number `i` on; each value is read once. */
INLINE void mix_some(const Mix *m, const int heads, const int width, long i, long dim, int type) {
    Lanes sums[MIXED][WIDTH], value;
    for (int h = 0; h < heads; h++)
        for (int w = 0; w < width; w++)
            load(&sums[h][w], m->sums + h * dim + i + w * LANES, FLOAT32);
    for (long t = 0; t < m->count; t++) {
        if (m->next_keys) fetch(m->next_keys, m->next_places[t] + i, width * LANES, type);
        for (int w = 0; w < width; w++) {
            load(&value, at(m->values, m->places[t] + i + w * LANES, type), type);
            for (int h = 0; h < heads; h++) sums[h][w] += value * m->weights[t * m->stride + h];
        }
    }
    for (int h = 0; h < heads; h++)
        memcpy(m->sums + h * dim + i, sums[h], width * sizeof *sums[h]);
}

INLINE void mix_heads(const Mix *m, const int heads, const int width, long dim, int type) {
    long i = 0;
    for (; i + width * LANES <= dim; i += width * LANES) mix_some(m, heads, width, i, dim, type);
    for (; i + LANES <= dim; i += LANES) mix_some(m, heads, 1, i, dim, type);
    for (; i < dim; i++)
        for (int h = 0; h < heads; h++)
            for (long t = 0; t < m->count; t++)
                m->sums[h * dim + i] +=
                    m->weights[t * m->stride + h] * get(m->values, m->places[t] + i, type);
}

INLINE void mix(const Item *item, const Part *part, const Part *next, const Lanes *weights,
                float *sums, long dim, int type) {
    const Attention *a = item->a;
    for (long kv = 0, h = 0; kv < a->kv_per_item; kv++) {
        const long place = (item->first_kv + kv) * dim, end = h + item->group;
        Mix m = {at(a->values, place, type), part->places, at(a->keys, place, type), next->places,
                 .count = part->count, .stride = item->vectors * LANES};
        while (h < end) {
            m.weights = (const float *)weights + h, m.sums = sums + h * dim;
            if (end - h >= MIXED) mix_heads(&m, MIXED, TOGETHER, dim, type), h += MIXED;
            else mix_heads(&m, 1, WIDTH, dim, type), h++;
            m.next_keys = NULL;
        }
    }
}

/* The keys after these: of the same query, else the first ones of the next item, else none. Its
places are as many as this part's at least. */
INLINE void find_next(const Item *item, const Item *later, const Part *part, Part *next) {
    const long start = part->start + part->count;
    next->count = 0;
    if (start < item->seen) find_part(item, start, next);
    else if (later) find_part(later, first_key(later), next);
    for (long t = next->count; t < part->count; t++) next->places[t] = part->places[t];
}

INLINE void fetch_keys(const Item *item, const Part *part, long from, long dim, int type) {
    const long place = item->first_kv * dim, width = item->a->kv_per_item * dim;
    for (long t = from; t < part->count; t++)
        fetch(item->a->keys, part->places[t] + place, width, type);
}

/* Pages lie apart, so the processor cannot guess the next: it is told in time, also of the first
keys of the item that comes `later`. */
INLINE void attend(const Item *item, const Item *later, long dim, int type) {
    const Attention *a = item->a;
    const long heads = a->kv_per_item * item->group, head = item->first_kv * item->group;
    const long place = item->token * a->q_stride + head * dim;
    float q[heads * dim], sums[heads * dim];
    Lanes scores[KEYS * item->vectors], fades[item->vectors];
    Softmax softmax[item->vectors];
    Part parts[2], *part = parts, *next = parts + 1;
    find_part(item, first_key(item), part);
    fetch_keys(item, part, 0, dim, type);
    for (long i = 0; i < heads * dim; i++)
        q[i] = get(a->q, place + i, type) * a->scale, sums[i] = 0.0f;
    const void *queries = has_pairs(dim, type) ? at(a->q, place, type) : q;
    memset(scores, 0, sizeof scores); /* some lanes may be no head's */
    for (long v = 0; v < item->vectors; v++) start_softmax(softmax + v);
    for (long h = 0; h < heads; h++)
        start_lane(softmax + h / LANES, h % LANES, item->seen, a->window,
                   a->slopes ? a->slopes[head + h] : 0.0f);
#ifdef __AMX_BF16__
    uint16_t pairs[heads * dim];
    if (uses_unit(a, dim, type)) {
        shape_tiles(item->group);
        pair_up((const uint16_t *)a->q + place, pairs, heads, item->group, dim);
    }
#endif
    for (int is_last = 0; !is_last;) {
        const long start = part->start, count = part->count;
        is_last = start + count == item->seen;
        find_next(item, later, part, next);
#ifdef __AMX_BF16__
        if (uses_unit(a, dim, type)) {
            score_by_unit(item, pairs, part->places, count, scores, dim);
        } else
#endif
            score(item, queries, part->places, count, scores, dim, type);
        if (has_pairs(dim, type))
            for (long i = 0; i < count * item->vectors; i++) scores[i] *= a->scale;
        for (long v = 0; v < item->vectors; v++) {
            if (a->slopes || start < softmax[v].first[0])
                bias_scores(softmax + v, scores + v, item->vectors, start, count);
            soften(softmax + v, scores + v, item->vectors, count, fades + v);
        }
        for (long h = 0; h < heads; h++)
            for (long i = 0; i < dim; i++) sums[h * dim + i] *= ((const float *)fades)[h];
        mix(item, part, next, scores, sums, dim, type);
        fetch_keys(item, next, count, dim, type);
        Part *done = part;
        part = next, next = done;
    }
    for (long h = 0; h < heads; h++) {
        const float whole = 1.0f / softmax[h / LANES].total[h % LANES];
        const long to = (item->token * a->heads + head + h) * dim;
        for (long i = 0; i < dim; i++) put(a->out, to + i, sums[h * dim + i] * whole, type);
    }
#ifdef __AMX_BF16__
    if (uses_unit(a, dim, type)) _tile_release();
#endif
}

/* Most models' heads have one of two sizes; loops of a known length are twice as fast. */
static void attend_one(const Item *item, const Item *later) {
    const Attention *a = item->a;
    if (a->dim == 64) BY_TYPE(a->type, attend, item, later, 64);
    else if (a->dim == 128) BY_TYPE(a->type, attend, item, later, 128);
    else BY_TYPE(a->type, attend, item, later, a->dim);
}

/* The item after it most likely is the same thread's, unless heads of one query are shared out. */
void attend_decode(const Attention *a, long index) {
    const int has_later = a->splits == 1 && index + 1 < a->count;
    const Item item = find_item(a, index), later = find_item(a, has_later ? index + 1 : index);
    attend_one(&item, has_later ? &later : NULL);
}
