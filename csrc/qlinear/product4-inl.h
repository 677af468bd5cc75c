// Products with weights of 4 bits. Part of kernel-inl.h, on the same struct `Isa`.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace onnx_quarot {
namespace {

// Zero points of a panel in one block, two a byte.
constexpr std::size_t kZeroBytes = kPanelColumns / 2;

// Of the scales: where those of a tile's vector are, `blocks` of them a panel.
constexpr std::size_t of_vector(std::size_t vector, std::size_t blocks) {
  return vector / kVectors * blocks * kPanelColumns + vector % kVectors * Isa::lanes;
}

// What the sums of a block start from: the row's correction, in the columns of zero points times these.
template <bool Zeros>
inline Isa::Int start_of(std::int32_t correction, Isa::Int zeros) {
  return Zeros ? splat(correction) * zeros : splat(correction);
}

// The zero points of a tile's vector in one block.
template <bool Zeros>
inline Isa::Int load_zeros(const std::uint8_t* panels, std::size_t blocks, std::size_t tile_vector) {
  if constexpr (!Zeros) return Isa::Int{};
  const std::uint8_t* block = panels + tile_vector / kVectors * blocks * kZeroBytes;
  const std::size_t vector = tile_vector % kVectors;
  Isa::Int places;
  for (std::size_t i = 0; i < Isa::lanes; ++i) places[i] = static_cast<std::int32_t>((vector * Isa::lanes + i) / 8 * 4);
  return Isa::wide_bytes(block + vector * Isa::lanes % 8) >> places & 15;
}

// Adds steps of the depth to a tile's sums, each of them in several parts: few would wait for one another. The pointers
// move on; one of the starts stands for three rows.
template <std::size_t Rows, std::size_t Panels, bool Ahead, std::size_t Chains>
__attribute__((always_inline)) inline void add_steps(const MultiplyJob& job, std::size_t steps,
                                                     const std::uint8_t*& weights,
                                                     const std::uint8_t* (&starts)[(Rows + 2) / 3],
                                                     const std::uint8_t*& ahead,
                                                     Isa::Int (&sums)[Chains][Rows][kVectors * Panels]) {
  constexpr std::size_t vectors = kVectors * Panels;
  for (std::size_t step = 0; step < steps; step += 8) {
    Isa::Part parts[Chains][Rows][vectors];
    ONNX_QUAROT_UNROLL for (std::size_t c = 0; c < Chains; ++c) {
      ONNX_QUAROT_UNROLL for (std::size_t r = 0; r < Rows; ++r) {
        ONNX_QUAROT_UNROLL for (std::size_t v = 0; v < vectors; ++v) parts[c][r][v] = Isa::part(sums[c][r][v]);
      }
    }
    ONNX_QUAROT_UNROLL for (std::size_t pair = 0; pair < 4; ++pair) {
      ONNX_QUAROT_UNROLL for (std::size_t half = 0; half < 2; ++half) {
        Isa::Part(&part)[Rows][vectors] = parts[(pair * 2 + half) % Chains];
        Isa::Weights operands[vectors];
        ONNX_QUAROT_UNROLL for (std::size_t v = 0; v < vectors; ++v) {
          operands[v] = Isa::nibbles(weights + v / kVectors * job.panel_bytes, v % kVectors, half);
        }
        ONNX_QUAROT_UNROLL for (std::size_t r = 0; r < Rows; ++r) {
          const Isa::Values operand = Isa::values(starts[r / 3] + r % 3 * job.row_bytes + pair * 8 + 4 * half);
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
    ONNX_QUAROT_UNROLL for (std::size_t t = 0; t < (Rows + 2) / 3; ++t) starts[t] += 32;
    ONNX_QUAROT_UNROLL for (std::size_t c = 0; c < Chains; ++c) {
      ONNX_QUAROT_UNROLL for (std::size_t r = 0; r < Rows; ++r) {
        ONNX_QUAROT_UNROLL for (std::size_t v = 0; v < vectors; ++v) {
          sums[c][r][v] = Isa::flush(sums[c][r][v], parts[c][r][v]);
        }
      }
    }
  }
}

constexpr std::size_t chains4(std::size_t sums) { return Isa::quick_sums || sums >= 8 ? 1 : sums >= 4 ? 2 : 4; }

// 4 bits: sums of a block become floats at its end. Register files that are too small spill the floats, which are
// touched once a block.
template <std::size_t Rows, std::size_t Panels, bool Zeros, bool Ahead>
__attribute__((noinline)) void tile4(const MultiplyJob& job, std::size_t first_row, std::size_t column,
                                     const std::uint8_t* ahead) {
  constexpr std::size_t vectors = kVectors * Panels;
  const std::size_t blocks = job.steps / job.block_steps;
  const std::uint8_t* weights = job.weights + column / kPanelColumns * job.panel_bytes;
  const float* scales = job.scales + column * blocks;
  const std::uint8_t* zero_points = Zeros ? job.zero_points + column / 2 * blocks : nullptr;
  constexpr std::size_t triples = (Rows + 2) / 3;
  const std::uint8_t* starts[triples];
  ONNX_QUAROT_UNROLL for (std::size_t t = 0; t < triples; ++t) {
    starts[t] = static_cast<const std::uint8_t*>(job.values) + (first_row + 3 * t) * job.row_bytes;
  }
  const std::int32_t* corrections = job.corrections + first_row * blocks;
  constexpr std::size_t chains = chains4(Rows * vectors);
  Isa::Float totals[Rows][vectors] = {};
  for (std::size_t block = 0; block < blocks; ++block) {
    Isa::Int sums[chains][Rows][vectors] = {};
    ONNX_QUAROT_UNROLL for (std::size_t v = 0; v < vectors; ++v) {
      const Isa::Int zeros = load_zeros<Zeros>(zero_points, blocks, v);
      ONNX_QUAROT_UNROLL for (std::size_t r = 0; r < Rows; ++r) {
        sums[0][r][v] = start_of<Zeros>(corrections[r * blocks + block], zeros);
      }
    }
    add_steps<Rows, Panels, Ahead>(job, job.block_steps, weights, starts, ahead, sums);
    ONNX_QUAROT_UNROLL for (std::size_t v = 0; v < vectors; ++v) {
      const auto scale = load<Isa::Float>(scales + of_vector(v, blocks));
      ONNX_QUAROT_UNROLL for (std::size_t r = 0; r < Rows; ++r) {
        ONNX_QUAROT_UNROLL for (std::size_t c = 1; c < chains; ++c) sums[0][r][v] += sums[c][r][v];
        totals[r][v] = totals[r][v] + to_float(sums[0][r][v]) * scale;
      }
    }
    scales += kPanelColumns;
    if constexpr (Zeros) zero_points += kZeroBytes;
  }
  finish<false, Rows, Panels>(job, first_row, column, [&](std::size_t r, std::size_t v) { return totals[r][v]; });
}

template <std::size_t Rows, std::size_t Panels, bool Zeros, bool Ahead>
void tile4_of(std::size_t rows, const MultiplyJob& job, std::size_t first_row, std::size_t column,
              const std::uint8_t* ahead) {
  if constexpr (Rows > 1) {
    if (rows < Rows) return tile4_of<Rows - 1, Panels, Zeros, Ahead>(rows, job, first_row, column, ahead);
  }
  tile4<Rows, Panels, Zeros, Ahead>(job, first_row, column, ahead);
}

template <std::size_t Panels, bool Zeros>
void panels4(const MultiplyJob& job, std::size_t column) {
  const std::size_t groups = (job.rows + Isa::rows4 - 1) / Isa::rows4;
  const std::uint8_t* next = job.weights + (column / kPanelColumns + Panels) * job.panel_bytes;
  const bool fetches = groups > 1 && column + 2 * Panels * kPanelColumns <= job.reach;
  for (std::size_t group = 0; group < groups; ++group) {
    const std::size_t row = job.rows * group / groups, rows = job.rows * (group + 1) / groups - row;
    if (fetches && group < Panels) {
      tile4_of<Isa::rows4, Panels, Zeros, true>(rows, job, row, column, next + group * job.panel_bytes);
    } else {
      tile4_of<Isa::rows4, Panels, Zeros, false>(rows, job, row, column, nullptr);
    }
  }
}

// One row times more panels side by side than there are registers for: they take turns, block by block.
template <std::size_t BlockSteps, std::size_t Panels, bool Zeros>
__attribute__((noinline)) void row4_turns(const MultiplyJob& job, std::size_t column) {
  constexpr std::size_t together = Isa::row_tile4, turns = Panels / together;
  constexpr std::size_t vectors = kVectors * together, chains = chains4(vectors);
  const std::size_t blocks = job.steps / BlockSteps;
  const std::uint8_t* panel = job.weights + column / kPanelColumns * job.panel_bytes;
  const auto* row = static_cast<const std::uint8_t*>(job.values);
  const float* scales = job.scales + column * blocks;
  const std::uint8_t* zero_points = Zeros ? job.zero_points + column / 2 * blocks : nullptr;
  Isa::Float totals[turns][1][vectors] = {};
  for (std::size_t block = 0; block < blocks; ++block) {
    ONNX_QUAROT_UNROLL for (std::size_t turn = 0; turn < turns; ++turn) {
      Isa::Int sums[chains][1][vectors] = {};
      ONNX_QUAROT_UNROLL for (std::size_t v = 0; v < vectors; ++v) {
        const Isa::Int zeros = load_zeros<Zeros>(zero_points, blocks, turn * vectors + v);
        sums[0][0][v] = start_of<Zeros>(job.corrections[block], zeros);
      }
      const std::uint8_t *weights = panel + turn * together * job.panel_bytes, *starts[1] = {row}, *ahead = nullptr;
      add_steps<1, together, false>(job, BlockSteps, weights, starts, ahead, sums);
      ONNX_QUAROT_UNROLL for (std::size_t v = 0; v < vectors; ++v) {
        ONNX_QUAROT_UNROLL for (std::size_t c = 1; c < chains; ++c) sums[0][0][v] += sums[c][0][v];
        const auto scale = load<Isa::Float>(scales + of_vector(turn * vectors + v, blocks));
        totals[turn][0][v] = totals[turn][0][v] + to_float(sums[0][0][v]) * scale;
      }
    }
    panel += BlockSteps * (kStepBytes / 2);
    row += BlockSteps * kStepValues;
    scales += kPanelColumns;
    if constexpr (Zeros) zero_points += kZeroBytes;
  }
  finish<false, 1, Panels>(job, 0, column,
                           [&](std::size_t, std::size_t v) { return totals[v / vectors][0][v % vectors]; });
}

// One row, for products that take the upper halves of bytes where they are, 16 times too large.
template <std::size_t BlockSteps, std::size_t Panels, bool Zeros, class Set = Isa>
inline void row4_panels(const MultiplyJob& job, std::size_t column) {
  constexpr std::size_t vectors = kVectors * Panels;
  const std::size_t blocks = job.steps / BlockSteps;
  const auto* row = static_cast<const std::uint8_t*>(job.values);
  const std::uint8_t* weights = job.weights + column / kPanelColumns * job.panel_bytes;
  const float* scales = job.scales + column * blocks;
  const std::uint8_t* zero_points = Zeros ? job.zero_points + column / 2 * blocks : nullptr;
  const std::size_t ahead = row_distance<Panels>(job);
  Isa::Float totals[vectors] = {};
  for (std::size_t block = 0; block < blocks; ++block) {
    Isa::Int low[vectors], high[vectors] = {};
    ONNX_QUAROT_UNROLL for (std::size_t v = 0; v < vectors; ++v) {
      const Isa::Int zeros = load_zeros<Zeros>(zero_points, blocks, v);
      low[v] = start_of<Zeros>(job.corrections[block], zeros);
    }
    ONNX_QUAROT_UNROLL for (std::size_t step = 0; step < BlockSteps / 2; ++step) {
      const Isa::Values first = Isa::values(row), second = Isa::values(row + 4);
      ONNX_QUAROT_UNROLL for (std::size_t v = 0; v < vectors; ++v) {
        const auto bytes = Set::bytes(weights + v / kVectors * job.panel_bytes, v % kVectors);
        low[v] = Isa::dot4(low[v], reinterpret_cast<Isa::Int>(bytes & std::uint8_t{15}), first);
        high[v] = Isa::dot4(high[v], reinterpret_cast<Isa::Int>(bytes & std::uint8_t{0xf0}), second);
      }
      fetch_row<Panels>(job, weights + ahead);
      row += 8;
      weights += kStepBytes;
    }
    ONNX_QUAROT_UNROLL for (std::size_t p = 0; p < Panels; ++p) {
      // Not the zero points: eight blocks of them are one line, asked for as often.
      __builtin_prefetch(scales + p * blocks * kPanelColumns + ahead / (BlockSteps / 2) / sizeof(float));
    }
    ONNX_QUAROT_UNROLL for (std::size_t v = 0; v < vectors; ++v) {
      const auto scale = load<Isa::Float>(scales + of_vector(v, blocks));
      totals[v] = totals[v] + to_float(low[v] + (high[v] >> 4)) * scale;
    }
    scales += kPanelColumns;
    if constexpr (Zeros) zero_points += kZeroBytes;
  }
  finish<false, 1, Panels>(job, 0, column, [&](std::size_t, std::size_t v) { return totals[v]; });
}

template <std::size_t BlockSteps, bool Zeros>
void row4(const MultiplyJob& job) {
  const auto some = [&](auto panels, std::size_t column) {
    if constexpr (Isa::upper_halves) {
      row4_panels<BlockSteps, panels, Zeros>(job, column);
    } else if constexpr (panels > Isa::row_tile4) {
      row4_turns<BlockSteps, panels, Zeros>(job, column);
    } else {
      tile4<1, panels, Zeros, false>(job, 0, column, nullptr);
    }
  };
  std::size_t column = 0;
  if constexpr (Isa::row_panels4 > 1) {
    constexpr std::integral_constant<std::size_t, Isa::row_panels4> several;
    constexpr std::size_t width = several * kPanelColumns;
    const std::size_t end = Isa::side_by_side4(job) ? job.columns / width * width : 0;
    for (; column < end; column += width) some(several, column);
  }
  constexpr std::integral_constant<std::size_t, 1> one;
  for (; column < job.columns; column += kPanelColumns) some(one, column);
}

template <bool Zeros>
void multiply4_of(const MultiplyJob& whole) {
  if (whole.rows == 1) {
    const std::size_t steps = whole.block_steps;
    const auto row = steps == 8 ? row4<8, Zeros> : steps == 16 ? row4<16, Zeros> : row4<32, Zeros>;
    return row(whole);
  }
  constexpr std::size_t width = Isa::panels4 * kPanelColumns;
  for (std::size_t row = 0; row < whole.rows; row += Isa::most_rows) {
    const MultiplyJob job = some_rows(whole, row, std::min(Isa::most_rows, whole.rows - row));
    std::size_t column = 0;
    for (; column + width <= job.columns; column += width) panels4<Isa::panels4, Zeros>(job, column);
    for (; column < job.columns; column += kPanelColumns) panels4<1, Zeros>(job, column);
  }
}

void multiply4(const MultiplyJob& job) {
  job.zero_points == nullptr ? multiply4_of<false>(job) : multiply4_of<true>(job);
}

}  // namespace
}  // namespace onnx_quarot
