// bfloat16 for CPUs with AVX-512 BF16, whose conversions take no subnormal numbers: as avx512.cc, but results of
// magnitude below 2^-126 may become zeros of their sign, and inputs count as zero.
#if defined(__AVX512BF16__)
#define ONNX_QUAROT_VECTOR_BYTES 64
#define ONNX_QUAROT_BLOCK_VECTORS 16
#define ONNX_QUAROT_MAX_RADIX 32
#define ONNX_QUAROT_FUSED_DIFFERENCE 1
#define ONNX_QUAROT_INTERLEAVED 0
#include "kernel-inl.h"

namespace onnx_quarot {
const TypeKernels avx512_bfloat16_kernels = kTypeKernels<BFloat>;
}
#endif
