#define ISA wide
#include "../simd/wide.h"

#include "../core/table.h"
