// What an instruction set offers: one function a data type. Filled by the files in isa/, chosen in cpu.cc.
#ifndef ONNX_QUAROT_KERNELS_H
#define ONNX_QUAROT_KERNELS_H

#include <cstddef>
#include <cstdint>

namespace onnx_quarot {

// One step of order K: columns of K elements are multiplied by +-H_K.
struct OrderStep {
  std::size_t order;
  const std::uint64_t* codes[2];  // as in Order, for one column and for two side by side
  bool halved;                    // codes are those of half the order, as Order says
};

// A row is `blocks` adjacent blocks of `order` * `power` elements. Distances are in elements.
struct Job {
  const void* in;
  void* out;
  std::size_t rows;
  std::size_t blocks;
  std::ptrdiff_t in_stride;
  std::ptrdiff_t out_stride;
  std::size_t order;       // K
  std::size_t power;       // M = 2^m
  const OrderStep* steps;  // their orders have the product K; null for K = 1
  std::size_t step_count;
  const float* signs;     // null: none
  std::size_t sign_step;  // from the signs of one block to those of the next: 0 or the block size
  bool transpose;
  double scale;
  void* scratch;  // as scratch_layout says
};

// Float values to 8 bits: byte = saturate(round(x * factor) + zero_point), to nearest even, between `low` and `high`;
// a NaN becomes `high`, or with its sign bit set `low`.
struct QuantizeJob {
  const float* in;
  void* out;
  std::size_t rows;
  std::size_t count;     // of a row; rows are adjacent
  const float* factors;  // of each row; null: 1
  std::int32_t zero_point;
  std::int32_t low;
  std::int32_t high;
  bool within;  // the zero point is 0, and no x * factor is a NaN or rounds to anything outside -127 ... 127
};

// Adjacent rows of n = 2^m floats, at least a vector, transformed without any scale; and the largest magnitude of each,
// as by `largest`.
struct MeasureJob {
  const float* in;
  float* values;
  float* largest;
  std::size_t rows;
  std::size_t n;
};

struct TypeKernels {
  void (*rows)(const Job&);
  // `count` adjacent rows of n = 2^m elements, at least a vector and, computed in another type, at most kTwoRowsBytes
  // of that: what short calls are made of, without a Job's cost.
  void (*powers)(const void* in, void* out, std::size_t count, std::size_t n, double scale);
  // `count` adjacent elements to float64 and back, rounded once.
  void (*widen)(const void* from, double* to, std::size_t count);
  void (*narrow)(const double* from, void* to, std::size_t count);
};

struct Kernels {
  const char* name;
  std::size_t vector_bytes;
  TypeKernels types[4];  // by DType
  void (*quantize)(const QuantizeJob&);
  float (*largest)(const float* values, std::size_t count);  // largest magnitude; NaN if there is one
  void (*measure_powers)(const MeasureJob&);
};

extern const Kernels baseline_kernels;
extern const Kernels avx2_kernels, avx2_turns_kernels, avx2_fused_kernels;  // the same results; see CpuFeatures
extern const Kernels avx512_kernels;
extern const TypeKernels avx512_bfloat16_kernels;  // in place of those for bfloat16, where the CPU converts to it
extern const Kernels neon_kernels;

// The kernels in use, or those called `name`. Both throw std::invalid_argument.
const Kernels& active_kernels();
const Kernels& find_kernels(const char* name);

}  // namespace onnx_quarot

#endif
