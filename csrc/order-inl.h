// The step of order K: columns of K elements, `step` apart, multiplied by +-H_K in place. Both forms build, for each four
// inputs, their sums with all signs once, and let every output pick one sum a group (the method of four Russians).
// Included by kernel-inl.h.

namespace onnx_quarot {
namespace {

// x3 +- x2 +- x1 +- x0: entry e has +x_i where bit i of e is set.
template <class V>
ONNX_QUAROT_INLINE void signed_sums(V x0, V x1, V x2, V x3, V* sums, V one) {
  const V plus = x0 + x1, minus = difference(x0, x1, one), low = difference(x3, x2, one), high = x3 + x2;
  sums[0] = difference(low, plus, one);
  sums[1] = low + minus;
  sums[2] = difference(low, minus, one);
  sums[3] = low + plus;
  sums[4] = difference(high, plus, one);
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
    small_order_column<T, Transpose>(values + j, step, scale, minus_scale, one, typename MakeIndices<static_cast<int>(4 * T)>::Type{});
  }
}

// R outputs of one column: `codes` point at the first output's entry of group 0 and are `order` apart.
template <std::size_t R, class C, class V>
ONNX_QUAROT_INLINE void table_outputs(const std::uint8_t* codes, std::size_t order, const char* table, C* values,
                                      std::size_t step, V scale) {
  constexpr std::size_t unit = sizeof(V) / 8;  // a code is 8 times the index of a table entry
  V sum[R];
#pragma GCC unroll 64
  for (std::size_t r = 0; r < R; ++r) sum[r] = *reinterpret_cast<const V*>(table + codes[r] * unit);
  for (std::size_t g = 1; g < order / 4; ++g) {
    codes += order;
    table += 16 * sizeof(V);
#pragma GCC unroll 64
    for (std::size_t r = 0; r < R; ++r) sum[r] += *reinterpret_cast<const V*>(table + codes[r] * unit);
  }
#pragma GCC unroll 64
  for (std::size_t r = 0; r < R; ++r) store(values + r * step, sum[r] * scale);
}

// Any order, from the codes of its matrix.
template <class C, class V>
__attribute__((noinline)) void table_order(C* values, std::size_t step, std::size_t order, const std::uint8_t* codes, void* scratch, V scale,
                 V one) {
  V* table = static_cast<V*>(scratch);
  for (std::size_t j = 0; j < step; j += sizeof(V) / sizeof(C)) {
    for (std::size_t g = 0; g < order / 4; ++g) {
      const C* x = values + 4 * g * step + j;
      V sums[8];
      signed_sums(load(x), load(x + step), load(x + 2 * step), load(x + 3 * step), sums, one);
#pragma GCC unroll 64
      for (std::size_t e = 0; e < 8; ++e) {
        table[16 * g + 8 + e] = sums[e];
        table[16 * g + 7 - e] = -sums[e];
      }
    }
    const char* bytes = static_cast<const char*>(scratch);
    std::size_t b = 0;
    for (; b + 12 <= order; b += 12) table_outputs<12>(codes + b, order, bytes, values + b * step + j, step, scale);
    for (; b < order; b += 4) table_outputs<4>(codes + b, order, bytes, values + b * step + j, step, scale);
  }
}

template <std::size_t T, class V>
ONNX_QUAROT_INLINE void small_order(float* values, std::size_t step, bool transpose, V scale, V one) {
  return transpose ? small_order<T, true>(values, step, scale, one) : small_order<T, false>(values, step, scale, one);
}

// values[b] <- scale * sum over a of values[a] H[a][b], for `step` adjacent columns. `codes` are those of H or H^T, as
// `transpose` says.
ONNX_QUAROT_INLINE void order_step(float* values, std::size_t step, std::size_t order, const std::uint8_t* codes,
                                   bool transpose, void* scratch, Floats scale, Floats one) {
  switch (order) {
    case 12:
      return small_order<3>(values, step, transpose, scale, one);
    case 20:
      return small_order<5>(values, step, transpose, scale, one);
    case 28:
      return small_order<7>(values, step, transpose, scale, one);
    case 36:
      return small_order<9>(values, step, transpose, scale, one);
    default:
      return table_order(values, step, order, codes, scratch, scale, one);
  }
}
ONNX_QUAROT_INLINE void order_step(double* values, std::size_t step, std::size_t order, const std::uint8_t* codes, bool,
                                   void* scratch, Doubles scale, Doubles one) {
  return table_order(values, step, order, codes, scratch, scale, one);
}

}  // namespace
}  // namespace onnx_quarot
