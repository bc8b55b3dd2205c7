#define ISA baseline
#include "../simd/baseline.h"

#include "../core/table.h"
