// The kernels for any processor.
#include "includes.h"

#define VCL_ISA baseline
#define VCL_LEVEL 0
#include "kernels.h"
