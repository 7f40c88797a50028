/* Work on single rows: norms, and what a feed-forward does to its units. */
#include "kernels.h"
#include "team.h"

enum { ROWS_PER_ITEM = 16, ROWS_PER_SUM = 64, ELEMENTS_PER_THREAD = 1 << 15 };

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
    const void *x, *weight, *grad;
    void *out;
    float *weight_grads; /* one row for each item, or NULL */
    long rows, width;
    float eps;
    int type;
} NormBack;

INLINE void norm_row_back(const void *x, const void *weight, const void *grad, void *out,
                          float *weight_grad, long width, float eps, int type) {
    float squares = 0.0f, along = 0.0f; /* along: how much of the gradient only lengthens x */
    SUM(squares)
    for (long i = 0; i < width; i++) squares += get(x, i, type) * get(x, i, type);
    SUM(along)
    for (long i = 0; i < width; i++)
        along += get(grad, i, type) * get(weight, i, type) * get(x, i, type);
    const float scale = 1.0f / sqrtf(squares / (float)width + eps);
    along *= scale * scale / (float)width;
    for (long i = 0; i < width; i++)
        put(out, i, scale * (get(grad, i, type) * get(weight, i, type) - get(x, i, type) * along),
            type);
    if (weight_grad)
        for (long i = 0; i < width; i++)
            weight_grad[i] += get(grad, i, type) * get(x, i, type) * scale;
}

static void norm_item_back(void *data, long item) {
    const NormBack *n = data;
    float *weight_grad = n->weight_grads ? n->weight_grads + item * n->width : NULL;
    long last = (item + 1) * ROWS_PER_SUM < n->rows ? (item + 1) * ROWS_PER_SUM : n->rows;
    for (long row = item * ROWS_PER_SUM; row < last; row++) {
        const void *x = at(n->x, row * n->width, n->type);
        const void *grad = at(n->grad, row * n->width, n->type);
        void *out = (void *)at(n->out, row * n->width, n->type);
        BY_TYPE(n->type, norm_row_back, x, n->weight, grad, out, weight_grad, n->width, n->eps);
    }
}

/* The gradient of an RMS norm's input, and of its weight: a row of zeros is given for every
ROWS_PER_SUM rows, and their sum is the gradient, whatever the number of threads. */
EXPORT void norm_back(const void *x, const void *weight, const void *grad, void *out,
                      float *weight_grads, long rows, long width, float eps, int type,
                      int threads) {
    NormBack norm = {x, weight, grad, out, weight_grads, rows, width, eps, type};
    each_item(norm_item_back, &norm, (rows + ROWS_PER_SUM - 1) / ROWS_PER_SUM,
              useful_threads(rows * width, threads));
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
    const void *gate, *up, *grad;
    void *out;
    long rows, stride, width, items;
    int type;
} GateBack;

INLINE void gate_row_back(const void *gate, const void *up, const void *grad, void *out, long width,
                          int type) {
    for (long i = 0; i < width; i++) {
        const float g = get(gate, i, type), back = get(grad, i, type);
        const float open = 1.0f / (1.0f + exponential(-g));
        put(out, i, back * get(up, i, type) * open * (1.0f + g * (1.0f - open)), type);
        put(out, width + i, back * g * open, type);
    }
}

static void gate_item_back(void *data, long item) {
    const GateBack *g = data;
    Span span = span_of(item, g->items, g->rows);
    for (long row = span.first; row < span.last; row++) {
        const void *gate = at(g->gate, row * g->stride, g->type);
        const void *up = at(g->up, row * g->stride, g->type);
        const void *grad = at(g->grad, row * g->width, g->type);
        void *out = (void *)at(g->out, row * 2 * g->width, g->type);
        BY_TYPE(g->type, gate_row_back, gate, up, grad, out, g->width);
    }
}

/* The gradients of silu(gate) * up: in each row of `out` the gate's, then those of what is up. */
EXPORT void silu_gate_back(const void *gate, const void *up, const void *grad, void *out, long rows,
                           long stride, long width, int type, int threads) {
    threads = useful_threads(rows * width, threads);
    GateBack g = {gate, up, grad, out, rows, stride, width, items_of(rows, threads), type};
    each_item(gate_item_back, &g, g.items, threads);
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
