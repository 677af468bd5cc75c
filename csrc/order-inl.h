// The step of order K: columns of K elements, `step` apart, multiplied by H_K in place. All forms but that of order 12
// build, for a few inputs at a time, their sums with all signs once, and let every output pick one sum a group (the
// method of four Russians). Included by kernel-inl.h.
#include "order12-inl.h"

namespace onnx_quarot {
namespace {

// x0 +- x1 +- x2 +- x3 +- x4, `step` vectors apart: sum e has +x_i where bit i - 1 of e is set.
template <class V>
ONNX_QUAROT_INLINE void group_sums(V x0, V x1, V x2, V x3, V x4, V* sums, std::size_t step, V one) {
  const V plus = x1 + x2, minus = difference(x1, x2, one);
  const V high_plus = x3 + x4, high_minus = difference(x3, x4, one);
  const V high[4] = {sparing_difference(x0, high_plus, one), x0 + high_minus, difference(x0, high_minus, one),
                     x0 + high_plus};
#pragma GCC unroll 4
  for (std::size_t h = 0; h < 4; ++h) {
    V* to = sums + 4 * h * step;
    to[0] = sparing_difference(high[h], plus, one);
    to[step] = high[h] + minus;
    to[2 * step] = difference(high[h], minus, one);
    to[3 * step] = high[h] + plus;
  }
}

// 16 times code i of a row.
ONNX_QUAROT_INLINE std::size_t row_code(const std::uint64_t* row, std::size_t i) {
  constexpr std::uint64_t mask = ((std::uint64_t{1} << kCodeBits) - 1) * kCodeUnit;
  return row[i / kCodesInWord] >> (kCodeBits * (i % kCodesInWord)) & mask;
}

// Adds or subtracts a sum of W vectors for each of R outputs, `rows` times. Loads are what this waits for: six codes
// are read at a time.
template <bool Minus, std::size_t R, std::size_t W, class V>
ONNX_QUAROT_INLINE void accumulate(const std::uint64_t* codes, std::size_t words, std::size_t rows, const V* table,
                                   V (&sum)[R][W]) {
  constexpr std::size_t unit = W * sizeof(V) / kCodeUnit;
  const char* sums = reinterpret_cast<const char*>(table);
  for (; rows > 0; --rows, codes += words) {
#pragma GCC unroll 64
    for (std::size_t r = 0; r < R; ++r) {
      const V* term = reinterpret_cast<const V*>(sums + row_code(codes, r) * unit);
      for (std::size_t w = 0; w < W; ++w) sum[r][w] = Minus ? sum[r][w] - term[w] : sum[r][w] + term[w];
    }
  }
}

// A batch of R outputs of W vectors each: their sums of the rounds before are in `sums`, and so will be these, unless
// they are finished.
template <std::size_t R, std::size_t W, class V, class Finish>
ONNX_QUAROT_INLINE void batch_sums(const std::uint64_t* batch, std::size_t plus, std::size_t minus, const V* table,
                                   V* sums, bool begins, bool ends, const Finish& finish) {
  constexpr std::size_t words = row_words(R);
  const std::uint64_t* outputs = batch + 1;
  V sum[R][W] = {};
  if (!begins) {
#pragma GCC unroll 64
    for (std::size_t r = 0; r < R; ++r) {
      for (std::size_t w = 0; w < W; ++w) sum[r][w] = sums[W * (row_code(outputs, r) / kCodeUnit) + w];
    }
  }
  accumulate<false>(outputs + words, words, plus, table, sum);
  accumulate<true>(outputs + words * (1 + plus), words, minus, table, sum);
#pragma GCC unroll 64
  for (std::size_t r = 0; r < R; ++r) {
    const std::size_t output = row_code(outputs, r) / kCodeUnit;
    if (ends) {
      finish(output, sum[r]);
    } else {
      for (std::size_t w = 0; w < W; ++w) sums[W * output + w] = sum[r][w];
    }
  }
}

// A round's batches of R outputs, of which `left` are to be done, and then the smaller ones. Returns the codes of the
// next round.
template <std::size_t R, std::size_t W, class V, class Finish>
ONNX_QUAROT_INLINE const std::uint64_t* round_sums(const std::uint64_t* batch, std::size_t left, const V* table,
                                                   V* sums, bool begins, bool ends, const Finish& finish) {
  for (; left >= R; left -= R) {
    const std::size_t plus = batch[0] & 0xffffffffu, minus = batch[0] >> 32;
    batch_sums<R, W>(batch, plus, minus, table, sums, begins, ends, finish);
    batch += 1 + row_words(R) * (1 + plus + minus);
  }
  if constexpr (R > 2) {
    return round_sums<smaller_batch(R), W>(batch, left, table, sums, begins, ends, finish);
  } else {
    return batch;
  }
}

// Vectors of each of n inputs, of each of some columns, times a matrix of +-1, given by its codes for so many of both.
// input(i, v) gives those of input i; finish(i, v) takes those of output i, once all inputs have been read.
template <std::size_t Vectors, std::size_t Columns, class V, class Input, class Finish>
ONNX_QUAROT_INLINE void table_product(std::size_t n, const std::uint64_t* codes, V* table, V* sums, V one,
                                      const Input& input, const Finish& finish) {
  constexpr std::size_t W = Vectors * Columns;
  const std::size_t groups = group_count(n), step = round_groups(groups, Vectors), zeros = leading_zeros(n);
  for (std::size_t w = 0; w < W; ++w) table[w] = V{};
  for (std::size_t done = 0; done < groups; done += step) {
    const std::size_t end = done + step < groups ? done + step : groups;
    V* to = table + W;
    for (std::size_t g = done; g < end; ++g, to += W * kGroupSums) {
      V x[kGroupInputs][W] = {};
#pragma GCC unroll 5
      for (std::size_t i = 0; i < kGroupInputs; ++i) {
        if (kGroupInputs * g + i >= zeros) input(kGroupInputs * g + i - zeros, x[i]);
      }
#pragma GCC unroll 2
      for (std::size_t w = 0; w < W; ++w) group_sums(x[0][w], x[1][w], x[2][w], x[3][w], x[4][w], to + w, W, one);
    }
    codes = round_sums<kBatchVectors / W, W>(codes, n, table, sums, done == 0, end == groups, finish);
  }
}

// Columns side by side times the matrix. Codes take as long to read as sums to load: with two columns, half of that.
template <std::size_t Columns, class C, class V>
ONNX_QUAROT_INLINE void table_columns(C* column, std::size_t step, const OrderStep& order, V* table, V* sums, V scale,
                                      V one) {
  constexpr std::size_t lanes = sizeof(V) / sizeof(C);
  const auto input = [&](std::size_t i, V* x) {
    for (std::size_t c = 0; c < Columns; ++c) x[c] = load(column + i * step + c * lanes);
  };
  const auto finish = [&](std::size_t i, const V* sum) {
    for (std::size_t c = 0; c < Columns; ++c) store(column + i * step + c * lanes, sum[c] * scale);
  };
  table_product<1, Columns>(order.order, order.codes[Columns - 1], table, sums, one, input, finish);
}

// Any order, from the codes of its matrix.
template <class C, class V>
__attribute__((noinline)) void table_order(C* values, std::size_t step, const OrderStep& order, char* table_bytes,
                                           char* sums_bytes, V scale, V one) {
  constexpr std::size_t lanes = sizeof(V) / sizeof(C);
  V* table = reinterpret_cast<V*>(table_bytes);
  V* sums = reinterpret_cast<V*>(sums_bytes);
  if (!order.halved) {
    constexpr std::size_t most = most_columns(sizeof(V));
    std::size_t j = 0;
    for (; j + most * lanes <= step; j += most * lanes)
      table_columns<most>(values + j, step, order, table, sums, scale, one);
    if (j < step) table_columns<1>(values + j, step, order, table, sums, scale, one);
    return;
  }
  for (std::size_t j = 0; j < step; j += lanes) {
    C* column = values + j;
    const auto input = [&](std::size_t i, V* x) {
      const V a = load(column + 2 * i * step), b = load(column + (2 * i + 1) * step);
      x[0] = a + b;
      x[1] = difference(a, b, one);
    };
    const auto finish = [&](std::size_t i, const V* sum) {
      C* even = column + 2 * i * step;
      C* odd = even + step;
      const V a = load(even), b = load(odd);
      store(even, (sum[0] - (b + b)) * scale);
      store(odd, (sum[1] - (a + a)) * scale);
    };
    table_product<2, 1>(order.order / 2, order.codes[0], table, sums, one, input, finish);
  }
}

// values[b] <- scale * sum over a of values[a] H[a][b], for `step` adjacent columns; the codes are those of H or of
// H^T, as `transpose` says.
ONNX_QUAROT_INLINE void order_step(float* values, std::size_t step, const OrderStep& order, bool transpose, char* table,
                                   char* sums, Floats scale, Floats one) {
  switch (order.order) {
    case 12:
      return order12(values, step, transpose, scale, one);
    case 20:
      return williamson_order<5>(values, step, transpose, scale, one);
    case 28:
      return williamson_order<7>(values, step, transpose, scale, one);
    case 36:
      return williamson_order<9>(values, step, transpose, scale, one);
    case 44:
      return williamson_order<11>(values, step, transpose, scale, one);
    case 60:
      return paley_order<29>(values, step, scale, one);
    case 76:
      return paley_order<37>(values, step, scale, one);
    default:
      return table_order(values, step, order, table, sums, scale, one);
  }
}
ONNX_QUAROT_INLINE void order_step(double* values, std::size_t step, const OrderStep& order, bool, char* table,
                                   char* sums, Doubles scale, Doubles one) {
  return table_order(values, step, order, table, sums, scale, one);
}

// All steps of a block of K columns, `step` adjacent ones at a time: innermost factor first, the scale with the last.
template <class C, class V>
void order_steps(C* values, std::size_t step, const Job& job, char* scratch, const ScratchLayout& layout, V scale,
                 V one) {
  const std::size_t total = job.order * step;
  for (std::size_t i = job.step_count; i-- > 0;) {
    const OrderStep& order = job.steps[i];
    for (std::size_t start = 0; start < total; start += order.order * step) {
      order_step(values + start, step, order, job.transpose, scratch + layout.table, scratch + layout.sums,
                 i == 0 ? scale : one, one);
    }
    step *= order.order;
  }
}

}  // namespace
}  // namespace onnx_quarot
