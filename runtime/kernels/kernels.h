/* What Python calls, one by one or through a whole stack of layers. */
#pragma once
#include "attention.h"
#include <stdint.h>

/* A linear layer's weights lie in panels: [outputs / PANEL][inputs / STEP][PANEL / TILE][STEP / 2]
[TILE][2], as Intel's matrix unit reads them, so a panel is one stream of memory. */
enum { STEP = 32, PANEL = 32, TILE = 16 };

typedef struct {
    const uint16_t *x;        /* [tokens, inputs] bfloat16 */
    const void *weight;       /* panels: bfloat16, or int8 if there are scales */
    const float *scales;      /* one per output, or NULL */
    const uint16_t *bias;     /* one per output, or NULL */
    const uint16_t *residual; /* [tokens, outputs], added to the result, or NULL; may be `out` */
    void *out;                /* [tokens, outputs] in `out_type` */
    long tokens, inputs, outputs;
    int out_type;
} Linear;

/* Sequences that lie one after the other. Tensors are [heads, tokens, width], those of keys and
values [kv_heads, tokens, width]: rows are filled up with zeros to a multiple of 16 numbers. */
typedef struct {
    const float *q, *k, *v;
    float *out, *log_totals;       /* [heads, tokens]: of each softmax's sum of exponentials */
    const float *d_out;            /* the gradient of `out`, */
    float *d_q, *d_k, *d_v;        /* and what it gives, all by query head */
    const int64_t *ends;           /* one per sequence: the token after its last */
    const float *slopes;           /* one per head, or NULL */
    long sequences, tokens, heads, kv_heads, width;
    long window; /* 0: all earlier keys are seen */
    float scale;
} CausalAttention;

/* What a feed-forward does to its units. */
enum { SILU_GATE = 0, RELU = 1, GELU_TANH = 2 };

EXPORT void linear(const Linear *l, int threads);
EXPORT void normalise(const void *x, const void *weight, const void *shift, void *out, long rows,
                      long width, float eps, int type, int threads);
EXPORT void silu_gate(const void *gate, const void *up, void *out, long rows, long stride,
                      long width, int type, int threads);
EXPORT void activate(void *units, long rows, long width, int kind, int type, int threads);
EXPORT void rotate(void *x, const void *cos, const void *sin, long rows, long stride, long heads,
                   long dim, int is_interleaved, int type);
EXPORT void paged_attention(Attention *a, int threads);
EXPORT void causal_attention(CausalAttention *a, int threads);
EXPORT void causal_attention_gradients(CausalAttention *a, int threads);
