// The loss of a unit and its derivatives by the sub-batch variances and by beta; the table of the README.
// Everything here is elementwise over a vector of units.
#pragma once

#include "vec.h"

namespace vcl::VCL_ISA {

// H vectors of units: var[k][h] becomes to_scale · dL/dv_k; loss[h], and dL/dbeta in dbeta[h], are written.
template <int H> inline void loss_of_variances(Form form, double to_scale, int64_t K, Vec<double> (*var)[H],
                                               const Vec<double>* beta, Vec<double>* loss, Vec<double>* dbeta) {
  for (int h = 0; h < H; ++h) loss[h] = dbeta[h] = Vec<double>{};
  if (form == Form::ratio) {  // mean over pairs (a, b) of (1 - r)^2, r = v_a / (v_b + beta)
    const double share = 1 / double(K / 2);
    for (int64_t k = 0; k + 1 < K; k += 2) {
      for (int h = 0; h < H; ++h) {
        const Vec<double> inverse = 1.0 / (var[k + 1][h] + beta[h]), r = var[k][h] * inverse, rest = 1.0 - r;
        const Vec<double> slope = 2 * share * rest * inverse, by_b = slope * r;
        loss[h] += rest * rest * share;
        dbeta[h] += by_b;
        var[k][h] = -to_scale * slope;
        var[k + 1][h] = to_scale * by_b;
      }
    }
    return;
  }
  // V = sum (v_k - vbar)^2 / (K - 1), from differences to v_0: equal variances give 0 exactly, and a large common value
  // cancels no digits
  Vec<double> sum[H] = {}, squares[H] = {}, vbar[H], slope[H], by_all[H];
  for (int64_t k = 1; k < K; ++k) {
    for (int h = 0; h < H; ++h) {
      const Vec<double> d = var[k][h] - var[0][h];
      sum[h] += d;
      squares[h] += d * d;
    }
  }
  for (int h = 0; h < H; ++h) {
    const Vec<double> offset = sum[h] * (1 / double(K)), V = (squares[h] - sum[h] * offset) * (1 / double(K - 1));
    vbar[h] = var[0][h] + offset;
    loss[h] = V;
    slope[h] = broadcast<double>(to_scale * 2 / double(K - 1));
    by_all[h] = Vec<double>{};
    if (form == Form::variance) continue;
    const Vec<double> inverse = 1.0 / (vbar[h] + beta[h]), inverse2 = inverse * inverse;  // V / (vbar + beta)^2
    loss[h] = V * inverse2;
    dbeta[h] = -2.0 * loss[h] * inverse;
    slope[h] *= inverse2;
    by_all[h] = dbeta[h] * (to_scale / double(K));
  }
  for (int64_t k = 0; k < K; ++k) {
    for (int h = 0; h < H; ++h) var[k][h] = slope[h] * (var[k][h] - vbar[h]) + by_all[h];
  }
}

}  // namespace vcl::VCL_ISA
