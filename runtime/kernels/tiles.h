/* The configuration of Intel's matrix unit (AMX), as the processor reads it. */
#pragma once
#include <stdint.h>

#ifdef __AMX_BF16__
#include <immintrin.h>

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} __attribute__((packed)) TileShapes;
#endif
