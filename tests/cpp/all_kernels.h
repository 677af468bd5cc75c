// QLinear's kernels that tests can run: those of this CPU, and emulated ones.
#ifndef ONNX_QUAROT_TESTS_ALL_KERNELS_H
#define ONNX_QUAROT_TESTS_ALL_KERNELS_H

#include <string>
#include <vector>

#include "qlinear/kernels.h"
#include "qlinear/qlinear.h"

namespace onnx_quarot {

#if defined(ONNX_QUAROT_EMULATED_KERNELS)
extern const QLinearKernels qlinear_emulated_avx512vnni;
extern const QLinearKernels qlinear_emulated_avxvnni;
extern const QLinearKernels qlinear_emulated_signed;
#endif

inline std::vector<const QLinearKernels*> all_kernels() {
  std::vector<const QLinearKernels*> all;
  for (const std::string& isa : qlinear_isas()) all.push_back(&qlinear_kernels(isa));
#if defined(ONNX_QUAROT_EMULATED_KERNELS)
  all.insert(all.end(), {&qlinear_emulated_avx512vnni, &qlinear_emulated_avxvnni, &qlinear_emulated_signed});
#endif
  return all;
}

}  // namespace onnx_quarot

#endif
