// The kernels of QLinear, written once on a struct `Isa` that the including file defines:
//
//   lanes                        columns in a vector
//   rows, panels                 of a tile of many rows: rows x (16 * panels) sums in registers
//   rows4, panels4               the same for 4 bits
//   most_rows                    that panels are multiplied by at a time, in the second cache: they bound the sums kept
//                                between blocks of the depth
//   row_panels8, row_panels4     panels that a single row reads side by side where
//   side_by_side8, side_by_side4 (a job) says so
//   row_tile4                    of row_panels4, how many are multiplied at a time, by turns, unless upper_halves
//   fetches_row                  whether a single row asks for weights ahead
//   upper_halves                 whether dot4 takes bytes that hold a feature in their upper half alone
//   quick_sums                   whether sums wait for additions alone, not for products
//   offset8                      what packed weights are too large by, as the products see them
//   has_excess                   whether rows beside 8-bit weights have an excess
//   Int, Float                   vectors of 32-bit integers and floats
//   quantize8, quantize4         see QuantizeJob
//   Weights, Values              operands: weights(bytes, vector), values(bytes)
//   dot8(sum, weights, values)   sum += products
//   Part, nibbles(...), dot4(part, ...), flush(sum, part)   the same for 4 bits; a Part takes 32 features
//   multiply_add(a, b, sum)      a * b + sum, rounded once on CPUs with fused multiply-adds
//   wide_bytes(bytes)            as many bytes as lanes as 32-bit integers; of 16 lanes the last 8 are as the first 8
//
// Everything has internal linkage. Other products and sums are not contracted: results of QLinear are the same bits
// everywhere, those of attention wherever multiply_add is fused.
#include "attention-inl.h"
#include "product4-inl.h"
#include "product8-inl.h"

#define ONNX_QUAROT_QLINEAR_KERNELS(symbol, name)                                            \
  namespace onnx_quarot {                                                                    \
  const QLinearKernels symbol = {                                                            \
      name,           Isa::has_excess, Isa::offset8, peak_bits, sum_squares,    gate,        \
      Isa::quantize8, quantize_bytes,  multiply8,    multiply4, attend_queries, turn_pairs}; \
  }
