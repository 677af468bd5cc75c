// The step of order K: columns of K elements, `step` apart, multiplied by +-H_K in place. Both forms build, for each
// four inputs, their sums with all signs once, and let every output pick one sum a group (the method of four Russians).
// Included by kernel-inl.h.

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

template <std::size_t T, bool Transpose, class C, class V, int... B>
ONNX_QUAROT_INLINE void small_order_column(C* values, std::size_t step, V scale, V minus_scale, V one, Indices<B...>) {
  constexpr const SmallOrder<T, Transpose>& order = kSmallOrder<T, Transpose>;
  V sums[T][8];
#pragma GCC unroll 64
  for (std::size_t g = 0; g < T; ++g) {
    const C* x = values + 4 * g * step;
    signed_sums(load(x), load(x + step), load(x + 2 * step), load(x + 3 * step), sums[g], one);
  }
  (store(values + static_cast<std::size_t>(B) * step,
         gather_sum<T, Transpose, std::size_t{B}, 1>(sums, sums[0][order.entry[0][B]], one) *
             (order.minus[0][B] ? minus_scale : scale)),
   ...);
}

template <std::size_t T, bool Transpose, class C, class V>
__attribute__((noinline)) void small_order(C* values, std::size_t step, V scale, V one) {
  const V minus_scale = -scale;
  for (std::size_t j = 0; j < step; j += sizeof(V) / sizeof(C)) {
    small_order_column<T, Transpose>(values + j, step, scale, minus_scale, one,
                                     typename MakeIndices<static_cast<int>(4 * T)>::Type{});
  }
}

// Sums that are kept in registers: half of what there are.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr std::size_t kSumVectors = 16;
#else
constexpr std::size_t kSumVectors = 8;
#endif

// The codes of R adjacent outputs. Loads are what this step waits for: they are read together and taken apart.
template <std::size_t R>
class Codes {
 public:
  ONNX_QUAROT_INLINE explicit Codes(const std::uint8_t* codes) { std::memcpy(words_, codes, R); }
  ONNX_QUAROT_INLINE std::size_t operator[](std::size_t r) const { return words_[r / 8] >> (8 * (r % 8)) & 0xffu; }

 private:
  std::uint64_t words_[(R + 7) / 8] = {};
};

// R outputs of W vectors each from `groups` groups: `codes` point at the first output's entry of group 0 and are
// `outputs` apart; sums begin with `sum` or, for the first groups of all, with the first entry.
template <std::size_t R, std::size_t W, class V>
ONNX_QUAROT_INLINE void table_sums(const std::uint8_t* codes, std::size_t outputs, std::size_t groups, bool first,
                                   const V* table, V* sums) {
  constexpr std::size_t unit = W * sizeof(V) / 16;  // a code is 16 times the index of a table entry, which is W vectors
  const char* group = reinterpret_cast<const char*>(table);
  const auto entry = [&](const Codes<R>& code, std::size_t r) {
    return reinterpret_cast<const V*>(group + code[r] * unit);
  };
  V sum[R][W];
  std::size_t g = 0;
  if (first) {
    const Codes<R> code(codes);
#pragma GCC unroll 64
    for (std::size_t r = 0; r < R; ++r) {
      for (std::size_t w = 0; w < W; ++w) sum[r][w] = entry(code, r)[w];
    }
    g = 1;
    codes += outputs;
    group += 16 * W * sizeof(V);
  } else {
#pragma GCC unroll 64
    for (std::size_t r = 0; r < R; ++r) {
      for (std::size_t w = 0; w < W; ++w) sum[r][w] = sums[W * r + w];
    }
  }
  for (; g < groups; ++g) {
    const Codes<R> code(codes);
#pragma GCC unroll 64
    for (std::size_t r = 0; r < R; ++r) {
      for (std::size_t w = 0; w < W; ++w) sum[r][w] += entry(code, r)[w];
    }
    codes += outputs;
    group += 16 * W * sizeof(V);
  }
#pragma GCC unroll 64
  for (std::size_t r = 0; r < R; ++r) {
    for (std::size_t w = 0; w < W; ++w) sums[W * r + w] = sum[r][w];
  }
}

// The same for outputs [b, n), n even, as many at once as there are registers for, then half of that.
template <std::size_t R, std::size_t W, class V>
ONNX_QUAROT_INLINE void all_table_sums(const std::uint8_t* codes, std::size_t b, std::size_t n, std::size_t groups,
                                       bool first, const V* table, V* sums) {
  for (; b + R <= n; b += R) table_sums<R, W>(codes + b, n, groups, first, table, sums + W * b);
  if constexpr (R > 2) all_table_sums<R / 2, W>(codes, b, n, groups, first, table, sums);
}

// W vectors of every input times a matrix of +-1 given by codes, left in `sums`, [outputs][W]. input(i, v) gives the
// vectors of input i.
template <std::size_t W, class V, class Input>
ONNX_QUAROT_INLINE void table_product(Input input, std::size_t n, const std::uint8_t* codes, V* table, V* sums, V one) {
  const std::size_t groups = (n + 3) / 4;
  for (std::size_t done = 0; done < groups; done += table_groups(sizeof(V))) {
    const std::size_t count = groups - done < table_groups(sizeof(V)) ? groups - done : table_groups(sizeof(V));
    for (std::size_t g = 0; g < count; ++g) {
      V x[4][W] = {};
      for (std::size_t i = 0; i < 4 && 4 * (done + g) + i < n; ++i) input(4 * (done + g) + i, x[i]);
#pragma GCC unroll 4
      for (std::size_t v = 0; v < W; ++v) {
        V entries[8];
        signed_sums(x[0][v], x[1][v], x[2][v], x[3][v], entries, one);
#pragma GCC unroll 64
        for (std::size_t e = 0; e < 8; ++e) {
          table[W * (16 * g + 8 + e) + v] = entries[e];
          table[W * (16 * g + 7 - e) + v] = -entries[e];
        }
      }
    }
    all_table_sums<kSumVectors / W, W>(codes + done * n, 0, n, count, done == 0, table, sums);
  }
}

// Any order, from the codes of its matrix.
template <class C, class V>
__attribute__((noinline)) void table_order(C* values, std::size_t step, const OrderStep& order, char* table_bytes,
                                           char* sums_bytes, V scale, V one) {
  constexpr std::size_t lanes = sizeof(V) / sizeof(C);
  V* table = reinterpret_cast<V*>(table_bytes);
  V* sums = reinterpret_cast<V*>(sums_bytes);
  if (order.halved) {
    for (std::size_t j = 0; j < step; j += lanes) {
      C* column = values + j;
      table_product<2>(
          [&](std::size_t i, V* x) {
            const V a = load(column + 2 * i * step), b = load(column + (2 * i + 1) * step);
            x[0] = a + b;
            x[1] = difference(a, b, one);
          },
          order.order / 2, order.codes, table, sums, one);
      for (std::size_t i = 0; i < order.order / 2; ++i) {
        C* even = column + 2 * i * step;
        C* odd = even + step;
        const V a = load(even), b = load(odd);
        store(even, (sums[2 * i] - (b + b)) * scale);
        store(odd, (sums[2 * i + 1] - (a + a)) * scale);
      }
    }
    return;
  }
  for (std::size_t j = 0; j < step; j += lanes) {
    C* column = values + j;
    table_product<1>([&](std::size_t i, V* x) { x[0] = load(column + i * step); }, order.order, order.codes, table,
                     sums, one);
    for (std::size_t i = 0; i < order.order; ++i) store(column + i * step, sums[i] * scale);
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
