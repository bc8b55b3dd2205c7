#pragma once
#define VECTOR_BYTES 16
#define TILE_ROWS 6
#define ACCUMULATORS 24
#include "vec.h"
