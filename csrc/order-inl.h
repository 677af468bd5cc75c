// The step of order K: columns of K elements, `step` apart, multiplied by +-H_K in place. Both forms build, for each
// four or five inputs, their sums with all signs once, and let every output pick one sum a group (the method of four
// Russians). Included by kernel-inl.h.

namespace onnx_quarot {
namespace {

// x3 +- x2 +- x1 +- x0: entry e has +x_i where bit i of e is set.
template <class V>
ONNX_QUAROT_INLINE void signed_sums(V x0, V x1, V x2, V x3, V* sums, V one) {
  const V plus = x0 + x1, minus = difference(x0, x1, one), low = difference(x3, x2, one), high = x3 + x2;
  sums[0] = sparing_difference(low, plus, one);
  sums[1] = low + minus;
  sums[2] = difference(low, minus, one);
  sums[3] = low + plus;
  sums[4] = sparing_difference(high, plus, one);
  sums[5] = high + minus;
  sums[6] = difference(high, minus, one);
  sums[7] = high + plus;
}

// Williamson's matrix of order K = 4 T as sums of groups, known at compile time.
template <std::size_t T, bool Transpose>
struct SmallOrder {
  std::uint8_t entry[T][4 * T];  // of signed_sums
  bool minus[T][4 * T];          // the negated entry

  constexpr SmallOrder() : entry(), minus() {
    const WilliamsonSeed seed = *find_williamson(T);
    for (std::size_t g = 0; g < T; ++g) {
      for (std::size_t b = 0; b < 4 * T; ++b) {
        unsigned bits = 0;
        for (std::size_t i = 0; i < 4; ++i) {
          const std::size_t a = 4 * g + i;
          if ((Transpose ? williamson_entry(seed, b, a) : williamson_entry(seed, a, b)) > 0) bits |= 1u << i;
        }
        minus[g][b] = (bits & 8u) == 0;
        entry[g][b] = static_cast<std::uint8_t>((minus[g][b] ? ~bits : bits) & 7u);
      }
    }
  }
};

template <std::size_t T, bool Transpose>
constexpr SmallOrder<T, Transpose> kSmallOrder{};

// One output: the sum over groups G.. of entries, negated as a whole when the first is (a sign that the scale absorbs).
template <std::size_t T, bool Transpose, std::size_t B, std::size_t G, class V>
ONNX_QUAROT_INLINE V gather_sum(const V (*sums)[8], V sum, V one) {
  if constexpr (G == T) {
    return sum;
  } else {
    constexpr const SmallOrder<T, Transpose>& order = kSmallOrder<T, Transpose>;
    const V term = sums[G][order.entry[G][B]];
    constexpr bool same = order.minus[G][B] == order.minus[0][B];
    return gather_sum<T, Transpose, B, G + 1>(sums, same ? sum + term : difference(sum, term, one), one);
  }
}

// The pointer to elements behind, computed here and now: left to itself the compiler computes one for every row of a
// column beforehand, and keeps them in memory.
template <class C>
ONNX_QUAROT_INLINE C* behind(C* p, std::size_t distance) {
  p += distance;
  __asm__("" : "+r"(p));
  return p;
}

// A column whose groups' sums are kept in memory.
template <std::size_t T, bool Transpose, class C, class V, int... B>
ONNX_QUAROT_INLINE void small_order_column(C* values, std::size_t step, V scale, V minus_scale, V one, Indices<B...>) {
  constexpr const SmallOrder<T, Transpose>& order = kSmallOrder<T, Transpose>;
  V sums[T][8];
  const C* x = values;
#pragma GCC unroll 64
  for (std::size_t g = 0; g < T; ++g, x = behind(x, 4 * step)) {
    signed_sums(load(x), load(x + step), load(x + 2 * step), load(x + 3 * step), sums[g], one);
  }
  ((store(values, gather_sum<T, Transpose, std::size_t{B}, 1>(sums, sums[0][order.entry[0][B]], one) *
                      (order.minus[0][B] ? minus_scale : scale)),
    values = behind(values, step)),
   ...);
}

// With 32 registers there is room for the sums of one group and a part of the outputs: no sum is loaded, and the sums
// are made anew for every part. Every second output adds by multiply-adds where these have units of their own.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr bool kPartsInRegisters = true;
#else
constexpr bool kPartsInRegisters = false;
#endif
template <std::size_t T>
constexpr std::size_t kParts = 4 * T > 20 ? 2 : 1;

template <std::size_t T, bool Transpose, std::size_t G, std::size_t B, class V>
ONNX_QUAROT_INLINE void add_group(const V* sums, V& sum, V one) {
  constexpr const SmallOrder<T, Transpose>& order = kSmallOrder<T, Transpose>;
  const V term = sums[order.entry[G][B]];
  if constexpr (G == 0) {
    sum = term;
  } else {
    constexpr bool same = order.minus[G][B] == order.minus[0][B], fused = kFusedDifference && B % 2 != 0;
    const V product = fused ? one * term : term;
    sum = same ? sum + product : sum - product;
  }
}

// Outputs First + B of a column, from group G on, of which `x` is the first input.
template <std::size_t T, bool Transpose, std::size_t First, std::size_t G = 0, class C, class V, int... B>
ONNX_QUAROT_INLINE void part_sums(const C* x, std::size_t step, V* sum, V one, Indices<B...> outputs) {
  if constexpr (G < T) {
    V sums[8];
    signed_sums(load(x), load(x + step), load(x + 2 * step), load(x + 3 * step), sums, one);
    (add_group<T, Transpose, G, First + std::size_t{B}>(sums, sum[B], one), ...);
    part_sums<T, Transpose, First, G + 1>(behind(x, 4 * step), step, sum, one, outputs);
  }
}

template <std::size_t N, class C, class V>
ONNX_QUAROT_INLINE void store_column(C* values, std::size_t step, const V* x) {
#pragma GCC unroll 64
  for (std::size_t i = 0; i < N; ++i, values = behind(values, step)) store(values, x[i]);
}

template <std::size_t T, bool Transpose, class C, class V, int... B>
ONNX_QUAROT_INLINE void small_order_parts(C* values, std::size_t step, V scale, V minus_scale, V one,
                                          Indices<B...> outputs) {
  constexpr const SmallOrder<T, Transpose>& order = kSmallOrder<T, Transpose>;
  constexpr std::size_t n = sizeof...(B);
  V sum[n], first[n];
  part_sums<T, Transpose, 0>(values, step, sum, one, outputs);
  ((first[B] = sum[B] * (order.minus[0][B] ? minus_scale : scale)), ...);
  if constexpr (n < 4 * T) {
    part_sums<T, Transpose, n>(behind(values, 0), step, sum, one, outputs);
    ((sum[B] *= order.minus[0][n + std::size_t{B}] ? minus_scale : scale), ...);
    store_column<n>(values + n * step, step, sum);
  }
  store_column<n>(values, step, first);
}

template <std::size_t T, bool Transpose, class C, class V>
__attribute__((noinline)) void small_order(C* values, std::size_t step, V scale, V one) {
  const V minus_scale = -scale;
  for (std::size_t j = 0; j < step; j += sizeof(V) / sizeof(C)) {
    if constexpr (kPartsInRegisters) {
      small_order_parts<T, Transpose>(values + j, step, scale, minus_scale, one,
                                      typename MakeIndices<static_cast<int>(4 * T / kParts<T>)>::Type{});
    } else {
      small_order_column<T, Transpose>(values + j, step, scale, minus_scale, one,
                                       typename MakeIndices<static_cast<int>(4 * T)>::Type{});
    }
  }
}

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

// W vectors of each of n inputs times a matrix of +-1, given by its codes. input(i, v) gives the vectors of input i;
// finish(i, v) takes those of output i, once all inputs have been read.
template <std::size_t W, class V, class Input, class Finish>
ONNX_QUAROT_INLINE void table_product(std::size_t n, const std::uint64_t* codes, V* table, V* sums, V one,
                                      const Input& input, const Finish& finish) {
  const std::size_t groups = group_count(n), step = round_groups(groups, W), zeros = leading_zeros(n);
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

// Any order, from the codes of its matrix.
template <class C, class V>
__attribute__((noinline)) void table_order(C* values, std::size_t step, const OrderStep& order, char* table_bytes,
                                           char* sums_bytes, V scale, V one) {
  constexpr std::size_t lanes = sizeof(V) / sizeof(C);
  V* table = reinterpret_cast<V*>(table_bytes);
  V* sums = reinterpret_cast<V*>(sums_bytes);
  for (std::size_t j = 0; j < step; j += lanes) {
    C* column = values + j;
    if (order.halved) {
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
      table_product<2>(order.order / 2, order.codes, table, sums, one, input, finish);
    } else {
      const auto input = [&](std::size_t i, V* x) { x[0] = load(column + i * step); };
      const auto finish = [&](std::size_t i, const V* sum) { store(column + i * step, sum[0] * scale); };
      table_product<1>(order.order, order.codes, table, sums, one, input, finish);
    }
  }
}

template <std::size_t T, class V>
ONNX_QUAROT_INLINE void small_order(float* values, std::size_t step, bool transpose, V scale, V one) {
  return transpose ? small_order<T, true>(values, step, scale, one) : small_order<T, false>(values, step, scale, one);
}

// values[b] <- scale * sum over a of values[a] H[a][b], for `step` adjacent columns; the codes are those of H or of
// H^T, as `transpose` says.
ONNX_QUAROT_INLINE void order_step(float* values, std::size_t step, const OrderStep& order, bool transpose, char* table,
                                   char* sums, Floats scale, Floats one) {
  switch (order.order) {
    case 12:
      return small_order<3>(values, step, transpose, scale, one);
    case 20:
      return small_order<5>(values, step, transpose, scale, one);
    case 28:
      return small_order<7>(values, step, transpose, scale, one);
    case 36:
      return small_order<9>(values, step, transpose, scale, one);
    case 44:
      return small_order<11>(values, step, transpose, scale, one);
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
