// An `Isa` for CPUs with a dot product of four bytes: each lane of a sum gains four products. The including file
// defines ONNX_QUAROT_DOT_LANES, ONNX_QUAROT_DOT_ROWS, ONNX_QUAROT_DOT_PANELS, ONNX_QUAROT_DOT_SIGNED (1: weights are
// signed as well, 0: unsigned), Vector dot_bytes(Vector sum, Vector weights, Vector values), Vector
// wide_bytes<Vector>(from), and Vector fused(Vector a, Vector b, Vector sum), see multiply_add in kernel-inl.h.
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace onnx_quarot {
namespace {

void quantize_bytes(const QuantizeJob& job);

struct Isa {
  static constexpr std::size_t lanes = ONNX_QUAROT_DOT_LANES, rows = ONNX_QUAROT_DOT_ROWS,
                               panels = ONNX_QUAROT_DOT_PANELS;
  static constexpr std::size_t rows4 = ONNX_QUAROT_DOT_LANES == 16 ? 6 : 4,
                               panels4 = ONNX_QUAROT_DOT_LANES == 16 ? 2 : 1;
  // With 8 bits long panels, with 4 bits short ones: these share what is done to a row, and the end.
  static constexpr std::size_t row_panels8 = ONNX_QUAROT_DOT_LANES == 16 ? 4 : 1,
                               row_panels4 = ONNX_QUAROT_DOT_LANES == 16 ? 2 : 1, row_tile4 = row_panels4;
  static constexpr bool upper_halves = ONNX_QUAROT_DOT_SIGNED == 0, fetches_row = true;
  static bool side_by_side8(const MultiplyJob& job) { return job.steps >= kLongSteps; }
  static bool side_by_side4(const MultiplyJob& job) { return job.panel_bytes <= kShortPanel; }
  static constexpr std::size_t most_rows = 256;
  static constexpr bool quick_sums = false;
  static constexpr std::int32_t offset8 = ONNX_QUAROT_DOT_SIGNED ? 0 : 128;
  static constexpr bool has_excess = false;
  using Int [[gnu::vector_size(4 * ONNX_QUAROT_DOT_LANES), gnu::aligned(4)]] = std::int32_t;
  using Float [[gnu::vector_size(4 * ONNX_QUAROT_DOT_LANES), gnu::aligned(4)]] = float;
  using Bytes [[gnu::vector_size(4 * ONNX_QUAROT_DOT_LANES), gnu::aligned(4)]] = std::uint8_t;
  using Weights = Int;
  using Values = Int;
  using Part = Int;

  static Float multiply_add(const Float& a, const Float& b, const Float& sum) { return fused(a, b, sum); }
  static Bytes bytes(const std::uint8_t* from, std::size_t vector) {
    Bytes loaded;
    std::memcpy(&loaded, from + vector * 4 * lanes, sizeof(loaded));
    return loaded;
  }
  static Weights weights(const std::uint8_t* from, std::size_t vector) {
    const Bytes loaded = bytes(from, vector);
    return reinterpret_cast<Int>(ONNX_QUAROT_DOT_SIGNED ? loaded ^ std::uint8_t{0x80} : loaded);
  }
  static Values values(const std::uint8_t* from) {
    std::int32_t four = 0;
    std::memcpy(&four, from, sizeof(four));
    return four - Int{};
  }
  static Int dot8(Int sum, Weights weights, Values values) { return dot_bytes(sum, weights, values); }
  static void quantize8(const QuantizeJob& job) { quantize_bytes(job); }

  static Int wide_bytes(const std::uint8_t* from) { return onnx_quarot::wide_bytes<Int>(from); }
  static Part part(Int sum) { return sum; }
  static Weights nibbles(const std::uint8_t* from, std::size_t vector, std::size_t half) {
    const Bytes loaded = bytes(from, vector);
    return reinterpret_cast<Int>(half == 0 ? loaded & std::uint8_t{15} : loaded >> std::uint8_t{4});
  }
  static Part dot4(Part part, Weights weights, Values values) { return dot_bytes(part, weights, values); }
  static Int flush(Int, Part part) { return part; }
};

}  // namespace
}  // namespace onnx_quarot

#include "kernel-inl.h"
