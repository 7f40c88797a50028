/* Numbers in memory are float32 or bfloat16; arithmetic is always float32.

Loops take the type as an argument that is constant where they are inlined, so that one text gives
a loop per type. */
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

enum { FLOAT32 = 0, BFLOAT16 = 1 };

/* Lets the compiler add up in any order; nothing else is relaxed, so NaN and infinity stay. */
#define SUM(variable) _Pragma(TEXT(omp simd reduction(+ : variable)))
#define TEXT(words) #words

#define INLINE static inline __attribute__((always_inline))
#define EXPORT __attribute__((visibility("default")))

/* Calls `body` with its last argument a constant. */
#define BY_TYPE(type, body, ...) \
    ((type) == BFLOAT16 ? body(__VA_ARGS__, BFLOAT16) : body(__VA_ARGS__, FLOAT32))

INLINE float widen(uint16_t half) {
    union { uint32_t bits; float value; } u = {.bits = (uint32_t)half << 16};
    return u.value;
}

INLINE uint16_t narrow(float value) {
    union { float value; uint32_t bits; } u = {.value = value};
    uint32_t rounded = (u.bits + 0x7fff + ((u.bits >> 16) & 1)) >> 16; /* to nearest, ties even */
    return value != value ? 0x7fc0 : (uint16_t)rounded;
}

INLINE float get(const void *from, long index, int type) {
    return type == BFLOAT16 ? widen(((const uint16_t *)from)[index]) : ((const float *)from)[index];
}

INLINE void put(void *to, long index, float value, int type) {
    if (type == BFLOAT16) ((uint16_t *)to)[index] = narrow(value);
    else ((float *)to)[index] = value;
}

INLINE const void *at(const void *from, long index, int type) {
    return (const char *)from + index * (type == BFLOAT16 ? 2 : 4);
}

/* e to the x within 2 units in the last place, without a call: NaN stays NaN, and below -87 the
result is about 1e-38. Source: Cephes, expf. */
INLINE float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    float whole = rintf(x * 1.44269504f);
    float rest = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * rest + 1.3981999507e-3f;
    p = p * rest + 8.3334519073e-3f;
    p = p * rest + 4.1665795894e-2f;
    p = p * rest + 1.6666665459e-1f;
    p = p * rest + 5.0000001201e-1f;
    p = p * rest * rest + rest + 1.0f;
    union { int32_t bits; float value; } power = {.bits = ((int32_t)whole + 127) << 23};
    return p * power.value;
}
