// The instruction set of a translation unit. Each kernels_*.cpp sets VCL_LEVEL: 0 portable, 1 AVX2, 2 AVX-512. (GCC 12
// reads a whole file before its target pragmas, so the compiler's own macros do not tell.) Headers of kernels include
// this file first and define everything in namespace vcl::VCL_ISA: no instruction set links to the code of another.
#pragma once

#ifndef VCL_LEVEL
#define VCL_LEVEL 0
#endif

// Included before the pragma: these functions must run on every processor.
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>
#include <utility>
#if VCL_LEVEL > 0
#include <immintrin.h>
#endif

#include "plain.h"

#if VCL_LEVEL == 2
#define VCL_ISA avx512
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#elif VCL_LEVEL == 1
#define VCL_ISA avx2
#pragma GCC target("avx2,fma,f16c")
#else
#define VCL_ISA baseline
#endif
