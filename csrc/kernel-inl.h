// The transform, written once. Included by each file in isa/, which names the vector width and what the registers hold:
//   ONNX_QUAROT_BLOCK_VECTORS   vectors of the first pass, kept in registers (a power of two)
//   ONNX_QUAROT_MAX_RADIX       largest radix of a strided pass
//   ONNX_QUAROT_FUSED_DIFFERENCE  1: subtract by fused multiply-add
//   ONNX_QUAROT_INTERLEAVED     1: first and second passes of short rows take turns, instruction by instruction
// Stages run in the same order whatever the width: element bits from low to high, then the step of order K. Sums are
// therefore formed in the same order on every CPU, and results agree bit for bit.
#include <type_traits>

#include "kernels.h"
#include "order_codes.h"
#include "scratch.h"
#include "simd-inl.h"
#include "williamson-inl.h"

namespace onnx_quarot {
namespace {

constexpr std::size_t kBlockVectors = ONNX_QUAROT_BLOCK_VECTORS;
constexpr std::size_t kMaxRadix = ONNX_QUAROT_MAX_RADIX;
constexpr bool kFusedDifference = ONNX_QUAROT_FUSED_DIFFERENCE != 0;
constexpr bool kInterleaved = ONNX_QUAROT_INTERLEAVED != 0;
static_assert(!kInterleaved || kBlockVectors == 8, "two of them need the registers of one of 16");
constexpr std::size_t kL1Bytes = 32768;     // rows up to here are transformed in first-level cache
constexpr std::size_t kChunkBytes = 16384;  // pieces of longer ones
constexpr std::size_t kL2Bytes = 524288;    // and larger pieces of those, where they fit

// On CPUs that run additions and fused multiply-adds on different units, subtractions are made the latter: the product
// by an opaque 1 is exact. Where multiply-adds and stores hinder each other (Zen 3), that costs instead.
template <class V>
ONNX_QUAROT_INLINE V difference(V a, V b, V one) {
  if constexpr (kFusedDifference) {
    return a - one * b;
  } else {
    (void)one;
    return a - b;
  }
}

// Where values come from: an array, multiplied by signs if there are any.
template <class T, bool Signed>
struct Source {
  static constexpr bool paired = kPaired<T>;
  using Vector = typename Compute<T>::Vector;
  const T* values;
  const float* signs;
  ONNX_QUAROT_INLINE Vector get(std::size_t i) const {
    Vector v = load(values + i);
    if constexpr (Signed) {
      Vector s;
      load_signs(signs + i, s);
      v *= s;
    }
    return v;
  }
  // Two vectors of elements, those of even index and those of odd index.
  ONNX_QUAROT_INLINE void get_pair(std::size_t i, Vector& even, Vector& odd) const {
    load_pair(values + i, even, odd);
    if constexpr (Signed) {
      Vector e, o;
      load_pair(signs + i, e, o);
      even *= e;
      odd *= o;
    }
  }
  // The first stage of two such vectors.
  ONNX_QUAROT_INLINE void get_sums(std::size_t i, Vector& sums, Vector& differences, Vector one) const {
#if defined(__AVX512BF16__)
    if constexpr (!Signed && std::is_same_v<T, BFloat>) return load_sums(values + i, sums, differences);
#endif
    Vector even, odd;
    get_pair(i, even, odd);
    sums = even + odd;
    differences = difference(even, odd, one);
  }
  ONNX_QUAROT_INLINE Source at(std::size_t i) const { return at(i, i); }
  ONNX_QUAROT_INLINE Source at(std::size_t i, std::size_t sign) const {
    return {values + i, Signed ? signs + sign : nullptr};
  }
};

constexpr unsigned doublings(std::size_t from, std::size_t to) { return from < to ? 1 + doublings(2 * from, to) : 0; }

enum class Finish { none, scale, scale_and_sign };

// Where values go.
template <class T, Finish F>
struct Sink {
  static constexpr bool paired = kPaired<T>;
  using Vector = typename Compute<T>::Vector;
  using Loop = Sink;  // what a loop over columns puts values into
  T* values;
  const float* signs;
  Vector factor;
  ONNX_QUAROT_INLINE void put(std::size_t i, Vector v) const {
    if constexpr (F != Finish::none) v *= factor;
    if constexpr (F == Finish::scale_and_sign) {
      Vector s;
      load_signs(signs + i, s);
      v *= s;
    }
    store(values + i, v);
  }
  // x[i] to `step` i, for R of them.
  template <std::size_t R>
  ONNX_QUAROT_INLINE void put_all(const Vector* x, std::size_t step) const {
#pragma GCC unroll 64
    for (std::size_t i = 0; i < R; ++i) put(i * step, x[i]);
  }
  ONNX_QUAROT_INLINE void put_pair(std::size_t i, Vector even, Vector odd) const {
    if constexpr (F != Finish::none) {
      even *= factor;
      odd *= factor;
    }
    if constexpr (F == Finish::scale_and_sign) {
      Vector e, o;
      load_pair(signs + i, e, o);
      even *= e;
      odd *= o;
    }
    store_pair(values + i, even, odd);
  }
  ONNX_QUAROT_INLINE Sink at(std::size_t i) const { return at(i, i); }
  ONNX_QUAROT_INLINE Sink at(std::size_t i, std::size_t sign) const {
    return {values + i, F == Finish::scale_and_sign ? signs + sign : nullptr, factor};
  }
};

constexpr std::size_t kEveryRow = ~std::size_t{0}, kTwoRows = 1;

// Where rows stay between passes: row i at `values` + i `step`, or every second row in the same place.
template <class C>
struct Rows {
  C* values;
  std::size_t step;
  std::size_t mask;  // of row numbers
  ONNX_QUAROT_INLINE C* at(std::size_t i) const { return values + (i & mask) * step; }
};

// With 64-byte vectors, two of which are computed a cycle on either kind of units, those of multiply-adds would be the
// busier ones where a scale is multiplied as well: some subtractions are left to the adders. In passes over columns
// those of every other stage, whose distances the bits say; none if results are converted, by units that also add.
constexpr bool kSparesMultipliers = kVectorBytes >= 64;
template <bool Converts>
constexpr std::size_t kPlainInColumns = kSparesMultipliers && !Converts ? 0b10101 : 0;
template <class V>
ONNX_QUAROT_INLINE V sparing_difference(V a, V b, V one) {
  return kSparesMultipliers ? a - b : difference(a, b, one);
}

// Butterflies between R vectors, neighbours first, from distance H to below End.
template <std::size_t R, std::size_t H = 1, std::size_t End = R, std::size_t Plain = 0, class V>
ONNX_QUAROT_INLINE void butterflies(V* x, V one) {
  if constexpr (H < End) {
#pragma GCC unroll 64
    for (std::size_t i = 0; i < R; ++i) {
      if ((i & H) != 0) continue;
      const V a = x[i], b = x[i + H];
      x[i] = a + b;
      x[i + H] = (Plain & H) != 0 ? a - b : difference(a, b, one);
    }
    butterflies<R, 2 * H, End, Plain>(x, one);
  }
}

// R adjacent vectors, transformed in registers. A paired type arrives with even and odd elements apart, which makes
// its first stage one between vectors, and stays so: passes over whole vectors do not mind, and the last one brings
// them together.
template <std::size_t R, class In, class Out, class V>
ONNX_QUAROT_INLINE void block_pass(In in, Out out, V one) {
  constexpr std::size_t lanes = sizeof(V) / sizeof(one[0]);
  constexpr bool pairs = In::paired && R > 1;
  V x[R];
  if constexpr (pairs) {
#pragma GCC unroll 64
    for (std::size_t i = 0; i < R; i += 2) in.get_sums(i * lanes, x[i], x[i + 1], one);
  } else {
#pragma GCC unroll 64
    for (std::size_t i = 0; i < R; ++i) x[i] = in.get(i * lanes);
  }
  lane_stages<R>(x);
  butterflies<R, pairs ? 2 : 1>(x, one);
  if constexpr (Out::paired && R > 1) {
#pragma GCC unroll 64
    for (std::size_t i = 0; i < R; i += 2) out.put_pair(i * lanes, x[i], x[i + 1]);
  } else {
    out.template put_all<R>(x, lanes);
  }
}

// One or, for a paired type, two adjacent columns of R vectors: `in_step` elements apart where they come from and
// `step` where they go.
template <std::size_t R, class In, class Out, class V>
ONNX_QUAROT_INLINE void column_pass(In in, std::size_t in_step, Out out, std::size_t step, V one) {
  constexpr std::size_t lanes = sizeof(V) / sizeof(one[0]);
  constexpr std::size_t plain = kPlainInColumns<sizeof(*out.values) != sizeof(one[0])>;
  V x[R];
#pragma GCC unroll 64
  for (std::size_t i = 0; i < R; ++i) x[i] = in.get(i * in_step);
  butterflies<R, 1, R, plain>(x, one);
  if constexpr (Out::paired) {
    V odd[R];
#pragma GCC unroll 64
    for (std::size_t i = 0; i < R; ++i) odd[i] = in.get(i * in_step + lanes);
    butterflies<R, 1, R, plain>(odd, one);
#pragma GCC unroll 64
    for (std::size_t i = 0; i < R; ++i) out.put_pair(i * step, x[i], odd[i]);
  } else {
    out.template put_all<R>(x, step);
  }
}

// Butterflies of radix R between elements `step` apart, for R * step adjacent elements.
template <std::size_t R, class In, class Out, class V>
__attribute__((noinline)) void last_pass(In in, Out out, std::size_t step, V one) {
  constexpr std::size_t lanes = sizeof(V) / sizeof(one[0]), width = (Out::paired ? 2 : 1) * lanes;
  typename Out::Loop to(out);
  if constexpr (sizeof(*in.values) == sizeof(*out.values)) {
    // In place and off the boundaries of vectors, every access would touch two cache lines: columns are taken from the
    // first boundary on. Those before it and behind the last one are whole vectors that overlap their neighbours, and
    // start from what these were.
    const std::size_t past = reinterpret_cast<std::uintptr_t>(in.values) % sizeof(V) / sizeof(one[0]);
    if (in.values == out.values && past != 0 && step >= 32 * lanes) {
      V first[R], last[R];
      for (std::size_t i = 0; i < R; ++i) {
        first[i] = in.get(i * step);
        last[i] = in.get(i * step + step - lanes);
      }
      for (std::size_t j = lanes - past; j + lanes <= step; j += lanes)
        column_pass<R>(in.at(j), step, to.at(j), step, one);
      using Scalar = std::remove_reference_t<decltype(first[0][0])>;
      const auto kept = [](const V* x) { return Source<Scalar, false>{reinterpret_cast<const Scalar*>(x), nullptr}; };
      column_pass<R>(kept(first), lanes, to.at(0), step, one);
      column_pass<R>(kept(last), lanes, to.at(step - lanes), step, one);
      return;
    }
  }
  for (std::size_t j = 0; j < step; j += width) column_pass<R>(in.at(j), step, to.at(j), step, one);
}

// Passes of radix 8 at most that make up for them.
constexpr unsigned passes(unsigned doublings) { return (doublings + 2) / 3; }

// How a row too long for two passes is cut: the radix of its last pass, 8 as often as possible, after the first passes
// in first-level cache and after chunks of it beyond. Not more than 8: longer columns at power-of-two distances evict
// each other. Where it takes no pass more, one of them ends with pieces that stay in second-level cache; vectors that
// are half a cache line gain nothing from that.
ONNX_QUAROT_INLINE std::size_t last_radix(std::size_t n, std::size_t element_bytes, std::size_t block) {
  const std::size_t bytes = n * element_bytes;
  unsigned left = bytes <= kL1Bytes ? doublings(block, n) : doublings(kChunkBytes, bytes);
  if constexpr (kVectorBytes >= 64) {
    const unsigned beyond = doublings(kL2Bytes, bytes);
    if (beyond > 0 && passes(beyond) + passes(left - beyond) == passes(left)) left = beyond;
  }
  return left == 1 ? 2 : (left % 3 == 0 ? 8 : 4);
}

template <std::size_t R, class In, class Out, class V>
void one_pass_rows(In in, Out out, std::size_t count, std::size_t sign_step, V one) {
  constexpr std::size_t n = R * sizeof(V) / sizeof(one[0]);
  for (std::size_t i = 0; i < count; ++i) block_pass<R>(in.at(i * n, i * sign_step), out.at(i * n, i * sign_step), one);
}

// A block_pass and, between its instructions, column_passes over as many vectors of the row before. A block waits for
// shuffles and for its own results, columns wait for adders and stores: one after the other, a CPU that looks ahead
// less than a block (Zen 3) finds too little to do meanwhile. R is 2 or 4: more registers there are not.
template <std::size_t R, class In, class Out, class C, class V>
struct Interleaved {
  static constexpr std::size_t lanes = sizeof(V) / sizeof(C), vectors = kBlockVectors;
  static constexpr std::size_t lane_steps = vectors * doublings(1, lanes);
  static constexpr std::size_t pair_steps = vectors / 2 * doublings(1, vectors);
  static constexpr std::size_t block_steps = lane_steps + pair_steps + vectors;
  static constexpr std::size_t column_pairs = R / 2 * doublings(1, R);
  static constexpr std::size_t column_steps = R + column_pairs + 1;
  static constexpr std::size_t total_column_steps = vectors / R * column_steps;

  V one;
  V x[vectors];
  V y[R];
  Sink<C, Finish::none> to;
  Out done;
  In from;
  Source<C, false> before;

  template <std::size_t Pair, std::size_t Half>
  static ONNX_QUAROT_INLINE void butterfly(V* values, V one) {
    constexpr std::size_t i = Pair / Half * 2 * Half + Pair % Half;
    const V a = values[i], b = values[i + Half];
    values[i] = a + b;
    values[i + Half] = difference(a, b, one);
  }
  template <std::size_t Step>
  ONNX_QUAROT_INLINE void block_step() {
    if constexpr (Step < lane_steps) {
      constexpr std::size_t i = Step % vectors;
      if constexpr (Step < vectors) x[i] = from.get(i * lanes);
      x[i] = lane_stage<(1 << Step / vectors)>(x[i], LanesOf<V>{});
    } else if constexpr (Step < lane_steps + pair_steps) {
      constexpr std::size_t pair = Step - lane_steps;
      butterfly<pair % (vectors / 2), std::size_t{1} << pair / (vectors / 2)>(x, one);
    } else {
      constexpr std::size_t i = Step - lane_steps - pair_steps;
      to.put(i * lanes, x[i]);
    }
  }
  template <std::size_t Step, std::size_t End>
  ONNX_QUAROT_INLINE void columns() {
    if constexpr (Step < End) {
      constexpr std::size_t column = Step / column_steps * lanes, i = Step % column_steps;
      if constexpr (i < R) {
        y[i] = before.get(column + i * vectors * lanes);
      } else if constexpr (i < R + column_pairs) {
        butterfly<(i - R) % (R / 2), std::size_t{1} << (i - R) / (R / 2)>(y, one);
      } else {
        done.at(column).template put_all<R>(y, vectors * lanes);
      }
      columns<Step + 1, End>();
    }
  }
  template <std::size_t Step = 0>
  ONNX_QUAROT_INLINE void run() {
    if constexpr (Step < block_steps) {
      block_step<Step>();
      columns<Step * total_column_steps / block_steps, (Step + 1) * total_column_steps / block_steps>();
      run<Step + 1>();
    }
  }
};

// Rows of R blocks. The first pass keeps the arithmetic units busy and the second one loads and stores: the second pass
// of a row runs piece by piece between the pieces of the next row's first pass.
template <std::size_t R, class In, class Out, class C, class V>
void two_pass_rows(In in, const Rows<C>& rows, Out out, std::size_t count, std::size_t sign_step, V one) {
  constexpr std::size_t lanes = sizeof(V) / sizeof(C), block = kBlockVectors * lanes, n = R * block;
  constexpr std::size_t width = (Out::paired ? 2 : 1) * lanes, columns = block / width;
  constexpr std::size_t pieces = R < columns ? R : columns;
  const auto row_sink = [&](std::size_t i) { return Sink<C, Finish::none>{rows.at(i), nullptr, one}; };
  if (count == 0) return;
  one_pass_rows<kBlockVectors>(in, row_sink(0), R, block, one);
  for (std::size_t i = 1; i < count; ++i) {
    const In from = in.at(i * n, i * sign_step);
    const Sink<C, Finish::none> to = row_sink(i);
    const Source<C, false> before{rows.at(i - 1), nullptr};
    const Out done = out.at((i - 1) * n, (i - 1) * sign_step);
    if constexpr (kInterleaved && R <= 4 && !In::paired && !Out::paired) {
      typename Out::Loop columns_to(done);
      const std::size_t share = kBlockVectors / R * lanes;
#pragma GCC unroll 1
      for (std::size_t b = 0, c = 0; b < n; b += block, c += share) {
        Interleaved<R, In, decltype(columns_to.at(c)), C, V> both{
            one, {}, {}, to.at(b), columns_to.at(c), from.at(b), before.at(c)};
        both.run();
      }
      continue;
    }
    std::size_t b = 0, c = 0;
    for (std::size_t piece = 0; piece < pieces; ++piece) {
#pragma GCC unroll 1
      for (std::size_t k = 0; k < R / pieces; ++k, b += block) block_pass<kBlockVectors>(from.at(b), to.at(b), one);
      typename Out::Loop columns_to(done);
#pragma GCC unroll 1
      for (std::size_t k = 0; k < columns / pieces; ++k, c += width)
        column_pass<R>(before.at(c), block, columns_to.at(c), block, one);
    }
  }
  last_pass<R>(Source<C, false>{rows.at(count - 1), nullptr}, out.at((count - 1) * n, (count - 1) * sign_step), block,
               one);
}

// H_n of `count` adjacent rows of n elements, n a power of two and at least a vector. The signs of a row, or what else
// `out` has for each, begin `sign_step` after those of the row before. `rows` is where they are between passes: memory
// of its own, or the rows of `out`.
template <class In, class Out, class C, class V>
void power_rows(In in, const Rows<C>& rows, Out out, std::size_t count, std::size_t sign_step, std::size_t n, V one) {
  static_assert(kBlockVectors == 8 || kBlockVectors == 16);
  static_assert(kMaxRadix == 8 || kMaxRadix == 16 || kMaxRadix == 32);
  constexpr std::size_t lanes = sizeof(V) / sizeof(C), block = kBlockVectors * lanes;
  static_assert(block * kMaxRadix * sizeof(C) <= kTwoRowsBytes);
  if (n <= block) {
    switch (n / lanes) {
      case 1:
        return one_pass_rows<1>(in, out, count, sign_step, one);
      case 2:
        return one_pass_rows<2>(in, out, count, sign_step, one);
      case 4:
        return one_pass_rows<4>(in, out, count, sign_step, one);
      case 8:
        return one_pass_rows<8>(in, out, count, sign_step, one);
      default:
        return one_pass_rows<kBlockVectors>(in, out, count, sign_step, one);
    }
  }
  if (n <= block * kMaxRadix) {
    switch (n / block) {
      case 2:
        return two_pass_rows<2>(in, rows, out, count, sign_step, one);
      case 4:
        return two_pass_rows<4>(in, rows, out, count, sign_step, one);
      case 8:
        return two_pass_rows<8>(in, rows, out, count, sign_step, one);
      case 16:
        if constexpr (kMaxRadix >= 16) return two_pass_rows<16>(in, rows, out, count, sign_step, one);
        [[fallthrough]];
      default:
        return two_pass_rows<kMaxRadix>(in, rows, out, count, sign_step, one);
    }
  }
  const std::size_t radix = last_radix(n, sizeof(C), block), part = n / radix;
  for (std::size_t i = 0; i < count; ++i) {
    C* row = rows.at(i);
    const Sink<C, Finish::none> to{row, nullptr, one};
    power_rows(in.at(i * n, i * sign_step), Rows<C>{row, part, kEveryRow}, to, radix, part, part, one);
    const Source<C, false> from{row, nullptr};
    const Out last = out.at(i * n, i * sign_step);
    if (radix == 8) {
      last_pass<8>(from, last, part, one);
    } else if (radix == 4) {
      last_pass<4>(from, last, part, one);
    } else {
      last_pass<2>(from, last, part, one);
    }
  }
}

}  // namespace
}  // namespace onnx_quarot

#include "convert-inl.h"
#include "job-inl.h"
#include "order-inl.h"
#include "quantize-inl.h"
