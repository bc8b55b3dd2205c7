#pragma once
#define VECTOR_BYTES 64
#define TILE_ROWS 8
#define ACCUMULATORS 24
#include "vec.h"
