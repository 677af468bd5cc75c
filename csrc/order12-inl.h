// The step of order 12 (widths of 1536, 3072, 12288), whose matrix needs no sums of groups kept in memory. Included by
// order-inl.h, which says what a step is.
//
// Williamson's blocks are A = J, all ones, and B = C = D = 2I - J here: an output is +-J of every block of inputs,
// which is the same for a whole block of outputs, and +-2 times three inputs. The array of williamson_entry multiplies
// a row (x0, x1, x2, x3), and its transpose, to
//   y0 = J (x2 + x3 + x0 + x1) - 2 (x1 + x2 + x3)    J (x0 - x1 - x2 - x3) + 2 (x1 + x2 + x3)
//   y1 = 2 (x0 + x2 - x3) - J (x0 - x1 + x2 - x3)    J (x0 + x1 + x2 - x3) - 2 (x0 + x2 - x3)
//   y2 = J (x2 - x3 - x0 + x1) + 2 (x0 - x1 + x3)    J (x0 - x1 + x2 + x3) - 2 (x0 - x1 + x3)
//   y3 = J (x2 + x3 - x0 - x1) + 2 (x0 + x1 - x2)    J (x0 + x1 - x2 + x3) - 2 (x0 + x1 - x2)
// Products by two are exact: fused with the sum or not, results are the same.
#include "unrolled_order-inl.h"

namespace onnx_quarot {
namespace {

// One column times the matrix and the scale, in place. Inputs are read twice: there are not registers for all.
template <bool Transpose, class C, class V>
ONNX_QUAROT_INLINE void order12_product(C* x, std::size_t step, V scale, V one) {
  const V two = one + one;
  V sums[4];  // J of every block
#pragma GCC unroll 4
  for (std::size_t b = 0; b < 4; ++b) {
    const C* block = x + 3 * b * step;
    sums[b] = load(block) + load(block + step) + load(block + 2 * step);
  }
  const V p = sums[0] + sums[1], m = difference(sums[0], sums[1], one);
  const V q = sums[2] + sums[3], n = difference(sums[2], sums[3], one);
  const V j0 = Transpose ? difference(m, q, one) : q + p, j1 = Transpose ? p + n : m + n;
  const V j2 = Transpose ? m + q : difference(n, m, one);
  const V j3 = Transpose ? difference(p, n, one) : difference(q, p, one);
#pragma GCC unroll 3
  for (std::size_t i = 0; i < 3; ++i, x += step) {
    V x0 = load(x), x1 = load(x + 3 * step), x2 = load(x + 6 * step), x3 = load(x + 9 * step);
    in_registers(x0, x1, x2, x3);
    // The units of multiply-adds are busy with the products: these are plain subtractions.
    const V t0 = two * (x1 + (x2 + x3)), t1 = two * (x0 + (x2 - x3));
    const V t2 = two * ((x0 - x1) + x3), t3 = two * ((x0 + x1) - x2);
    store(x, (Transpose ? j0 + t0 : j0 - t0) * scale);
    store(x + 3 * step, (Transpose ? j1 - t1 : t1 - j1) * scale);
    store(x + 6 * step, (Transpose ? j2 - t2 : j2 + t2) * scale);
    store(x + 9 * step, (Transpose ? j3 - t3 : j3 + t3) * scale);
  }
}

template <bool Transpose, class C, class V>
__attribute__((noinline)) void order12(C* values, std::size_t step, V scale, V one) {
  constexpr std::size_t lanes = sizeof(V) / sizeof(C);
  for (std::size_t j = 0; j < step; j += lanes) order12_product<Transpose>(values + j, step, scale, one);
}
template <class C, class V>
ONNX_QUAROT_INLINE void order12(C* values, std::size_t step, bool transpose, V scale, V one) {
  // Rows that evict each other are better read once.
  if (evict_each_other(12, step * sizeof(C))) return williamson_order<3>(values, step, transpose, scale, one);
  return transpose ? order12<true>(values, step, scale, one) : order12<false>(values, step, scale, one);
}

}  // namespace
}  // namespace onnx_quarot
