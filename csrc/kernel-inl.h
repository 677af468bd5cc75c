// The transform, written once. Included by each file in isa/, which names the vector width and what the registers hold:
//   ONNX_QUAROT_BLOCK_VECTORS   vectors of the first pass, kept in registers (a power of two)
//   ONNX_QUAROT_MAX_RADIX       largest radix of a strided pass
// Stages run in the same order whatever the width: element bits from low to high, then the step of order K. Sums are
// therefore formed in the same order on every CPU, and results agree bit for bit.
#include "kernels.h"
#include "scratch.h"
#include "simd-inl.h"
#include "williamson-inl.h"

namespace onnx_quarot {
namespace {

constexpr std::size_t kBlockVectors = ONNX_QUAROT_BLOCK_VECTORS;
constexpr std::size_t kMaxRadix = ONNX_QUAROT_MAX_RADIX;
constexpr std::size_t kL1Bytes = 32768;    // rows up to here are transformed in first-level cache
constexpr std::size_t kChunkBytes = 16384; // pieces of longer ones

// Where values come from: an array, multiplied by signs if there are any.
template <class T, bool Signed>
struct Source {
  const T* values;
  const float* signs;
  ONNX_QUAROT_INLINE typename Compute<T>::Vector get(std::size_t i) const {
    typename Compute<T>::Vector v = load(values + i);
    if constexpr (Signed) {
      typename Compute<T>::Vector s;
      load_signs(signs + i, s);
      v *= s;
    }
    return v;
  }
  ONNX_QUAROT_INLINE Source at(std::size_t i) const { return at(i, i); }
  ONNX_QUAROT_INLINE Source at(std::size_t i, std::size_t sign) const {
    return {values + i, Signed ? signs + sign : nullptr};
  }
};

enum class Finish { none, scale, scale_and_sign };

// Where values go.
template <class T, Finish F>
struct Sink {
  T* values;
  const float* signs;
  typename Compute<T>::Vector factor;
  ONNX_QUAROT_INLINE void put(std::size_t i, typename Compute<T>::Vector v) const {
    if constexpr (F != Finish::none) v *= factor;
    if constexpr (F == Finish::scale_and_sign) {
      typename Compute<T>::Vector s;
      load_signs(signs + i, s);
      v *= s;
    }
    store(values + i, v);
  }
  ONNX_QUAROT_INLINE Sink at(std::size_t i) const { return at(i, i); }
  ONNX_QUAROT_INLINE Sink at(std::size_t i, std::size_t sign) const {
    return {values + i, F == Finish::scale_and_sign ? signs + sign : nullptr, factor};
  }
};

template <class V>
ONNX_QUAROT_INLINE V difference(V a, V b, V one) {
#if defined(__FMA__)
  return a - one * b;
#else
  (void)one;
  return a - b;
#endif
}

// Butterflies between R vectors, neighbours first.
template <std::size_t R, std::size_t H = 1, class V>
ONNX_QUAROT_INLINE void butterflies(V* x, V one) {
  if constexpr (H < R) {
#pragma GCC unroll 64
    for (std::size_t i = 0; i < R; ++i) {
      if ((i & H) != 0) continue;
      const V a = x[i], b = x[i + H];
      x[i] = a + b;
      x[i + H] = difference(a, b, one);
    }
    butterflies<R, 2 * H>(x, one);
  }
}

// R adjacent vectors, transformed in registers.
template <std::size_t R, class In, class Out, class V>
ONNX_QUAROT_INLINE void block_pass(const In& in, const Out& out, V one) {
  constexpr std::size_t lanes = sizeof(V) / sizeof(one[0]);
  V x[R];
#pragma GCC unroll 64
  for (std::size_t i = 0; i < R; ++i) x[i] = lane_stages<1>(in.get(i * lanes));
  butterflies<R>(x, one);
#pragma GCC unroll 64
  for (std::size_t i = 0; i < R; ++i) out.put(i * lanes, x[i]);
}

// Butterflies of radix R between elements `step` apart, for R * step adjacent elements.
template <std::size_t R, class In, class Out, class V>
void strided_pass(const In& in, const Out& out, std::size_t step, V one) {
  constexpr std::size_t lanes = sizeof(V) / sizeof(one[0]);
  for (std::size_t j = 0; j < step; j += lanes) {
    V x[R];
#pragma GCC unroll 64
    for (std::size_t i = 0; i < R; ++i) x[i] = in.get(i * step + j);
    butterflies<R>(x, one);
#pragma GCC unroll 64
    for (std::size_t i = 0; i < R; ++i) out.put(i * step + j, x[i]);
  }
}

template <class In, class Out, class V>
void strided_pass(const In& in, const Out& out, std::size_t step, std::size_t radix, V one) {
  static_assert(kMaxRadix == 16 || kMaxRadix == 32);
  switch (radix) {
    case 2:
      return strided_pass<2>(in, out, step, one);
    case 4:
      return strided_pass<4>(in, out, step, one);
    case 8:
      return strided_pass<8>(in, out, step, one);
    case 16:
      return strided_pass<16>(in, out, step, one);
    default:
      return strided_pass<kMaxRadix>(in, out, step, one);
  }
}

// How a row of n elements, too long for two passes, is cut: the radix of its last pass. Beyond first-level cache only 4
// and 8, because longer columns at power-of-two distances evict each other.
ONNX_QUAROT_INLINE std::size_t last_radix(std::size_t n, std::size_t element_bytes, std::size_t block) {
  if (n * element_bytes <= kL1Bytes) {
    const std::size_t radix = n / (8 * block);
    return radix < 16 ? radix : 16;
  }
  unsigned doublings = 0;
  for (std::size_t size = n * element_bytes; size > kChunkBytes; size /= 2) ++doublings;
  return doublings == 1 ? 2 : (doublings % 3 == 0 ? 8 : 4);
}

// H_n of one row of n elements, n longer than the block of the first pass. `values` may be the rows of `in` or `out`.
template <class In, class Out, class C, class V>
void long_row(const In& in, C* values, const Out& out, std::size_t n, V one) {
  constexpr std::size_t block = kBlockVectors * sizeof(V) / sizeof(C);
  const Source<C, false> from{values, nullptr};
  const Sink<C, Finish::none> to{values, nullptr, one};
  if (n <= block * kMaxRadix) {
    for (std::size_t i = 0; i < n; i += block) block_pass<kBlockVectors>(in.at(i), to.at(i), one);
    return strided_pass(from, out, block, n / block, one);
  }
  const std::size_t radix = last_radix(n, sizeof(C), block), part = n / radix;
  for (std::size_t i = 0; i < n; i += part) long_row(in.at(i), values + i, to.at(i), part, one);
  strided_pass(from, out, part, radix, one);
}

template <std::size_t R, class In, class Out, class V>
void short_rows(const In& in, const Out& out, std::size_t count, std::size_t sign_step, V one) {
  constexpr std::size_t n = R * sizeof(V) / sizeof(one[0]);
  for (std::size_t i = 0; i < count; ++i) block_pass<R>(in.at(i * n, i * sign_step), out.at(i * n, i * sign_step), one);
}

// H_n of `count` adjacent rows of n elements, n at least a vector. `values` holds one row, or all if `keep` says so.
template <class In, class Out, class C, class V>
void rows_of_power(const In& in, C* values, std::size_t values_step, const Out& out, std::size_t count,
                   std::size_t sign_step, std::size_t n, V one) {
  static_assert(kBlockVectors == 8 || kBlockVectors == 16);
  switch (n / (sizeof(V) / sizeof(C))) {
    case 1:
      return short_rows<1>(in, out, count, sign_step, one);
    case 2:
      return short_rows<2>(in, out, count, sign_step, one);
    case 4:
      return short_rows<4>(in, out, count, sign_step, one);
    case 8:
      return short_rows<8>(in, out, count, sign_step, one);
    case 16:
      if constexpr (kBlockVectors == 16) return short_rows<16>(in, out, count, sign_step, one);
      [[fallthrough]];
    default:
      for (std::size_t i = 0; i < count; ++i) {
        long_row(in.at(i * n, i * sign_step), values + i * values_step, out.at(i * n, i * sign_step), n, one);
      }
  }
}

}  // namespace
}  // namespace onnx_quarot

#include "order-inl.h"
#include "job-inl.h"
