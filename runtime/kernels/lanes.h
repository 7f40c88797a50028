/* Numbers side by side, as many as one instruction takes. Vectors longer than the processor's would
be kept in memory by the compiler, which makes attention five times as slow.

A softmax is taken lane by lane, so a lane's largest and its sum never have to be gathered from
within a vector. */
#pragma once
#include "numbers.h"
#ifdef __AVX2__
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
enum { LANES = 16 };
#elif defined(__AVX2__)
enum { LANES = 8 };
#else
enum { LANES = 4 };
#endif

/* Of numbers that are read as vectors. */
#define ALIGNED __attribute__((aligned(64)))

typedef float Lanes __attribute__((vector_size(4 * LANES), aligned(4 * LANES), may_alias));
typedef int32_t Integers __attribute__((vector_size(4 * LANES), aligned(4 * LANES), may_alias));

/* As a lane's largest score before there is one: minus infinity less itself would be NaN. */
#define LOWEST (-3e38f)

INLINE void spread(Lanes *lanes, float value) { *lanes = value - (Lanes){0.0f}; }

/* Where the mask is set `yes`, elsewhere `no`. */
INLINE void pick(Lanes *out, const Integers *mask, const Lanes *yes, const Lanes *no) {
    *out = (Lanes)((*mask & (Integers)*yes) | (~*mask & (Integers)*no));
}

/* The larger of the two; `other` where either is NaN. */
INLINE void take_larger(Lanes *out, const Lanes *value, const Lanes *other) {
#ifdef __AVX512F__
    *out = (Lanes)_mm512_max_ps((__m512)*value, (__m512)*other);
#else
    const Integers mask = *value > *other;
    pick(out, &mask, value, other);
#endif
}

/* e to the power of numbers up to 0, within 4 units in the last place: NaN stays NaN, and below
-88 the result is exactly 0. Source: Cephes, expf. */
INLINE void exponentials(Lanes *x) {
    Lanes lowest;
    spread(&lowest, -88.0f);
    take_larger(x, &lowest, x);
    /* Added to this number, another is rounded to an integer that stands in the lowest bits. */
    const float rounding = 12582912.0f;
    const Lanes rounded = *x * 1.44269504f + rounding;
    const Lanes rest = *x - (rounded - rounding) * 0.693147181f;
    Lanes p = rest * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * rest + 8.3334519073e-3f;
    p = p * rest + 4.1665795894e-2f;
    p = p * rest + 1.6666665459e-1f;
    p = p * rest + 5.0000001201e-1f;
    p = p * rest + 1.0f;
    p = p * rest + 1.0f;
    *x = p * (Lanes)(((Integers)rounded + 127) << 23);
}

/* Numbers of memory as float32. */
INLINE void load(Lanes *out, const void *from, int type) {
    if (type == BFLOAT16) {
#ifdef __AVX512F__
        const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from));
        *out = (Lanes)_mm512_slli_epi32(wide, 16);
#elif defined(__AVX2__)
        const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(from));
        *out = (Lanes)_mm256_slli_epi32(wide, 16);
#else
        uint16_t halves __attribute__((vector_size(2 * LANES)));
        memcpy(&halves, from, sizeof halves);
        *out = (Lanes)(__builtin_convertvector(halves, Integers) << 16);
#endif
    } else memcpy(out, from, sizeof *out);
}

/* The sum of all lanes. */
INLINE float add_up(const Lanes *lanes) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)*lanes);
#elif defined(__AVX2__)
    const __m256 all = (__m256)*lanes;
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#else
    float sum = 0.0f;
    for (int lane = 0; lane < LANES; lane++) sum += (*lanes)[lane];
    return sum;
#endif
}

/* The sums of one to four vectors, side by side: together they take half the instructions. */
INLINE void add_up_each(const Lanes *lanes, const int count, float *sums) {
#ifdef __AVX512F__
    __m512 v[4];
    for (int i = 0; i < 4; i++) v[i] = i < count ? (__m512)lanes[i] : _mm512_setzero_ps();
    const __m512d low = (__m512d)(_mm512_unpacklo_ps(v[0], v[1]) + _mm512_unpackhi_ps(v[0], v[1]));
    const __m512d high = (__m512d)(_mm512_unpacklo_ps(v[2], v[3]) + _mm512_unpackhi_ps(v[2], v[3]));
    const __m512 all =
        (__m512)_mm512_unpacklo_pd(low, high) + (__m512)_mm512_unpackhi_pd(low, high);
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    _mm_mask_storeu_ps(sums, (__mmask8)((1 << count) - 1), four);
#else
    for (int i = 0; i < count; i++) sums[i] = add_up(lanes + i);
#endif
}
