// Products with weights of 8 bits. Part of kernel-inl.h, on the same struct `Isa`.
#include <algorithm>
#include <cstddef>
#include <cstdint>

namespace onnx_quarot {
namespace {

// Steps of the depth at a time: those of a tile's panels stay in the second cache while all rows pass over them.
constexpr std::size_t kDepthSteps = 1024;

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
  const std::uint8_t* ahead;
};

// Adds the products of what a row's values leave out to its sums of `Panels` panels.
template <std::size_t Panels>
inline void add_excess(const MultiplyJob& job, std::size_t row, std::size_t column,
                       Isa::Int (&sums)[kVectors * Panels]) {
  const auto* values = static_cast<const std::uint8_t*>(job.values) + row * job.row_bytes;
  const auto* excess = reinterpret_cast<const ExcessStep*>(values + excess_offset(job.steps));
  const std::uint8_t* panel = job.weights + column / kPanelColumns * job.panel_bytes;
  for (std::size_t left = excess->step; left > 0; --left) {
    ++excess;
    const Isa::Values operand = Isa::values(excess->values);
    const std::uint8_t* weights = panel + excess->step * kStepBytes;
    ONNX_QUAROT_UNROLL for (std::size_t v = 0; v < kVectors * Panels; ++v) {
      const std::uint8_t* from = weights + v / kVectors * job.panel_bytes;
      sums[v] = Isa::dot8(sums[v], Isa::weights(from, v % kVectors), operand);
    }
  }
}

// Meanwhile, as many steps of `Ahead` panels are fetched into the second cache, from tile.ahead on.
template <std::size_t Rows, std::size_t Panels, std::size_t Ahead>
__attribute__((noinline)) void tile8(const Tile& tile) {
  constexpr std::size_t vectors = kVectors * Panels;
  Isa::Int sums[Rows][vectors];
  ONNX_QUAROT_UNROLL for (std::size_t r = 0; r < Rows; ++r) {
    ONNX_QUAROT_UNROLL for (std::size_t v = 0; v < vectors; ++v) {
      sums[r][v] = tile.first ? splat(tile.corrections[r]) : load<Isa::Int>(tile.sums + (r * vectors + v) * Isa::lanes);
    }
  }
  if (tile.last) fetch_results<Rows, Panels>(*tile.job, tile.row, tile.column);
  // One pointer for three rows: no address needs an instruction.
  constexpr std::size_t triples = (Rows + 2) / 3;
  const std::uint8_t* starts[triples];
  ONNX_QUAROT_UNROLL for (std::size_t t = 0; t < triples; ++t) starts[t] = tile.values + 3 * t * tile.row_bytes;
  const std::uint8_t* weights = tile.weights;
  [[maybe_unused]] const std::uint8_t* ahead = tile.ahead;
  _Pragma("GCC unroll 2") for (std::size_t step = 0; step < tile.steps; ++step) {
    Isa::Weights operands[vectors];
    ONNX_QUAROT_UNROLL for (std::size_t v = 0; v < vectors; ++v) {
      operands[v] = Isa::weights(weights + v / kVectors * tile.panel_bytes, v % kVectors);
    }
    ONNX_QUAROT_UNROLL for (std::size_t r = 0; r < Rows; ++r) {
      const Isa::Values operand = Isa::values(starts[r / 3] + r % 3 * tile.row_bytes);
      ONNX_QUAROT_UNROLL for (std::size_t v = 0; v < vectors; ++v) {
        sums[r][v] = Isa::dot8(sums[r][v], operands[v], operand);
      }
    }
    ONNX_QUAROT_UNROLL for (std::size_t t = 0; t < triples; ++t) starts[t] += kStepValues;
    weights += kStepBytes;
    if constexpr (Ahead > 0) {
      ONNX_QUAROT_UNROLL for (std::size_t p = 0; p < Ahead; ++p) __builtin_prefetch(ahead + p * tile.panel_bytes, 0, 2);
      ahead += kStepBytes;
    }
  }
  if (!tile.last) {
    ONNX_QUAROT_UNROLL for (std::size_t r = 0; r < Rows; ++r) {
      ONNX_QUAROT_UNROLL for (std::size_t v = 0; v < vectors; ++v)
          store(tile.sums + (r * vectors + v) * Isa::lanes, sums[r][v]);
    }
    return;
  }
  const MultiplyJob& job = *tile.job;
  if constexpr (Isa::has_excess) {
    ONNX_QUAROT_UNROLL for (std::size_t r = 0; r < Rows; ++r) {
      add_excess<Panels>(job, tile.row + r, tile.column, sums[r]);
    }
  }
  finish<true, Rows, Panels>(job, tile.row, tile.column,
                             [&](std::size_t r, std::size_t v) { return to_float(sums[r][v]); });
}

// The tile of `rows` rows, 1 to Rows.
template <std::size_t Rows, std::size_t Panels, std::size_t Ahead>
void tile8_of(std::size_t rows, const Tile& tile) {
  if constexpr (Rows > 1) {
    if (rows < Rows) return tile8_of<Rows - 1, Panels, Ahead>(rows, tile);
  }
  tile8<Rows, Panels, Ahead>(tile);
}

// What is multiplied after these steps: the same panels' next ones, or the next panels' first ones. Null: nothing.
template <std::size_t Panels>
const std::uint8_t* next_panels(const MultiplyJob& job, const std::uint8_t* panel, std::size_t block,
                                std::size_t blocks, std::size_t column) {
  if (block + 1 < blocks) return panel + job.steps * (block + 1) / blocks * kStepBytes;
  return column + 2 * Panels * kPanelColumns > job.reach ? nullptr : panel + Panels * job.panel_bytes;
}

// `Panels` panels from `column` on, times all rows, in groups of about the same number.
template <std::size_t Panels>
void panels8(const MultiplyJob& job, std::size_t column, std::int32_t* sums) {
  const std::size_t groups = (job.rows + Isa::rows - 1) / Isa::rows;
  const std::size_t blocks = (job.steps + kDepthSteps - 1) / kDepthSteps;
  const std::uint8_t* panel = job.weights + column / kPanelColumns * job.panel_bytes;
  for (std::size_t block = 0; block < blocks; ++block) {
    const std::size_t step = job.steps * block / blocks, end = job.steps * (block + 1) / blocks;
    Tile tile{};
    tile.weights = panel + step * kStepBytes;
    tile.panel_bytes = job.panel_bytes;
    tile.row_bytes = job.row_bytes;
    tile.steps = end - step;
    tile.first = block == 0;
    tile.last = block + 1 == blocks;
    tile.job = &job;
    tile.column = column;
    // A single group of rows waits for these panels already: it does not share its time with the next ones.
    const std::uint8_t* next = groups == 1 ? nullptr : next_panels<Panels>(job, panel, block, blocks, column);
    for (std::size_t group = 0; group < groups; ++group) {
      tile.row = job.rows * group / groups;
      const std::size_t rows = job.rows * (group + 1) / groups - tile.row;
      tile.values = static_cast<const std::uint8_t*>(job.values) + tile.row * job.row_bytes + step * kStepValues;
      tile.corrections = job.corrections + tile.row;
      tile.sums = sums + tile.row * kPanelColumns * Panels;
      // Every group fetches its share of them: at once, they would be waited for.
      const std::size_t skipped = Panels * group / groups, share = Panels * (group + 1) / groups - skipped;
      tile.ahead = next == nullptr || share == 0 ? nullptr : next + skipped * job.panel_bytes;
      if (tile.ahead == nullptr) {
        tile8_of<Isa::rows, Panels, 0>(rows, tile);
      } else if (share == 1) {
        tile8_of<Isa::rows, Panels, 1>(rows, tile);
      } else {
        tile8_of<Isa::rows, Panels, (Panels + 1) / 2>(rows, tile);
      }
    }
  }
}

// One row: memory is what takes the time, and is read from its beginning to its end. Several steps are under way at
// once, each with sums of its own; panels side by side share the row's operands.
template <std::size_t Panels>
inline void row8_panels(const MultiplyJob& job, std::size_t column) {
  constexpr std::size_t vectors = kVectors * Panels, chains = vectors < 8 ? 8 / vectors : 1;
  const auto* row = static_cast<const std::uint8_t*>(job.values);
  const std::uint8_t* weights = job.weights + column / kPanelColumns * job.panel_bytes;
  const std::size_t ahead = row_distance<Panels>(job);
  Isa::Int sums[chains][vectors] = {};
  ONNX_QUAROT_UNROLL for (std::size_t v = 0; v < vectors; ++v) sums[0][v] = splat(job.corrections[0]);
  const auto add = [&](Isa::Int* sum, std::size_t step) {
    const Isa::Values operand = Isa::values(row + step * kStepValues);
    ONNX_QUAROT_UNROLL for (std::size_t v = 0; v < vectors; ++v) {
      const std::uint8_t* from = weights + v / kVectors * job.panel_bytes;
      sum[v] = Isa::dot8(sum[v], Isa::weights(from, v % kVectors), operand);
    }
    fetch_row<Panels>(job, weights + ahead);
    weights += kStepBytes;
  };
  std::size_t step = 0;
  for (; step + chains <= job.steps; step += chains) {
    ONNX_QUAROT_UNROLL for (std::size_t i = 0; i < chains; ++i) add(sums[i], step + i);
  }
  for (; step < job.steps; ++step) add(sums[0], step);
  ONNX_QUAROT_UNROLL for (std::size_t i = 1; i < chains; ++i) {
    ONNX_QUAROT_UNROLL for (std::size_t v = 0; v < vectors; ++v) sums[0][v] += sums[i][v];
  }
  if constexpr (Isa::has_excess) add_excess<Panels>(job, 0, column, sums[0]);
  finish<true, 1, Panels>(job, 0, column, [&](std::size_t, std::size_t v) { return to_float(sums[0][v]); });
}

// Several panels at a time: more of them are under way.
void row8(const MultiplyJob& job) {
  std::size_t column = 0;
  if constexpr (Isa::row_panels8 > 1) {
    constexpr std::size_t width = Isa::row_panels8 * kPanelColumns;
    const std::size_t end = Isa::side_by_side8(job) ? job.columns / width * width : 0;
    for (; column < end; column += width) row8_panels<Isa::row_panels8>(job, column);
  }
  for (; column < job.columns; column += kPanelColumns) row8_panels<1>(job, column);
}

void multiply8(const MultiplyJob& whole) {
  if (whole.rows == 1) return row8(whole);
  alignas(64) std::int32_t sums[Isa::most_rows * kPanelColumns * Isa::panels];
  for (std::size_t row = 0; row < whole.rows; row += Isa::most_rows) {
    const MultiplyJob job = some_rows(whole, row, std::min(Isa::most_rows, whole.rows - row));
    std::size_t column = 0;
    for (; column + Isa::panels * kPanelColumns <= job.columns; column += Isa::panels * kPanelColumns) {
      panels8<Isa::panels>(job, column, sums);
    }
    for (; column < job.columns; column += kPanelColumns) {
      panels8<1>(job, column, sums);
    }
  }
}

}  // namespace
}  // namespace onnx_quarot
