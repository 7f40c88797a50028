/* The softmax of some queries' scores, one per lane, taken a part of the keys at a time. Source:
Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018). */
#pragma once
#include "lanes.h"

typedef struct {
    Lanes highest, total, slope; /* a lane's largest score and sum so far; ALiBi's slope */
    Integers first, end;         /* the keys that it sees; none where it stands for no query */
} Softmax;

INLINE void start_lane(Softmax *s, int lane, long seen, long window, float slope) {
    s->end[lane] = (int32_t)seen;
    s->first[lane] = window && seen > window ? (int32_t)(seen - window) : 0;
    s->slope[lane] = slope;
}

INLINE void start_softmax(Softmax *s) {
    memset(s, 0, sizeof *s);
    spread(&s->highest, LOWEST);
}

/* Adds the distances' costs and hides what a lane does not see. */
INLINE void bias_scores(const Softmax *s, Lanes *scores, long stride, long start, long count) {
    const Lanes hidden = (Lanes){0} - INFINITY;
    for (long t = 0; t < count; t++) {
        Lanes *score = scores + t * stride;
        const Integers key = (int32_t)(start + t) - (Integers){0};
        const Integers is_seen = (key < s->end) & (key >= s->first);
        *score += s->slope * __builtin_convertvector(key - s->end + 1, Lanes);
        pick(score, &is_seen, score, &hidden);
    }
}

/* Turns scores, `stride` vectors apart, into weights; returns in `fade` what the sums so far must
be multiplied by. */
INLINE void soften(Softmax *s, Lanes *scores, long stride, long count, Lanes *fade) {
    Lanes top = s->highest, other = top, sum = {0};
    for (long t = 0; t + 1 < count; t += 2) {
        take_larger(&top, scores + t * stride, &top);
        take_larger(&other, scores + (t + 1) * stride, &other);
    }
    take_larger(&top, scores + (count - 1) * stride, &top);
    take_larger(&top, &other, &top);
    for (long t = 0; t < count; t++) {
        Lanes weight = scores[t * stride] - top;
        exponentials(&weight);
        scores[t * stride] = weight;
        sum += weight;
    }
    *fade = s->highest - top;
    exponentials(fade);
    s->total = s->total * *fade + sum;
    s->highest = top;
}
