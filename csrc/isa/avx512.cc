// AVX-512 F, BW, DQ and VL. 256 floats in 16 of the 32 registers.
#if defined(__AVX512F__)
#define ONNX_QUAROT_VECTOR_BYTES 64
#define ONNX_QUAROT_BLOCK_VECTORS 16
#define ONNX_QUAROT_MAX_RADIX 32
#define ONNX_QUAROT_FUSED_DIFFERENCE 1
#define ONNX_QUAROT_INTERLEAVED 0
#include "kernel-inl.h"

ONNX_QUAROT_KERNELS(avx512_kernels, "avx512")
#endif
