// Transforms whose result is quantized at once, without a trip through memory.
//
// onnx_quarot::HadamardQuantizeLinear, version 1
//   inputs      X             float32, shape [..., n], rank at least 1
//               y_scale       float32, one element, positive
//               y_zero_point  int8 or uint8, one element
//               signs         optional, as in Hadamard
//   output      Y             y_zero_point's type, X's shape: saturate(round(T / y_scale) + y_zero_point), where T is
//                             Hadamard's result. The division is a multiplication by a factor, so that a quotient half
//                             way between two integers may round either way.
//
// onnx_quarot::HadamardDynamicQuantizeLinear, version 1
//   inputs      X             as above
//               signs         optional, as in Hadamard
//   outputs     Y             int8, X's shape: round(T / y_scale), each row by its own scale
//               y_scale       float32, shape [..., 1]: the row's largest magnitude / 127; 1 for a row of zeros
//
// Attributes as in Hadamard.
#ifndef ONNX_QUAROT_ORT_HADAMARD_QUANTIZE_H
#define ONNX_QUAROT_ORT_HADAMARD_QUANTIZE_H

#include "abi.h"

namespace onnx_quarot::ort {

// The operator for one type of zero point.
struct HadamardQuantizeOp : CustomOp {
  HadamardQuantizeOp(const Api* api, ElementType type);

  const Api* api;
  ElementType type;
};

struct HadamardDynamicQuantizeOp : CustomOp {
  explicit HadamardDynamicQuantizeOp(const Api* api);

  const Api* api;
};

}  // namespace onnx_quarot::ort

#endif
