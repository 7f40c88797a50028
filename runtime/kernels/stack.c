/* All layers of a model in one call, in bfloat16: a decode step's kernels are so short that asking
Python between them would take as long. */
#include "kernels.h"

typedef struct {
    const void *weight, *shift; /* no shift: RMS norm */
} NormWeights;

typedef struct {
    NormWeights attention_norm, feed_forward_norm; /* the latter has none if both read one copy */
    const void *q_norm, *k_norm; /* of each head, or NULL */
    Linear qkv, out, up, down;   /* their weights; `up` gives the gate, then what it gates */
    const float *slopes;         /* as Attention has them */
    long window;
} Layer;

typedef struct {
    const Layer *layers;
    Attention attention;  /* the step's plan, with the first layer's keys and values */
    long layer_bytes;     /* from one layer's keys to the next one's */
    uint16_t *stream;     /* [tokens, width]: what goes in and comes out */
    uint16_t *normed;     /* [tokens, width] */
    uint16_t *projected;  /* [tokens, outputs of qkv or of up] */
    uint16_t *mixed;      /* [tokens, heads * dim] */
    uint16_t *gated;      /* [tokens, inputs of down] */
    const void *cos, *sin; /* [tokens, dim], or NULL */
    long count;
    float eps;
    int is_interleaved, activation;
} Stack;

static void multiply(Linear l, const uint16_t *x, uint16_t *out, const uint16_t *residual,
                     long tokens, int threads) {
    l.x = x, l.out = out, l.residual = residual, l.tokens = tokens, l.out_type = BFLOAT16;
    linear(&l, threads);
}

static void turn_heads(const Stack *s, uint16_t *heads, long count, const void *norm, long stride) {
    const long tokens = s->attention.tokens, dim = s->attention.dim;
    for (long t = 0; norm && t < tokens; t++) {
        uint16_t *row = heads + t * stride;
        normalise(row, norm, NULL, row, count, dim, s->eps, BFLOAT16, 1);
    }
    if (s->cos)
        rotate(heads, s->cos, s->sin, tokens, stride, count, dim, s->is_interleaved, BFLOAT16);
}

static void attend(const Stack *s, const Layer *layer, long index, int threads) {
    Attention a = s->attention;
    const long q_width = a.heads * a.dim, kv_width = a.kv_heads * a.dim, stride = layer->qkv.outputs;
    turn_heads(s, s->projected, a.heads, layer->q_norm, stride);
    turn_heads(s, s->projected + q_width, a.kv_heads, layer->k_norm, stride);
    a.q = s->projected, a.k = s->projected + q_width, a.v = s->projected + q_width + kv_width;
    a.q_stride = a.kv_stride = stride;
    a.keys = (char *)a.keys + index * s->layer_bytes;
    a.values = (char *)a.values + index * s->layer_bytes;
    a.out = s->mixed, a.slopes = layer->slopes, a.window = layer->window;
    paged_attention(&a, threads);
}

static void normalise_stream(const Stack *s, const NormWeights *norm, long width, int threads) {
    normalise(s->stream, norm->weight, norm->shift, s->normed, s->attention.tokens, width, s->eps,
              BFLOAT16, threads);
}

/* Returns the input of `down`. */
static const uint16_t *activate_units(const Stack *s, long units, int threads) {
    const long tokens = s->attention.tokens;
    if (s->activation != SILU_GATE) {
        activate(s->projected, tokens, units, s->activation, BFLOAT16, threads);
        return s->projected;
    }
    silu_gate(s->projected, s->projected + units, s->gated, tokens, 2 * units, units, BFLOAT16,
              threads);
    return s->gated;
}

static void run_layer(const Stack *s, const Layer *layer, long index, int threads) {
    const long tokens = s->attention.tokens, width = layer->qkv.inputs, units = layer->down.inputs;
    normalise_stream(s, &layer->attention_norm, width, threads);
    multiply(layer->qkv, s->normed, s->projected, NULL, tokens, threads);
    attend(s, layer, index, threads);
    multiply(layer->out, s->mixed, s->stream, s->stream, tokens, threads);
    if (layer->feed_forward_norm.weight)
        normalise_stream(s, &layer->feed_forward_norm, width, threads);
    multiply(layer->up, s->normed, s->projected, NULL, tokens, threads);
    multiply(layer->down, activate_units(s, units, threads), s->stream, s->stream, tokens, threads);
}

EXPORT void run_stack(const Stack *s, int threads) {
    for (long i = 0; i < s->count; i++) run_layer(s, s->layers + i, i, threads);
}

/* By this the loader knows a library of other sources, which would misread its arguments. */
EXPORT long argument_bytes(void) { return sizeof(Stack) + sizeof(Layer) + sizeof(CausalAttention); }
