// The operator onnx_quarot::QLinear, version 1: Y = dequantize(quantize_rows(X R) . W) + bias, as qlinear/qlinear.h
// says.
//
//   inputs      X        float32, float16 or bfloat16, shape [..., K], rank at least 1
//               W        uint8, packed weights: [panels, K' / 4, 16, 4], or for 4 bits [panels, K' / 8, 16, 4]
//               scales   float32, [N], or for 4 bits [panels, blocks, 16]
//               bias     optional; float32, [N], or of the shape of Y, where there is one
//               signs    optional; int8, as Hadamard's
//   outputs     Y        X's type, shape [..., N]; up to three with `splits`; [..., N / 2] with `gated`
//   attributes  K, N            int
//               bits            int, 8 (default) or 4
//               block           int, for 4 bits: 32, 64 or 128
//               layout_version  int, 1
//               rotate          int, 0 (default) or 1: whether there is a Hadamard matrix R
//               block_size, transpose, scale   of R: as Hadamard's
//               epsilon         float, if given: rows of X are divided by sqrt(mean of squares + epsilon) first
//               splits          ints, if given: columns of each output, all but the last multiples of 16
//               gated           int, 0 (default) or 1: every 32 columns are 16 a and 16 b, of which silu(a) * b is left
#ifndef ONNX_QUAROT_ORT_QLINEAR_H
#define ONNX_QUAROT_ORT_QLINEAR_H

#include "abi.h"

namespace onnx_quarot::ort {

// The operator for one type of X, as HadamardOp.
struct QLinearOp : CustomOp {
  QLinearOp(const Api* api, ElementType type);

  const Api* api;
  ElementType type;
};

}  // namespace onnx_quarot::ort

#endif
