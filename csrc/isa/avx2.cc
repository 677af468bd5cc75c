// AVX2 with FMA and F16C. 64 floats in 8 of the 16 registers.
#if defined(__AVX2__)
#define ONNX_QUAROT_VECTOR_BYTES 32
#define ONNX_QUAROT_BLOCK_VECTORS 8
#define ONNX_QUAROT_MAX_RADIX 8
#define ONNX_QUAROT_FUSED_DIFFERENCE 0
#define ONNX_QUAROT_INTERLEAVED 1
#include "kernel-inl.h"

ONNX_QUAROT_KERNELS(avx2_kernels, "avx2")
#endif
