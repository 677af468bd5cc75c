// The kernels of QLinear, written once on a struct `Isa` that the including file defines:
//
//   lanes                        columns in a vector
//   rows, panels                 of a tile of many rows: rows x (16 * panels) sums in registers
//   few_panels                   panels beside one another where there is one row, so that enough sums are under way
//   halves                       parts of a step of four features: 2 where they are multiplied in pairs
//   offset8, offset4             what packed weights are too large by, as the products see them
//   Int, Float                   vectors of 32-bit integers and floats
//   quantize8, quantize4         see QuantizeJob
//   widens, widened_bytes, widen a copy of a panel's step in a form that is multiplied faster, for many rows
//   Weights, Values              operands: weights(bytes, vector, half), widened(...), values(bytes, half)
//   dot8(sum, weights, values)   sum += products
//   Part, nibbles(...), values4, dot4(part, ...), flush(sum, part)   the same for 4 bits; a Part takes 32 features
//
// Everything has internal linkage. Products and sums are not contracted: results are the same bits everywhere.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kernels.h"
#include "qlinear.h"

#define ONNX_QUAROT_UNROLL _Pragma("GCC unroll 16")

namespace onnx_quarot {
namespace {

constexpr std::size_t kVectors = kPanelColumns / Isa::lanes;
// A block of the depth: its part of a panel stays in the first cache while all rows pass over it.
constexpr std::size_t kDepthSteps = 256;
// Rows from which a panel is worth widening.
constexpr std::size_t kWidenRows = 16;

template <class Vector>
inline Vector load(const void* from) {
  Vector vector;
  std::memcpy(&vector, from, sizeof(vector));
  return vector;
}

template <class Vector>
inline void store(void* to, const Vector& vector) {
  std::memcpy(to, &vector, sizeof(vector));
}

inline Isa::Float splat(float value) { return value - Isa::Float{}; }
inline Isa::Int splat(std::int32_t value) { return value - Isa::Int{}; }
inline Isa::Float to_float(Isa::Int value) { return __builtin_convertvector(value, Isa::Float); }

// Values in -127..127 in the order of their features, one byte each: for every CPU that multiplies bytes.
template <std::int32_t Offset>
void quantize_bytes(const QuantizeJob& job) {
  auto* out = static_cast<std::int8_t*>(job.out);
  // Adding 1.5 * 2^23 leaves the rounded integer in the low bits.
  constexpr float magic = 12582912.0f;
  for (std::size_t k = 0; k < job.depth; ++k) {
    const float shifted = job.values[k] * job.inverse + magic;
    std::int32_t bits = 0;
    std::memcpy(&bits, &shifted, sizeof(bits));
    out[k] = static_cast<std::int8_t>(bits - 0x4b400000);
  }
  std::fill(out + job.depth, out + job.steps * 4, std::int8_t{0});
  for (std::size_t block = 0; block * job.block_steps < job.steps; ++block) {
    std::int32_t sum = 0;
    const std::int8_t* values = out + block * job.block_steps * 4;
    for (std::size_t k = 0; k < job.block_steps * 4; ++k) sum += values[k];
    job.corrections[block] = -Offset * sum;
  }
}

// The scales (or the bias) of one panel's columns.
inline void panel_floats(const float* from, std::size_t columns, float* to) {
  std::memset(to, 0, kPanelColumns * sizeof(float));
  if (from != nullptr) std::memcpy(to, from, columns * sizeof(float));
}

inline void store_columns(float* y, std::size_t columns, std::size_t vector, Isa::Float value) {
  const std::size_t at = vector * Isa::lanes;
  if (at + Isa::lanes <= columns) return store(y + at, value);
  float lanes[Isa::lanes];
  store(lanes, value);
  if (at < columns) std::memcpy(y + at, lanes, (columns - at) * sizeof(float));
}

// A tile of Rows x (16 * Panels) sums over `steps` steps.
struct Tile {
  const std::uint8_t* values;
  std::size_t row_bytes;
  const std::uint8_t* weights;
  std::size_t panel_bytes;
  std::size_t steps;
  const std::int32_t* corrections;
  std::int32_t* sums;  // [rows][16 * panels]: where the depth comes in blocks
  bool first, last;    // of these
  const MultiplyJob* job;
  std::size_t row;  // the job's
  std::size_t column;
};

template <std::size_t Rows, std::size_t Panels, bool Widened>
__attribute__((noinline)) void tile8(const Tile& tile) {
  constexpr std::size_t vectors = kVectors * Panels;
  Isa::Int sums[Rows][vectors];
  ONNX_QUAROT_UNROLL for (std::size_t r = 0; r < Rows; ++r) {
    ONNX_QUAROT_UNROLL for (std::size_t v = 0; v < vectors; ++v) {
      sums[r][v] = tile.first ? splat(tile.corrections[r]) : load<Isa::Int>(tile.sums + (r * vectors + v) * Isa::lanes);
    }
  }
  constexpr std::size_t value_bytes = Isa::step_bytes8;
  constexpr std::size_t step_bytes = Widened ? Isa::widened_bytes : kStepBytes;
  const std::uint8_t* values = tile.values;
  const std::uint8_t* third = values + 3 * tile.row_bytes;  // one pointer more, and no address needs an instruction
  const std::uint8_t* weights = tile.weights;
  for (std::size_t step = 0; step < tile.steps; ++step) {
    ONNX_QUAROT_UNROLL for (std::size_t half = 0; half < Isa::halves; ++half) {
      Isa::Weights operands[vectors];
      ONNX_QUAROT_UNROLL for (std::size_t v = 0; v < vectors; ++v) {
        const std::uint8_t* from = weights + v / kVectors * tile.panel_bytes;
        operands[v] = Widened ? Isa::widened(from, v % kVectors, half) : Isa::weights(from, v % kVectors, half);
      }
      ONNX_QUAROT_UNROLL for (std::size_t r = 0; r < Rows; ++r) {
        const std::uint8_t* row = r < 3 ? values + r * tile.row_bytes : third + (r - 3) * tile.row_bytes;
        const Isa::Values operand = Isa::values(row, half);
        ONNX_QUAROT_UNROLL for (std::size_t v = 0; v < vectors; ++v) sums[r][v] =
            Isa::dot8(sums[r][v], operands[v], operand);
      }
    }
    values += value_bytes;
    third += value_bytes;
    weights += step_bytes;
  }
  if (!tile.last) {
    ONNX_QUAROT_UNROLL for (std::size_t r = 0; r < Rows; ++r) {
      ONNX_QUAROT_UNROLL for (std::size_t v = 0; v < vectors; ++v)
          store(tile.sums + (r * vectors + v) * Isa::lanes, sums[r][v]);
    }
    return;
  }
  const MultiplyJob& job = *tile.job;
  ONNX_QUAROT_UNROLL for (std::size_t p = 0; p < Panels; ++p) {
    const std::size_t column = tile.column + p * kPanelColumns;
    const std::size_t columns = std::min(kPanelColumns, job.columns - column);
    alignas(64) float scales[kPanelColumns], bias[kPanelColumns];
    panel_floats(job.scales + column, columns, scales);
    panel_floats(job.bias == nullptr ? nullptr : job.bias + column, columns, bias);
    ONNX_QUAROT_UNROLL for (std::size_t r = 0; r < Rows; ++r) {
      const std::size_t row = tile.row + r;
      ONNX_QUAROT_UNROLL for (std::size_t v = 0; v < kVectors; ++v) {
        const Isa::Float product = to_float(sums[r][p * kVectors + v]) * splat(job.row_scales[row]);
        store_columns(job.y + row * job.y_stride + column, columns, v,
                      product * load<Isa::Float>(scales + v * Isa::lanes) + load<Isa::Float>(bias + v * Isa::lanes));
      }
    }
  }
}

// The tile of `rows` rows, 1 to Rows.
template <std::size_t Rows, std::size_t Panels, bool Widened>
void tile8_of(std::size_t rows, const Tile& tile) {
  if constexpr (Rows > 1) {
    if (rows < Rows) return tile8_of<Rows - 1, Panels, Widened>(rows, tile);
  }
  tile8<Rows, Panels, Widened>(tile);
}

// `Panels` panels from `column` on, times all rows, in groups of about the same number.
template <std::size_t Panels, std::size_t MaxRows>
void panels8(const MultiplyJob& job, std::size_t column, std::int32_t* sums, std::uint8_t* wide) {
  const bool widened = Isa::widens && wide != nullptr;
  const std::size_t groups = (job.rows + MaxRows - 1) / MaxRows;
  // Blocks of the depth pay where rows come back to a panel.
  const std::size_t block = groups > 4 ? kDepthSteps : job.steps;
  const std::uint8_t* panel = job.weights + column / kPanelColumns * job.panel_bytes;
  for (std::size_t step = 0; step < job.steps; step += block) {
    const std::size_t steps = std::min(block, job.steps - step);
    Tile tile{};
    tile.weights = panel + step * kStepBytes;
    tile.panel_bytes = job.panel_bytes;
    if (widened) {
      for (std::size_t s = 0; s < steps; ++s) Isa::widen(tile.weights + s * kStepBytes, wide + s * Isa::widened_bytes);
      tile.weights = wide;
    }
    tile.row_bytes = job.row_bytes;
    tile.steps = steps;
    tile.first = step == 0;
    tile.last = step + steps == job.steps;
    tile.job = &job;
    tile.column = column;
    for (std::size_t group = 0; group < groups; ++group) {
      tile.row = job.rows * group / groups;
      const std::size_t rows = job.rows * (group + 1) / groups - tile.row;
      tile.values = static_cast<const std::uint8_t*>(job.values) + tile.row * job.row_bytes + step * Isa::step_bytes8;
      tile.corrections = job.corrections + tile.row;
      tile.sums = sums + tile.row * kPanelColumns * Panels;
      if constexpr (Isa::widens) {
        if (widened) {
          tile8_of<MaxRows, Panels, true>(rows, tile);
          continue;
        }
      }
      tile8_of<MaxRows, Panels, false>(rows, tile);
    }
  }
}

// Rows at a time, which bounds the sums kept between blocks of the depth.
constexpr std::size_t kMaxRows = 256;

void multiply8(const MultiplyJob& whole) {
  alignas(64) std::int32_t sums[kMaxRows * kPanelColumns * Isa::panels];
  alignas(64) std::uint8_t wide[Isa::widens ? kDepthSteps * Isa::widened_bytes : 1];
  for (std::size_t row = 0; row < whole.rows; row += kMaxRows) {
    MultiplyJob job = whole;
    job.rows = std::min(kMaxRows, whole.rows - row);
    job.values = static_cast<const std::uint8_t*>(whole.values) + row * whole.row_bytes;
    job.corrections += row;
    job.row_scales += row;
    job.y += row * whole.y_stride;
    const bool widens = Isa::widens && job.rows >= kWidenRows && job.rows > 4 * Isa::rows;
    std::size_t column = 0;
    const auto left = [&] {
      return column < job.columns ? (job.columns - column + kPanelColumns - 1) / kPanelColumns : 0;
    };
    if (job.rows == 1) {
      for (; left() >= Isa::few_panels; column += Isa::few_panels * kPanelColumns) {
        panels8<Isa::few_panels, 1>(job, column, sums, nullptr);
      }
    } else {
      for (; left() >= Isa::panels; column += Isa::panels * kPanelColumns) {
        panels8<Isa::panels, Isa::rows>(job, column, sums, widens ? wide : nullptr);
      }
    }
    for (; left() > 0; column += kPanelColumns) panels8<1, Isa::rows>(job, column, sums, widens ? wide : nullptr);
  }
}

// 4 bits: sums of a block become floats at its end. One panel; register files that are too small spill the floats,
// which are touched once a block.
template <std::size_t Rows>
__attribute__((noinline)) void tile4(const MultiplyJob& job, std::size_t first_row, std::size_t column) {
  const std::size_t blocks = job.steps / job.block_steps;
  const std::size_t columns = std::min(kPanelColumns, job.columns - column);
  const std::uint8_t* weights = job.weights + column / kPanelColumns * job.panel_bytes;
  const float* scales = job.scales + column * blocks;
  const auto* values = static_cast<const std::uint8_t*>(job.values) + first_row * job.row_bytes;
  const std::int32_t* corrections = job.corrections + first_row * blocks;
  Isa::Float totals[Rows][kVectors] = {};
  for (std::size_t block = 0; block < blocks; ++block) {
    Isa::Int sums[Rows][kVectors];
    ONNX_QUAROT_UNROLL for (std::size_t r = 0; r < Rows; ++r) {
      const Isa::Int start = splat(corrections[r * blocks + block]);
      ONNX_QUAROT_UNROLL for (std::size_t v = 0; v < kVectors; ++v) sums[r][v] = start;
    }
    for (std::size_t step = 0; step < job.block_steps; step += 8) {
      Isa::Part parts[Rows][kVectors];
      ONNX_QUAROT_UNROLL for (std::size_t r = 0; r < Rows; ++r) {
        ONNX_QUAROT_UNROLL for (std::size_t v = 0; v < kVectors; ++v) parts[r][v] = Isa::part(sums[r][v]);
      }
      ONNX_QUAROT_UNROLL for (std::size_t pair = 0; pair < 4; ++pair) {
        ONNX_QUAROT_UNROLL for (std::size_t half = 0; half < 2; ++half) {
          Isa::Weights4 operands[kVectors];
          ONNX_QUAROT_UNROLL for (std::size_t v = 0; v < kVectors; ++v) operands[v] = Isa::nibbles(weights, v, half);
          ONNX_QUAROT_UNROLL for (std::size_t r = 0; r < Rows; ++r) {
            const Isa::Values4 operand = Isa::values4(values + r * job.row_bytes + 4 * half);
            ONNX_QUAROT_UNROLL for (std::size_t v = 0; v < kVectors; ++v) {
              parts[r][v] = Isa::dot4(parts[r][v], operands[v], operand);
            }
          }
        }
        weights += kStepBytes;
        values += 8;
      }
      ONNX_QUAROT_UNROLL for (std::size_t r = 0; r < Rows; ++r) {
        ONNX_QUAROT_UNROLL for (std::size_t v = 0; v < kVectors; ++v) sums[r][v] = Isa::flush(sums[r][v], parts[r][v]);
      }
    }
    ONNX_QUAROT_UNROLL for (std::size_t v = 0; v < kVectors; ++v) {
      const auto scale = load<Isa::Float>(scales + v * Isa::lanes);
      ONNX_QUAROT_UNROLL for (std::size_t r = 0; r < Rows; ++r) totals[r][v] =
          totals[r][v] + to_float(sums[r][v]) * scale;
    }
    scales += kPanelColumns;
  }
  alignas(64) float bias[kPanelColumns];
  panel_floats(job.bias == nullptr ? nullptr : job.bias + column, columns, bias);
  ONNX_QUAROT_UNROLL for (std::size_t r = 0; r < Rows; ++r) {
    const std::size_t row = first_row + r;
    ONNX_QUAROT_UNROLL for (std::size_t v = 0; v < kVectors; ++v) {
      store_columns(job.y + row * job.y_stride + column, columns, v,
                    totals[r][v] * splat(job.row_scales[row]) + load<Isa::Float>(bias + v * Isa::lanes));
    }
  }
}

template <std::size_t Rows>
void tile4_of(std::size_t rows, const MultiplyJob& job, std::size_t first_row, std::size_t column) {
  if constexpr (Rows > 1) {
    if (rows < Rows) return tile4_of<Rows - 1>(rows, job, first_row, column);
  }
  tile4<Rows>(job, first_row, column);
}

void multiply4(const MultiplyJob& job) {
  const std::size_t groups = (job.rows + Isa::rows4 - 1) / Isa::rows4;
  for (std::size_t column = 0; column < job.columns; column += kPanelColumns) {
    for (std::size_t group = 0; group < groups; ++group) {
      const std::size_t row = job.rows * group / groups;
      tile4_of<Isa::rows4>(job.rows * (group + 1) / groups - row, job, row, column);
    }
  }
}

}  // namespace
}  // namespace onnx_quarot

#define ONNX_QUAROT_QLINEAR_KERNELS(symbol, name)                                                              \
  namespace onnx_quarot {                                                                                      \
  const QLinearKernels symbol = {name,      Isa::step_bytes8, 4, Isa::quantize8, quantize_bytes<Isa::offset4>, \
                                 multiply8, multiply4};                                                        \
  }
