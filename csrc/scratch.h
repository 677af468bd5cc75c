// Where a kernel keeps what does not fit in registers. Shared by fwht.cc, which allocates, and the kernels, which use
// it; internal linkage, because the kernels are compiled for different CPUs.
#ifndef ONNX_QUAROT_SCRATCH_H
#define ONNX_QUAROT_SCRATCH_H

#include <cstddef>

#include "kernels.h"
#include "order_codes.h"

namespace onnx_quarot {
namespace {

constexpr std::size_t kScratchAlignment = 64;
// Rows up to here are worked on two at a time, and have room for two.
constexpr std::size_t kTwoRowsBytes = 32768;

// Offsets in bytes. `lanes` is the number of elements computed in one vector.
struct ScratchLayout {
  std::size_t values;    // intermediate values of a block in the type of computation
  std::size_t table;     // sums of five inputs with all signs, for the step of order K
  std::size_t sums;      // its outputs, while the table is filled again
  std::size_t gathered;  // the last three: blocks whose power of two is shorter than a vector, packed side by side
  std::size_t scattered;
  std::size_t signs;
  std::size_t total;
};

constexpr std::size_t padded(std::size_t bytes) {
  return (bytes + kScratchAlignment - 1) / kScratchAlignment * kScratchAlignment;
}

// Columns of a step of order K that are worked on together: the sums of two are to stay in first-level cache.
constexpr std::size_t most_columns(std::size_t vector_bytes) { return vector_bytes < 64 ? 2 : 1; }

constexpr std::size_t step_vectors(const OrderStep& step) { return step.halved ? 2 : 1; }
constexpr std::size_t step_columns(const OrderStep& step, std::size_t vector_bytes) {
  return step.halved ? 1 : most_columns(vector_bytes);
}

// A zero, and the sums of a round, of each vector and column.
constexpr std::size_t table_bytes(const OrderStep& step, std::size_t vector_bytes) {
  const std::size_t vectors = step_vectors(step), groups = round_groups(group_count(step.order / vectors), vectors);
  return (1 + groups * kGroupSums) * vectors * step_columns(step, vector_bytes) * vector_bytes;
}

// Outputs of a step are kept only while rounds are left: one vector for each element of a column.
constexpr std::size_t sums_bytes(const OrderStep& step, std::size_t vector_bytes) {
  const std::size_t vectors = step_vectors(step), groups = group_count(step.order / vectors);
  return round_groups(groups, vectors) < groups ? step.order * step_columns(step, vector_bytes) * vector_bytes : 0;
}

inline ScratchLayout scratch_layout(const Job& job, std::size_t element_bytes, std::size_t compute_bytes,
                                    std::size_t vector_bytes) {
  const std::size_t lanes = vector_bytes / compute_bytes;
  const bool packs = job.power < lanes;
  const std::size_t elements = job.order * (packs ? lanes : job.power);
  const auto largest = [&](std::size_t (*bytes)(const OrderStep&, std::size_t)) {
    std::size_t most = 0;
    for (std::size_t i = 0; i < job.step_count; ++i) {
      const std::size_t needed = bytes(job.steps[i], vector_bytes);
      if (needed > most) most = needed;
    }
    return padded(most);
  };
  ScratchLayout layout{};
  const std::size_t row_bytes = packs || element_bytes != compute_bytes ? padded(elements * compute_bytes) : 0;
  layout.table = job.order == 1 && row_bytes <= kTwoRowsBytes ? 2 * row_bytes : row_bytes;
  layout.sums = layout.table + largest(table_bytes);
  layout.gathered = layout.sums + largest(sums_bytes);
  layout.scattered = layout.gathered + (packs ? padded(elements * element_bytes) : 0);
  layout.signs = layout.scattered + (packs ? padded(elements * element_bytes) : 0);
  layout.total = layout.signs + (packs ? padded(elements * sizeof(float)) : 0);
  return layout;
}

}  // namespace
}  // namespace onnx_quarot

#endif
