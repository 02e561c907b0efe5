// What a CPU kernel is told: how the tensor is seen, where its data lie, what to write.
// Plain data, no torch: the kernels are compiled once for each instruction set.
#pragma once

#include <cstdint>

namespace vcl {

enum class DType : int { f32, f64, bf16, f16 };
enum class Form : int64_t { none = -1, ratio = 0, variance = 1, relative_variance = 2 };

enum class Activation : int64_t { identity, relu, leaky_relu, elu, gelu, gelu_tanh, silu, tanh };

// x seen as [row, unit, position]. K sub-batches of n consecutive rows; a unit's sample is the n * P values
// of one sub-batch. `spatial`: positions are contiguous (NCHW); otherwise units are (2-D, channels_last,
// and unit="activation", where P = 1).
struct View {
  int64_t N, K, n, U, P;
  bool spatial;
};

struct Strides {
  int64_t row, unit, pos;
};

// A sub-batch is summarised in pieces small enough for an activation to find them in cache: rows [i0, i1) x positions
// [p0, p1). Pieces are a function of the view alone and are merged in order, so that results do not depend
// on how the work is shared between threads.
struct Piece {
  int64_t i0, i1, p0, p1;
  int64_t count() const { return (i1 - i0) * (p1 - p0); }
};

// Values that lie one after another: a whole row where nothing is left out of it, else a unit or a position.
inline int64_t run_length(const View& v, const Strides& s) {
  if (v.spatial) return s.unit == v.P ? v.U * v.P : v.P;
  return s.pos == v.U || v.P == 1 ? v.U * v.P : v.U;
}

// Values of one unit in a piece: 16 KiB of fp32 for contiguous positions; 128 for contiguous units, whose neighbours
// share the cache with them, or all of a sub-batch that is hardly larger.
inline int64_t piece_values(const View& v) { return v.spatial ? 4096 : v.n * v.P <= 256 ? 256 : 128; }

struct Pieces {
  int64_t rows;       // whole rows in a piece, or 1
  int64_t positions;  // positions in a piece
  int64_t by_row, by_pos;
  Pieces(const View& v, int64_t values) {
    rows = v.P >= values ? 1 : (values / v.P < v.n ? values / v.P : v.n);
    positions = v.P <= values ? v.P : values;
    by_row = (v.n + rows - 1) / rows;
    by_pos = (v.P + positions - 1) / positions;
  }
  int64_t size() const { return by_row * by_pos; }
  Piece at(const View& v, int64_t s) const {
    const int64_t i0 = s / by_pos * rows, p0 = s % by_pos * positions;
    return {i0, i0 + rows < v.n ? i0 + rows : v.n, p0, p0 + positions < v.P ? p0 + positions : v.P};
  }
};

struct Job {
  View view;
  Strides xs, ds;  // of x; of dx, y and dy
  const void* x;   // in backward: what was saved, x or y
  void* dx;        // null: no gradient wanted

  const void* beta;  // null: `beta_value` for every unit
  int64_t beta_step;  // 0: one beta, 1: one for each unit
  double beta_value, beta_min;
  Form form;
  double factor;  // multiplies the loss and its gradients

  // Results, each null when not wanted. Per unit: loss, dbeta. Per (sub-batch, unit): mean, var, scale, shift.
  void *loss, *dbeta, *mean, *var, *scale;
  const void* shift;
  double *loss_sum, *dbeta_sum;  // one for each block of units

  // The activation beside the loss. In backward each is null where its term is missing.
  Activation activation;
  double parameter;
  bool from_output;  // saved is y
  void* y;           // null: loss alone. Without its activation (identity): the rows that take part
  void* rows;        // dense copy of the rows that take part beside y: written by forward, read by backward
  const void *dy, *g;  // upstream gradients of y and of the loss (one value)

  // Split runs: in float64, [K, pieces, U in whole vectors]. No piece_mean where one piece is all of a sub-batch.
  void *piece_mean, *piece_m2;
  int64_t column;               // units of a piece that are taken at a time, a multiple of 16 unless all
  int64_t block;                // units in a block, a multiple of 16 unless one block holds all
  bool joined;                  // spatial: the units of a block lie one after another and are written as one run
  bool stream;                  // dx or y by non-temporal stores
};

// The entry points of one instruction set for one dtype; each does the tasks [begin, end).
struct Kernels {
  // Task: a block of units. Moments, loss, coefficients and gradient while the block is in cache.
  void (*blocks)(const Job&, int64_t begin, int64_t end);
  // Task: a column of a piece of a sub-batch: writes piece_m2 and piece_mean or, where one piece is all of it, mean.
  void (*pieces)(const Job&, int64_t begin, int64_t end);
  // Task: a block of units, from piece_mean and piece_m2.
  void (*finish)(const Job&, int64_t begin, int64_t end);
  // Task: a row; see rows.h.
  void (*activations)(const Job&, int64_t begin, int64_t end);
  void (*gradients)(const Job&, int64_t begin, int64_t end);
};

namespace baseline { Kernels kernels(DType); }
namespace avx2 { Kernels kernels(DType); }
namespace avx512 { Kernels kernels(DType); }

}  // namespace vcl
