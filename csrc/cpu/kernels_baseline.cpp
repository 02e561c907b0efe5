// The kernels for any processor.
#include "includes.h"

#define VCL_ISA baseline
#include "kernels.h"
