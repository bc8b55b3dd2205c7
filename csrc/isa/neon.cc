#define ISA neon
#include "../simd/neon.h"

#include "../core/table.h"
