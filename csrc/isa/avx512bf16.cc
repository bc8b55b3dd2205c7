#define ISA avx512bf16
#define FLOAT64_OF avx512
#include "../simd/avx512bf16.h"

#include "../core/table.h"
