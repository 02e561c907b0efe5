// Row by row in memory order: y = activation(x), and
//   dx = dy · activation'(saved) + g · (scale · (x - mean) + shift)
// where each term stands only if its tensors do, the second only in rows that take part in the loss.
// Included inside the namespace of one instruction set.
#pragma once

constexpr int64_t kChunk = 512;  // values of a row with a loss part that are worked on in L1 at a time

template <class T> struct Rows {
  using A = acc_t<T>;
  static constexpr int64_t L = lanes<A>;

  const Job& j;
  const View& v;
  const int64_t run;  // contiguous values: all of a row, or of a unit or a position
  const A g;
  explicit Rows(const Job& job)
      : j(job), v(job.view), run(run_length(job.view, job.xs)), g(job.g ? *(const A*)job.g : A(1)) {}

  const T* x(int64_t i, int64_t at) const {
    return (const T*)j.x + i * j.xs.row + (run == v.U * v.P ? 0 : at / run * (v.spatial ? j.xs.unit : j.xs.pos));
  }

  // out += g * (scale * (x - mean) + shift) for values [at, at + len) of a row of sub-batch k.
  void add_loss_part(int64_t k, int64_t at, int64_t len, const T* from, A* out) const {
    const A *m = (const A*)j.mean + k * v.U, *a = (const A*)j.scale + k * v.U;
    const A* b = j.shift ? (const A*)j.shift + k * v.U : nullptr;
    const int64_t inner = v.spatial ? v.P : v.U;
    for (int64_t q = 0, u = at / inner, in = at % inner; q < len; ++u, in = 0) {
      const int64_t end = q + inner - in < len ? q + inner - in : len;
      for (int64_t c = in; q < end; q += L, c += L) {
        const int64_t width = end - q;
        const auto coefficient = [&](const A* p) { return v.spatial ? broadcast<A>(p[u]) : load_up_to(p + c, width); };
        Vec<A> part = coefficient(a) * (load_up_to(from + q, width) - coefficient(m));
        if (b) part += coefficient(b);
        store_up_to<false>(out + q, load(out + q) + g * part, width);
      }
      q = end;
    }
  }

  // A run of a row that takes part: through a buffer in which the terms meet before they are rounded.
  template <bool stream>
  void run_with_loss(int64_t k, int64_t start, const T* saved, const T* dy, const T* from, T* dx) const {
    alignas(64) A out[kChunk + L];
    for (int64_t q = 0; q < run; q += kChunk) {
      const int64_t here = q + kChunk < run ? kChunk : run - q;
      if (!dy) std::memset(out, 0, here * sizeof(A));
      else differentiate_run<T, A, false>(j.activation, j.from_output, j.parameter, saved + q, dy + q, out, here);
      add_loss_part(k, start + q, here, from + q, out);
      for (int64_t c = 0; c < here; c += L) store_up_to<stream>(dx + q + c, load(out + c), here - c);
    }
  }

  template <bool stream> void backward(int64_t i) const {
    T* dx = (T*)j.dx + i * j.ds.row;
    const int64_t all = v.U * v.P, k = i / v.n;
    const bool takes_part = k < v.K && j.scale;
    if (!takes_part && !j.dy) return zero<T, stream>(dx, all);
    for (int64_t start = 0; start < all; start += run) {
      const T* dy = j.dy ? (const T*)j.dy + i * j.ds.row + start : nullptr;
      const T* saved = j.x ? x(i, start) : dy;  // which the derivative of the identity does not look at
      if (takes_part) {
        const T* from = j.rows ? (const T*)j.rows + i * all + start : saved;
        run_with_loss<stream>(k, start, saved, dy, from, dx + start);
      } else {
        differentiate_run<T, T, stream>(j.activation, j.from_output, j.parameter, saved, dy, dx + start, run);
      }
    }
  }

  template <bool stream> void forward(int64_t i) const {
    T* y = (T*)j.y + i * j.ds.row;
    for (int64_t start = 0; start < v.U * v.P; start += run) {
      activate_run<T, stream>(j.activation, j.parameter, x(i, start), y + start, run);
    }
  }

  static void gradients(const Job& j, int64_t begin, int64_t end) {
    const Rows r(j);
    for (int64_t i = begin; i < end; ++i) {
      if (j.stream) r.template backward<true>(i);
      else r.template backward<false>(i);
    }
    if (j.stream) stream_fence();
  }

  static void activations(const Job& j, int64_t begin, int64_t end) {
    const Rows r(j);
    for (int64_t i = begin; i < end; ++i) {
      if (j.stream) r.template forward<true>(i);
      else r.template forward<false>(i);
    }
    if (j.stream) stream_fence();
  }
};
