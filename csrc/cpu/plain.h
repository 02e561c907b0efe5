// The values that travel whole, and the jobs that ops give to kernels. Plain data, no torch: the kernels are compiled
// once for each instruction set.
#pragma once

#include <cstdint>
#include <type_traits>

namespace vcl {

// ---- numbers: kernels read and write T, and compute in acc_t<T>

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };
template <class T> using acc_t = std::conditional_t<sizeof(T) == 8, double, float>;

// ---- what was asked for; enumerators in the order of options.py

enum class Form : int64_t { ratio, variance, relative_variance };
constexpr int kForms = static_cast<int>(Form::relative_variance) + 1;  // of the last enumerator
enum class Activation : int64_t { identity, relu, leaky_relu, elu, gelu, gelu_tanh, silu, tanh };
constexpr int kActivations = static_cast<int>(Activation::tanh) + 1;  // likewise

struct ActivationSpec {
  Activation kind;
  double parameter;  // alpha of elu, negative_slope of leaky_relu
};

struct SubBatches {
  int64_t n, K;
  bool per_activation;
};

struct LossSpec {
  double beta_value, beta_min;
  SubBatches sub_batches;
  Form form;
  double factor;  // multiplies the loss and its gradients
  bool reduce;    // one value, not one for each unit
};

// The beta that acts. V: one number, or a vector of units. (Inlined, so that no instruction set uses another's code.)
template <class V> [[gnu::always_inline]] inline V bounded_beta(V beta, V beta_min) {
  return beta < beta_min ? beta_min : beta;
}

// dL/dbeta, without what would push a beta below its bound further down.
template <class V> [[gnu::always_inline]] inline V projected_gradient(V dbeta, V beta, V beta_min) {
  return (beta < beta_min) & (dbeta >= V{}) ? V{} : dbeta;
}

// ---- how a tensor is seen

struct Strides {
  int64_t row, unit, pos;
  int64_t offset(int64_t r, int64_t u) const { return r * row + u * unit; }
};

// [row, unit, position]. `spatial`: a unit's positions are contiguous (NCHW); otherwise neighbouring units are (2-D,
// channels_last, and unit="activation", where P = 1).
struct Geometry {
  int64_t N, K, n, U, P;
  bool spatial;
  Strides strides;

  int64_t M() const { return n * P; }
  int64_t row_values() const { return U * P; }
  int64_t rows_with_loss() const { return K * n; }
  // Values in a run: a whole row where the row has no gaps, else a unit or a position.
  int64_t run() const {
    if (spatial) return strides.unit == P ? U * P : P;
    return strides.pos == U || P == 1 ? U * P : U;
  }
  int64_t run_stride() const { return spatial ? strides.unit : strides.pos; }
};

// Rows [i0, i1) x positions [p0, p1) of a sub-batch, for every unit.
struct Part {
  int64_t i0, i1, p0, p1;
  int64_t count() const { return (i1 - i0) * (p1 - p0); }
};

// The parts of a sub-batch, each small enough that the activation finds it in cache after the moments. They follow from
// the geometry alone and are merged in order: results do not depend on how threads share the work.
struct Parts {
  int64_t n, P;
  int64_t most;                       // values of one unit in a part
  int64_t part_rows, part_positions;  // a part is whole rows, or positions of one row
  int64_t by_pos;                     // parts of one row

  // 16 KiB of float32 for contiguous positions. For contiguous units 128 values, because neighbours share the cache;
  // or all of a sub-batch that is hardly larger.
  explicit Parts(const Geometry& g) : n(g.n), P(g.P), most(g.spatial ? 4096 : g.M() <= 256 ? 256 : 128) {
    part_rows = P >= most ? 1 : (most / P < n ? most / P : n);
    part_positions = P <= most ? P : most;
    by_pos = (P + part_positions - 1) / part_positions;
  }
  int64_t size() const { return (n + part_rows - 1) / part_rows * by_pos; }
  Part at(int64_t s) const {
    const int64_t i0 = s / by_pos * part_rows, p0 = s % by_pos * part_positions;
    return {i0, i0 + part_rows < n ? i0 + part_rows : n, p0, p0 + part_positions < P ? p0 + part_positions : P};
  }
};

// dx = scale · (x - mean) + shift. Each: a tensor, a pointer to its data, or a vector of values.
template <class Each> struct Coefficients { Each mean, scale, shift; };

// ---- what kernels are told, for storage type T: where the data lie, what to write, how the work is cut

// The loss, and where its results go. A pointer is null where that result is not wanted.
template <class A> struct LossJob {
  LossSpec spec;
  const A* beta;  // null: spec.beta_value for every unit
  bool beta_per_unit;
  A *loss, *dbeta;                 // one for each unit
  double *loss_sums, *dbeta_sums;  // one for each block of units, zero before
  Coefficients<A*> coefficients;   // mean and scale; no shift
  A* var;                          // of each sub-batch and unit, where moments alone are wanted
};

// How the work of forward is cut.
struct Plan {
  bool split;                   // tasks: parts and then `finalise`, otherwise blocks
  int64_t block_units, blocks;  // units in a block, a multiple of 16 unless one holds all; how many blocks
  int64_t part_block_units;     // units in a block of a part, likewise
  int64_t all_parts;            // of all sub-batches
  int64_t moments_per_part;     // float64 moments of a part: m2, and the mean unless it is final
  bool joined;                  // spatial: the units of a block lie one after another and are written as one run
  bool stream;                  // write by non-temporal stores, if the result is aligned
  int64_t rest;                 // last rows, whose activation alone is wanted
  int64_t elements;             // that are read
};

template <class T> struct ForwardJob {
  Geometry g;
  const T* x;
  LossJob<acc_t<T>> loss;
  T *dx, *y;        // rows to be written: one of them, or none. y: the activation, or by the identity `rows`
  Strides strides;  // of dx or y
  T* rows;          // a dense copy of the rows that take part, beside y
  ActivationSpec activation;
  Plan plan;
  // Moments of parts, [K, parts, U in whole vectors]. No part_mean where one part is all of a sub-batch.
  double *part_mean, *part_m2;
};

// dx = dy · activation'(saved) + upstream · (scale · (x - mean) + shift). Pointers of a term that is missing are null.
template <class T> struct BackwardJob {
  Geometry g;                  // of what was saved, with N rows
  const T *saved, *rows, *dy;  // saved: x, or y if from_output; rows: null if `saved` is x
  bool from_output;
  ActivationSpec activation;
  Coefficients<const acc_t<T>*> coefficients;
  acc_t<T> upstream;  // gradient of the loss
  T* dx;
  Strides strides;  // of dx and dy
  bool stream;
};

// The entry points of one instruction set; each does the tasks [begin, end).
template <class T> struct Kernels {
  using Forward = void(const ForwardJob<T>&, int64_t begin, int64_t end);
  Forward* blocks;    // task: a block. Moments, loss, coefficients and dx (one_pass) while the block is in cache
  Forward* parts;     // task: a block of a part. Writes part_m2 and part_mean or, where one part is all, mean
  Forward* finalise;  // task: a block. Merges parts; loss and coefficients
  Forward* activate;  // task: a row, which takes no part in the loss
  void (*backward)(const BackwardJob<T>&, int64_t begin, int64_t end);  // task: a row
};

namespace baseline { template <class T> Kernels<T> kernels(); }
namespace avx2 { template <class T> Kernels<T> kernels(); }
namespace avx512 { template <class T> Kernels<T> kernels(); }

}  // namespace vcl
