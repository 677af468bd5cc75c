// Williamson's construction as constant expressions, so that the kernels can unroll the small orders at compile time.
// Everything has internal linkage: the header is included by files compiled for different CPUs.
#ifndef ONNX_QUAROT_WILLIAMSON_INL_H
#define ONNX_QUAROT_WILLIAMSON_INL_H

#include <cstddef>
#include <cstdint>

namespace onnx_quarot {
namespace {

// Four symmetric circulants A, B, C, D of odd size t, first row +1, then bit i of a seed set: -1 at i + 1 and t - 1 -
// i.
struct WilliamsonSeed {
  std::size_t t;
  std::uint32_t blocks[4];
};

constexpr WilliamsonSeed kWilliamsonSeeds[] = {
    {3, {0x0, 0x1, 0x1, 0x1}},           {5, {0x1, 0x2, 0x3, 0x3}},   {7, {0x3, 0x5, 0x6, 0x7}},
    {9, {0x1, 0x3, 0x7, 0xa}},           {11, {0x3, 0x5, 0xf, 0x16}}, {23, {0xa7, 0x613, 0x31f, 0x254}},
    {29, {0x2f3, 0x6bb, 0x30a6, 0xb11}},
};

// The kernels unroll orders up to here.
constexpr std::size_t kLargestUnrolledOrder = 44;

constexpr const WilliamsonSeed* find_williamson(std::size_t t) {
  for (const WilliamsonSeed& seed : kWilliamsonSeeds) {
    if (seed.t == t) return &seed;
  }
  return nullptr;
}

// Entry of [[A, B, C, D], [-B, A, -D, C], [-C, D, A, -B], [-D, -C, B, A]].
constexpr int williamson_entry(const WilliamsonSeed& seed, std::size_t row, std::size_t column) {
  constexpr int which[4][4] = {{0, 1, 2, 3}, {1, 0, 3, 2}, {2, 3, 0, 1}, {3, 2, 1, 0}};
  constexpr int sign[4][4] = {{1, 1, 1, 1}, {-1, 1, -1, 1}, {-1, 1, 1, -1}, {-1, -1, 1, 1}};
  const std::size_t t = seed.t;
  const std::size_t block_row = row / t, block_column = column / t;
  const std::size_t shift = (column % t - row % t + t) % t;
  const std::size_t distance = shift <= t / 2 ? shift : t - shift;
  const bool minus = distance != 0 && ((seed.blocks[which[block_row][block_column]] >> (distance - 1)) & 1u) != 0;
  return sign[block_row][block_column] * (minus ? -1 : 1);
}

}  // namespace
}  // namespace onnx_quarot

#endif
