/* Linear layers on Intel's matrix unit (AMX), for weights in bfloat16 or in 8 bits.

The unit multiplies 16 tokens by 16 outputs over 32 inputs at once. An integer of 8 bits is a bfloat16
number without loss: 8-bit weights are widened on their way from memory, and inputs keep their
precision. */
#include "kernels.h"
#include "team.h"
#include "tiles.h"
#include <stdlib.h>

#ifdef __AMX_BF16__

enum { TILE_BYTES = 1024, AHEAD = 4096 };
enum { MOST_TOGETHER = 4, BYTES_TOGETHER = 160 << 10 };

/* Tiles 0 to 3 are sums (tokens by outputs), 4 and 5 inputs, 6 and 7 weights. */
static void shape_tiles(long tokens) {
    long low = tokens < TILE ? tokens : TILE, high = tokens - low;
    if (high == 0) high = TILE; /* unused, but no tile may be empty */
    uint8_t rows[8] = {low, low, high, high, low, high, TILE, TILE};
    TileShapes shapes = {.palette = 1};
    for (int i = 0; i < 8; i++) shapes.rows[i] = rows[i], shapes.row_bytes[i] = 64;
    _tile_loadconfig(&shapes);
}

/* Widens a step of a panel: 1024 weights. */
INLINE void widen_step(const int8_t *from, uint16_t *to) {
    for (int i = 0; i < STEP * PANEL; i += 32) {
        __m512 low = _mm512_cvtepi32_ps(
            _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(from + i))));
        __m512 high = _mm512_cvtepi32_ps(
            _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(from + i + 16))));
        _mm512_store_si512(to + i, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    }
}

/* Into the second cache: the first can wait for too few lines at once to keep memory busy. */
INLINE void fetch_ahead(const void *from, long bytes) {
    for (long i = 0; i < bytes; i += 64) _mm_prefetch((const char *)from + AHEAD + i, _MM_HINT_T1);
}

INLINE void multiply_step(const uint16_t *x, long stride_bytes, const void *weights, int is_tall) {
    _tile_loadd(6, weights, 64);
    _tile_loadd(7, (const char *)weights + TILE_BYTES, 64);
    _tile_loadd(4, x, stride_bytes);
    if (is_tall) _tile_loadd(5, (const char *)x + TILE * stride_bytes, stride_bytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if (is_tall) {
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
}

INLINE void add_halves(const uint16_t *from, __m512 *low, __m512 *high) {
    __m512i first = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from));
    __m512i second = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(from + TILE)));
    *low = _mm512_add_ps(*low, _mm512_castsi512_ps(_mm512_slli_epi32(first, 16)));
    *high = _mm512_add_ps(*high, _mm512_castsi512_ps(_mm512_slli_epi32(second, 16)));
}

/* Has the places of a panel's sums on their way, while these are being computed. */
INLINE void fetch_out(const Linear *l, long panel, long token, long tokens) {
    for (long t = token; t < token + tokens; t++) {
        const char *out = at(l->out, t * l->outputs + panel * PANEL, l->out_type);
        __builtin_prefetch(out, 1);
        if (l->out_type == FLOAT32) __builtin_prefetch(out + 64, 1);
    }
}

/* Scales, adds and stores up to 32 tokens' sums of one panel. */
static void finish(const Linear *all, long panel, long token, long tokens) {
    const Linear copy = *all, *l = &copy; /* which no store can reach: it stays in registers */
    float sums[2 * TILE][PANEL] __attribute__((aligned(64)));
    _tile_stored(0, sums[0], PANEL * 4);
    _tile_stored(1, sums[0] + TILE, PANEL * 4);
    if (tokens > TILE) {
        _tile_stored(2, sums[TILE], PANEL * 4);
        _tile_stored(3, sums[TILE] + TILE, PANEL * 4);
    }
    const long first = panel * PANEL;
    for (long t = 0; t < tokens; t++) {
        const long row = (token + t) * l->outputs + first;
        __m512 low = _mm512_load_ps(sums[t]), high = _mm512_load_ps(sums[t] + TILE);
        if (l->scales) {
            low = _mm512_mul_ps(low, _mm512_loadu_ps(l->scales + first));
            high = _mm512_mul_ps(high, _mm512_loadu_ps(l->scales + first + TILE));
        }
        if (l->bias) add_halves(l->bias + first, &low, &high);
        if (l->residual) add_halves(l->residual + row, &low, &high);
        if (l->out_type == BFLOAT16) {
            __m512i halves = (__m512i)_mm512_cvtne2ps_pbh(high, low);
            _mm512_storeu_si512((uint16_t *)l->out + row, halves);
        } else {
            _mm512_storeu_ps((float *)l->out + row, low);
            _mm512_storeu_ps((float *)l->out + row + TILE, high);
        }
    }
}

/* Panels side by side, which lie in the second cache together. */
typedef struct {
    const Linear *l;
    long panels; /* of an item */
} Groups;

/* Multiplies up to 32 tokens by a panel, whose weights are in 8 bits if `is_narrow`. */
INLINE void multiply_panel(const Linear *l, const void *weight, int is_narrow, long panel,
                           long token, long tokens) {
    const long steps = l->inputs / STEP, step_size = STEP * PANEL, stride = l->inputs * 2;
    const uint16_t *x = l->x + token * l->inputs;
    fetch_out(l, panel, token, tokens);
    uint16_t one_step[STEP * PANEL] __attribute__((aligned(64)));
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (long s = 0; s < steps; s++) {
        const uint16_t *weights = (const uint16_t *)weight + s * step_size;
        if (is_narrow) {
            const int8_t *bytes = (const int8_t *)weight + s * step_size;
            fetch_ahead(bytes, step_size);
            widen_step(bytes, one_step);
            weights = one_step;
        } else if (token == 0) fetch_ahead(weights, 2 * step_size);
        if (tokens > TILE) multiply_step(x + s * STEP, stride, weights, 1);
        else multiply_step(x + s * STEP, stride, weights, 0);
    }
    finish(l, panel, token, tokens);
}

/* Multiplies all tokens by a group of panels: some tokens by all of them first, so that what is
written lies side by side. */
static void group_item(void *data, long item) {
    const Groups *groups = data;
    const Linear *l = groups->l;
    const long size = l->inputs * PANEL, first = item * groups->panels;
    const int is_narrow = l->scales && l->tokens <= 2 * TILE;
    const char *weights = (const char *)l->weight + first * size * (l->scales ? 1 : 2);
    uint16_t *wide = NULL;
    if (l->scales && !is_narrow) {
        wide = aligned_alloc(64, groups->panels * size * 2);
        for (long i = 0; i < groups->panels * size; i += STEP * PANEL)
            widen_step((const int8_t *)weights + i, wide + i);
        weights = (const char *)wide;
    }
    for (long token = 0; token < l->tokens; token += 2 * TILE) {
        const long left = l->tokens - token, tokens = left < 2 * TILE ? left : 2 * TILE;
        if (token == 0 || tokens < 2 * TILE) shape_tiles(tokens);
        for (long i = 0; i < groups->panels; i++)
            multiply_panel(l, weights + i * size * (is_narrow ? 1 : 2), is_narrow, first + i, token,
                           tokens);
    }
    free(wide);
    _tile_release();
}

/* The most panels that stay in the cache and still share out evenly; one where it is widened first,
for that gained nothing. */
static long panels_together(const Linear *l, int threads) {
    const long panels = l->outputs / PANEL, bytes = l->inputs * PANEL * 2;
    long group = l->scales && l->tokens > 2 * TILE ? 1 : MOST_TOGETHER;
    while (group > 1 && (group * bytes > BYTES_TOGETHER || panels % (group * threads))) group--;
    return group;
}

EXPORT int has_linear(void) { return 1; }

EXPORT void linear(const Linear *l, int threads) {
    Groups groups = {l, panels_together(l, threads)};
    each_item(group_item, &groups, l->outputs / PANEL / groups.panels, threads);
}
#elif !defined(__AVX2__) /* else linear_vectors.c has them */
EXPORT int has_linear(void) { return 0; }

EXPORT void linear(const Linear *l, int threads) { (void)l, (void)threads; }
#endif
