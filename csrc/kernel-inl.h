// The transform, written once. Included by each file in isa/, which names the vector width and what the registers hold:
//   ONNX_QUAROT_BLOCK_VECTORS   vectors of the first pass, kept in registers (a power of two)
//   ONNX_QUAROT_MAX_RADIX       largest radix of a strided pass
//   ONNX_QUAROT_FUSED_DIFFERENCE  1: subtract by fused multiply-add
//   ONNX_QUAROT_INTERLEAVED     1: passes of short rows take turns, instruction by instruction
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

// Elements behind the last boundary of a vector.
template <class C>
ONNX_QUAROT_INLINE std::size_t elements_past_boundary(const C* values) {
  return reinterpret_cast<std::uintptr_t>(values) % kVectorBytes / sizeof(C);
}

constexpr std::size_t kEveryRow = ~std::size_t{0}, kTwoRows = 1;

// Where rows stay between passes: row i at `values` + i `step`, or every second row in the same place.
template <class C>
struct Rows {
  C* values;
  std::size_t step;
  std::size_t mask;  // of row numbers
  ONNX_QUAROT_INLINE C* at(std::size_t i) const { return values + (i & mask) * step; }
};

// In passes over columns of R vectors, the stages whose subtractions are fused; the bits are their distances.
// - 64-byte vectors are added, and multiplied and added, two a cycle each. The units of the latter would be the busier
//   ones where a scale is multiplied as well: every other stage is left to the adders, but for results to be converted,
//   by units that also add.
// - Where multiply-adds and stores hinder each other, two multiply-adds cost the time of one store. Eight stores and a
//   third of the subtractions, fused, take as long as all else takes the adders: 10 cycles a column instead of 12.
// - Where they do not, columns are fastest with one stage of plain subtractions.
constexpr bool kSparesMultipliers = kVectorBytes >= 64;
constexpr std::size_t kFusedStages = kFusedDifference ? ~std::size_t{0} : 0;
constexpr std::size_t fused_in_columns(std::size_t radix, bool converts) {
  if (kSparesMultipliers && !converts) return kFusedStages & ~std::size_t{0b10101};
  if (kInterleaved && radix == 8) return kFusedDifference ? 0b11 : 0b10;
  if (kInterleaved && radix == 4) return kFusedDifference ? 0b10 : 0;
  return kFusedStages;
}
template <class V>
ONNX_QUAROT_INLINE V sparing_difference(V a, V b, V one) {
  return kSparesMultipliers ? a - b : difference(a, b, one);
}

// Butterflies between R vectors, neighbours first, from distance H to below End.
template <std::size_t R, std::size_t H = 1, std::size_t End = R, std::size_t Fused = kFusedStages, class V>
ONNX_QUAROT_INLINE void butterflies(V* x, V one) {
  if constexpr (H < End) {
#pragma GCC unroll 64
    for (std::size_t i = 0; i < R; ++i) {
      if ((i & H) != 0) continue;
      const V a = x[i], b = x[i + H];
      x[i] = a + b;
      x[i + H] = (Fused & H) != 0 ? a - one * b : a - b;
    }
    butterflies<R, 2 * H, End, Fused>(x, one);
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
  constexpr std::size_t fused = fused_in_columns(R, sizeof(*out.values) != sizeof(one[0]));
  V x[R];
#pragma GCC unroll 64
  for (std::size_t i = 0; i < R; ++i) x[i] = in.get(i * in_step);
  butterflies<R, 1, R, fused>(x, one);
  if constexpr (Out::paired) {
    V odd[R];
#pragma GCC unroll 64
    for (std::size_t i = 0; i < R; ++i) odd[i] = in.get(i * in_step + lanes);
    butterflies<R, 1, R, fused>(odd, one);
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
    const std::size_t past = elements_past_boundary(in.values);
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
// are half a cache line gain nothing from that. Rows of 32 blocks are eight of four where these are interleaved.
ONNX_QUAROT_INLINE std::size_t last_radix(std::size_t n, std::size_t element_bytes, std::size_t block) {
  if (kInterleaved && n == 32 * block) return 8;
  const std::size_t bytes = n * element_bytes;
  unsigned left = bytes <= kL1Bytes ? doublings(block, n) : doublings(kChunkBytes, bytes);
  if constexpr (kVectorBytes >= 64) {
    const unsigned beyond = doublings(kL2Bytes, bytes);
    if (beyond > 0 && passes(beyond) + passes(left - beyond) == passes(left)) left = beyond;
  }
  return left == 1 ? 2 : (left % 3 == 0 ? 8 : 4);
}

}  // namespace
}  // namespace onnx_quarot

#include "convert-inl.h"
#include "job-inl.h"
#include "order-inl.h"
#include "quantize-inl.h"
