// AVX-VNNI: vpdpbusd on 256 bits. 6 x 16 sums in 12 of the 16 registers.
#if defined(__AVXVNNI__) || defined(ONNX_QUAROT_EMULATE_DOT)
#define ONNX_QUAROT_DOT_LANES 8
#define ONNX_QUAROT_DOT_ROWS 6
#define ONNX_QUAROT_DOT_PANELS 1
#define ONNX_QUAROT_DOT_SIGNED 0
#if defined(ONNX_QUAROT_EMULATE_DOT)
#include "portable_dot-inl.h"
#else
#include <immintrin.h>

#include <cstdint>

namespace onnx_quarot {
namespace {
template <class Vector>
inline Vector dot_bytes(Vector sum, Vector weights, Vector values) {
  return reinterpret_cast<Vector>(_mm256_dpbusd_avx_epi32(
      reinterpret_cast<__m256i>(sum), reinterpret_cast<__m256i>(weights), reinterpret_cast<__m256i>(values)));
}
template <class Vector>
inline Vector wide_bytes(const std::uint8_t* from) {
  return reinterpret_cast<Vector>(_mm256_cvtepu8_epi32(_mm_loadu_si64(from)));
}
template <class Vector>
inline Vector fused(Vector a, Vector b, Vector sum) {
  return reinterpret_cast<Vector>(
      _mm256_fmadd_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b), reinterpret_cast<__m256>(sum)));
}
}  // namespace
}  // namespace onnx_quarot
#endif

#include "dot-inl.h"

ONNX_QUAROT_QLINEAR_KERNELS(qlinear_avxvnni, "avxvnni")
#endif
