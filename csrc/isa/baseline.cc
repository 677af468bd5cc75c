// What the compiler targets by default: SSE2 on x86-64, and plain C++ wherever there is nothing better.
#define ONNX_QUAROT_VECTOR_BYTES 16
#define ONNX_QUAROT_BLOCK_VECTORS 8
#define ONNX_QUAROT_MAX_RADIX 8
#define ONNX_QUAROT_FUSED_DIFFERENCE 0
#define ONNX_QUAROT_INTERLEAVED 0
#include "kernel-inl.h"

ONNX_QUAROT_KERNELS(baseline_kernels, "baseline")
