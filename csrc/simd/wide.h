#pragma once
#define VECTOR_BYTES 64
#define TILE_ROWS 3
#define ACCUMULATORS 6
#include "vec.h"
