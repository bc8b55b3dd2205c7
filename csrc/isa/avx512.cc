#define ISA avx512
#include "../simd/avx512.h"

#include "../core/table.h"
