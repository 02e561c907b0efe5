// What the kernels use, included before a file switches to its instruction set.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "job.h"

#if defined(VCL_MVEC)
#define VCL_DECLARE(name)           \
  __m256d _ZGVdN4v_##name(__m256d); \
  __m512d _ZGVeN8v_##name(__m512d);
extern "C" {
VCL_DECLARE(exp)
VCL_DECLARE(expm1)
VCL_DECLARE(erf)
VCL_DECLARE(tanh)
}
#undef VCL_DECLARE
#endif
