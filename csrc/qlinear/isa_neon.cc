// 64-bit Arm with the dot product of signed bytes (FEAT_DotProd). 4 x 16 sums in 16 of the 32 registers.
#if defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>

#include <cstdint>
#include <cstring>

namespace onnx_quarot {
namespace {
template <class Vector>
inline Vector dot_bytes(Vector sum, Vector weights, Vector values) {
  return reinterpret_cast<Vector>(vdotq_s32(reinterpret_cast<int32x4_t>(sum), reinterpret_cast<int8x16_t>(weights),
                                            reinterpret_cast<int8x16_t>(values)));
}
template <class Vector>
inline Vector wide_bytes(const std::uint8_t* from) {
  std::uint32_t four = 0;
  std::memcpy(&four, from, sizeof(four));
  const uint16x8_t pairs = vmovl_u8(vcreate_u8(four));
  return reinterpret_cast<Vector>(vmovl_u16(vget_low_u16(pairs)));
}
template <class Vector>
inline Vector fused(Vector a, Vector b, Vector sum) {
  return reinterpret_cast<Vector>(vfmaq_f32(reinterpret_cast<float32x4_t>(sum), reinterpret_cast<float32x4_t>(a),
                                            reinterpret_cast<float32x4_t>(b)));
}
}  // namespace
}  // namespace onnx_quarot

#define ONNX_QUAROT_DOT_LANES 4
#define ONNX_QUAROT_DOT_ROWS 4
#define ONNX_QUAROT_DOT_PANELS 1
#define ONNX_QUAROT_DOT_SIGNED 1
#include "dot-inl.h"

ONNX_QUAROT_QLINEAR_KERNELS(qlinear_neon, "neon")
#endif
