// What an instruction set offers for QLinear. Filled by the isa_*.cc files, chosen in qlinear.cc.
#ifndef ONNX_QUAROT_QLINEAR_KERNELS_H
#define ONNX_QUAROT_QLINEAR_KERNELS_H

#include <cstddef>
#include <cstdint>

#include "attention.h"

namespace onnx_quarot {

// Of a step of four activations, and behind a row's steps.
constexpr std::size_t kStepValues = 4, kRowPadding = 64;

// Panels of at most as many bytes are short: their beginning and end take a part of a row's time.
constexpr std::size_t kShortPanel = 8192;

// Rows of at least as many steps are long: with 8 bits a panel is then twice the first-level cache.
constexpr std::size_t kLongSteps = 1024;

// What is left out of a row's step where kernels add two products in 16 bits, to multiply as the row's own values are.
// Behind a row and its padding come all of these, with room for every step; in the first, `step` is their number.
struct ExcessStep {
  std::uint32_t step;
  std::uint8_t values[kStepValues];
};
constexpr std::size_t excess_offset(std::size_t steps) { return steps * kStepValues + kRowPadding; }
constexpr std::size_t excess_bytes(std::size_t steps) { return (steps + 1) * sizeof(ExcessStep); }

// One row to quantize: values * inverse, rounded, in `steps` steps of four, zeros after `depth`. `out`
// has kRowPadding bytes more than the steps take, and then its excess if the kernels have it.
struct QuantizeJob {
  const float* values;
  std::size_t depth;
  std::size_t steps;
  std::size_t block_steps;  // steps that share a correction
  float inverse;
  void* out;
  std::int32_t* corrections;  // one a block: -offset times the sum of its values
  std::int32_t offset;
};

// Rows of integers times packed panels. Distances in bytes for `values`, in elements elsewhere.
struct MultiplyJob {
  const void* values;
  std::size_t row_bytes;
  const std::int32_t* corrections;  // what sums start from; with zero points, times these
  const float* row_scales;
  std::size_t rows;
  const std::uint8_t* weights;  // of the first panel
  std::size_t panel_bytes;
  std::size_t steps;
  std::size_t block_steps;          // as above
  const float* scales;              // of the first panel's first column
  const std::uint8_t* zero_points;  // 4 bits, of the first panel: null where all have the same
  const float* bias;                // null: none; first row, first panel's first column
  std::size_t bias_stride;          // 0: every row has the same
  float* y;                         // first row, first panel's first column
  std::size_t y_stride;
  std::size_t columns;   // in all panels together; the last panel may be narrower than 16
  std::size_t reach;     // the same, with the panels behind them that may be fetched ahead
  bool several_streams;  // see CpuFeatures
};

struct QLinearKernels {
  const char* name;
  bool has_excess;       // whether rows beside 8-bit weights have an excess
  std::int32_t offset8;  // what 8-bit weights are too large by, as the products see them
  std::uint32_t (*peak_bits)(const float* values, std::size_t depth);  // of the largest magnitude
  float (*sum_squares)(const float* values, std::size_t depth);
  // y = silu(a) * b, from pairs of panels, [pairs][2][16] to [pairs][16].
  void (*gate)(const float* values, std::size_t pairs, float* y);
  void (*quantize8)(const QuantizeJob&);
  void (*quantize4)(const QuantizeJob&);
  void (*multiply8)(const MultiplyJob&);
  void (*multiply4)(const MultiplyJob&);
  void (*attend)(const AttendJob&);
  void (*turn)(const TurnJob&);
};

extern const QLinearKernels qlinear_baseline;
extern const QLinearKernels qlinear_avx2;
extern const QLinearKernels qlinear_avxvnni;
extern const QLinearKernels qlinear_avx512vnni;
extern const QLinearKernels qlinear_neon;

}  // namespace onnx_quarot

#endif
