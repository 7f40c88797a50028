/* Rotary positions, in place on the heads of packed rows. */
#include "kernels.h"

INLINE void turn_halves(void *head, const void *cos, const void *sin, long dim, int type) {
    long half = dim / 2;
    for (long i = 0; i < half; i++) {
        float low = get(head, i, type), high = get(head, i + half, type);
        put(head, i, low * get(cos, i, type) + high * get(sin, i, type), type);
        put(head, i + half, high * get(cos, i + half, type) + low * get(sin, i + half, type), type);
    }
}

INLINE void turn_neighbours(void *head, const void *cos, const void *sin, long dim, int type) {
    for (long i = 0; i < dim; i += 2) {
        float even = get(head, i, type), odd = get(head, i + 1, type);
        put(head, i, even * get(cos, i, type) + odd * get(sin, i, type), type);
        put(head, i + 1, odd * get(cos, i + 1, type) + even * get(sin, i + 1, type), type);
    }
}

INLINE void turn_row(void *row, const void *cos, const void *sin, long heads, long dim,
                     int is_interleaved, int type) {
    for (long h = 0; h < heads; h++) {
        void *head = (void *)at(row, h * dim, type);
        if (is_interleaved) turn_neighbours(head, cos, sin, dim, type);
        else turn_halves(head, cos, sin, dim, type);
    }
}

/* Rows lie `stride` apart; the tables have one row of `dim` numbers for each. */
EXPORT void rotate(void *x, const void *cos, const void *sin, long rows, long stride, long heads,
                   long dim, int is_interleaved, int type) {
    for (long t = 0; t < rows; t++) {
        void *row = (void *)at(x, t * stride, type);
        const void *c = at(cos, t * dim, type), *s = at(sin, t * dim, type);
        BY_TYPE(type, turn_row, row, c, s, heads, dim, is_interleaved);
    }
}
