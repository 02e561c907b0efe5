// How the work of forward is cut into tasks: decided from plain values, before anything is allocated.
#pragma once

#include <algorithm>

#include "plain.h"

namespace vcl {

// What forward is asked for.
enum class Want { loss, dx, moments, coefficients, activation };

struct Request {
  Want want;
  LossSpec spec;  // for moments, only its sub_batches
  bool beta_grad = false, keep_rows = false;
  ActivationSpec activation = {};  // the identity

  bool wants_loss() const { return want != Want::moments; }
  bool wants_coefficients() const { return want == Want::coefficients || want == Want::activation; }
  // Whether rows are written: y, or the copied rows that take part.
  bool writes_rows() const { return want == Want::activation || keep_rows; }
};

constexpr int64_t kSerial = 32768;              // elements under which starting threads costs more than it gains
constexpr int64_t kFinalise = 8;                // cost of a unit's coefficients, per part, in elements
constexpr int64_t kBlockBytes = 512 << 10;      // of x in a block of units: it is read again from L2
constexpr int64_t kUnitBlockBytes = 256 << 10;  // where units are contiguous: rows far apart share few cache sets
constexpr int64_t kStreamLater = 4 << 20;       // least bytes of a result that is used only later, out of cache
constexpr int64_t kStreamNext = 16 << 20;       // least bytes of one that the next layer reads at once, perhaps from L3
constexpr int64_t kJoinedRun = 8192;            // values in a run of units, with their coefficients in cache
constexpr int64_t kPartBlockBytes = 256 << 10;  // of x in a block of a part: its activation finds it in L2
constexpr int64_t kPartMoments = 4 << 20;       // bytes of the moments of parts that may exceed half of x

template <class T> bool aligned(const T* result) { return reinterpret_cast<uintptr_t>(result) % 64 == 0; }
constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Units in a block: as many as stay in L2; contiguous units at least 256 bytes wide. Spatial units that do not end
// on a vector are taken in sixteens where the results are streamed, so that every block begins on one.
inline int64_t units_in_block(const Geometry& g, int64_t size) {
  const int64_t sample = std::max<int64_t>(1, g.K * g.M() * size);
  if (!g.spatial) return std::clamp<int64_t>(kUnitBlockBytes / sample / 64 * 64, 64, 1024);
  const int64_t fit = std::clamp<int64_t>(kBlockBytes / sample, 1, std::max<int64_t>(1, g.U / 16));
  const bool sixteens = g.P % 16 && g.P * 16 <= kJoinedRun && g.N * g.row_values() * size >= kStreamLater;
  return sixteens ? divide_up(fit, 16) * 16 : fit;
}

// Whether a block writes its units as one run. A gradient only where units do not end on a vector: its coefficients
// must be repeated for each value.
inline bool joins(const Geometry& g, const Strides& out, const Request& q, int64_t block_units) {
  const bool wanted = q.want == Want::dx ? g.P % 16 != 0 : q.writes_rows();
  return wanted && g.spatial && g.strides.unit == g.P && out.unit == g.P && g.P <= Parts(g).most &&
         block_units * g.P <= kJoinedRun;
}

// Whether to take parts in memory order: too few blocks to share, or contiguous units, whose samples lie far apart; but
// not if the moments of parts are much beside x.
inline bool splits(const Geometry& g, const Request& q, const Plan& p, int64_t size, int64_t threads) {
  const int64_t values = g.U * g.K * g.M();
  if (q.want == Want::dx || values < kSerial) return false;
  const bool small = p.moments_per_part * p.all_parts * g.U * 8 <= std::max(kPartMoments, values * size / 2);
  return (!g.spatial && small) || p.blocks < 2 * threads;
}

// Whether a result is large enough for non-temporal stores, and its rows and runs begin on whole vectors if it does.
// `next`: the next layer reads it at once, otherwise it is long cold when it is wanted.
inline bool streams(const Geometry& g, int64_t row_stride, int64_t run, int64_t size, bool next) {
  return g.N * g.row_values() * size >= (next ? kStreamNext : kStreamLater) && (row_stride | run) * size % 64 == 0;
}

// `out`: strides of the rows to be written. `size`: bytes of an element.
inline Plan plan_forward(const Geometry& g, const Strides& out, const Request& q, int64_t size, int64_t threads) {
  Plan p{};
  p.block_units = units_in_block(g, size);
  p.joined = joins(g, out, q, p.block_units);
  const bool next = q.want == Want::activation;
  const int64_t gap = g.spatial ? out.unit | g.P : out.pos | g.U;
  const int64_t run = p.joined ? p.block_units * g.P : g.P == 1 ? g.U : gap;  // that a block writes at a time
  p.stream = (next || q.want == Want::dx) && streams(g, out.row, run, size, next);
  p.blocks = divide_up(g.U, p.block_units);
  p.all_parts = g.K * Parts(g).size();
  p.moments_per_part = p.all_parts > g.K ? 2 : 1;
  p.split = splits(g, q, p, size, threads);
  if (p.split) {
    p.block_units = 64, p.blocks = divide_up(g.U, 64);
    const int64_t part_bytes = g.K * g.M() / p.all_parts * size;  // of a unit
    p.part_block_units = std::clamp<int64_t>(kPartBlockBytes / part_bytes / 64 * 64, 64, std::max<int64_t>(64, g.U));
  }
  p.rest = next ? g.N - g.rows_with_loss() : 0;
  p.elements = g.U * (g.K * g.M() + p.rest * g.P);
  return p;
}

}  // namespace vcl
