/* Linear layers on vectors, for processors without a matrix unit.

Panels, made for that unit, suit vectors as well: they hold sixteen pairs of numbers side by side.
Where the processor has an instruction for bfloat16 (AVX512-BF16) it multiplies such pairs by one of
a token's. Elsewhere a bfloat16 number is the upper half of a float32 one, so a shift gives the
first numbers and a mask the second ones. Sums are float32. */
#include "kernels.h"
#include "lanes.h"
#include "team.h"
#include <stdlib.h>

#if defined(__AVX2__) && !defined(__AMX_BF16__)

enum { PAIRS = STEP / 2, AHEAD = 4096, VECTORS = TILE / LANES };
/* Tokens whose sums of a tile fit into the registers, and whose sums of two tiles do. */
#ifdef __AVX512F__
enum { MOST_TOKENS = 12, MOST_OF_TWO_TILES = 12 };
#else
enum { MOST_TOKENS = 6, MOST_OF_TWO_TILES = 2 };
#endif

#ifdef __AVX512BF16__
typedef uint16_t Input;

/* A pair of inputs' weights for sixteen outputs. */
typedef __m512bh Pair;

INLINE void load_pair(const void *from, Pair *pair) {
    *pair = (__m512bh)_mm512_loadu_si512(from);
}

INLINE void widen_pair(const void *from, Pair *pair) {
    const __m256i bytes = _mm256_loadu_si256(from);
    const __m512i low = _mm512_cvtepi8_epi32(_mm256_castsi256_si128(bytes));
    const __m512i high = _mm512_cvtepi8_epi32(_mm256_extracti128_si256(bytes, 1));
    *pair = _mm512_cvtne2ps_pbh(_mm512_cvtepi32_ps(high), _mm512_cvtepi32_ps(low));
}

INLINE void store_pair(void *to, const Pair *pair) { _mm512_store_si512(to, (__m512i)*pair); }

INLINE void add_products(Lanes *sums, const Pair *pair, const Input *x) {
    int32_t both;
    memcpy(&both, x, sizeof both);
    *sums = (Lanes)_mm512_dpbf16_ps((__m512)*sums, *pair, (__m512bh)_mm512_set1_epi32(both));
}
#else
typedef float Input;

/* A pair of inputs' weights for sixteen outputs: the first inputs', the second ones'. */
typedef struct {
    Lanes first[VECTORS], second[VECTORS];
} Pair;

INLINE void load_pair(const void *from, Pair *pair) {
    for (int i = 0; i < VECTORS; i++) {
        Integers both;
        memcpy(&both, (const Integers *)from + i, sizeof both);
        pair->first[i] = (Lanes)(both << 16);
        pair->second[i] = (Lanes)(both & (int32_t)0xffff0000);
    }
}

INLINE void widen_pair(const void *from, Pair *pair) {
    typedef int16_t Bytes __attribute__((vector_size(2 * LANES)));
    for (int i = 0; i < VECTORS; i++) {
        Bytes bytes;
        memcpy(&bytes, (const Bytes *)from + i, sizeof bytes);
        const Integers both = __builtin_convertvector(bytes, Integers);
        pair->first[i] = __builtin_convertvector(both << 24 >> 24, Lanes);
        pair->second[i] = __builtin_convertvector(both >> 8, Lanes);
    }
}

INLINE void store_pair(void *to, const Pair *pair) {
    for (int i = 0; i < VECTORS; i++) {
        const Integers first = (Integers)pair->first[i] >> 16 & 0xffff;
        ((Integers *)to)[i] = (Integers)pair->second[i] | first;
    }
}

INLINE void add_products(Lanes *sums, const Pair *pair, const Input *x) {
    for (int i = 0; i < VECTORS; i++) {
        sums[i] += x[0] * pair->first[i];
        sums[i] += x[1] * pair->second[i];
    }
}
#endif

typedef struct {
    const Linear *l;
    const Input *x; /* [tokens, inputs] */
} Job;

/* What comes from memory meanwhile: weights that lie so many bytes later, of each step those of some
pairs. */
typedef struct {
    long ahead;
    int first, last;
} Fetch;

/* Sums a few tokens' products with the sixteen outputs of a tile, or of two side by side. A token's
sum is taken in the same order whoever is multiplied beside it. */
INLINE void multiply_tiles(const Job *job, const char *weights, const int is_narrow, long token,
                           const int tokens, const int tiles, Fetch fetch, float (*sums)[PANEL]) {
    const long inputs = job->l->inputs, pair_bytes = TILE * (is_narrow ? 2 : 4);
    const Input *x = job->x + token * inputs;
    Lanes sum[MOST_TOKENS][2][VECTORS];
#pragma GCC unroll 12
    for (int t = 0; t < tokens; t++)
        for (int w = 0; w < tiles; w++)
            for (int i = 0; i < VECTORS; i++) sum[t][w][i] = (Lanes){0.0f};
    for (long s = 0; s < inputs / STEP; s++) {
        for (int p = 0; p < PAIRS; p++) {
            const Input *column = x + s * STEP + 2 * p;
            Pair pair[2];
            for (int w = 0; w < tiles; w++) {
                const char *from = weights + ((2 * s + w) * PAIRS + p) * pair_bytes;
                if (is_narrow) widen_pair(from, &pair[w]);
                else load_pair(from, &pair[w]);
                if (p >= fetch.first && p < fetch.last)
                    _mm_prefetch(from + fetch.ahead, _MM_HINT_T1);
            }
#pragma GCC unroll 12
            for (int t = 0; t < tokens; t++)
                for (int w = 0; w < tiles; w++)
                    add_products(sum[t][w], &pair[w], column + t * inputs);
        }
    }
#pragma GCC unroll 12
    for (int t = 0; t < tokens; t++)
        for (int w = 0; w < tiles; w++)
            for (int i = 0; i < VECTORS; i++)
                memcpy(sums[t] + TILE * w + LANES * i, &sum[t][w][i], sizeof(Lanes));
}

/* One or two tokens' sums of a single tile would be so few that each waits for itself. */
#define MULTIPLY(count)                                                                        \
    case count:                                                                                \
        if (count <= MOST_OF_TWO_TILES)                                                        \
            multiply_tiles(job, weights, is_narrow, token, count, 2, fetch, sums);             \
        else {                                                                                 \
            multiply_tiles(job, weights, is_narrow, token, count, 1, fetch, sums);             \
            multiply_tiles(job, weights + tile_bytes, is_narrow, token, count, 1, fetch, next); \
        }                                                                                      \
        break

INLINE void multiply_panel(const Job *job, const char *weights, const int is_narrow, long token,
                           long tokens, Fetch fetch, float (*sums)[PANEL]) {
    const long tile_bytes = PAIRS * TILE * (is_narrow ? 2 : 4);
    float(*next)[PANEL] = (float(*)[PANEL])(sums[0] + TILE);
    switch (tokens) {
        MULTIPLY(1);
        MULTIPLY(2);
        MULTIPLY(3);
        MULTIPLY(4);
        MULTIPLY(5);
        MULTIPLY(6);
#ifdef __AVX512F__
        MULTIPLY(7);
        MULTIPLY(8);
        MULTIPLY(9);
        MULTIPLY(10);
        MULTIPLY(11);
        MULTIPLY(12);
#endif
    }
}

/* Scales, adds and stores some tokens' sums of a panel. */
static void finish(const Linear *l, long panel, long token, long tokens, float (*sums)[PANEL]) {
    const long first = panel * PANEL;
    for (long t = 0; t < tokens; t++) {
        const long row = (token + t) * l->outputs + first;
        for (long o = 0; o < PANEL; o++) {
            float sum = sums[t][o];
            if (l->scales) sum *= l->scales[first + o];
            if (l->bias) sum += widen(l->bias[first + o]);
            if (l->residual) sum += widen(l->residual[row + o]);
            sums[t][o] = sum;
        }
        for (long o = 0; o < PANEL; o++) put(l->out, row + o, sums[t][o], l->out_type);
    }
}

/* Multiplies all tokens by a panel, which stays in the second cache meanwhile. */
static void panel_item(void *data, long panel) {
    const Job *job = data;
    const Linear *l = job->l;
    const long size = l->inputs * PANEL;
    const int is_narrow = l->scales && l->tokens <= MOST_TOKENS;
    const char *weights = (const char *)l->weight + panel * size * (l->scales ? 1 : 2);
    uint16_t *wide = NULL;
    if (l->scales && !is_narrow) { /* once, not for every few tokens */
        wide = aligned_alloc(64, size * 2);
        for (long i = 0; i < size; i += 2 * TILE) {
            Pair pair;
            widen_pair(weights + i, &pair);
            store_pair(wide + i, &pair);
        }
        weights = (const char *)wide;
    }
    const long blocks = (l->tokens + MOST_TOKENS - 1) / MOST_TOKENS;
    float sums[MOST_TOKENS][PANEL] ALIGNED;
    for (long b = 0; b < blocks; b++) {
        const long token = l->tokens * b / blocks, tokens = l->tokens * (b + 1) / blocks - token;
        /* With several blocks each fetches its part of the panel after this one, so that none waits
        while the others only compute. */
        const Fetch all = {AHEAD, 0, PAIRS};
        const Fetch some = {2 * size, PAIRS * b / blocks, PAIRS * (b + 1) / blocks};
        if (is_narrow) multiply_panel(job, weights, 1, token, tokens, all, sums);
        else if (blocks == 1) multiply_panel(job, weights, 0, token, tokens, all, sums);
        else multiply_panel(job, weights, 0, token, tokens, some, sums);
        finish(l, panel, token, tokens, sums);
    }
    free(wide);
}

EXPORT int has_linear(void) { return 1; }

#ifdef __AVX512BF16__
EXPORT void linear(const Linear *l, int threads) {
    Job job = {l, l->x};
    each_item(panel_item, &job, l->outputs / PANEL, threads);
}
#else
EXPORT void linear(const Linear *l, int threads) {
    const long numbers = l->tokens * l->inputs;
    float *x = aligned_alloc(64, (size_t)(numbers * 4 + 63) / 64 * 64);
    for (long i = 0; i < numbers; i++) x[i] = widen(l->x[i]);
    Job job = {l, x};
    each_item(panel_item, &job, l->outputs / PANEL, threads);
    free(x);
}
#endif
#endif
