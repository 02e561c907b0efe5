// The kernels for AVX2; only entered where the processor has it.
#if defined(__x86_64__)
#define VCL_LEVEL 1
#include "kernels.h"
#endif
