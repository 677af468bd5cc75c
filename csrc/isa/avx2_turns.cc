// As avx2.cc, for CPUs on which multiply-adds do not hinder stores: most differences are multiply-adds.
#if defined(__AVX2__)
#define ONNX_QUAROT_VECTOR_BYTES 32
#define ONNX_QUAROT_BLOCK_VECTORS 8
#define ONNX_QUAROT_MAX_RADIX 8
#define ONNX_QUAROT_FUSED_DIFFERENCE 1
#define ONNX_QUAROT_INTERLEAVED 1
#include "kernel-inl.h"

ONNX_QUAROT_KERNELS(avx2_turns_kernels, "avx2")
#endif
