// The ends of a product, for weights of 8 and of 4 bits: what is done to sums, and what is fetched ahead. Part of
// kernel-inl.h, on the same struct `Isa`.
#include <cstddef>
#include <cstdint>

#include "floats-inl.h"

namespace onnx_quarot {
namespace {

constexpr std::size_t kVectors = kPanelColumns / Isa::lanes;

// `count` of a job's rows, from `row` on.
inline MultiplyJob some_rows(const MultiplyJob& whole, std::size_t row, std::size_t count) {
  MultiplyJob job = whole;
  job.rows = count;
  job.values = static_cast<const std::uint8_t*>(whole.values) + row * whole.row_bytes;
  job.corrections += row * (whole.steps / whole.block_steps);
  job.row_scales += row;
  job.y += row * whole.y_stride;
  if (whole.bias != nullptr) job.bias += row * whole.bias_stride;
  return job;
}

// One of a panel's vectors at the end, in the last panel where that is narrower than 16. Out of the way: copies of
// parts of vectors would put all sums of a tile into memory.
template <bool Scaled>
__attribute__((noinline, cold)) void store_narrow(const MultiplyJob& job, std::size_t row, std::size_t at,
                                                  Isa::Float value) {
  float lanes[Isa::lanes];
  store(lanes, value);
  for (std::size_t lane = 0; lane < Isa::lanes && at + lane < job.columns; ++lane) {
    float one = lanes[lane];
    if constexpr (Scaled) one = one * job.scales[at + lane];
    if (job.bias != nullptr) one = one + job.bias[row * job.bias_stride + at + lane];
    job.y[row * job.y_stride + at + lane] = one;
  }
}

// Where a tile's results go, and what is added to them: fetched while it is multiplied, for writing to lines that come
// from memory takes longer than it does to fill them.
template <std::size_t Rows, std::size_t Panels>
inline void fetch_results(const MultiplyJob& job, std::size_t first, std::size_t column) {
  ONNX_QUAROT_UNROLL for (std::size_t r = 0; r < Rows; ++r) {
    ONNX_QUAROT_UNROLL for (std::size_t p = 0; p < Panels; ++p) {
      const std::size_t at = column + p * kPanelColumns;
      __builtin_prefetch(job.y + (first + r) * job.y_stride + at, 1);
      if (job.bias_stride != 0) __builtin_prefetch(job.bias + (first + r) * job.bias_stride + at);
    }
  }
}

// What is done to the sums of a tile at the end: scales of rows, those of columns if Scaled, and bias. `sum(r, v)` is
// vector v of row first + r. The job's numbers are copied, for all that the compiler knows stores could change them.
template <bool Scaled, std::size_t Rows, std::size_t Panels, class Sum>
inline void finish(const MultiplyJob& job, std::size_t first, std::size_t column, const Sum& sum) {
  constexpr std::size_t vectors = Panels * kVectors;
  const float* const row_scales = job.row_scales + first;
  if (job.columns - column < Panels * kPanelColumns) {
    ONNX_QUAROT_UNROLL for (std::size_t v = 0; v < vectors; ++v) {
      ONNX_QUAROT_UNROLL for (std::size_t r = 0; r < Rows; ++r) {
        store_narrow<Scaled>(job, first + r, column + v * Isa::lanes, sum(r, v) * splat(row_scales[r]));
      }
    }
    return;
  }
  const std::size_t stride = job.y_stride, bias_stride = job.bias_stride;
  float* y = job.y + first * stride + column;
  const float* bias = job.bias == nullptr ? nullptr : job.bias + first * bias_stride + column;
  Isa::Float scales[vectors] = {};
  if constexpr (Scaled) {
    ONNX_QUAROT_UNROLL for (std::size_t v = 0; v < vectors; ++v) {
      scales[v] = load<Isa::Float>(job.scales + column + v * Isa::lanes);
    }
  }
  const auto value = [&](std::size_t r, std::size_t v) {
    const Isa::Float scaled = sum(r, v) * splat(row_scales[r]);
    return Scaled ? scaled * scales[v] : scaled;
  };
  if (bias == nullptr) {
    ONNX_QUAROT_UNROLL for (std::size_t r = 0; r < Rows; ++r) {
      ONNX_QUAROT_UNROLL for (std::size_t v = 0; v < vectors; ++v) store(y + v * Isa::lanes, value(r, v));
      y += stride;
    }
    return;
  }
  ONNX_QUAROT_UNROLL for (std::size_t r = 0; r < Rows; ++r) {
    ONNX_QUAROT_UNROLL for (std::size_t v = 0; v < vectors; ++v) {
      store(y + v * Isa::lanes, value(r, v) + load<Isa::Float>(bias + v * Isa::lanes));
    }
    y += stride;
    bias += bias_stride;
  }
}

// How far ahead a single row's weights are asked for: the processor's own guesses end with a page. One panel is
// followed by the next in memory; several at a time, if they are short, by as many.
constexpr std::size_t kDistance = 8192;
template <std::size_t Panels>
inline std::size_t row_distance(const MultiplyJob& job) {
  return Panels > 1 && job.panel_bytes <= kShortPanel ? Panels * job.panel_bytes : kDistance;
}

template <std::size_t Panels>
inline void fetch_row(const MultiplyJob& job, const std::uint8_t* from) {
  if constexpr (!Isa::fetches_row) return;
  ONNX_QUAROT_UNROLL for (std::size_t p = 0; p < Panels; ++p) __builtin_prefetch(from + p * job.panel_bytes);
}

}  // namespace
}  // namespace onnx_quarot
