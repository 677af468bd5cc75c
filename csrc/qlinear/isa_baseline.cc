// What the compiler targets by default.
#define ONNX_QUAROT_DOT_SIGNED 0
#include "portable_dot-inl.h"

#define ONNX_QUAROT_DOT_LANES 4
#define ONNX_QUAROT_DOT_ROWS 2
#define ONNX_QUAROT_DOT_PANELS 1
#include "dot-inl.h"

ONNX_QUAROT_QLINEAR_KERNELS(qlinear_baseline, "baseline")
