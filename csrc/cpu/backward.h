// Row by row in memory order:
//   dx = dy · activation'(saved) + upstream · (scale · (x - mean) + shift)
// A term without tensors is left out. Rows that take no part have no second term.
#pragma once

#include "activations.h"
#include "one_pass.h"

namespace vcl::VCL_ISA {

constexpr int64_t kChunk = 1024;  // values of a row whose coefficients are expanded at a time, in L1

template <class T> struct Backward {
  using A = acc_t<T>;
  static constexpr int64_t L = lanes<A>;

  const BackwardJob<T>& j;
  const Geometry& g;
  const int64_t run, row_values;
  explicit Backward(const BackwardJob<T>& job) : j(job), g(job.g), run(g.run()), row_values(g.row_values()) {}

  // Where the values of row i from `at` on, within a run, are read and written.
  struct Row {
    const T *saved, *dy, *x;
    T* dx;
  };

  Row row(int64_t i, int64_t at) const {
    const int64_t saved_at = i * g.strides.row + at / run * g.run_stride() + at % run, to = i * j.strides.row + at;
    const T* saved = j.saved + saved_at;
    return {saved, j.dy ? j.dy + to : nullptr, j.rows ? j.rows + i * row_values + at : saved, j.dx + to};
  }

  // A run of whole units, each at least a vector long: where the next one begins inside a vector, lanes are chosen.
  template <class F> void run_of_units(int64_t k, int64_t i, int64_t at, const F& write) const {
    const Row r = row(i, at);
    const Vec<A> lane = lane_index<A>();
    const auto of = [&](int64_t u) {
      const auto get = [&](const A* from) { return broadcast<A>(from ? from[k * g.U + u] : A(0)); };
      return Coefficients<Vec<A>>{get(j.coefficients.mean), get(j.coefficients.scale), get(j.coefficients.shift)};
    };
    int64_t u = at / g.P, left = g.P;  // of unit u
    Coefficients<Vec<A>> here = of(u);
    for (int64_t c = 0; c < run; c += L, left -= L) {
      if (left >= L) {
        write(r, c, run - c, here);
        continue;
      }
      u = u + 1 < g.U ? u + 1 : u;
      const Coefficients<Vec<A>> next = of(u);
      const auto before = lane < A(left);
      const auto choose = [&](Vec<A> a, Vec<A> b) { return before ? a : b; };
      write(r, c, run - c,
            {choose(here.mean, next.mean), choose(here.scale, next.scale), choose(here.shift, next.shift)});
      here = next;
      left += g.P;
    }
  }

  // Coefficients of the values [at, at + len) of a row: a pointer to where they already lie, or `room` filled with them
  // (up to a vector past the end).
  const A* expanded(const A* coefficients, int64_t k, int64_t at, int64_t len, A* room) const {
    const A* from = coefficients + k * g.U;
    if (g.spatial) return repeat(from, g.P, at, len, room), room;
    const int64_t first = at % g.U;
    if (first + len <= g.U) return from + first;
    for (int64_t q = 0, u = first; q < len; u = 0) {
      const int64_t end = q + g.U - u < len ? q + g.U - u : len;
      for (; q < end; q += L, u += L) store<false>(room + q, load_up_to(from + u, end - q));
      q = end;
    }
    return room;
  }

  // Values [at, at + len) of a run, whatever the units.
  template <class F> void chunk(int64_t k, int64_t i, int64_t at, int64_t len, const F& write) const {
    alignas(64) A room[3][kChunk + L];
    const Row r = row(i, at);
    const A* mean = expanded(j.coefficients.mean, k, at, len, room[0]);
    const A* scale = expanded(j.coefficients.scale, k, at, len, room[1]);
    const A* shift = j.coefficients.shift ? expanded(j.coefficients.shift, k, at, len, room[2]) : nullptr;
    for (int64_t c = 0; c < len; c += L) {
      const auto get = [&](const A* from) { return load_up_to(from + c, len - c); };
      write(r, c, len - c, {get(mean), get(scale), shift ? get(shift) : Vec<A>{}});
    }
  }

  // Row i of sub-batch k.
  template <bool stream, Activation act, bool from_output> void row_with_loss(int64_t k, int64_t i) const {
    // The vector at c, or the `width` values that are left: the terms meet in registers before they are rounded.
    const auto write = [&](const Row& r, int64_t c, int64_t width, const Coefficients<Vec<A>>& of) {
      const auto get = [&](const T* from) { return load_up_to(from + c, width); };
      Vec<A> sum = j.upstream * (dx_of<A>(get(r.x), of.mean, of.scale) + of.shift);
      if (r.dy) sum += activation_gradient<act, from_output, T>(get(r.saved), get(r.dy), A(j.activation.parameter));
      store_up_to<stream>(r.dx + c, sum, width);
    };
    if (g.spatial && g.P >= L) {
      for (int64_t at = 0; at < row_values; at += run) run_of_units(k, i, at, write);
      return;
    }
    const bool whole = !g.spatial && g.U % L == 0;  // a position begins on a vector: no need to expand coefficients
    for (int64_t at = 0, len; at < row_values; at += len) {
      len = run - at % run < kChunk ? run - at % run : kChunk;
      if (whole && g.U - at % g.U < len) len = g.U - at % g.U;
      chunk(k, i, at, len, write);
    }
  }

  template <bool stream> void row_without_loss(int64_t i) const {
    if (!j.dy) return zero_run<T, stream>(j.dx + i * j.strides.row, row_values);
    for (int64_t at = 0; at < row_values; at += run) {
      const Row r = row(i, at);
      activation_gradient_run<T, stream>(j.activation, j.from_output, r.saved, r.dy, r.dx, run);
    }
  }

  template <bool stream> void any_row(int64_t i) const {
    if (!j.coefficients.scale || i >= g.rows_with_loss()) return row_without_loss<stream>(i);
    with_activation(j.activation.kind, [&](auto act) {
      with_flag(j.from_output, [&](auto output) { row_with_loss<stream, act(), output()>(i / g.n, i); });
    });
  }

  static void rows(const BackwardJob<T>& j, int64_t begin, int64_t end) {
    const Backward b(j);
    with_flag(j.stream, [&](auto stream) {
      for (int64_t i = begin; i < end; ++i) b.template any_row<stream()>(i);
    });
    if (j.stream) stream_fence();
  }
};

}  // namespace vcl::VCL_ISA
