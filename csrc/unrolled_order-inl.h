// Steps of orders that models have often, by matrices known at compile time: every sum is an instruction of its own,
// and no codes are read. Included by order12-inl.h; order-inl.h says what a step is.

namespace onnx_quarot {
namespace {

template <std::size_t T, bool Transpose>
struct Williamson {
  static constexpr std::size_t n = 4 * T;
  WilliamsonSeed seed = *find_williamson(T);
  constexpr bool plus(std::size_t a, std::size_t b) const {
    return (Transpose ? williamson_entry(seed, b, a) : williamson_entry(seed, a, b)) > 0;
  }
};

// The matrix P of Paley's second construction, as Order says, for a prime Q.
template <std::size_t Q>
struct Paley {
  static constexpr std::size_t n = Q + 1;
  bool square[Q];
  constexpr Paley() : square() {
    for (std::size_t i = 0; i < Q; ++i) square[i * i % Q] = true;
  }
  constexpr bool plus(std::size_t a, std::size_t b) const { return a == 0 || b == 0 || square[(a + Q - b) % Q]; }
};

// A matrix M as sums of groups of four inputs; its order is even, so that the last group may have two.
template <class M>
struct GroupSums {
  static constexpr std::size_t groups = (M::n + 3) / 4;
  std::uint8_t entry[groups][M::n];  // of signed_sums
  bool minus[groups][M::n];          // the negated entry

  constexpr GroupSums() : entry(), minus() {
    const M matrix{};
    for (std::size_t g = 0; g < groups; ++g) {
      const std::size_t inputs = M::n - 4 * g < 4 ? M::n - 4 * g : 4;
      for (std::size_t b = 0; b < M::n; ++b) {
        unsigned bits = 0;
        for (std::size_t i = 0; i < inputs; ++i) {
          if (matrix.plus(4 * g + i, b)) bits |= 1u << i;
        }
        minus[g][b] = (bits >> (inputs - 1)) == 0;
        entry[g][b] = static_cast<std::uint8_t>((minus[g][b] ? ~bits : bits) & ((1u << (inputs - 1)) - 1));
      }
    }
  }
};

template <class M>
constexpr GroupSums<M> kGroupSumsOf{};

// Sums of N inputs with all signs but the last one's, which is +: entry e has +x_i where bit i of e is set.
template <std::size_t N, class C, class V>
ONNX_QUAROT_INLINE void signed_sums(const C* x, std::size_t step, V* sums, V one) {
  const V x0 = load(x), x1 = load(x + step);
  if constexpr (N == 2) {
    sums[0] = difference(x1, x0, one);
    sums[1] = x1 + x0;
  } else {
    const V x2 = load(x + 2 * step), x3 = load(x + 3 * step);
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
}
template <class M, std::size_t G>
constexpr std::size_t kInputs = M::n - 4 * G < 4 ? M::n - 4 * G : 4;

// The pointer to elements behind, computed here and now: left to itself the compiler computes one for every row of a
// column beforehand, and keeps them in memory. Nor does it know that two of them are the same, and keep what it
// computed from the first.
template <class C>
ONNX_QUAROT_INLINE C* behind(C* p, std::size_t distance) {
  p += distance;
  __asm__ volatile("" : "+r"(p));
  return p;
}

// Adds group G's term to output B, or subtracts it. The first term is taken as it is: a sign that the scale absorbs.
// Where terms are in registers, every second output takes them by multiply-adds, if these have units of their own.
template <class M, std::size_t G, std::size_t B, bool InRegisters, class V>
ONNX_QUAROT_INLINE void add_term(const V* sums, V& sum, V one) {
  constexpr const GroupSums<M>& order = kGroupSumsOf<M>;
  constexpr bool second = B % 2 != 0;
  const V term = sums[order.entry[G][B]];
  if constexpr (G == 0) {
    sum = term;
  } else if constexpr (order.minus[G][B] == order.minus[0][B]) {
    sum += InRegisters && kFusedDifference && second ? one * term : term;
  } else {
    sum = InRegisters && !second ? sum - term : difference(sum, term, one);
  }
}

// With 16 registers, all sums of all groups are kept in memory, of one column or of two side by side.
template <class M, std::size_t Columns, std::size_t G = 0, class C, class V>
ONNX_QUAROT_INLINE void make_sums(const C* x, std::size_t step, V (*sums)[GroupSums<M>::groups][8], V one) {
  if constexpr (G < GroupSums<M>::groups) {
    signed_sums<kInputs<M, G>>(x, step, sums[0][G], one);
    if constexpr (Columns > 1) signed_sums<kInputs<M, G>>(x + sizeof(V) / sizeof(C), step, sums[1][G], one);
    make_sums<M, Columns, G + 1>(behind(x, 4 * step), step, sums, one);
  }
}
template <class M, std::size_t B, class V, int... G>
ONNX_QUAROT_INLINE V gather_sum(const V (*sums)[8], V one, Indices<G...>) {
  V sum{};
  (add_term<M, std::size_t{G}, B, false>(sums[G], sum, one), ...);
  return sum;
}
template <class M, std::size_t B, std::size_t Columns, class C, class V>
ONNX_QUAROT_INLINE void store_output(C* out, const V (*sums)[GroupSums<M>::groups][8], V factor, V one) {
  constexpr typename MakeIndices<static_cast<int>(GroupSums<M>::groups)>::Type groups{};
  store(out, gather_sum<M, B>(sums[0], one, groups) * factor);
  if constexpr (Columns > 1) store(out + sizeof(V) / sizeof(C), gather_sum<M, B>(sums[1], one, groups) * factor);
}
template <class M, std::size_t Columns, class C, class V, int... B>
ONNX_QUAROT_INLINE void gather_sums(const C* x, std::size_t step, C* out, std::size_t out_step, V scale, V minus_scale,
                                    V one, Indices<B...>) {
  V sums[Columns][GroupSums<M>::groups][8];
  make_sums<M, Columns>(x, step, sums, one);
  ((store_output<M, std::size_t{B}, Columns>(out, sums, kGroupSumsOf<M>.minus[0][B] ? minus_scale : scale, one),
    out = behind(out, out_step)),
   ...);
}

// With 32 registers, there is room for the sums of one group and a part of the outputs: no sum is loaded, and the sums
// are made anew for every part.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr bool kPartsInRegisters = true;
#else
constexpr bool kPartsInRegisters = false;
#endif
constexpr std::size_t kMostInPart = 22;

// Outputs First + B from group G on, of which `x` is the first input.
template <class M, std::size_t First, std::size_t G = 0, class C, class V, int... B>
ONNX_QUAROT_INLINE void part_sums(const C* x, std::size_t step, V* sum, V one, Indices<B...> outputs) {
  if constexpr (G < GroupSums<M>::groups) {
    V sums[8];
    signed_sums<kInputs<M, G>>(x, step, sums, one);
    (add_term<M, G, First + std::size_t{B}, true>(sums, sum[B], one), ...);
    part_sums<M, First, G + 1>(behind(x, 4 * step), step, sum, one, outputs);
  }
}

template <std::size_t N, class C, class V>
ONNX_QUAROT_INLINE void store_column(C* values, std::size_t step, const V* x) {
#pragma GCC unroll 64
  for (std::size_t i = 0; i < N; ++i, values = behind(values, step)) store(values, x[i]);
}

// Outputs from First on. Where they replace the inputs, those of all parts but the last are `kept` until it is done.
template <class M, bool InPlace, std::size_t First, class C, class V, int... B>
ONNX_QUAROT_INLINE void parts(const C* x, std::size_t step, C* out, std::size_t out_step, V scale, V minus_scale, V one,
                              V* kept, Indices<B...> outputs) {
  constexpr std::size_t n = sizeof...(B), next = First + n, left = M::n - next;
  V sum[n];
  part_sums<M, First>(behind(x, 0), step, sum, one, outputs);
  ((sum[B] *= kGroupSumsOf<M>.minus[0][First + std::size_t{B}] ? minus_scale : scale), ...);
  if constexpr (InPlace && left > 0) {
    ((kept[First + std::size_t{B}] = sum[B]), ...);
  } else {
    store_column<n>(out + First * out_step, out_step, sum);
  }
  if constexpr (left > 0) {
    parts<M, InPlace, next>(x, step, out, out_step, scale, minus_scale, one, kept,
                            typename MakeIndices<static_cast<int>(left < n ? left : n)>::Type{});
  } else if constexpr (InPlace) {
    store_column<First>(out, out_step, kept);
  }
}

// One column times M and the scale, or minus_scale = -scale. With 16 registers two, side by side, if so many are asked
// for.
template <class M, bool InPlace, std::size_t Columns = 1, class C, class V>
ONNX_QUAROT_INLINE void unrolled_product(const C* x, std::size_t step, C* out, std::size_t out_step, V scale,
                                         V minus_scale, V one) {
  if constexpr (kPartsInRegisters) {
    constexpr std::size_t count = (M::n + kMostInPart - 1) / kMostInPart, n = (M::n + count - 1) / count;
    V kept[M::n];
    parts<M, InPlace, 0>(x, step, out, out_step, scale, minus_scale, one, kept,
                         typename MakeIndices<static_cast<int>(n)>::Type{});
  } else {
    gather_sums<M, Columns>(x, step, out, out_step, scale, minus_scale, one,
                            typename MakeIndices<static_cast<int>(M::n)>::Type{});
  }
}

// Whether as many cache lines, as far apart, do not fit in first-level cache together: 64 sets of eight.
constexpr bool evict_each_other(std::size_t lines, std::size_t bytes_apart) {
  constexpr std::size_t sets = 64, ways = 8, line = 64;
  const std::size_t power = bytes_apart & (~bytes_apart + 1);
  return power > line && lines * power > sets * ways * line;
}

template <std::size_t T, bool Transpose, class C, class V>
__attribute__((noinline)) void williamson_order(C* values, std::size_t step, V scale, V one) {
  constexpr std::size_t lanes = sizeof(V) / sizeof(C);
  const V minus_scale = -scale;
  std::size_t j = 0;
  // Where the rows of a column evict each other, each cache line is fetched once for the two columns in it, not twice.
  // Elsewhere two columns take 5 to 10 % longer than one after the other.
  if constexpr (!kPartsInRegisters && kVectorBytes == 32) {
    for (; evict_each_other(4 * T, step * sizeof(C)) && j + 2 * lanes <= step; j += 2 * lanes) {
      C* column = values + j;
      unrolled_product<Williamson<T, Transpose>, true, 2>(column, step, column, step, scale, minus_scale, one);
    }
  }
  for (; j < step; j += lanes) {
    C* column = values + j;
    unrolled_product<Williamson<T, Transpose>, true>(column, step, column, step, scale, minus_scale, one);
  }
}
template <std::size_t T, class C, class V>
ONNX_QUAROT_INLINE void williamson_order(C* values, std::size_t step, bool transpose, V scale, V one) {
  return transpose ? williamson_order<T, true>(values, step, scale, one)
                   : williamson_order<T, false>(values, step, scale, one);
}

// Adjacent vectors times P; a function of its own, so that there is one of it.
template <std::size_t Q, class C, class V>
__attribute__((noinline)) void paley_product(const C* x, C* out, V one) {
  constexpr std::size_t lanes = sizeof(V) / sizeof(C);
  unrolled_product<Paley<Q>, false>(x, lanes, out, lanes, one, -one, one);
}

// Paley's second construction, by its matrix P for sums and for differences, as Order says.
template <std::size_t Q, class C, class V>
__attribute__((noinline)) void paley_order(C* values, std::size_t step, V scale, V one) {
  constexpr std::size_t lanes = sizeof(V) / sizeof(C), n = Q + 1;
  alignas(sizeof(V)) C folded[2][n * lanes], products[2][n * lanes];
  for (std::size_t j = 0; j < step; j += lanes) {
    C* cell = values + j;
    for (std::size_t i = 0; i < n; ++i, cell += 2 * step) {
      const V a = load(cell), b = load(cell + step);
      store(folded[0] + i * lanes, a + b);
      store(folded[1] + i * lanes, difference(a, b, one));
    }
    for (std::size_t v = 0; v < 2; ++v) paley_product<Q>(folded[v], products[v], one);
    cell = values + j;
    for (std::size_t i = 0; i < n; ++i, cell += 2 * step) {
      const V a = load(cell), b = load(cell + step);
      store(cell, (load(products[0] + i * lanes) - (b + b)) * scale);
      store(cell + step, (load(products[1] + i * lanes) - (a + a)) * scale);
    }
  }
}

}  // namespace
}  // namespace onnx_quarot
