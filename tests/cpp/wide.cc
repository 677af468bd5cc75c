// The 512-bit kernel for CPUs without 512-bit registers: the compiler splits its vectors. Slow, and just as right.
#define ONNX_QUAROT_VECTOR_BYTES 64
#define ONNX_QUAROT_BLOCK_VECTORS 16
#define ONNX_QUAROT_MAX_RADIX 32
#define ONNX_QUAROT_FUSED_DIFFERENCE 1
#define ONNX_QUAROT_INTERLEAVED 0
#include "kernel-inl.h"

namespace onnx_quarot {
extern const Kernels wide_kernels;
}
ONNX_QUAROT_KERNELS(wide_kernels, "wide")
