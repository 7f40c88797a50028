/* Linear layers on vectors of eight numbers (AVX2), for processors without units for bfloat16.

Panels, made for the matrix unit, suit vectors as well: a bfloat16 number
is the upper half of a float32 one, so of sixteen pairs side by side a shift gives the first numbers
and a mask the second ones. Products and sums are float32. */
#include "kernels.h"
#include "team.h"
#include <stdlib.h>

#if defined(__AVX2__) && !defined(__AVX512F__)
#include <immintrin.h>

enum { PAIRS = STEP / 2, AHEAD = 4096 };
enum { MOST_TOKENS = 6 }; /* whose sums of a tile fit into the registers */

typedef struct {
    const Linear *l;
    const float *x; /* [tokens, inputs] */
} Job;

/* A pair of inputs' weights for sixteen outputs: first and second inputs, eight outputs each. */
typedef struct {
    __m256 first[2], second[2];
} Pair;

INLINE void widen_pair(const void *from, Pair *pair) {
    for (int i = 0; i < 2; i++) {
        __m256i both = _mm256_loadu_si256((const __m256i *)from + i);
        pair->first[i] = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
        pair->second[i] =
            _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32((int)0xffff0000)));
    }
}

INLINE void widen_narrow_pair(const void *from, Pair *pair) {
    for (int i = 0; i < 2; i++) {
        __m256i both = _mm256_cvtepi16_epi32(_mm_loadu_si128((const __m128i *)from + i));
        __m256i first = _mm256_srai_epi32(_mm256_slli_epi32(both, 24), 24);
        pair->first[i] = _mm256_cvtepi32_ps(first);
        pair->second[i] = _mm256_cvtepi32_ps(_mm256_srai_epi32(both, 8));
    }
}

/* Sums one to six tokens' products with the sixteen outputs of a tile, or of two side by side. A
token's sum is taken in the same order whoever is multiplied beside it. */
INLINE void multiply_tiles(const Job *job, const char *weights, int is_narrow, long token,
                           const int tokens, const int tiles, float (*sums)[PANEL]) {
    const long inputs = job->l->inputs, pair_bytes = TILE * (is_narrow ? 2 : 4);
    const float *x = job->x + token * inputs;
    __m256 sum[MOST_TOKENS][2][2];
    for (int t = 0; t < tokens; t++)
        for (int w = 0; w < tiles; w++)
            for (int i = 0; i < 2; i++) sum[t][w][i] = _mm256_setzero_ps();
    for (long s = 0; s < inputs / STEP; s++) {
        for (int p = 0; p < PAIRS; p++) {
            const float *column = x + s * STEP + 2 * p;
            for (int w = 0; w < tiles; w++) {
                const char *from = weights + ((2 * s + w) * PAIRS + p) * pair_bytes;
                Pair pair;
                if (is_narrow) widen_narrow_pair(from, &pair);
                else widen_pair(from, &pair);
                if (token == 0) _mm_prefetch(from + AHEAD, _MM_HINT_T0);
                for (int t = 0; t < tokens; t++) {
                    __m256 first = _mm256_broadcast_ss(column + t * inputs);
                    __m256 second = _mm256_broadcast_ss(column + t * inputs + 1);
                    for (int i = 0; i < 2; i++) {
                        sum[t][w][i] = _mm256_fmadd_ps(first, pair.first[i], sum[t][w][i]);
                        sum[t][w][i] = _mm256_fmadd_ps(second, pair.second[i], sum[t][w][i]);
                    }
                }
            }
        }
    }
    for (int t = 0; t < tokens; t++)
        for (int w = 0; w < tiles; w++)
            for (int i = 0; i < 2; i++) _mm256_store_ps(sums[t] + TILE * w + 8 * i, sum[t][w][i]);
}

#define TILE_BY_TILE(count)                                                                   \
    case count:                                                                               \
        multiply_tiles(job, weights, is_narrow, token, count, 1, sums);                       \
        multiply_tiles(job, weights + tile_bytes, is_narrow, token, count, 1, second);        \
        break

/* One or two tokens' sums of a single tile would be so few that each waits for itself. */
INLINE void multiply_panel(const Job *job, const char *weights, int is_narrow, long token,
                           long tokens, float (*sums)[PANEL]) {
    const long tile_bytes = PAIRS * TILE * (is_narrow ? 2 : 4);
    float(*second)[PANEL] = (float(*)[PANEL])(sums[0] + TILE);
    switch (tokens) {
    case 1: multiply_tiles(job, weights, is_narrow, token, 1, 2, sums); break;
    case 2: multiply_tiles(job, weights, is_narrow, token, 2, 2, sums); break;
        TILE_BY_TILE(3);
        TILE_BY_TILE(4);
        TILE_BY_TILE(5);
        TILE_BY_TILE(6);
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
    const int is_narrow = l->scales != NULL;
    const char *weights = (const char *)l->weight + panel * l->inputs * PANEL * (is_narrow ? 1 : 2);
    const long blocks = (l->tokens + MOST_TOKENS - 1) / MOST_TOKENS;
    float sums[MOST_TOKENS][PANEL] __attribute__((aligned(64)));
    for (long b = 0; b < blocks; b++) {
        const long token = l->tokens * b / blocks, tokens = l->tokens * (b + 1) / blocks - token;
        if (is_narrow) multiply_panel(job, weights, 1, token, tokens, sums);
        else multiply_panel(job, weights, 0, token, tokens, sums);
        finish(l, panel, token, tokens, sums);
    }
}

EXPORT int has_linear(void) { return 1; }

EXPORT void linear(const Linear *l, int threads) {
    const long numbers = l->tokens * l->inputs;
    float *x = aligned_alloc(64, (size_t)(numbers * 4 + 63) / 64 * 64);
    for (long i = 0; i < numbers; i++) x[i] = widen(l->x[i]);
    Job job = {l, x};
    each_item(panel_item, &job, l->outputs / PANEL, threads);
    free(x);
}
#endif
