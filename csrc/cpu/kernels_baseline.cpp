// The kernels for any processor.
#include "kernels.h"
