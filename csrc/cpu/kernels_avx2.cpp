// The kernels for AVX2; only entered where the processor has it.
#include "includes.h"

#define VCL_ISA avx2
#define VCL_LEVEL 1
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c")
#include "kernels.h"
#endif
