// What the kernels of QLinear do with floats: the size of a row, its integers, and gates. Part of kernel-inl.h, on the
// same struct `Isa`.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kernels.h"
#include "qlinear.h"

#define ONNX_QUAROT_UNROLL _Pragma("GCC unroll 16")

namespace onnx_quarot {
namespace {

template <class Vector>
inline Vector load(const void* from) {
  Vector vector;
  std::memcpy(&vector, from, sizeof(vector));
  return vector;
}

// As one vector: gcc copies memory in pieces of 16 bytes, for which it keeps what is stored in memory beforehand.
template <class Vector>
inline void store(void* to, Vector vector) {
  using Unaligned [[gnu::may_alias, gnu::aligned(1)]] = Vector;
  *static_cast<Unaligned*>(to) = vector;
}

inline Isa::Float splat(float value) { return value - Isa::Float{}; }
inline Isa::Int splat(std::int32_t value) { return value - Isa::Int{}; }
inline Isa::Float to_float(Isa::Int value) { return __builtin_convertvector(value, Isa::Float); }

// The largest magnitude of a row, by its bits: as integers, magnitudes are in order, with infinities and NaNs above all
// others.
std::uint32_t peak_bits(const float* values, std::size_t depth) {
  constexpr std::size_t chains = 4;
  Isa::Int largest[chains] = {};
  std::size_t k = 0;
  for (; k + chains * Isa::lanes <= depth; k += chains * Isa::lanes) {
    ONNX_QUAROT_UNROLL for (std::size_t i = 0; i < chains; ++i) {
      const Isa::Int bits = load<Isa::Int>(values + k + i * Isa::lanes) & 0x7fffffff;
      largest[i] = bits > largest[i] ? bits : largest[i];
    }
  }
  std::int32_t peak = 0;
  for (; k < depth; ++k) peak = std::max(peak, load<std::int32_t>(values + k) & 0x7fffffff);
  for (const Isa::Int& chain : largest) {
    for (std::size_t lane = 0; lane < Isa::lanes; ++lane) peak = std::max(peak, chain[lane]);
  }
  return static_cast<std::uint32_t>(peak);
}

// Added up in an order that is the same on all CPUs: 64 partial sums, whatever the vectors hold.
float sum_squares(const float* values, std::size_t depth) {
  constexpr std::size_t partial = 64, chains = partial / Isa::lanes;
  Isa::Float sums[chains] = {};
  float rest[partial] = {};
  for (std::size_t k = 0; k < depth; k += partial) {
    const float* from = values + k;
    if (k + partial > depth) {
      std::memcpy(rest, from, (depth - k) * sizeof(float));
      from = rest;
    }
    ONNX_QUAROT_UNROLL for (std::size_t i = 0; i < chains; ++i) {
      const auto some = load<Isa::Float>(from + i * Isa::lanes);
      sums[i] = sums[i] + some * some;
    }
  }
  float parts[partial];
  for (std::size_t i = 0; i < chains; ++i) store(parts + i * Isa::lanes, sums[i]);
  for (std::size_t half = partial / 2; half > 0; half /= 2) {
    for (std::size_t i = 0; i < half; ++i) parts[i] = parts[i] + parts[i + half];
  }
  return parts[0];
}

// exp(t) for t in -87..87, what is outside as the nearer end, and NaN for NaN: 2^n times a polynomial of degree 6 on
// half of ln 2 to either side (after Cephes' expf).
inline Isa::Float exponential(Isa::Float given) {
  constexpr float most = 87.0f, magic = 12582912.0f;
  Isa::Float t = given;
  t = t > most ? splat(most) : t;
  t = t < -most ? splat(-most) : t;
  const Isa::Float shifted = t * 1.44269504f + magic;  // the whole part in the low bits
  const Isa::Float whole = shifted - magic;
  const Isa::Float r = t - whole * 0.693359375f - whole * -2.12194440e-4f;
  Isa::Float p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const auto power = reinterpret_cast<Isa::Int>(p) + (reinterpret_cast<Isa::Int>(shifted) << 23);
  return given == given ? reinterpret_cast<Isa::Float>(power) : given;
}

// x / (1 + exp(-x)).
inline Isa::Float silu(Isa::Float x) { return x / (1.0f + exponential(-x)); }

void gate(const float* values, std::size_t pairs, float* y) {
  for (std::size_t pair = 0; pair < pairs; ++pair, values += 2 * kPanelColumns, y += kPanelColumns) {
    ONNX_QUAROT_UNROLL for (std::size_t at = 0; at < kPanelColumns; at += Isa::lanes) {
      store(y + at, silu(load<Isa::Float>(values + at)) * load<Isa::Float>(values + kPanelColumns + at));
    }
  }
}

// Values in -127..127 in the order of their features, one byte each: for every CPU that multiplies bytes. Writes whole
// vectors: up to lanes - 1 bytes behind the last step.
void quantize_bytes(const QuantizeJob& job) {
  using Narrow [[gnu::vector_size(Isa::lanes), gnu::aligned(1)]] = std::int8_t;
  auto* out = static_cast<std::int8_t*>(job.out);
  // Adding 1.5 * 2^23 leaves the rounded integer in the low bits.
  constexpr float magic = 12582912.0f;
  const Isa::Float inverse = splat(job.inverse);
  const std::size_t block = job.block_steps * 4;
  for (std::size_t start = 0, index = 0; start < job.steps * 4; start += block, ++index) {
    Isa::Int sum{};
    const auto some = [&](const float* from, std::int8_t* to) {
      const Isa::Int rounded = reinterpret_cast<Isa::Int>(load<Isa::Float>(from) * inverse + magic) - 0x4b400000;
      sum += rounded;
      store(to, __builtin_convertvector(rounded, Narrow));
    };
    const std::size_t end = std::min(start + block, job.depth);
    std::size_t k = start;
    for (; k + Isa::lanes <= end; k += Isa::lanes) some(job.values + k, out + k);
    if (k < end) {
      float rest[Isa::lanes] = {};
      std::memcpy(rest, job.values + k, (end - k) * sizeof(float));
      some(rest, out + k);
      k += Isa::lanes;
    }
    if (k < start + block) std::memset(out + k, 0, start + block - k);
    std::int32_t total = 0;
    for (std::size_t lane = 0; lane < Isa::lanes; ++lane) total += sum[lane];
    job.corrections[index] = -job.offset * total;
  }
}

}  // namespace
}  // namespace onnx_quarot
