// The dot product of four bytes, and bytes as 32-bit integers, in plain C++, for vectors of any width: what CPUs
// without instructions for it run, and what stands in for the instructions where kernels made for them are tested.
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace onnx_quarot {
namespace {

// Weight: what the bytes of `weights` are, std::uint8_t or std::int8_t.
template <class Weight, class Vector>
inline Vector portable_dot(Vector sum, Vector weights, Vector values) {
  constexpr std::size_t count = sizeof(Vector);
  Weight w[count];
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
inline Vector portable_wide(const std::uint8_t* from) {
  std::int32_t lanes[sizeof(Vector) / 4];
  for (std::size_t i = 0; i < sizeof(Vector) / 4; ++i) lanes[i] = from[i % 8];
  Vector wide;
  std::memcpy(&wide, lanes, sizeof(wide));
  return wide;
}

}  // namespace
}  // namespace onnx_quarot
