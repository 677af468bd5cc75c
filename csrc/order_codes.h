// How a matrix of +-1 is written down for the kernels that multiply by it.
//
// Inputs are taken in groups of five, with zeros before the first ones if there are too few. Of a group's sums with all
// signs only the 16 that begin with +x0 are made; every output adds or subtracts one of them. As many groups as fit in
// first-level cache are a round; terms are added round by round, so that is the same for every kernel. For each round,
// outputs are ordered by how many sums they add, and then worked on in batches of 12 vectors while there are so many,
// then of fewer. A batch is one row of codes that name its outputs, rows of codes of the sums to add, and rows of those
// to subtract; code 0 is a sum that is zero, for outputs that have fewer than others of their batch. In memory:
//   a word   rows to add, rows to subtract * 2^32
//   rows     words with six codes of ten bits each, from bit 4 on: a code where it stands is 16 times its value
#ifndef ONNX_QUAROT_ORDER_CODES_H
#define ONNX_QUAROT_ORDER_CODES_H

#include <cstddef>
#include <cstdint>
#include <vector>

namespace onnx_quarot {
namespace {

constexpr std::size_t kGroupInputs = 5;
constexpr std::size_t kGroupSums = 16;
constexpr std::size_t kRoundSums = 640;  // of one vector each and a column, or half as many of two
constexpr std::size_t kBatchVectors = 12;
constexpr std::size_t kCodesInWord = 6;
constexpr std::size_t kCodeBits = 10;
constexpr std::size_t kCodeUnit = 16;

// Outputs of a batch: 12, 6, 4 or 2.
constexpr std::size_t smaller_batch(std::size_t size) { return size > kCodesInWord ? size / 2 : size - 2; }

constexpr std::size_t row_words(std::size_t outputs) { return (outputs + kCodesInWord - 1) / kCodesInWord; }

constexpr std::size_t group_count(std::size_t inputs) { return (inputs + kGroupInputs - 1) / kGroupInputs; }
constexpr std::size_t leading_zeros(std::size_t inputs) { return kGroupInputs * group_count(inputs) - inputs; }

// Groups of a round, of which there are as few as possible, and all alike but the last.
constexpr std::size_t round_groups(std::size_t groups, std::size_t vectors) {
  const std::size_t most = kRoundSums / kGroupSums / vectors, rounds = (groups + most - 1) / most;
  return (groups + rounds - 1) / rounds;
}

}  // namespace

// The codes of y[b] = sum over a of x[a] h[a * row + b * column], n inputs and n outputs, n even and at most 1024,
// where an input and an output are `vectors` vectors, of each of `columns` columns that are worked on together.
std::vector<std::uint64_t> order_codes(const std::int8_t* h, std::size_t n, std::size_t row, std::size_t column,
                                       std::size_t vectors, std::size_t columns);

}  // namespace onnx_quarot

#endif
