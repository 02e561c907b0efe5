// The kernels for AVX-512; only entered where the processor has it.
#if defined(__x86_64__)
#define VCL_LEVEL 2
#include "kernels.h"
#endif
