// The kernels of one instruction set, for every storage type.
#pragma once

#include "backward.h"
#include "forward.h"

namespace vcl::VCL_ISA {

template <class T> Kernels<T> kernels() {
  using F = Forward<T>;
  return {&F::blocks, &F::part_tasks, &F::finalise, &F::activate_rows, &Backward<T>::rows};
}
template Kernels<float> kernels();
template Kernels<double> kernels();
template Kernels<bf16> kernels();
template Kernels<f16> kernels();

}  // namespace vcl::VCL_ISA
