// Row by row in memory order: y = activation(x), and
//   dx = dy · activation'(saved) + g · (scale · (x - mean) + shift)
// where each term stands only if its tensors do, the second only in rows that take part in the loss.
// Included inside the namespace of one instruction set.
#pragma once

constexpr int64_t kChunk = 1024;  // values of a row whose coefficients are spread out at a time, in L1

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

  // What a row's values [at, …) of a contiguous run are made from and go to.
  struct Places {
    const T *saved, *dy, *from;
    T* dx;
  };

  Places places(int64_t i, int64_t at) const {
    const int64_t start = at / run * run;
    const T* dy = j.dy ? (const T*)j.dy + i * j.ds.row + at : nullptr;
    const T* saved = j.x ? x(i, start) + (at - start) : dy;  // which the derivative of the identity does not look at
    return {saved, dy, j.rows ? (const T*)j.rows + i * v.U * v.P + at : saved, (T*)j.dx + i * j.ds.row + at};
  }

  struct LossPart {
    Vec<A> mean, scale, shift;
  };

  // The vector at c, or the `width` values that are left: the terms meet in registers before they are rounded.
  template <bool stream, Activation act, bool from_output>
  void vector(const Places& p, int64_t c, int64_t width, const LossPart& loss) const {
    const auto get = [&](const T* from) { return load_up_to(from + c, width); };
    Vec<A> sum = g * (loss.scale * (get(p.from) - loss.mean) + loss.shift);
    if (p.dy) sum += derivative<act, from_output, T>(get(p.saved), get(p.dy), A(j.parameter));
    store_up_to<stream>(p.dx + c, sum, width);
  }

  // A run of whole units, each at least a vector long: where the next one begins inside a vector, lanes are chosen.
  template <bool stream, Activation act, bool from_output>
  void run_of_units(int64_t k, int64_t i, int64_t at) const {
    const Places p = places(i, at);
    const Vec<A> lane = lane_index<A>();
    const auto of = [&](int64_t u) {
      const auto get = [&](const void* from) { return broadcast<A>(from ? ((const A*)from)[k * v.U + u] : A(0)); };
      return LossPart{get(j.mean), get(j.scale), get(j.shift)};
    };
    int64_t u = at / v.P, left = v.P;  // of unit u
    LossPart loss = of(u);
    for (int64_t c = 0; c < run; c += L, left -= L) {
      if (left >= L) {
        vector<stream, act, from_output>(p, c, run - c, loss);
        continue;
      }
      u = u + 1 < v.U ? u + 1 : u;
      const LossPart next = of(u);
      const auto before = lane < A(left);
      vector<stream, act, from_output>(p, c, run - c, {before ? loss.mean : next.mean, before ? loss.scale : next.scale,
                                                       before ? loss.shift : next.shift});
      loss = next;
      left += v.P;
    }
  }

  // A coefficient for each of the values [at, at + len) of a row: where they lie, or else spread out in `room`, up to
  // a vector past their end.
  const A* spread(const void* coefficients, int64_t k, int64_t at, int64_t len, A* room) const {
    const A* from = (const A*)coefficients + k * v.U;
    const int64_t inner = v.spatial ? v.P : v.U, first = at % inner;
    if (!v.spatial && first + len <= inner) return from + first;
    for (int64_t q = 0, u = at / inner, in = first; q < len; ++u, in = 0) {
      const int64_t end = q + inner - in < len ? q + inner - in : len;
      for (int64_t c = in; q < end; q += L, c += L) {
        store<false>(room + q, v.spatial ? broadcast<A>(from[u]) : load_up_to(from + c, end - q));
      }
      q = end;
    }
    return room;
  }

  // Values [at, at + len) of a run, whatever the units.
  template <bool stream, Activation act, bool from_output>
  void chunk(int64_t k, int64_t i, int64_t at, int64_t len) const {
    alignas(64) A room[3][kChunk + L];
    const Places p = places(i, at);
    const A* mean = spread(j.mean, k, at, len, room[0]);
    const A* scale = spread(j.scale, k, at, len, room[1]);
    const A* shift = j.shift ? spread(j.shift, k, at, len, room[2]) : nullptr;
    for (int64_t c = 0; c < len; c += L) {
      const auto get = [&](const A* from) { return load_up_to(from + c, len - c); };
      vector<stream, act, from_output>(p, c, len - c, {get(mean), get(scale), shift ? get(shift) : Vec<A>{}});
    }
  }

  // Row i of sub-batch k.
  template <bool stream, Activation act, bool from_output> void row_with_loss(int64_t k, int64_t i) const {
    const int64_t all = v.U * v.P;
    if (v.spatial && v.P >= L) {
      for (int64_t at = 0; at < all; at += run) run_of_units<stream, act, from_output>(k, i, at);
      return;
    }
    const bool whole = !v.spatial && v.U % L == 0;  // a position begins on a vector: no need to spread coefficients
    for (int64_t at = 0, len; at < all; at += len) {
      len = run - at % run < kChunk ? run - at % run : kChunk;
      if (whole && v.U - at % v.U < len) len = v.U - at % v.U;
      chunk<stream, act, from_output>(k, i, at, len);
    }
  }

  template <bool stream> void row_without_loss(int64_t i) const {
    T* dx = (T*)j.dx + i * j.ds.row;
    const int64_t all = v.U * v.P;
    if (!j.dy) return zero<T, stream>(dx, all);
    for (int64_t start = 0; start < all; start += run) {
      const T* dy = (const T*)j.dy + i * j.ds.row + start;
      differentiate_run<T, stream>(j.activation, j.from_output, j.parameter, j.x ? x(i, start) : dy, dy, dx + start, run);
    }
  }

  template <bool stream> void backward(int64_t i) const {
    if (!j.scale || i >= v.K * v.n) return row_without_loss<stream>(i);
    with_activation(j.activation, [&](auto act) {
      if (j.from_output) row_with_loss<stream, act(), true>(i / v.n, i);
      else row_with_loss<stream, act(), false>(i / v.n, i);
    });
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
