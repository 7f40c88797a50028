/* Causal attention of sequences that lie one after the other, and its gradients, for training.

An item is a sequence with one query head. Its queries go in blocks of `BLOCK`, the keys that they
see too, so no more than a block's scores are in memory: the gradient makes them anew. Scores lie by
key, then query, one query to a lane. Source: Dao et al., "FlashAttention" (2022), algorithms 1 and
4. */
#include "kernels.h"
#include "softmax.h"
#include "team.h"

enum { BLOCK = 48, ROWS = 6, COLUMNS = 2, TILES = BLOCK / LANES };

/* A sequence in one head's part of the tensors. */
typedef struct {
    const CausalAttention *a;
    long tokens, query, key; /* how many it has; its first row among queries, and among keys */
    float slope;
} Item;

static Item find_item(const CausalAttention *a, long index) {
    const int64_t *ends = a->ends + index / a->heads;
    const long first = ends == a->ends ? 0 : ends[-1], head = index % a->heads;
    return (Item){.a = a, .tokens = ends[0] - first, .query = head * a->tokens + first,
                  .key = head / (a->heads / a->kv_heads) * a->tokens + first,
                  .slope = a->slopes ? a->slopes[head] : 0.0f};
}

/* Some queries that see the same keys, but for the last few. */
typedef struct {
    long first, count, tiles;
    Softmax softmax[TILES];
} Queries;

static long smaller(long a, long b) { return a < b ? a : b; }

static void start(const Item *item, long first, Queries *queries) {
    queries->first = first;
    queries->count = smaller(BLOCK, item->tokens - first);
    queries->tiles = (queries->count + LANES - 1) / LANES;
    for (long t = 0; t < queries->tiles * LANES; t++) {
        Softmax *softmax = queries->softmax + t / LANES;
        if (t % LANES == 0) start_softmax(softmax);
        if (t < queries->count)
            start_lane(softmax, t % LANES, first + t + 1, item->a->window, item->slope);
    }
}

/* The first key that a query sees, as the first of a block. */
static long first_seen(const Item *item, long query) {
    const long window = item->a->window;
    return window && query >= window ? (query - window + 1) / BLOCK * BLOCK : 0;
}

/* turned[i][t] = rows[t][i] * scale, and zeros from `count` on. */
static void turn_rows(const float *rows, long count, long width, float scale, float *turned) {
    memset(turned, 0, BLOCK * width * sizeof *turned);
    for (long t = 0; t < count; t++)
        for (long i = 0; i < width; i++) turned[i * BLOCK + t] = rows[t * width + i] * scale;
}

/* A matrix of factors: the one of `row` and `step` is numbers[row * by_row + step * by_step]. */
typedef struct {
    const float *numbers;
    long by_row, by_step;
} Factors;

INLINE void add_some(Lanes *out, Factors f, const Lanes *vectors, long steps, long stride,
                     const int rows, const int columns) {
    Lanes sums[ROWS][COLUMNS];
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < columns; c++) sums[r][c] = out[r * stride + c];
    for (long step = 0; step < steps; step++, vectors += stride, f.numbers += f.by_step)
        for (int r = 0; r < rows; r++)
            for (int c = 0; c < columns; c++) sums[r][c] += f.numbers[r * f.by_row] * vectors[c];
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < columns; c++) out[r * stride + c] = sums[r][c];
}

INLINE void add_columns(Lanes *out, long rows, Factors f, const Lanes *vectors, long steps,
                        long stride, const int columns) {
    long r = 0;
    for (; r + ROWS <= rows; r += ROWS, out += ROWS * stride, f.numbers += ROWS * f.by_row)
        add_some(out, f, vectors, steps, stride, ROWS, columns);
    for (; r < rows; r++, out += stride, f.numbers += f.by_row)
        add_some(out, f, vectors, steps, stride, 1, columns);
}

/* out[row] += the sum over all steps of a factor times vectors[step]: `columns` of rows that are
`stride` vectors apart. */
static void add_products(float *out, long rows, Factors f, const float *vectors, long steps,
                         long columns, long stride) {
    Lanes *to = (Lanes *)out;
    const Lanes *from = (const Lanes *)vectors;
    long c = 0;
    for (; c + COLUMNS <= columns; c += COLUMNS)
        add_columns(to + c, rows, f, from + c, steps, stride, COLUMNS);
    if (c < columns) add_columns(to + c, rows, f, from + c, steps, stride, 1);
}

/* scores[key][query], with those that a query does not see at minus infinity. */
static void score(const Item *item, const Queries *queries, const float *turned, long key,
                  long count, Lanes *scores) {
    const CausalAttention *a = item->a;
    const Factors keys = {a->k + (item->key + key) * a->width, a->width, 1};
    memset(scores, 0, count * TILES * sizeof *scores);
    add_products((float *)scores, count, keys, turned, a->width, queries->tiles, TILES);
    const long last = queries->first + queries->tiles * LANES - 1;
    if (key + count <= queries->first + 1 && last < queries->first + queries->count && !a->slopes &&
        (!a->window || key + a->window > last))
        return; /* all see all */
    for (long tile = 0; tile < queries->tiles; tile++)
        bias_scores(queries->softmax + tile, scores + tile, TILES, key, count);
}

static void attend_from(const Item *item, Queries *queries) {
    const CausalAttention *a = item->a;
    const long row = item->query + queries->first, width = a->width;
    const long end = queries->first + queries->count;
    float turned[BLOCK * width] ALIGNED;
    Lanes scores[BLOCK * TILES];
    turn_rows(a->q + row * width, queries->count, width, a->scale, turned);
    float *out = a->out + row * width;
    memset(out, 0, queries->count * width * sizeof *out);
    for (long key = first_seen(item, queries->first); key < end; key += BLOCK) {
        const long count = smaller(BLOCK, end - key);
        score(item, queries, turned, key, count, scores);
        for (long tile = 0; tile < queries->tiles; tile++) {
            Lanes fade;
            soften(queries->softmax + tile, scores + tile, TILES, count, &fade);
            for (long t = tile * LANES; t < queries->count && t < (tile + 1) * LANES; t++)
                for (long i = 0; i < width; i++) out[t * width + i] *= fade[t % LANES];
        }
        add_products(out, queries->count, (Factors){(float *)scores, 1, BLOCK},
                     a->v + (item->key + key) * width, count, width / LANES, width / LANES);
    }
    for (long t = 0; t < queries->count; t++) {
        const Softmax *softmax = queries->softmax + t / LANES;
        const float total = softmax->total[t % LANES];
        for (long i = 0; i < width; i++) out[t * width + i] /= total;
        a->log_totals[row + t] = softmax->highest[t % LANES] + logf(total);
    }
}

/* Adds what these queries give to the gradients of all that they see. */
static void differentiate_from(const Item *item, Queries *queries) {
    const CausalAttention *a = item->a;
    const long row = item->query + queries->first, width = a->width, columns = width / LANES;
    const long end = queries->first + queries->count;
    const float *q = a->q + row * width, *d_out = a->d_out + row * width;
    float turned[BLOCK * width] ALIGNED, turned_d[BLOCK * width] ALIGNED;
    float log_totals[BLOCK] ALIGNED = {0}, means[BLOCK] ALIGNED = {0};
    Lanes weights[BLOCK * TILES], d_scores[BLOCK * TILES];
    turn_rows(q, queries->count, width, a->scale, turned);
    turn_rows(d_out, queries->count, width, 1.0f, turned_d);
    memcpy(log_totals, a->log_totals + row, queries->count * sizeof *log_totals);
    for (long t = 0; t < queries->count; t++)
        for (long i = 0; i < width; i++)
            means[t] += a->out[(row + t) * width + i] * d_out[t * width + i];
    for (long key = first_seen(item, queries->first); key < end; key += BLOCK) {
        const long count = smaller(BLOCK, end - key);
        const float *k = a->k + (item->key + key) * width, *v = a->v + (item->key + key) * width;
        /* Keys and values have gradients by query head. */
        float *d_k = a->d_k + (item->query + key) * width;
        float *d_v = a->d_v + (item->query + key) * width;
        score(item, queries, turned, key, count, weights);
        memset(d_scores, 0, count * TILES * sizeof *d_scores);
        add_products((float *)d_scores, count, (Factors){v, width, 1}, turned_d, width,
                     queries->tiles, TILES);
        for (long t = 0; t < count; t++)
            for (long tile = 0; tile < queries->tiles; tile++) {
                Lanes *weight = weights + t * TILES + tile, *d_score = d_scores + t * TILES + tile;
                *weight -= ((Lanes *)log_totals)[tile];
                exponentials(weight);
                *d_score = *weight * (*d_score - ((Lanes *)means)[tile]) * a->scale;
            }
        const Factors by_key = {(float *)weights, BLOCK, 1};
        const Factors d_by_key = {(float *)d_scores, BLOCK, 1};
        const Factors d_by_query = {(float *)d_scores, 1, BLOCK};
        add_products(d_v, count, by_key, d_out, queries->count, columns, columns);
        add_products(d_k, count, d_by_key, q, queries->count, columns, columns);
        add_products(a->d_q + row * width, queries->count, d_by_query, k, count, columns, columns);
    }
}

INLINE void each_block(const CausalAttention *a, long index,
                       void (*work)(const Item *item, Queries *queries)) {
    const Item item = find_item(a, index);
    Queries queries;
    for (long first = 0; first < item.tokens; first += BLOCK) {
        start(&item, first, &queries);
        work(&item, &queries);
    }
}

static void attend_item(void *data, long index) { each_block(data, index, attend_from); }

static void differentiate_item(void *data, long index) {
    each_block(data, index, differentiate_from);
}

EXPORT void causal_attention(CausalAttention *a, int threads) {
    each_item(attend_item, a, a->sequences * a->heads, threads);
}

/* Adds to `d_q`, `d_k` and `d_v`. */
EXPORT void causal_attention_gradients(CausalAttention *a, int threads) {
    each_item(differentiate_item, a, a->sequences * a->heads, threads);
}
