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

// The step of order K works on one or two vectors at a time: a zero, and the sums of a round.
constexpr std::size_t table_bytes(std::size_t vector_bytes) { return (2 + kRoundSums) * vector_bytes; }

// Outputs of a step are kept only while rounds are left: one vector for each element of a column.
constexpr std::size_t sums_bytes(const OrderStep& step, std::size_t vector_bytes) {
  const std::size_t vectors = step.halved ? 2 : 1, groups = group_count(step.order / vectors);
  return round_groups(groups, vectors) < groups ? step.order * vector_bytes : 0;
}

inline ScratchLayout scratch_layout(const Job& job, std::size_t element_bytes, std::size_t compute_bytes,
                                    std::size_t vector_bytes) {
  const std::size_t lanes = vector_bytes / compute_bytes;
  const bool packs = job.power < lanes;
  const std::size_t elements = job.order * (packs ? lanes : job.power);
  std::size_t sums = 0;
  for (std::size_t i = 0; i < job.step_count; ++i) {
    const std::size_t bytes = sums_bytes(job.steps[i], vector_bytes);
    if (bytes > sums) sums = bytes;
  }
  ScratchLayout layout{};
  const std::size_t row_bytes = packs || element_bytes != compute_bytes ? padded(elements * compute_bytes) : 0;
  layout.table = job.order == 1 && row_bytes <= kTwoRowsBytes ? 2 * row_bytes : row_bytes;
  layout.sums = layout.table + (job.order > 1 ? padded(table_bytes(vector_bytes)) : 0);
  layout.gathered = layout.sums + padded(sums);
  layout.scattered = layout.gathered + (packs ? padded(elements * element_bytes) : 0);
  layout.signs = layout.scattered + (packs ? padded(elements * element_bytes) : 0);
  layout.total = layout.signs + (packs ? padded(elements * sizeof(float)) : 0);
  return layout;
}

}  // namespace
}  // namespace onnx_quarot

#endif
