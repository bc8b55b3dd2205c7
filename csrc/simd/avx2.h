#pragma once
#define VECTOR_BYTES 32
#define TILE_ROWS 6
#define ACCUMULATORS 12
#include "vec.h"
