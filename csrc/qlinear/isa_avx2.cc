// AVX2, exact: vpmaddubsw adds the products of two features in 16 bits, which must not saturate. Weights are its
// unsigned operand, up to 255, so that the sum of a pair of activations may be -128..128. Few pairs of a row are larger
// when its largest value is 127: quantize8 takes what they have too much out, into the row's excess, which is
// multiplied by itself. So 32 products take three instructions, as for kernels that saturate. 4-bit weights need none
// of this: eight sums of two products of at most 15 * 127 fit into 16 bits.
#if defined(__AVX2__)
#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace onnx_quarot {
namespace {

struct Isa {
  static constexpr std::size_t lanes = 8, rows = 5, panels = 1, rows4 = 6, panels4 = 1;
  // A single row reads several panels side by side, which the processor fetches ahead by itself: on Zen 3, memory gives
  // half as much again as it does from one panel, or from any number asked for beforehand. Zen 4 reads one panel after
  // the other as fast, which makes short ones, whose beginnings it has to find, up to 1.8 times as fast; but long ones
  // push the row out of first-level cache, so that panels should share its operands.
  static constexpr std::size_t row_panels8 = 4, row_panels4 = 4, row_tile4 = 2;
  static constexpr bool upper_halves = false, fetches_row = false;
  static bool side_by_side8(const MultiplyJob& job) { return job.steps >= kLongSteps || job.several_streams; }
  static bool side_by_side4(const MultiplyJob& job) {
    return job.steps >= kLongSteps || (job.panel_bytes > kShortPanel && job.several_streams);
  }
  static constexpr std::size_t most_rows = 64;
  static constexpr bool quick_sums = true;
  static constexpr std::int32_t offset8 = 128;
  static constexpr bool has_excess = true;
  using Int [[gnu::vector_size(32), gnu::aligned(4)]] = std::int32_t;
  using Float [[gnu::vector_size(32), gnu::aligned(4)]] = float;
  using Weights = __m256i;
  using Values = __m256i;

  static Float multiply_add(Float a, Float b, Float sum) {
    return reinterpret_cast<Float>(
        _mm256_fmadd_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b), reinterpret_cast<__m256>(sum)));
  }

  static Weights weights(const std::uint8_t* from, std::size_t vector) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + vector * 32));
  }
  static Values values(const std::uint8_t* from) {
    return _mm256_castps_si256(_mm256_broadcast_ss(reinterpret_cast<const float*>(from)));
  }
  // Sums are added to in place, one after the other: left to itself, the compiler computes all products of a tile
  // before it adds them, runs out of registers, and copies sums.
  static Int dot8(Int sum, Weights weights, Values values) {
    const __m256i products = _mm256_madd_epi16(_mm256_maddubs_epi16(weights, values), _mm256_set1_epi16(1));
    asm volatile("vpaddd %1, %0, %0" : "+x"(sum) : "x"(products));
    return sum;
  }

  static void quantize8(const QuantizeJob& job) {
    auto* out = static_cast<std::uint8_t*>(job.out);
    auto* const excess = reinterpret_cast<ExcessStep*>(out + excess_offset(job.steps));
    ExcessStep* last = excess;
    const __m256 inverse = _mm256_set1_ps(job.inverse);
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    const __m256i most = _mm256_set1_epi16(128), least = _mm256_set1_epi16(-128), low = _mm256_set1_epi16(255);
    __m256i sum = _mm256_setzero_si256();
    const auto some = [&](std::size_t k, const float* from, std::uint8_t* to) {
      const auto two = [&](const float* at) {
        return _mm256_packs_epi32(_mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(at), inverse)),
                                  _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(at + 8), inverse)));
      };
      const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(two(from), two(from + 16)), order);
      const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), bytes);
      sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
      // The first of two that are too large takes all of it: it is at least as large, as the other is 127 at most.
      const __m256i beyond = _mm256_sub_epi16(pairs, _mm256_max_epi16(_mm256_min_epi16(pairs, most), least));
      const __m256i taken = _mm256_and_si256(beyond, low);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_sub_epi8(bytes, taken));
      const __m256i none = _mm256_cmpeq_epi32(taken, _mm256_setzero_si256());
      unsigned steps = static_cast<unsigned>(_mm256_movemask_ps(_mm256_castsi256_ps(none))) ^ 255u;
      if (steps == 0) return;
      std::uint8_t fours[32];
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(fours), taken);
      for (; steps != 0; steps &= steps - 1) {
        const unsigned step = static_cast<unsigned>(__builtin_ctz(steps));
        (++last)->step = static_cast<std::uint32_t>(k / kStepValues) + step;
        std::memcpy(last->values, fours + step * kStepValues, kStepValues);
      }
    };
    std::size_t k = 0;
    for (; k + 32 <= job.depth; k += 32) some(k, job.values + k, out + k);
    if (k < job.depth) {
      float rest[32] = {};
      std::memcpy(rest, job.values + k, (job.depth - k) * sizeof(float));
      some(k, rest, out + k);  // up to 31 bytes of the padding
    }
    excess->step = static_cast<std::uint32_t>(last - excess);
    std::int32_t sums[8], total = 0;
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums), sum);
    for (const std::int32_t one : sums) total += one;
    job.corrections[0] = -job.offset * total;
  }

  using Part = __m256i;  // 16-bit sums
  static Int wide_bytes(const std::uint8_t* from) {
    return reinterpret_cast<Int>(_mm256_cvtepu8_epi32(_mm_loadu_si64(from)));
  }
  static Part part(Int) { return _mm256_setzero_si256(); }
  static Weights nibbles(const std::uint8_t* from, std::size_t vector, std::size_t half) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + vector * 32));
    return _mm256_and_si256(half == 0 ? bytes : _mm256_srli_epi16(bytes, 4), _mm256_set1_epi8(15));
  }
  static Part dot4(Part part, Weights weights, Values values) {
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
