#pragma once
#define VECTOR_BYTES 16
#define TILE_ROWS 2
#define ACCUMULATORS 8
#include "vec.h"
