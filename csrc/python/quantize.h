// Transforms that quantize, for the Python module _core.
#ifndef ONNX_QUAROT_PYTHON_QUANTIZE_H
#define ONNX_QUAROT_PYTHON_QUANTIZE_H

#include <pybind11/pybind11.h>

namespace onnx_quarot {

void add_quantize(pybind11::module_& module);

}  // namespace onnx_quarot

#endif
