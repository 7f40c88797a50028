/* Work on single rows: norms, and what a feed-forward does to its units. */
#include "kernels.h"
#include "team.h"

enum { ROWS_PER_ITEM = 16, ELEMENTS_PER_THREAD = 1 << 14 };

static int useful_threads(long elements, int threads) {
    long most = elements / ELEMENTS_PER_THREAD;
    return most < threads ? (most > 1 ? (int)most : 1) : threads;
}

static long items_of(long rows, int threads) {
    return threads == 1 ? 1 : (rows + ROWS_PER_ITEM - 1) / ROWS_PER_ITEM;
}

/* The rows of one item: all of them where there is one item only. */
typedef struct {
    long first, last;
} Span;

static Span span_of(long item, long items, long rows) {
    long size = (rows + items - 1) / items;
    Span span = {item * size, (item + 1) * size};
    if (span.last > rows) span.last = rows;
    return span;
}

typedef struct {
    const void *x, *weight, *shift; /* no shift: RMS norm */
    void *out;
    long rows, width, items;
    float eps;
    int type;
} Norm;

INLINE void centre_row(const void *x, const void *weight, const void *shift, void *out, long width,
                       float eps, int type) {
    float sum = 0.0f, squares = 0.0f;
    SUM(sum)
    for (long i = 0; i < width; i++) sum += get(x, i, type);
    const float mean = sum / (float)width;
    SUM(squares)
    for (long i = 0; i < width; i++) squares += (get(x, i, type) - mean) * (get(x, i, type) - mean);
    const float scale = 1.0f / sqrtf(squares / (float)width + eps);
    for (long i = 0; i < width; i++)
        put(out, i, (get(x, i, type) - mean) * scale * get(weight, i, type) + get(shift, i, type),
            type);
}

INLINE void norm_row(const void *x, const void *weight, void *out, long width, float eps, int type) {
    float squares = 0.0f;
    SUM(squares)
    for (long i = 0; i < width; i++) squares += get(x, i, type) * get(x, i, type);
    float scale = 1.0f / sqrtf(squares / (float)width + eps);
    for (long i = 0; i < width; i++)
        put(out, i, get(x, i, type) * scale * get(weight, i, type), type);
}

static void norm_item(void *data, long item) {
    const Norm *n = data;
    Span span = span_of(item, n->items, n->rows);
    for (long row = span.first; row < span.last; row++) {
        const void *x = at(n->x, row * n->width, n->type);
        void *out = (void *)at(n->out, row * n->width, n->type);
        if (n->shift) BY_TYPE(n->type, centre_row, x, n->weight, n->shift, out, n->width, n->eps);
        else BY_TYPE(n->type, norm_row, x, n->weight, out, n->width, n->eps);
    }
}

/* Layer norm, or RMS norm where `shift` is NULL; `out` may be `x`. */
EXPORT void normalise(const void *x, const void *weight, const void *shift, void *out, long rows,
                      long width, float eps, int type, int threads) {
    threads = useful_threads(rows * width, threads);
    Norm norm = {x, weight, shift, out, rows, width, items_of(rows, threads), eps, type};
    each_item(norm_item, &norm, norm.items, threads);
}

typedef struct {
    const void *gate, *up;
    void *out;
    long rows, stride, width, items;
    int type;
} Gate;

INLINE void gate_row(const void *gate, const void *up, void *out, long width, int type) {
    for (long i = 0; i < width; i++) {
        float g = get(gate, i, type);
        put(out, i, g / (1.0f + exponential(-g)) * get(up, i, type), type);
    }
}

static void gate_item(void *data, long item) {
    const Gate *g = data;
    Span span = span_of(item, g->items, g->rows);
    for (long row = span.first; row < span.last; row++) {
        const void *gate = at(g->gate, row * g->stride, g->type);
        const void *up = at(g->up, row * g->stride, g->type);
        void *out = (void *)at(g->out, row * g->width, g->type);
        BY_TYPE(g->type, gate_row, gate, up, out, g->width);
    }
}

/* out = silu(gate) * up; both inputs' rows lie `stride` apart. */
EXPORT void silu_gate(const void *gate, const void *up, void *out, long rows, long stride,
                      long width, int type, int threads) {
    threads = useful_threads(rows * width, threads);
    Gate g = {gate, up, out, rows, stride, width, items_of(rows, threads), type};
    each_item(gate_item, &g, g.items, threads);
}

typedef struct {
    void *units;
    long rows, width, items;
    int kind, type;
} Activation;

INLINE void relu_row(void *units, long width, int type) {
    for (long i = 0; i < width; i++) {
        const float x = get(units, i, type);
        put(units, i, x < 0.0f ? 0.0f : x, type); /* NaN stays */
    }
}

/* 0.5 x (1 + tanh(z)) is x / (1 + exp(-2 z)). */
INLINE void gelu_tanh_row(void *units, long width, int type) {
    for (long i = 0; i < width; i++) {
        const float x = get(units, i, type);
        const float z = 0.7978845608f * (x + 0.044715f * x * x * x);
        put(units, i, x / (1.0f + exponential(-2.0f * z)), type);
    }
}

static void activate_item(void *data, long item) {
    const Activation *a = data;
    Span span = span_of(item, a->items, a->rows);
    for (long row = span.first; row < span.last; row++) {
        void *units = (void *)at(a->units, row * a->width, a->type);
        if (a->kind == RELU) BY_TYPE(a->type, relu_row, units, a->width);
        else BY_TYPE(a->type, gelu_tanh_row, units, a->width);
    }
}

/* Of units that are not gated, in place. */
EXPORT void activate(void *units, long rows, long width, int kind, int type, int threads) {
    threads = useful_threads(rows * width, threads);
    Activation a = {units, rows, width, items_of(rows, threads), kind, type};
    each_item(activate_item, &a, a.items, threads);
}
