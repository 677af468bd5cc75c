// AVX-512 VNNI: vpdpbusd on 512 bits. 6 x 64 sums in 24 of the 32 registers.
#if defined(__AVX512VNNI__) || defined(ONNX_QUAROT_EMULATE_DOT)
#define ONNX_QUAROT_DOT_LANES 16
#define ONNX_QUAROT_DOT_ROWS 6
#define ONNX_QUAROT_DOT_PANELS 4
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
  return reinterpret_cast<Vector>(_mm512_dpbusd_epi32(
      reinterpret_cast<__m512i>(sum), reinterpret_cast<__m512i>(weights), reinterpret_cast<__m512i>(values)));
}
template <class Vector>
inline Vector wide_bytes(const std::uint8_t* from) {
  // The mask of all lanes: GCC 12 warns of the plain form, which leaves a vector uninitialized.
  const __m128i bytes = _mm_castpd_si128(_mm_loaddup_pd(reinterpret_cast<const double*>(from)));
  return reinterpret_cast<Vector>(_mm512_maskz_cvtepu8_epi32(0xffff, bytes));
}
template <class Vector>
inline Vector fused(Vector a, Vector b, Vector sum) {
  return reinterpret_cast<Vector>(
      _mm512_fmadd_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(sum)));
}
}  // namespace
}  // namespace onnx_quarot
#endif

#include "dot-inl.h"

ONNX_QUAROT_QLINEAR_KERNELS(qlinear_avx512vnni, "avx512vnni")
#endif
