// As avx2.cc, for CPUs that add and multiply-add on different units.
#if defined(__AVX2__)
#define ONNX_QUAROT_VECTOR_BYTES 32
#define ONNX_QUAROT_BLOCK_VECTORS 8
#define ONNX_QUAROT_MAX_RADIX 16
#define ONNX_QUAROT_FUSED_DIFFERENCE 1
#define ONNX_QUAROT_INTERLEAVED 0
#include "kernel-inl.h"

ONNX_QUAROT_KERNELS(avx2_fused_kernels, "avx2")
#endif
