// What the compiler targets by default.
#include "portable_dot-inl.h"

namespace onnx_quarot {
namespace {
template <class Vector>
inline Vector dot_bytes(Vector sum, Vector weights, Vector values) {
  return portable_dot<std::uint8_t>(sum, weights, values);
}
template <class Vector>
inline Vector wide_bytes(const std::uint8_t* from) {
  return portable_wide<Vector>(from);
}
}  // namespace
}  // namespace onnx_quarot

#define ONNX_QUAROT_DOT_LANES 4
#define ONNX_QUAROT_DOT_ROWS 2
#define ONNX_QUAROT_DOT_PANELS 1
#define ONNX_QUAROT_DOT_SIGNED 0
#include "dot-inl.h"

ONNX_QUAROT_QLINEAR_KERNELS(qlinear_baseline, "baseline")
