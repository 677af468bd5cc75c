// The kernel for dot products of signed bytes (Arm's) on other CPUs, likewise.
#include "portable_dot-inl.h"

namespace onnx_quarot {
namespace {
template <class Vector>
inline Vector dot_bytes(Vector sum, Vector weights, Vector values) {
  return portable_dot<std::int8_t>(sum, weights, values);
}
template <class Vector>
inline Vector wide_bytes(const std::uint8_t* from) {
  return portable_wide<Vector>(from);
}
}  // namespace
}  // namespace onnx_quarot

#define ONNX_QUAROT_DOT_LANES 4
#define ONNX_QUAROT_DOT_ROWS 4
#define ONNX_QUAROT_DOT_PANELS 1
#define ONNX_QUAROT_DOT_SIGNED 1
#include "dot-inl.h"

namespace onnx_quarot {
extern const QLinearKernels qlinear_emulated_signed;
}
ONNX_QUAROT_QLINEAR_KERNELS(qlinear_emulated_signed, "emulated signed")
