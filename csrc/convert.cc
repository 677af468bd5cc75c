#include "convert.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>

namespace onnx_quarot {
namespace {

struct Half {
  std::uint16_t bits;
};
struct BFloat {
  std::uint16_t bits;
};

template <class To, class From>
To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

double widen(double x) { return x; }
double widen(float x) { return static_cast<double>(x); }
double widen(BFloat x) { return static_cast<double>(bit_cast<float>(static_cast<std::uint32_t>(x.bits) << 16)); }
double widen(Half x) {
  // The exponent moves by a multiplication, which also makes subnormal numbers normal; infinities and NaNs need more.
  const std::uint32_t magnitude = (x.bits & 0x7fffu) << 13, sign = (x.bits & 0x8000u) << 16;
  const float scaled = bit_cast<float>(magnitude) * 0x1p112f;
  const std::uint32_t infinite = magnitude >= (0x7c00u << 13) ? 0x7f800000u : 0u;
  return static_cast<double>(bit_cast<float>(bit_cast<std::uint32_t>(scaled) | infinite | sign));
}

// float64 to float32 by rounding to odd: a second rounding, to fewer than 22 bits, is then as good as a single one. No
// branches: whether a weight is rounded up is as good as random.
std::uint32_t to_odd(double x) {
  const float near = static_cast<float>(x);
  const double back = static_cast<double>(near);
  const std::uint32_t away = std::fabs(back) > std::fabs(x), inexact = back != x;
  return (bit_cast<std::uint32_t>(near) - away) | inexact;
}

void narrow(double x, double& to) { to = x; }
void narrow(double x, float& to) { to = static_cast<float>(x); }
void narrow(double x, BFloat& to) {
  const std::uint32_t bits = to_odd(x);
  const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  to.bits = static_cast<std::uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16) | 0x40u : rounded);
}
void narrow(double x, Half& to) {
  const std::uint32_t bits = to_odd(x), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  // Normal numbers: rebias and round the 13 bits that go. Subnormal ones: the addition of 1/2 leaves their 10 bits at
  // the end of the sum, rounded.
  const std::uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const std::uint32_t subnormal = bit_cast<std::uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  std::uint32_t result = magnitude < (113u << 23) ? subnormal : normal;
  result = magnitude >= (143u << 23) ? 0x7c00u : result;  // 65536 and more; what rounds up to it became infinity above
  result = magnitude > 0x7f800000u ? 0x7e00u : result;
  to.bits = static_cast<std::uint16_t>(result | sign);
}

constexpr std::size_t kLong = 64, kShort = 8;  // a block of a transposed matrix: rows and columns

template <class From, class To>
void copy(const MatrixView& from, const MatrixView& to, std::size_t rows, std::size_t columns) {
  const auto at = [](const MatrixView& m, std::size_t i, std::size_t j) {
    return static_cast<std::ptrdiff_t>(i) * m.row_stride + static_cast<std::ptrdiff_t>(j) * m.column_stride;
  };
  const From* source = static_cast<const From*>(from.data);
  To* target = static_cast<To*>(to.data);
  if (from.column_stride == 1 && to.column_stride == 1) {
    for (std::size_t i = 0; i < rows; ++i) {
      const From* a = source + at(from, i, 0);
      To* b = target + at(to, i, 0);
      for (std::size_t j = 0; j < columns; ++j) narrow(widen(a[j]), b[j]);
    }
    return;
  }
  // One of the two has adjacent rows: turn blocks that span whole cache lines of both.
  double block[kShort][kLong];
  for (std::size_t i = 0; i < rows; i += kLong) {
    const std::size_t height = std::min(kLong, rows - i);
    for (std::size_t j = 0; j < columns; j += kShort) {
      const std::size_t width = std::min(kShort, columns - j);
      if (from.row_stride == 1) {
        for (std::size_t b = 0; b < width; ++b) {
          const From* a = source + at(from, i, j + b);
          for (std::size_t k = 0; k < height; ++k) block[b][k] = widen(a[k]);
        }
        for (std::size_t k = 0; k < height; ++k) {
          for (std::size_t b = 0; b < width; ++b) narrow(block[b][k], target[at(to, i + k, j + b)]);
        }
      } else {
        for (std::size_t k = 0; k < height; ++k) {
          for (std::size_t b = 0; b < width; ++b) block[b][k] = widen(source[at(from, i + k, j + b)]);
        }
        for (std::size_t b = 0; b < width; ++b) {
          To* a = target + at(to, i, j + b);
          for (std::size_t k = 0; k < height; ++k)
            narrow(block[b][k], a[static_cast<std::ptrdiff_t>(k) * to.row_stride]);
        }
      }
    }
  }
}

}  // namespace

void convert(const MatrixView& from, const MatrixView& to, std::size_t rows, std::size_t columns) {
  const bool reads = to.dtype == DType::float64;
  if (!reads && from.dtype != DType::float64) throw std::invalid_argument("one of the two matrices must be float64");
  switch (reads ? from.dtype : to.dtype) {
    case DType::float32:
      return reads ? copy<float, double>(from, to, rows, columns) : copy<double, float>(from, to, rows, columns);
    case DType::float16:
      return reads ? copy<Half, double>(from, to, rows, columns) : copy<double, Half>(from, to, rows, columns);
    case DType::bfloat16:
      return reads ? copy<BFloat, double>(from, to, rows, columns) : copy<double, BFloat>(from, to, rows, columns);
    case DType::float64:
      return copy<double, double>(from, to, rows, columns);
  }
}

}  // namespace onnx_quarot
