// What dot-inl.h asks for in plain C++, for vectors of any width: what CPUs without instructions for it run, and what
// stands in for the instructions where kernels made for them are tested.
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace onnx_quarot {
namespace {

template <class Vector>
inline Vector dot_bytes(Vector sum, Vector weights, Vector values) {
  constexpr std::size_t count = sizeof(Vector);
  std::conditional_t<ONNX_QUAROT_DOT_SIGNED == 1, std::int8_t, std::uint8_t> w[count];
  std::int8_t a[count];
  std::memcpy(w, &weights, sizeof(w));
  std::memcpy(a, &values, sizeof(a));
  std::int32_t lanes[count / 4];
  for (std::size_t i = 0; i < count / 4; ++i) {
    lanes[i] =
        w[4 * i] * a[4 * i] + w[4 * i + 1] * a[4 * i + 1] + w[4 * i + 2] * a[4 * i + 2] + w[4 * i + 3] * a[4 * i + 3];
  }
  Vector products;
  std::memcpy(&products, lanes, sizeof(products));
  return sum + products;
}

template <class Vector>
inline Vector wide_bytes(const std::uint8_t* from) {
  std::int32_t lanes[sizeof(Vector) / 4];
  for (std::size_t i = 0; i < sizeof(Vector) / 4; ++i) lanes[i] = from[i % 8];
  Vector wide;
  std::memcpy(&wide, lanes, sizeof(wide));
  return wide;
}

// a * b + sum, rounded once where the CPU does that fast, or where a kernel for one that does is tested.
template <class Vector>
inline Vector fused(const Vector& a, const Vector& b, const Vector& sum) {
#if defined(__FP_FAST_FMAF) || defined(ONNX_QUAROT_EMULATE_DOT)
  Vector sums;
  for (std::size_t i = 0; i < sizeof(Vector) / sizeof(float); ++i) sums[i] = __builtin_fmaf(a[i], b[i], sum[i]);
  return sums;
#else
  return a * b + sum;
#endif
}

}  // namespace
}  // namespace onnx_quarot
