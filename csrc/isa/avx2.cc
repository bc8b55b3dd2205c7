#define ISA avx2
#include "../simd/avx2.h"

#include "../core/table.h"
