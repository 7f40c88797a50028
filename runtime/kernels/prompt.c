/* Attention of a prompt's queries over the pages of the KV cache.

An item is some queries of one sequence with the query heads that share one KV head. Each of them
is a lane: scores lie by key, then lane, and the softmax is taken along the way, `KEYS` keys at a
time. Source: Dao et al., "FlashAttention" (2022), algorithm 1. */
#include "attention.h"

enum { ITEM_LANES = 128 };

typedef struct {
    const Attention *a;
    long sequence, kv, token, queries; /* `token` is the first query's */
    long seen;                         /* how many keys it sees */
} Item;

static long queries_per_item(const Attention *a) {
    const long group = a->heads / a->kv_heads;
    return group < ITEM_LANES ? ITEM_LANES / group : 1;
}

static long items_of(const Attention *a, long prompt) {
    const long most = queries_per_item(a);
    return (a->prompts[4 * prompt + 3] + most - 1) / most * a->kv_heads;
}

long count_prompt_items(const Attention *a) {
    long items = 0;
    for (long i = 0; i < a->prompt_count; i++) items += items_of(a, i);
    return items;
}

static Item find_item(const Attention *a, long item) {
    const int64_t *prompt = a->prompts;
    for (long i = 0; item >= items_of(a, i); i++, prompt += 4) item -= items_of(a, i);
    const long most = queries_per_item(a), before = item / a->kv_heads * most;
    const long left = prompt[3] - before;
    return (Item){.a = a, .sequence = prompt[1], .kv = item % a->kv_heads,
                  .token = prompt[0] + before, .queries = left < most ? left : most,
                  .seen = prompt[2] + before};
}

static void start(const Item *item, long lane, Softmax *s) {
    const Attention *a = item->a;
    const long group = a->heads / a->kv_heads;
    start_softmax(s);
    for (int i = 0; i < LANES && (lane + i) / group < item->queries; i++) {
        const float slope = a->slopes ? a->slopes[item->kv * group + (lane + i) % group] : 0.0f;
        start_lane(s, i, item->seen + (lane + i) / group, a->window, slope);
    }
}

/* Do all queries of the item see all these keys, at no cost of distance? */
static int see_all(const Item *item, long start, long count) {
    const long last = item->seen + item->queries - 1, window = item->a->window;
    return !item->a->slopes && start + count <= item->seen && (!window || start >= last - window);
}

/* The item's part of `count` rows of the cache, as float32. */
INLINE void widen_rows(const Item *item, const void *cache, const long *places, long count,
                       float *out, long dim, int type) {
    for (long t = 0; t < count; t++) {
        const void *row = at(cache, places[t] + item->kv * dim, type);
        for (long i = 0; i < dim; i++) out[t * dim + i] = get(row, i, type);
    }
}

/* So many sums are added to in turn that none has to wait for itself. */
enum { AT_ONCE = 8 };

/* A query's numbers are read once for `keys_at_once` keys. */
INLINE void score_some(const Lanes *q, const float *keys, const int keys_at_once, Lanes *scores,
                       long dim) {
    Lanes sums[AT_ONCE];
    for (int t = 0; t < keys_at_once; t++) sums[t] = (Lanes){0};
    for (long i = 0; i < dim; i++)
        for (int t = 0; t < keys_at_once; t++) sums[t] += q[i] * keys[t * dim + i];
    for (int t = 0; t < keys_at_once; t++) scores[t] = sums[t];
}

INLINE void score(const Lanes *q, const float *keys, long count, Lanes *scores, long dim) {
    long t = 0;
    for (; t + AT_ONCE <= count; t += AT_ONCE)
        score_some(q, keys + t * dim, AT_ONCE, scores + t, dim);
    for (; t < count; t++) score_some(q, keys + t * dim, 1, scores + t, dim);
}

/* Weights are read once for `numbers` of each value. */
INLINE void mix_some(const Lanes *weights, const float *values, const int numbers, long count,
                     Lanes *sums, long dim) {
    Lanes mixed[AT_ONCE];
    for (int i = 0; i < numbers; i++) mixed[i] = sums[i];
    for (long t = 0; t < count; t++)
        for (int i = 0; i < numbers; i++) mixed[i] += weights[t] * values[t * dim + i];
    for (int i = 0; i < numbers; i++) sums[i] = mixed[i];
}

INLINE void mix(const Lanes *weights, const float *values, long count, Lanes *sums, long dim) {
    long i = 0;
    for (; i + AT_ONCE <= dim; i += AT_ONCE)
        mix_some(weights, values + i, AT_ONCE, count, sums + i, dim);
    for (; i < dim; i++) mix_some(weights, values + i, 1, count, sums + i, dim);
}

static const void *query_of(const Item *item, long lane) {
    const Attention *a = item->a;
    const long group = a->heads / a->kv_heads, head = item->kv * group + lane % group;
    return at(a->q, (item->token + lane / group) * a->q_stride + head * a->dim, a->type);
}

INLINE void attend(const Item *item, Softmax *softmax, Lanes *sums, long tiles, long from, long dim,
                   int type) {
    const Attention *a = item->a;
    const long lanes = item->queries * (a->heads / a->kv_heads);
    const long end = item->seen + item->queries - 1;
    Lanes q[tiles * dim], scores[KEYS], fade;
    float keys[KEYS * dim], values[KEYS * dim];
    long places[KEYS];
    memset(q, 0, sizeof q);
    for (long lane = 0; lane < lanes; lane++)
        for (long i = 0; i < dim; i++)
            q[lane / LANES * dim + i][lane % LANES] = get(query_of(item, lane), i, type) * a->scale;
    for (long start = from; start < end; start += KEYS) {
        const long count = end - start < KEYS ? end - start : KEYS;
        find_keys(a, item->sequence, start, count, places);
        widen_rows(item, a->keys, places, count, keys, dim, type);
        widen_rows(item, a->values, places, count, values, dim, type);
        for (long tile = 0; tile < tiles; tile++) {
            score(q + tile * dim, keys, count, scores, dim);
            if (!see_all(item, start, count)) bias_scores(softmax + tile, scores, 1, start, count);
            soften(softmax + tile, scores, 1, count, &fade);
            for (long i = 0; i < dim; i++) sums[tile * dim + i] *= fade;
            mix(scores, values, count, sums + tile * dim, dim);
        }
    }
}

#ifdef __AMX_BF16__
/* The matrix unit multiplies 16 rows by 16 lanes over 32 numbers. Keys are such rows as they lie;
queries and weights are its other operand, pairs of numbers by lane; values must be turned first,
once for all lanes of an item. */
enum { STEP = 32, TILE = 16 * 32 };

static int uses_unit(const Attention *a) {
    return a->type == BFLOAT16 && a->dim % STEP == 0 && a->page % 16 == 0;
}

static void shape_tiles(void) {
    TileShapes shapes = {.palette = 1};
    for (int i = 0; i < 8; i++) shapes.rows[i] = 16, shapes.row_bytes[i] = 64;
    _tile_loadconfig(&shapes);
}

/* Turns a square of 16 by 16 pairs: rows become columns. Each bit of a row's number changes places
with the same bit of a lane's. */
INLINE void turn(__m512i rows[16]) {
    const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i other = _mm512_set1_epi32(16); /* counts on from the first row into the second */
    for (int step = 1; step < 16; step *= 2) {
        const __m512i bit = _mm512_set1_epi32(step), swapped = _mm512_xor_si512(lanes, bit);
        const __mmask16 is_set = _mm512_test_epi32_mask(lanes, bit);
        const __m512i low = _mm512_mask_add_epi32(lanes, is_set, swapped, other);
        const __m512i high = _mm512_mask_add_epi32(swapped, is_set, lanes, other);
        for (int i = 0; i < 16; i++) {
            if (i & step) continue;
            const __m512i first = rows[i], second = rows[i + step];
            rows[i] = _mm512_permutex2var_epi32(first, low, second);
            rows[i + step] = _mm512_permutex2var_epi32(first, high, second);
        }
    }
}

/* Values as tiles of 16 numbers by 32 keys: [KEYS / 32][dim / 16][16][32]. Beyond the last key
stand zeros: what lies there is nobody's, and zero times NaN would count. */
static void turn_values(const Item *item, const long *places, long count, uint16_t *turned) {
    const Attention *a = item->a;
    const uint16_t *values = (const uint16_t *)a->values + item->kv * a->dim;
    const uint16_t zeros[16] = {0};
    for (long step = 0; step < count; step += STEP)
        for (long i = 0; i < a->dim; i += 16, turned += TILE) {
            __m512i rows[16];
            for (long t = 0; t < STEP; t++) {
                const uint16_t *row = step + t < count ? values + places[step + t] + i : zeros;
                const __m512i half = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)row));
                if (t % 2 == 0) rows[t / 2] = half;
                else rows[t / 2] = _mm512_or_si512(rows[t / 2], _mm512_slli_epi32(half, 16));
            }
            turn(rows);
            for (int row = 0; row < 16; row++) _mm512_store_si512(turned + row * STEP, rows[row]);
        }
}

/* pairs[i / 2, lane, i % 2] = the lane's query, zero where there is none. */
static void pair_queries(const Item *item, long tiles, uint16_t *pairs) {
    const long dim = item->a->dim, lanes = item->queries * (item->a->heads / item->a->kv_heads);
    memset(pairs, 0, tiles * LANES * dim * sizeof *pairs);
    for (long lane = 0; lane < lanes; lane++) {
        const uint16_t *q = query_of(item, lane);
        uint16_t *tile = pairs + lane / LANES * LANES * dim + lane % LANES * 2;
        for (long i = 0; i < dim; i++) tile[i / 2 * 2 * LANES + i % 2] = q[i];
    }
}

/* pairs[t / 2, lane, t % 2] = a weight, zero beyond the last key. */
static void pair_weights(Lanes *weights, long count, uint16_t *pairs) {
    uint16_t lane_by_lane[32];
    for (int i = 0; i < 32; i++) lane_by_lane[i] = (uint16_t)(i / 2 + i % 2 * 16);
    const __m512i order = _mm512_loadu_si512(lane_by_lane);
    for (long t = count; t % STEP; t++) weights[t] = (Lanes){0};
    for (long t = 0; t < (count + STEP - 1) / STEP * STEP; t += 2) {
        const __m512 first = (__m512)weights[t], second = (__m512)weights[t + 1];
        const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh(second, first);
        _mm512_store_si512(pairs + t * LANES, _mm512_permutexvar_epi16(order, halves));
    }
}

static void score_by_unit(const Item *item, const uint16_t *q, const long *places, long count,
                          Lanes *scores) {
    const Attention *a = item->a;
    for (long t = 0; t < count; t += 16) {
        const uint16_t *keys = (const uint16_t *)a->keys + places[t] + item->kv * a->dim;
        _tile_zero(0);
        for (long i = 0; i < a->dim; i += STEP) {
            _tile_loadd(1, keys + i, a->kv_heads * a->dim * 2);
            _tile_loadd(2, q + i * LANES, 64);
            _tile_dpbf16ps(0, 1, 2);
        }
        _tile_stored(0, scores + t, 64);
    }
    for (long t = 0; t < count; t++) scores[t] *= a->scale;
}

static void mix_by_unit(const uint16_t *weights, const uint16_t *turned, long count, Lanes *sums,
                        long dim) {
    for (long i = 0; i < dim; i += 32) {
        _tile_loadd(0, sums + i, 64);
        _tile_loadd(1, sums + i + 16, 64);
        for (long t = 0; t < count; t += STEP) {
            const uint16_t *values = turned + (t * dim + i * STEP);
            _tile_loadd(2, values, 64);
            _tile_loadd(3, values + TILE, 64);
            _tile_loadd(4, weights + t * LANES, 64);
            _tile_dpbf16ps(0, 2, 4);
            _tile_dpbf16ps(1, 3, 4);
        }
        _tile_stored(0, sums + i, 64);
        _tile_stored(1, sums + i + 16, 64);
    }
}

static void attend_by_unit(const Item *item, Softmax *softmax, Lanes *sums, long tiles, long from) {
    const long dim = item->a->dim, end = item->seen + item->queries - 1;
    uint16_t q[tiles * LANES * dim] ALIGNED, turned[KEYS * dim] ALIGNED;
    uint16_t weights[KEYS * LANES] ALIGNED;
    Lanes scores[KEYS], fade;
    long places[KEYS];
    shape_tiles();
    pair_queries(item, tiles, q);
    for (long start = from; start < end; start += KEYS) {
        const long count = end - start < KEYS ? end - start : KEYS;
        find_keys(item->a, item->sequence, start, count, places);
        turn_values(item, places, count, turned);
        for (long tile = 0; tile < tiles; tile++) {
            score_by_unit(item, q + tile * LANES * dim, places, count, scores);
            if (!see_all(item, start, count)) bias_scores(softmax + tile, scores, 1, start, count);
            soften(softmax + tile, scores, 1, count, &fade);
            pair_weights(scores, count, weights);
            for (long i = 0; i < dim; i++) sums[tile * dim + i] *= fade;
            mix_by_unit(weights, turned, count, sums + tile * dim, dim);
        }
    }
    _tile_release();
}
#endif

static void attend_by_type(const Item *item, Softmax *softmax, Lanes *sums, long tiles, long from) {
    BY_TYPE(item->a->type, attend, item, softmax, sums, tiles, from, item->a->dim);
}

void attend_prompt(const Attention *a, long index) {
    const Item item = find_item(a, index);
    const long dim = a->dim, lanes = item.queries * (a->heads / a->kv_heads);
    const long tiles = (lanes + LANES - 1) / LANES;
    /* A window's first keys may lie anywhere: whole pages are what the matrix unit reads. */
    const long from = a->window && item.seen > a->window
        ? (item.seen - a->window) / a->page * a->page : 0;
    Softmax softmax[tiles];
    Lanes sums[tiles * dim];
    memset(sums, 0, sizeof sums);
    for (long tile = 0; tile < tiles; tile++) start(&item, tile * LANES, softmax + tile);
#ifdef __AMX_BF16__
    if (uses_unit(a)) attend_by_unit(&item, softmax, sums, tiles, from);
    else
#endif
        attend_by_type(&item, softmax, sums, tiles, from);
    const long group = a->heads / a->kv_heads;
    for (long lane = 0; lane < lanes; lane++) {
        const long head = item.kv * group + lane % group, token = item.token + lane / group;
        const Lanes *sum = sums + lane / LANES * dim;
        const float whole = 1.0f / softmax[lane / LANES].total[lane % LANES];
        for (long i = 0; i < dim; i++)
            put(a->out, (token * a->heads + head) * dim + i, sum[i][lane % LANES] * whole, a->type);
    }
}
