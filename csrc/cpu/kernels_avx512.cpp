// The kernels for AVX-512; only entered where the processor has it.
#include "includes.h"

#define VCL_ISA avx512
#define VCL_LEVEL 2
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#include "kernels.h"
#endif
