// AVX2, exact. Bytes times bytes would saturate in 16 bits, so 8-bit weights are multiplied as pairs of 16-bit
// integers: the even and the odd bytes of a step, each widened by one instruction. 4-bit weights stay bytes: eight sums
// of two products of at most 15 * 127 fit into 16 bits.
#if defined(__AVX2__)
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "kernels.h"

namespace onnx_quarot {
namespace {

struct Isa {
  static constexpr std::size_t lanes = 8, rows = 5, panels = 1, halves = 2, rows4 = 4, panels4 = 1;
  static constexpr std::size_t row_panels8 = 1, row_panels4 = 0;
  static constexpr std::int32_t offset8 = 128;
  static constexpr std::size_t step_bytes8 = 8;
  using Int [[gnu::vector_size(32), gnu::aligned(4)]] = std::int32_t;
  using Float [[gnu::vector_size(32), gnu::aligned(4)]] = float;
  using Weights = __m256i;
  using Values = __m256i;

  static constexpr bool widens = true;
  static constexpr std::size_t widened_bytes = 128;
  static void widen(const std::uint8_t* from, std::uint8_t* to) {
    for (std::size_t half = 0; half < 2; ++half) {
      for (std::size_t v = 0; v < 2; ++v) {
        _mm256_store_si256(reinterpret_cast<__m256i*>(to + (half * 2 + v) * 32), weights(from, v, half));
      }
    }
  }
  static Weights widened(const std::uint8_t* from, std::size_t vector, std::size_t half) {
    return _mm256_load_si256(reinterpret_cast<const __m256i*>(from + (half * 2 + vector) * 32));
  }
  static Weights weights(const std::uint8_t* from, std::size_t vector, std::size_t half) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + vector * 32));
    return half == 0 ? _mm256_and_si256(bytes, _mm256_set1_epi16(0xff)) : _mm256_srli_epi16(bytes, 8);
  }
  static Values values(const std::uint8_t* from, std::size_t half) {
    return _mm256_castps_si256(_mm256_broadcast_ss(reinterpret_cast<const float*>(from + 4 * half)));
  }
  static Int dot8(Int sum, Weights weights, Values values) {
    __m256i total = _mm256_add_epi32(reinterpret_cast<__m256i>(sum), _mm256_madd_epi16(weights, values));
    // One product at a time: the compiler would compute them all before it adds, and run out of registers.
    asm volatile("" : "+x"(total));
    return reinterpret_cast<Int>(total);
  }

  // 16-bit integers, in each step features 0, 2, 1, 3: as the weights' even and odd bytes come.
  static void quantize8(const QuantizeJob& job) {
    auto* out = static_cast<std::int16_t*>(job.out);
    const __m256 inverse = _mm256_set1_ps(job.inverse);
    const __m256i order = _mm256_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15,  //
                                           0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15);
    __m256i sum = _mm256_setzero_si256();
    const auto sixteen = [&](const float* from) {
      const __m256i a = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(from), inverse));
      const __m256i b = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(from + 8), inverse));
      const __m256i packed = _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8);
      sum = _mm256_add_epi32(sum, _mm256_madd_epi16(packed, _mm256_set1_epi16(1)));
      return _mm256_shuffle_epi8(packed, order);
    };
    std::size_t k = 0;
    for (; k + 16 <= job.depth; k += 16) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + k), sixteen(job.values + k));
    }
    if (k < job.steps * 4) {
      float rest[16] = {};
      std::int16_t last[16];
      for (std::size_t i = 0; k + i < job.depth; ++i) rest[i] = job.values[k + i];
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(last), sixteen(rest));
      for (std::size_t i = 0; k + i < job.steps * 4; ++i) out[k + i] = last[i];
    }
    std::int32_t sums[8];
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums), sum);
    std::int32_t total = 0;
    for (const std::int32_t lane : sums) total += lane;
    job.corrections[0] = -job.offset * total;
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
  static Values4 values4(const std::uint8_t* from) { return values(from, 0); }
  static Part dot4(Part part, Weights4 weights, Values4 values) {
    Part total = _mm256_add_epi16(part, _mm256_maddubs_epi16(weights, values));
    asm volatile("" : "+x"(total));
    return total;
  }
  static Int flush(Int sum, Part part) { return dot8(sum, part, _mm256_set1_epi16(1)); }
};

}  // namespace
}  // namespace onnx_quarot

#include "kernel-inl.h"

ONNX_QUAROT_QLINEAR_KERNELS(qlinear_avx2, "avx2")
#endif
