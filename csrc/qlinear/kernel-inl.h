// The kernels of QLinear, written once on a struct `Isa` that the including file defines:
//
//   lanes                        columns in a vector
//   rows, panels                 of a tile of many rows: rows x (16 * panels) sums in registers
//   rows4, panels4               the same for 4 bits
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
// Steps of the depth at a time: those of a tile's panels stay in the second cache while all rows pass over them.
constexpr std::size_t kDepthSteps = 1024;
// Those of a widened copy, which stays in the first one.
constexpr std::size_t kWideSteps = 256;
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

// The largest magnitude of a row, by its bits: as integers, magnitudes are in order, with infinities and NaNs above all
// others.
std::uint32_t peak_bits(const float* values, std::size_t depth) {
  constexpr std::size_t chains = 4;
  Isa::Int largest[chains] = {};
  std::size_t k = 0;
  for (; k + chains * Isa::lanes <= depth; k += chains * Isa::lanes) {
    ONNX_QUAROT_UNROLL for (std::size_t i = 0; i < chains; ++i) {
      const Isa::Int bits = load<Isa::Int>(values + k + i * Isa::lanes) & 0x7fffffff;
      largest[i] = bits > largest[i] ? bits : largest[i];
    }
  }
  std::int32_t peak = 0;
  for (; k < depth; ++k) peak = std::max(peak, load<std::int32_t>(values + k) & 0x7fffffff);
  for (const Isa::Int& chain : largest) {
    for (std::size_t lane = 0; lane < Isa::lanes; ++lane) peak = std::max(peak, chain[lane]);
  }
  return static_cast<std::uint32_t>(peak);
}

// Values in -127..127 in the order of their features, one byte each: for every CPU that multiplies bytes. Writes whole
// vectors: up to lanes - 1 bytes behind the last step.
template <std::int32_t Offset>
void quantize_bytes(const QuantizeJob& job) {
  using Narrow [[gnu::vector_size(Isa::lanes), gnu::aligned(1)]] = std::int8_t;
  auto* out = static_cast<std::int8_t*>(job.out);
  // Adding 1.5 * 2^23 leaves the rounded integer in the low bits.
  constexpr float magic = 12582912.0f;
  const Isa::Float inverse = splat(job.inverse);
  const std::size_t block = job.block_steps * 4;
  for (std::size_t start = 0, index = 0; start < job.steps * 4; start += block, ++index) {
    Isa::Int sum{};
    const auto some = [&](const float* from, std::int8_t* to) {
      const Isa::Int rounded = reinterpret_cast<Isa::Int>(load<Isa::Float>(from) * inverse + magic) - 0x4b400000;
      sum += rounded;
      store(to, __builtin_convertvector(rounded, Narrow));
    };
    const std::size_t end = std::min(start + block, job.depth);
    std::size_t k = start;
    for (; k + Isa::lanes <= end; k += Isa::lanes) some(job.values + k, out + k);
    if (k < end) {
      float rest[Isa::lanes] = {};
      std::memcpy(rest, job.values + k, (end - k) * sizeof(float));
      some(rest, out + k);
      k += Isa::lanes;
    }
    if (k < start + block) std::memset(out + k, 0, start + block - k);
    std::int32_t total = 0;
    for (std::size_t lane = 0; lane < Isa::lanes; ++lane) total += sum[lane];
    job.corrections[index] = -Offset * total;
  }
}

// What is done to the columns of one panel at the end: scales and bias, filled up where the panel is the last one and
// narrower than 16.
struct PanelEnd {
  std::size_t columns;
  const float* scales;  // null: none
  const float* bias;    // null: none
  alignas(64) float filled[2][kPanelColumns];

  PanelEnd(const MultiplyJob& job, std::size_t column, const float* all_scales)
      : columns(std::min(kPanelColumns, job.columns - column)),
        scales(all_scales == nullptr ? nullptr : all_scales + column),
        bias(job.bias == nullptr ? nullptr : job.bias + column) {
    if (columns < kPanelColumns) {
      scales = fill(scales, filled[0]);
      bias = fill(bias, filled[1]);
    }
  }

  const float* fill(const float* from, float* to) const {
    if (from == nullptr) return nullptr;
    std::memset(to, 0, kPanelColumns * sizeof(float));
    std::memcpy(to, from, columns * sizeof(float));
    return to;
  }

  void store(float* y, std::size_t vector, Isa::Float value) const {
    const std::size_t at = vector * Isa::lanes;
    if (scales != nullptr) value = value * load<Isa::Float>(scales + at);
    if (bias != nullptr) value = value + load<Isa::Float>(bias + at);
    if (at + Isa::lanes <= columns) return onnx_quarot::store(y + at, value);
    float lanes[Isa::lanes];
    onnx_quarot::store(lanes, value);
    if (at < columns) std::memcpy(y + at, lanes, (columns - at) * sizeof(float));
  }
};

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
  constexpr std::size_t step_bytes = Widened ? Isa::widened_bytes : kStepBytes;
  // One pointer for three rows: no address needs an instruction.
  constexpr std::size_t triples = (Rows + 2) / 3;
  const std::uint8_t* starts[triples];
  ONNX_QUAROT_UNROLL for (std::size_t t = 0; t < triples; ++t) starts[t] = tile.values + 3 * t * tile.row_bytes;
  const std::uint8_t* weights = tile.weights;
  _Pragma("GCC unroll 2") for (std::size_t step = 0; step < tile.steps; ++step) {
    ONNX_QUAROT_UNROLL for (std::size_t half = 0; half < Isa::halves; ++half) {
      Isa::Weights operands[vectors];
      ONNX_QUAROT_UNROLL for (std::size_t v = 0; v < vectors; ++v) {
        const std::uint8_t* from = weights + v / kVectors * tile.panel_bytes;
        operands[v] = Widened ? Isa::widened(from, v % kVectors, half) : Isa::weights(from, v % kVectors, half);
      }
      ONNX_QUAROT_UNROLL for (std::size_t r = 0; r < Rows; ++r) {
        const Isa::Values operand = Isa::values(starts[r / 3] + r % 3 * tile.row_bytes, half);
        ONNX_QUAROT_UNROLL for (std::size_t v = 0; v < vectors; ++v) sums[r][v] =
            Isa::dot8(sums[r][v], operands[v], operand);
      }
    }
    ONNX_QUAROT_UNROLL for (std::size_t t = 0; t < triples; ++t) starts[t] += Isa::step_bytes8;
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
    const PanelEnd end(job, column, job.scales);
    ONNX_QUAROT_UNROLL for (std::size_t r = 0; r < Rows; ++r) {
      const std::size_t row = tile.row + r;
      ONNX_QUAROT_UNROLL for (std::size_t v = 0; v < kVectors; ++v) {
        end.store(job.y + row * job.y_stride + column, v,
                  to_float(sums[r][p * kVectors + v]) * splat(job.row_scales[row]));
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
template <std::size_t Panels>
void panels8(const MultiplyJob& job, std::size_t column, std::int32_t* sums, std::uint8_t* wide) {
  const bool widened = Isa::widens && wide != nullptr;
  const std::size_t groups = (job.rows + Isa::rows - 1) / Isa::rows;
  const std::size_t most = widened ? kWideSteps : kDepthSteps, blocks = (job.steps + most - 1) / most;
  const std::uint8_t* panel = job.weights + column / kPanelColumns * job.panel_bytes;
  for (std::size_t block = 0; block < blocks; ++block) {
    const std::size_t step = job.steps * block / blocks, end = job.steps * (block + 1) / blocks;
    Tile tile{};
    tile.weights = panel + step * kStepBytes;
    tile.panel_bytes = job.panel_bytes;
    if (widened) {
      for (std::size_t s = 0; s < end - step; ++s) {
        Isa::widen(tile.weights + s * kStepBytes, wide + s * Isa::widened_bytes);
      }
      tile.weights = wide;
    }
    tile.row_bytes = job.row_bytes;
    tile.steps = end - step;
    tile.first = block == 0;
    tile.last = block + 1 == blocks;
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
          tile8_of<Isa::rows, Panels, true>(rows, tile);
          continue;
        }
      }
      tile8_of<Isa::rows, Panels, false>(rows, tile);
    }
  }
}

// One row: memory is what takes the time, and is read from its beginning to its end. Several steps are under way at
// once, each with sums of its own.
void row8(const MultiplyJob& job) {
  constexpr std::size_t chains = kVectors < 8 ? 8 / kVectors : 1;
  const auto* row = static_cast<const std::uint8_t*>(job.values);
  const std::uint8_t* weights = job.weights;
  for (std::size_t column = 0; column < job.columns; column += kPanelColumns) {
    Isa::Int sums[chains][kVectors] = {};
    ONNX_QUAROT_UNROLL for (std::size_t v = 0; v < kVectors; ++v) sums[0][v] = splat(job.corrections[0]);
    const auto add = [&](Isa::Int* sum, std::size_t step) {
      ONNX_QUAROT_UNROLL for (std::size_t half = 0; half < Isa::halves; ++half) {
        const Isa::Values operand = Isa::values(row + step * Isa::step_bytes8, half);
        ONNX_QUAROT_UNROLL for (std::size_t v = 0; v < kVectors; ++v) {
          sum[v] = Isa::dot8(sum[v], Isa::weights(weights, v, half), operand);
        }
      }
      weights += kStepBytes;
    };
    std::size_t step = 0;
    for (; step + chains <= job.steps; step += chains) {
      ONNX_QUAROT_UNROLL for (std::size_t i = 0; i < chains; ++i) add(sums[i], step + i);
    }
    for (; step < job.steps; ++step) add(sums[0], step);
    const PanelEnd end(job, column, job.scales);
    ONNX_QUAROT_UNROLL for (std::size_t v = 0; v < kVectors; ++v) {
      ONNX_QUAROT_UNROLL for (std::size_t i = 1; i < chains; ++i) sums[0][v] += sums[i][v];
      end.store(job.y + column, v, to_float(sums[0][v]) * splat(job.row_scales[0]));
    }
  }
}

// Rows at a time, which bounds the sums kept between blocks of the depth.
constexpr std::size_t kMaxRows = 256;

void multiply8(const MultiplyJob& whole) {
  if (whole.rows == 1) return row8(whole);
  alignas(64) std::int32_t sums[kMaxRows * kPanelColumns * Isa::panels];
  alignas(64) std::uint8_t wide[Isa::widens ? kWideSteps * Isa::widened_bytes : 1];
  for (std::size_t row = 0; row < whole.rows; row += kMaxRows) {
    MultiplyJob job = whole;
    job.rows = std::min(kMaxRows, whole.rows - row);
    job.values = static_cast<const std::uint8_t*>(whole.values) + row * whole.row_bytes;
    job.corrections += row;
    job.row_scales += row;
    job.y += row * whole.y_stride;
    const bool widens = Isa::widens && job.rows >= kWidenRows && job.rows > 4 * Isa::rows;
    std::size_t column = 0;
    for (; column + Isa::panels * kPanelColumns <= job.columns; column += Isa::panels * kPanelColumns) {
      panels8<Isa::panels>(job, column, sums, widens ? wide : nullptr);
    }
    for (; column < job.columns; column += kPanelColumns) {
      panels8<1>(job, column, sums, widens ? wide : nullptr);
    }
  }
}

// 4 bits: sums of a block become floats at its end. Register files that are too small spill the floats, which are
// touched once a block. BlockSteps: the job's, where it pays to know them beforehand, else 0.
template <std::size_t Rows, std::size_t Panels, bool Ahead, std::size_t BlockSteps = 0>
__attribute__((noinline)) void tile4(const MultiplyJob& job, std::size_t first_row, std::size_t column,
                                     const std::uint8_t* ahead) {
  constexpr std::size_t vectors = kVectors * Panels;
  const std::size_t block_steps = BlockSteps != 0 ? BlockSteps : job.block_steps;
  const std::size_t blocks = job.steps / block_steps;
  const std::uint8_t* weights = job.weights + column / kPanelColumns * job.panel_bytes;
  const float* scales = job.scales + column * blocks;
  constexpr std::size_t triples = (Rows + 2) / 3;
  const std::uint8_t* starts[triples];
  ONNX_QUAROT_UNROLL for (std::size_t t = 0; t < triples; ++t) {
    starts[t] = static_cast<const std::uint8_t*>(job.values) + (first_row + 3 * t) * job.row_bytes;
  }
  const std::int32_t* corrections = job.corrections + first_row * blocks;
  // Few sums would wait for one another: each gets several parts.
  constexpr std::size_t chains = Rows * vectors >= 8 ? 1 : Rows * vectors >= 4 ? 2 : 4;
  Isa::Float totals[Rows][vectors] = {};
  for (std::size_t block = 0; block < blocks; ++block) {
    Isa::Int sums[chains][Rows][vectors] = {};
    ONNX_QUAROT_UNROLL for (std::size_t r = 0; r < Rows; ++r) {
      const Isa::Int start = splat(corrections[r * blocks + block]);
      ONNX_QUAROT_UNROLL for (std::size_t v = 0; v < vectors; ++v) sums[0][r][v] = start;
    }
    for (std::size_t step = 0; step < block_steps; step += 8) {
      Isa::Part parts[chains][Rows][vectors];
      ONNX_QUAROT_UNROLL for (std::size_t c = 0; c < chains; ++c) {
        ONNX_QUAROT_UNROLL for (std::size_t r = 0; r < Rows; ++r) {
          ONNX_QUAROT_UNROLL for (std::size_t v = 0; v < vectors; ++v) parts[c][r][v] = Isa::part(sums[c][r][v]);
        }
      }
      ONNX_QUAROT_UNROLL for (std::size_t pair = 0; pair < 4; ++pair) {
        ONNX_QUAROT_UNROLL for (std::size_t half = 0; half < 2; ++half) {
          Isa::Part(&part)[Rows][vectors] = parts[(pair * 2 + half) % chains];
          Isa::Weights4 operands[vectors];
          ONNX_QUAROT_UNROLL for (std::size_t v = 0; v < vectors; ++v) {
            operands[v] = Isa::nibbles(weights + v / kVectors * job.panel_bytes, v % kVectors, half);
          }
          ONNX_QUAROT_UNROLL for (std::size_t r = 0; r < Rows; ++r) {
            const Isa::Values4 operand = Isa::values4(starts[r / 3] + r % 3 * job.row_bytes + pair * 8 + 4 * half);
            ONNX_QUAROT_UNROLL for (std::size_t v = 0; v < vectors; ++v) {
              part[r][v] = Isa::dot4(part[r][v], operands[v], operand);
            }
          }
        }
        if constexpr (Ahead) {
          __builtin_prefetch(ahead, 0, 2);
          ahead += kStepBytes;
        }
        weights += kStepBytes;
      }
      ONNX_QUAROT_UNROLL for (std::size_t t = 0; t < triples; ++t) starts[t] += 32;
      ONNX_QUAROT_UNROLL for (std::size_t c = 0; c < chains; ++c) {
        ONNX_QUAROT_UNROLL for (std::size_t r = 0; r < Rows; ++r) {
          ONNX_QUAROT_UNROLL for (std::size_t v = 0; v < vectors; ++v) {
            sums[c][r][v] = Isa::flush(sums[c][r][v], parts[c][r][v]);
          }
        }
      }
    }
    ONNX_QUAROT_UNROLL for (std::size_t v = 0; v < vectors; ++v) {
      const auto scale = load<Isa::Float>(scales + v / kVectors * blocks * kPanelColumns + v % kVectors * Isa::lanes);
      ONNX_QUAROT_UNROLL for (std::size_t r = 0; r < Rows; ++r) {
        ONNX_QUAROT_UNROLL for (std::size_t c = 1; c < chains; ++c) sums[0][r][v] += sums[c][r][v];
        totals[r][v] = totals[r][v] + to_float(sums[0][r][v]) * scale;
      }
    }
    scales += kPanelColumns;
  }
  ONNX_QUAROT_UNROLL for (std::size_t p = 0; p < Panels; ++p) {
    const PanelEnd end(job, column + p * kPanelColumns, nullptr);
    ONNX_QUAROT_UNROLL for (std::size_t r = 0; r < Rows; ++r) {
      const std::size_t row = first_row + r;
      ONNX_QUAROT_UNROLL for (std::size_t v = 0; v < kVectors; ++v) {
        end.store(job.y + row * job.y_stride + column + p * kPanelColumns, v,
                  totals[r][p * kVectors + v] * splat(job.row_scales[row]));
      }
    }
  }
}

template <std::size_t Rows, std::size_t Panels, bool Ahead>
void tile4_of(std::size_t rows, const MultiplyJob& job, std::size_t first_row, std::size_t column,
              const std::uint8_t* ahead) {
  if constexpr (Rows > 1) {
    if (rows < Rows) return tile4_of<Rows - 1, Panels, Ahead>(rows, job, first_row, column, ahead);
  }
  tile4<Rows, Panels, Ahead>(job, first_row, column, ahead);
}

template <std::size_t Panels>
void panels4(const MultiplyJob& job, std::size_t column) {
  const std::size_t groups = (job.rows + Isa::rows4 - 1) / Isa::rows4;
  const std::uint8_t* next = job.weights + (column / kPanelColumns + Panels) * job.panel_bytes;
  const bool fetches = groups > 1 && column + 2 * Panels * kPanelColumns <= job.reach;
  for (std::size_t group = 0; group < groups; ++group) {
    const std::size_t row = job.rows * group / groups, rows = job.rows * (group + 1) / groups - row;
    if (fetches && group < Panels) {
      tile4_of<Isa::rows4, Panels, true>(rows, job, row, column, next + group * job.panel_bytes);
    } else {
      tile4_of<Isa::rows4, Panels, false>(rows, job, row, column, nullptr);
    }
  }
}

// One row: caches fetch several panels of this size faster than one, and shorter ones faster one after the other.
constexpr std::size_t kLongPanel = 32768;

template <std::size_t BlockSteps>
void row4(const MultiplyJob& job) {
  std::size_t column = 0;
  if constexpr (Isa::panels4 > 1) {
    constexpr std::size_t width = 4 * kPanelColumns;
    if (job.panel_bytes >= kLongPanel) {
      for (; column + width <= job.columns; column += width) tile4<1, 4, false>(job, 0, column, nullptr);
    }
  }
  for (; column < job.columns; column += kPanelColumns) tile4<1, 1, false, BlockSteps>(job, 0, column, nullptr);
}

void multiply4(const MultiplyJob& job) {
  if (job.rows == 1) {
    return job.block_steps == 8 ? row4<8>(job) : job.block_steps == 16 ? row4<16>(job) : row4<32>(job);
  }
  constexpr std::size_t width = Isa::panels4 * kPanelColumns;
  std::size_t column = 0;
  for (; column + width <= job.columns; column += width) panels4<Isa::panels4>(job, column);
  for (; column < job.columns; column += kPanelColumns) panels4<1>(job, column);
}

}  // namespace
}  // namespace onnx_quarot

#define ONNX_QUAROT_QLINEAR_KERNELS(symbol, name)                                                                \
  namespace onnx_quarot {                                                                                        \
  const QLinearKernels symbol = {                                                                                \
      name, Isa::step_bytes8, 4, peak_bits, Isa::quantize8, quantize_bytes<Isa::offset4>, multiply8, multiply4}; \
  }
