// The loss of a unit and its derivatives by the sub-batch variances and by beta; the table of the README.
// Everything here is elementwise over a vector of units. Included inside the namespace of one instruction set.
#pragma once

// In: var[k]. Out: var[k] becomes dL/dv_k (before `factor`); returns the loss, and dL/dbeta in *dbeta.
template <class A>
inline Vec<A> form_and_derivatives(Form form, Vec<A>* var, int64_t step, int64_t K, Vec<A> beta, Vec<A>* dbeta) {
  const Vec<A> zero = {};
  *dbeta = zero;
  if (form == Form::ratio) {  // mean over pairs (a, b) of (1 - r)^2, r = v_a / (v_b + beta)
    const A share = A(1) / A(K / 2);
    Vec<A> loss = zero;
    for (int64_t k = 0; k + 1 < K; k += 2) {
      Vec<A>&va = var[k * step], &vb = var[(k + 1) * step];
      const Vec<A> inverse = A(1) / (vb + beta), r = va * inverse, rest = A(1) - r;
      loss += rest * rest * share;
      const Vec<A> slope = A(2) * share * rest * inverse;
      va = -slope;
      vb = slope * r;
      *dbeta += vb;
    }
    return loss;
  }
  // V = sum (v_k - vbar)^2 / (K - 1), from differences to v_0, which a common part leaves, and which equal ones make 0
  const Vec<A> first = var[0];
  Vec<A> sum = zero, squares = zero;
  for (int64_t k = 1; k < K; ++k) {
    const Vec<A> d = var[k * step] - first;
    sum += d;
    squares += d * d;
  }
  const Vec<A> offset = sum * (A(1) / A(K)), vbar = first + offset, V = (squares - sum * offset) * (A(1) / A(K - 1));
  const A twice = A(2) / A(K - 1);
  if (form == Form::variance) {
    for (int64_t k = 0; k < K; ++k) var[k * step] = twice * (var[k * step] - vbar);
    return V;
  }
  const Vec<A> inverse = A(1) / (vbar + beta), inverse2 = inverse * inverse;  // V / (vbar + beta)^2
  const Vec<A> by_vbar = A(-2) * V * inverse2 * inverse;
  const Vec<A> slope = twice * inverse2, by_all = by_vbar * (A(1) / A(K));
  for (int64_t k = 0; k < K; ++k) {
    var[k * step] = slope * (var[k * step] - vbar) + by_all;
  }
  *dbeta = by_vbar;
  return V * inverse2;
}

// beta never acts below beta_min; there its gradient may only raise it (a projected gradient).
template <class A> inline Vec<A> bounded_gradient(Vec<A> dbeta, Vec<A> beta, A beta_min) {
  return (beta >= beta_min) | (dbeta < A(0)) ? dbeta : Vec<A>{};
}
