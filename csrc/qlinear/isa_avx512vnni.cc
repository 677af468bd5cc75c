// AVX-512 VNNI: vpdpbusd on 512 bits. 6 x 64 sums in 24 of the 32 registers.
#if defined(__AVX512VNNI__) || defined(ONNX_QUAROT_EMULATE_DOT)
#if defined(ONNX_QUAROT_EMULATE_DOT)
#include "portable_dot-inl.h"
#else
#include <immintrin.h>
#endif

namespace onnx_quarot {
namespace {
template <class Vector>
inline Vector dot_bytes(Vector sum, Vector weights, Vector values) {
#if defined(ONNX_QUAROT_EMULATE_DOT)
  return portable_dot<std::uint8_t>(sum, weights, values);
#else
  return reinterpret_cast<Vector>(_mm512_dpbusd_epi32(
      reinterpret_cast<__m512i>(sum), reinterpret_cast<__m512i>(weights), reinterpret_cast<__m512i>(values)));
#endif
}
}  // namespace
}  // namespace onnx_quarot

#define ONNX_QUAROT_DOT_LANES 16
#define ONNX_QUAROT_DOT_ROWS 6
#define ONNX_QUAROT_DOT_PANELS 4
#define ONNX_QUAROT_DOT_SIGNED 0
#include "dot-inl.h"

ONNX_QUAROT_QLINEAR_KERNELS(qlinear_avx512vnni, "avx512vnni")
#endif
