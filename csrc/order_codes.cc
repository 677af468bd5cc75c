#include "order_codes.h"

#include <algorithm>
#include <numeric>

namespace onnx_quarot {
namespace {

static_assert(kRoundSums < std::size_t{1} << kCodeBits, "sums and the zero before them have codes");

using Codes = std::vector<std::uint64_t>;

// Codes of the sums of a round that an output adds, and of those that it subtracts.
struct Terms {
  Codes plus, minus;
};

// `code(i)` of `size` outputs.
template <class Code>
void append_row(Codes& codes, std::size_t size, Code code) {
  for (std::size_t i = 0; i < size; ++i) {
    if (i % kCodesInWord == 0) codes.push_back(0);
    codes.back() |= std::uint64_t{code(i)} * kCodeUnit << (kCodeBits * (i % kCodesInWord));
  }
}

// Batches of all outputs, of `size` of them as long as there are so many.
void append_round(Codes& codes, const std::vector<Terms>& terms, std::size_t size) {
  std::vector<std::size_t> outputs(terms.size());
  std::iota(outputs.begin(), outputs.end(), std::size_t{0});
  std::stable_sort(outputs.begin(), outputs.end(),
                   [&](std::size_t a, std::size_t b) { return terms[a].plus.size() < terms[b].plus.size(); });
  for (std::size_t first = 0; first < outputs.size(); first += size) {
    while (size > outputs.size() - first) size = smaller_batch(size);
    std::size_t plus = 0, minus = 0;
    for (std::size_t i = 0; i < size; ++i) {
      plus = std::max(plus, terms[outputs[first + i]].plus.size());
      minus = std::max(minus, terms[outputs[first + i]].minus.size());
    }
    codes.push_back(std::uint64_t{plus} | std::uint64_t{minus} << 32);
    append_row(codes, size, [&](std::size_t i) { return outputs[first + i]; });
    const auto append = [&](Codes Terms::* list, std::size_t rows) {
      for (std::size_t r = 0; r < rows; ++r) {
        append_row(codes, size, [&](std::size_t i) {
          const Codes& own = terms[outputs[first + i]].*list;
          return r < own.size() ? own[r] : 0;
        });
      }
    };
    append(&Terms::plus, plus);
    append(&Terms::minus, minus);
  }
}

}  // namespace

std::vector<std::uint64_t> order_codes(const std::int8_t* h, std::size_t n, std::size_t row, std::size_t column,
                                       std::size_t vectors, std::size_t columns) {
  const std::size_t groups = group_count(n), step = round_groups(groups, vectors), zeros = leading_zeros(n);
  Codes codes;
  for (std::size_t done = 0; done < groups; done += step) {
    std::vector<Terms> terms(n);
    for (std::size_t b = 0; b < n; ++b) {
      // Last the first group, which can be added or subtracted where it begins with a zero: so that an even number is
      // added, which makes the outputs of batches more alike.
      for (std::size_t g = std::min(done + step, groups); g-- > done;) {
        int sign[kGroupInputs] = {};
        for (std::size_t i = g == 0 ? zeros : 0; i < kGroupInputs; ++i) {
          sign[i] = int{h[(kGroupInputs * g + i - zeros) * row + b * column]};
        }
        if (sign[0] == 0) sign[0] = terms[b].plus.size() % 2 != 0 ? 1 : -1;
        std::uint64_t sum = 0;  // bit i - 1: x_i has the sign of x_0
        for (std::size_t i = 1; i < kGroupInputs; ++i) {
          if (sign[i] == sign[0]) sum |= std::uint64_t{1} << (i - 1);
        }
        (sign[0] > 0 ? terms[b].plus : terms[b].minus).push_back(1 + (g - done) * kGroupSums + sum);
      }
    }
    append_round(codes, terms, kBatchVectors / vectors / columns);
  }
  return codes;
}

}  // namespace onnx_quarot
