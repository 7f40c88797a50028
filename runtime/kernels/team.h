#pragma once

typedef void (*Work)(void *data, long item);

/* Does items 0 to `items` - 1 in any order, on up to `threads` threads. */
void each_item(Work work, void *data, long items, int threads);
