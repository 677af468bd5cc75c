// Walsh-Hadamard transforms of the last axis: the whole C++ interface of the kernel.
//
// A block of n = K 2^m values is multiplied, as a row vector, by H_n = H_K (x) H_{2^m}, where H_{2^m} is Sylvester's
// matrix and H_K the matrix of orders.h: K = 1, or an order with the odd part of n, itself a product of small ones
// where n has the twos for it. The matrix depends on n alone: not on the type, the CPU or the build.
#ifndef ONNX_QUAROT_FWHT_H
#define ONNX_QUAROT_FWHT_H

#include <cstddef>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

namespace onnx_quarot {

enum class DType : std::uint8_t { float32, float16, bfloat16, float64 };

enum class QuantizedType : std::uint8_t { int8, uint8 };

// Bytes of one element.
std::size_t element_size(DType dtype);

// Thrown where a size has no Hadamard matrix here; every other bad argument is a plain std::invalid_argument.
class UnsupportedOrder : public std::invalid_argument {
 public:
  using std::invalid_argument::invalid_argument;
};

struct TransformSpec {
  DType dtype = DType::float32;
  std::size_t size = 0;         // length of the last axis
  std::size_t block_size = 0;   // the axis is cut in pieces of this length; 0: one piece
  bool transpose = false;       // multiply by the transposed matrix, and apply the signs last: the inverse
  std::optional<double> scale;  // 1/sqrt(block size) when absent, which makes the transform orthonormal
  std::size_t signs_length =
      0;            // 0: no signs; block_size: the same signs for each block; size: signs for the whole axis
  std::string isa;  // kernel by name, for tests; empty: the one in use (see active_isa)
};

struct Kernels;
struct Order;

// A validated transform of rows. Immutable, cheap to make (no allocation once an order has been used) and safe to share
// between threads.
class Transform {
 public:
  // Throws UnsupportedOrder or std::invalid_argument, with a message naming the argument, the value and the rule.
  explicit Transform(const TransformSpec& spec);

  // Transforms `rows` rows of `size` elements.
  //   in, out     aligned to their element; either the same rows (in == out with equal strides: in place) or disjoint
  //   strides     distance between rows, in elements; the elements of one row are adjacent
  //   signs       signs_length values, +1 or -1 (any other value is simply a factor); null iff signs_length is 0
  // y = (x * signs) H scale, or with transpose y = (x H^T scale) * signs. float16 and bfloat16 are computed in float32
  // and rounded once, to nearest even; on CPUs with AVX-512 BF16, bfloat16 of magnitude below 2^-126 may count as zero.
  // Allocates at most one scratch buffer a call.
  void rows(const void* in, void* out, std::size_t rows, std::ptrdiff_t in_stride, std::ptrdiff_t out_stride,
            const float* signs) const;

  // The same for adjacent rows [first, first + count) of whole arrays: the unit of work of a thread pool.
  void range(const void* in, void* out, std::size_t first, std::size_t count, const float* signs) const;

  // Rows of float32 transformed and quantized to 8 bits, both on adjacent rows [first, first + count) of whole arrays;
  // `out` shares no memory with `in`. dtype() must be float32. Allocates at most two scratch buffers a call.
  //   quantize          y = saturate(round(t) + zero_point), where t is the transform: make it with the scale divided
  //                     by the quantization scale. Rounds to nearest even; a NaN becomes the largest or, with its sign
  //                     bit set, the smallest value.
  //   quantize_dynamic  each row by its own scale: scales[row] = max |t| / 127, y = round(t / scales[row]). A row with
  //                     no magnitude of 2^-100 or more, before or after scaling, has scale 1 and zeros; an infinity or
  //                     a NaN shows in the scale.
  void quantize(const float* in, void* out, std::size_t first, std::size_t count, const float* signs,
                QuantizedType type, std::int32_t zero_point) const;
  void quantize_dynamic(const float* in, std::int8_t* out, float* scales, std::size_t first, std::size_t count,
                        const float* signs) const;

  DType dtype() const { return dtype_; }
  std::size_t size() const { return size_; }
  std::size_t block_size() const { return block_; }
  std::size_t signs_length() const { return signs_length_; }

 private:
  std::size_t compute_size() const { return dtype_ == DType::float64 ? sizeof(double) : sizeof(float); }
  void run(const void* in, void* out, std::size_t rows, std::ptrdiff_t in_stride, std::ptrdiff_t out_stride,
           const float* signs) const;
  bool plain_power() const;  // one power of two, without signs, of a vector or more: what has short ways

  DType dtype_;
  bool transpose_;
  std::size_t size_;
  std::size_t block_;
  std::size_t signs_length_;
  std::size_t power_;   // 2^m
  const Order* order_;  // null for K = 1
  double scale_;
  const Kernels* kernels_;
};

struct Factors {
  std::size_t order;    // K
  unsigned log2_power;  // m
};

// n = K 2^m as used for H_n. Throws UnsupportedOrder.
Factors factorize(std::size_t n);
bool has_order(std::size_t n);

// Names of the kernels this CPU can run, fastest first ("avx512", "avx2", "neon", "baseline").
std::vector<std::string> available_isas();
// The kernel in use: the fastest one, or the one the environment variable ONNX_QUAROT_ISA names, read once. Throws
// std::invalid_argument when that names none, or one this CPU cannot run.
std::string active_isa();

}  // namespace onnx_quarot

#endif
