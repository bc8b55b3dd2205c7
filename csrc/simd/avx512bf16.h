#pragma once
#include <immintrin.h>
#define VECTOR_BYTES 64
#define TILE_ROWS 8
#define ACCUMULATORS 24
#define HAS_DOT_PRODUCTS
#define DOT_PRODUCT(sum, a, b) ((Raw<float>::type)_mm512_dpbf16_ps((__m512)(sum), (__m512bh)(a), (__m512bh)(b)))
#include "vec.h"
