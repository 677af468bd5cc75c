// Copies of matrices between the storage types and float64, whichever way either lies in memory.
#ifndef ONNX_QUAROT_CONVERT_H
#define ONNX_QUAROT_CONVERT_H

#include <cstddef>
#include <string>

#include "fwht.h"

namespace onnx_quarot {

// A matrix somewhere in memory; distances in elements, of any sign.
struct MatrixView {
  void* data;
  DType dtype;
  std::ptrdiff_t row_stride;
  std::ptrdiff_t column_stride;
};

// to[i][j] = from[i][j] for rows x columns elements, rounded once, to nearest even. One of the two is float64. No
// allocation; both aligned to their element; they must not overlap. Works through blocks, so that a transposed source
// or target costs little more than a straight one. isa: a kernel by name, for tests; empty: the one in use.
void convert(const MatrixView& from, const MatrixView& to, std::size_t rows, std::size_t columns,
             const std::string& isa = {});

}  // namespace onnx_quarot

#endif
