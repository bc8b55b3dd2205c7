// AVX-512 as far as AVX2 can stand in for it: vectors of 64 bytes made of two registers, and the dot products of
// AVX512_BF16 by their definition.
#pragma once
#define VECTOR_BYTES 64
#define TILE_ROWS 3
#define ACCUMULATORS 6
#define HAS_DOT_PRODUCTS
#define DOT_PRODUCT(sum, a, b)                                                       \
  ((sum) + (Raw<float>::type)((a) & -0x10000) * (Raw<float>::type)((b) & -0x10000) + \
   (Raw<float>::type)((a) << 16) * (Raw<float>::type)((b) << 16))
#include "vec.h"
