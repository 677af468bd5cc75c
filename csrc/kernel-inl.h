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
ONNX_QUAROT_INLINE void block_pass(In in, Out out, V one) {
  constexpr std::size_t lanes = sizeof(V) / sizeof(one[0]);
  V x[R];
#pragma GCC unroll 64
  for (std::size_t i = 0; i < R; ++i) x[i] = in.get(i * lanes);
  lane_stages<R>(x);
  butterflies<R>(x, one);
#pragma GCC unroll 64
  for (std::size_t i = 0; i < R; ++i) out.put(i * lanes, x[i]);
}

// Butterflies of radix R between elements `step` apart, for R * step adjacent elements.
template <std::size_t R, class In, class Out, class V>
ONNX_QUAROT_INLINE void strided_pass(In in, Out out, std::size_t step, V one) {
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

template <std::size_t R, class In, class Out, class V>
__attribute__((noinline)) void last_pass(In in, Out out, std::size_t step, V one) {
  strided_pass<R>(in, out, step, one);
}

// How a row too long for two passes is cut: the radix of its last pass, 8 as often as possible, after the first pass in
// first-level cache and after chunks of it beyond. Not more than 8: longer columns at power-of-two distances evict each
// other.
ONNX_QUAROT_INLINE std::size_t last_radix(std::size_t n, std::size_t element_bytes, std::size_t block) {
  const std::size_t first = n * element_bytes <= kL1Bytes ? block : kChunkBytes / element_bytes;
  unsigned doublings = 0;
  for (std::size_t size = n; size > first; size /= 2) ++doublings;
  return doublings == 1 ? 2 : (doublings % 3 == 0 ? 8 : 4);
}

template <std::size_t R, class In, class Out, class V>
void one_pass_rows(In in, Out out, std::size_t count, std::size_t sign_step, V one) {
  constexpr std::size_t n = R * sizeof(V) / sizeof(one[0]);
  for (std::size_t i = 0; i < count; ++i) block_pass<R>(in.at(i * n, i * sign_step), out.at(i * n, i * sign_step), one);
}

template <std::size_t R, class In, class Out, class C, class V>
void two_pass_rows(In in, C* values, std::size_t values_step, Out out, std::size_t count, std::size_t sign_step, V one) {
  constexpr std::size_t block = kBlockVectors * sizeof(V) / sizeof(C), n = R * block;
  for (std::size_t i = 0; i < count; ++i) {
    const In from = in.at(i * n, i * sign_step);
    C* row = values + i * values_step;
    const Sink<C, Finish::none> to{row, nullptr, one};
    for (std::size_t b = 0; b < n; b += block) block_pass<kBlockVectors>(from.at(b), to.at(b), one);
    strided_pass<R>(Source<C, false>{row, nullptr}, out.at(i * n, i * sign_step), block, one);
  }
}

// H_n of `count` adjacent rows of n elements, n a power of two and at least a vector. The signs of a row begin
// `sign_step` after those of the row before. `values` holds what is between passes, `values_step` apart: memory of its
// own, or the rows of `out`.
template <class In, class Out, class C, class V>
void power_rows(In in, C* values, std::size_t values_step, Out out, std::size_t count, std::size_t sign_step,
                std::size_t n, V one) {
  static_assert(kBlockVectors == 8 || kBlockVectors == 16);
  static_assert(kMaxRadix == 8 || kMaxRadix == 16 || kMaxRadix == 32);
  constexpr std::size_t lanes = sizeof(V) / sizeof(C), block = kBlockVectors * lanes;
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
        return two_pass_rows<2>(in, values, values_step, out, count, sign_step, one);
      case 4:
        return two_pass_rows<4>(in, values, values_step, out, count, sign_step, one);
      case 8:
        return two_pass_rows<8>(in, values, values_step, out, count, sign_step, one);
      case 16:
        if constexpr (kMaxRadix >= 16) return two_pass_rows<16>(in, values, values_step, out, count, sign_step, one);
        [[fallthrough]];
      default:
        return two_pass_rows<kMaxRadix>(in, values, values_step, out, count, sign_step, one);
    }
  }
  const std::size_t radix = last_radix(n, sizeof(C), block), part = n / radix;
  for (std::size_t i = 0; i < count; ++i) {
    C* row = values + i * values_step;
    const Sink<C, Finish::none> to{row, nullptr, one};
    power_rows(in.at(i * n, i * sign_step), row, part, to, radix, part, part, one);
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

#include "order-inl.h"
#include "job-inl.h"
