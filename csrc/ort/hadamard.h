// The operator onnx_quarot::Hadamard, version 1.
//
//   inputs      X       float32, float16, bfloat16 or float64, shape [..., n], rank at least 1
//               signs   optional; int8, +1 or -1, length block_size (the same for each block) or n
//   output      Y       X's type and shape: (X * signs) H scale on the last axis, cut in blocks;
//                       with transpose (X H^T scale) * signs, which is the inverse
//   attributes  block_size  int, default n: must divide n and be a size with a Hadamard matrix (fwht.h)
//               transpose   int, 0 (default) or 1
//               scale       float, default 1/sqrt(block_size), which makes the transform orthonormal
#ifndef ONNX_QUAROT_ORT_HADAMARD_H
#define ONNX_QUAROT_ORT_HADAMARD_H

#include "abi.h"

namespace onnx_quarot::ort {

// The operator for one element type of X. ONNX Runtime keeps pointers to its definitions, and hands them back to every
// callback: what a callback needs to know stands behind the C struct.
struct HadamardOp : CustomOp {
  HadamardOp(const Api* api, ElementType type);

  const Api* api;
  ElementType type;
};

}  // namespace onnx_quarot::ort

#endif
