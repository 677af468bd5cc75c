// AVX2, exact: vpmaddubsw takes magnitudes of activations as its unsigned operand, and weights that have their signs
// as the signed one, w where the activation is positive and -w - 1 where it is negative, which is w with all bits
// flipped. Two products are 2 * 127 * 128 at most and fit into 16 bits; what the ones add up to is one number a row. So
// a step is four instructions, as many as for pairs of 16-bit integers, without widening the weights. 4-bit weights are
// the unsigned operand: eight sums of two products of at most 15 * 127 fit into 16 bits.
#if defined(__AVX2__)
#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace onnx_quarot {
namespace {

struct Isa {
  static constexpr std::size_t lanes = 8, rows = 5, panels = 1, halves = 1, rows4 = 4, panels4 = 1;
  static constexpr std::size_t row_panels8 = 1, row_panels4 = 0;
  static constexpr bool quick_sums = true;
  static constexpr std::int32_t offset8 = 0;
  static constexpr std::size_t step_bytes8 = 8;
  using Int [[gnu::vector_size(32), gnu::aligned(4)]] = std::int32_t;
  using Float [[gnu::vector_size(32), gnu::aligned(4)]] = float;
  using Weights = __m256i;
  struct Values {
    __m256i magnitudes, flips;
  };

  static constexpr bool widens = false;
  static constexpr std::size_t widened_bytes = 1;
  static void widen(const std::uint8_t*, std::uint8_t*) {}
  static Weights widened(const std::uint8_t* from, std::size_t vector, std::size_t half) {
    return weights(from, vector, half);
  }
  static Weights weights(const std::uint8_t* from, std::size_t vector, std::size_t) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + vector * 32));
  }
  static __m256i four(const std::uint8_t* from) {
    return _mm256_castps_si256(_mm256_broadcast_ss(reinterpret_cast<const float*>(from)));
  }
  static Values values(const std::uint8_t* from, std::size_t) { return {four(from), four(from + 4)}; }
  // Sums are added to in place, one after the other: left to itself, the compiler computes all products of a tile
  // before it adds them, runs out of registers, and copies sums.
  static Int add_pairs(Int sum, __m256i pairs) {
    const __m256i products = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
    asm volatile("vpaddd %1, %0, %0" : "+x"(sum) : "x"(products));
    return sum;
  }
  static Int dot8(Int sum, Weights weights, Values values) {
    return add_pairs(sum, _mm256_maddubs_epi16(values.magnitudes, _mm256_xor_si256(weights, values.flips)));
  }

  // A step: four magnitudes, then what flips the weights' bytes; these are 128 too large, which is flipped as well.
  static void quantize8(const QuantizeJob& job) {
    auto* out = static_cast<std::uint8_t*>(job.out);
    const __m256 inverse = _mm256_set1_ps(job.inverse);
    const __m256i order = _mm256_setr_epi32(0, 4, 2, 6, 1, 5, 3, 7);
    __m256i sum = _mm256_setzero_si256();
    const auto some = [&](const float* from, std::uint8_t* to) {
      const auto two = [&](const float* at) {
        return _mm256_packs_epi32(_mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(at), inverse)),
                                  _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(at + 8), inverse)));
      };
      const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(two(from), two(from + 16)), order);
      const __m256i magnitudes = _mm256_abs_epi8(bytes), negative = _mm256_cmpgt_epi8(_mm256_setzero_si256(), bytes);
      const __m256i flips = _mm256_xor_si256(negative, _mm256_set1_epi8(-128));
      sum = _mm256_add_epi64(sum, _mm256_sad_epu8(_mm256_and_si256(magnitudes, negative), _mm256_setzero_si256()));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_unpacklo_epi32(magnitudes, flips));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 32), _mm256_unpackhi_epi32(magnitudes, flips));
    };
    std::size_t k = 0;
    for (; k + 32 <= job.depth; k += 32) some(job.values + k, out + 2 * k);
    if (k < job.depth) {
      float rest[32] = {};
      std::memcpy(rest, job.values + k, (job.depth - k) * sizeof(float));
      std::uint8_t last[64];
      some(rest, last);
      std::memcpy(out + 2 * k, last, 2 * (job.steps * 4 - k));
    }
    std::int64_t sums[4];
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums), sum);
    job.corrections[0] = static_cast<std::int32_t>(sums[0] + sums[1] + sums[2] + sums[3]);
  }

  using Weights4 = __m256i;
  using Values4 = __m256i;
  using Part = __m256i;  // 16-bit sums
  static Int wide_bytes(const std::uint8_t* from) {
    return reinterpret_cast<Int>(_mm256_cvtepu8_epi32(_mm_loadu_si64(from)));
  }
  static Part part(Int) { return _mm256_setzero_si256(); }
  static Weights4 nibbles(const std::uint8_t* from, std::size_t vector, std::size_t half) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + vector * 32));
    return _mm256_and_si256(half == 0 ? bytes : _mm256_srli_epi16(bytes, 4), _mm256_set1_epi8(15));
  }
  static Values4 values4(const std::uint8_t* from) { return four(from); }
  static Part dot4(Part part, Weights4 weights, Values4 values) {
    Part total = _mm256_add_epi16(part, _mm256_maddubs_epi16(weights, values));
    asm volatile("" : "+x"(total));  // one product at a time, too
    return total;
  }
  static Int flush(Int sum, Part part) {
    return sum + reinterpret_cast<Int>(_mm256_madd_epi16(part, _mm256_set1_epi16(1)));
  }
};

}  // namespace
}  // namespace onnx_quarot

#include "kernel-inl.h"

ONNX_QUAROT_QLINEAR_KERNELS(qlinear_avx2, "avx2")
#endif
