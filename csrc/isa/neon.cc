// 64-bit Arm. 64 floats in 16 of the 32 registers.
#if defined(__aarch64__)
#define ONNX_QUAROT_VECTOR_BYTES 16
#define ONNX_QUAROT_BLOCK_VECTORS 16
#define ONNX_QUAROT_MAX_RADIX 16
#define ONNX_QUAROT_FUSED_DIFFERENCE 0
#define ONNX_QUAROT_INTERLEAVED 0
#include "kernel-inl.h"

ONNX_QUAROT_KERNELS(neon_kernels, "neon")
#endif
