// The kernel for dot products of signed bytes (Arm's) on other CPUs, likewise.
#define ONNX_QUAROT_EMULATE_DOT
#define ONNX_QUAROT_DOT_SIGNED 1
#include "portable_dot-inl.h"

#define ONNX_QUAROT_DOT_LANES 4
#define ONNX_QUAROT_DOT_ROWS 4
#define ONNX_QUAROT_DOT_PANELS 1
#include "dot-inl.h"

namespace onnx_quarot {
extern const QLinearKernels qlinear_emulated_signed;
}
ONNX_QUAROT_QLINEAR_KERNELS(qlinear_emulated_signed, "emulated signed")
