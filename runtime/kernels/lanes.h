/* Sixteen numbers side by side: one processor instruction each, or a few where vectors are shorter.

A softmax is taken lane by lane, so a lane's largest and its sum never have to be gathered from
within a vector. */
#pragma once
#include "numbers.h"
#ifdef __AVX512F__
#include <immintrin.h>
#endif

enum { LANES = 16 };

typedef float Lanes __attribute__((vector_size(64), aligned(64), may_alias));
typedef int32_t Integers __attribute__((vector_size(64), aligned(64), may_alias));

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

/* Sixteen numbers of memory as float32. */
INLINE void load(Lanes *out, const void *from, int type) {
    if (type == BFLOAT16) {
#ifdef __AVX512F__
        const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from));
        *out = (Lanes)_mm512_slli_epi32(wide, 16);
#else
        uint16_t halves __attribute__((vector_size(32)));
        memcpy(&halves, from, sizeof halves);
        *out = (Lanes)(__builtin_convertvector(halves, Integers) << 16);
#endif
    } else memcpy(out, from, sizeof *out);
}
