// Linear layers in integers: Y = dequantize(quantize_rows(X) . W) + bias, with W packed as below.
//
// Letters: M rows of X, K features of X, N outputs.
// Activations are quantized per row, symmetrically: scale = max|x| / 127, q = round(x * (127 / max|x|)), half to even.
// A row without values of 1e-30 or more counts as zeros; a row with a NaN or an infinity gives NaN and leaves its
// neighbours alone. Products are exact: no sum saturates, and with K <= kMaxDepth none overflows, so that every
// instruction set gives the same bits.
#ifndef ONNX_QUAROT_QLINEAR_H
#define ONNX_QUAROT_QLINEAR_H

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace onnx_quarot {

// Packed weights, layout version 1. Panels of 16 outputs (the last one filled with zeros), in each panel steps of the
// depth (the last one too): a panel is read from its beginning to its end. A panel's step is 64 bytes:
//   8 bits  [16 outputs][4 features]   value + 128; a step is 4 features
//   4 bits  [16 outputs][4 bytes]      value + 8 in 0..15; a step is 8 features: byte j holds feature j in its lower
//                                      half and feature 4 + j in its upper one
// 8-bit values lie in -127..127, with one scale an output. 4-bit ones lie in -8..7, with one scale an output and block
// of `block` features, stored as [panels][blocks][16], float32; blocks are whole, filled with zeros.
// 4-bit weights may have a zero point an output and block, 0..15: values are then code - zero point instead of code
// - 8. They are stored as [panels][blocks][8]: byte j holds that of output j in its lower half and of output 8 + j in
// its upper one.
constexpr std::int64_t kPackedLayout = 1;
constexpr std::size_t kPanelColumns = 16;
constexpr std::size_t kStepBytes = 64;
// 127 * 127 * K stays below 2^31.
constexpr std::size_t kMaxDepth = 131072;

struct QLinearShape {
  std::size_t depth = 0;     // K
  std::size_t columns = 0;   // N
  std::size_t bits = 8;      // 8 or 4
  std::size_t block = 0;     // 4 bits: 32, 64 or 128
  bool zero_points = false;  // 4 bits: whether weights have them

  std::size_t panels() const { return (columns + kPanelColumns - 1) / kPanelColumns; }
  std::size_t blocks() const { return bits == 4 ? (depth + block - 1) / block : 1; }
  // Steps of four features, those that fill the last block included.
  std::size_t steps() const { return bits == 4 ? blocks() * block / 4 : (depth + 3) / 4; }
  std::size_t panel_bytes() const { return steps() * kStepBytes * bits / 8; }
};

// Throws std::invalid_argument, with a message that names the argument, the value and the rule.
void check_shape(const QLinearShape& shape);

struct QLinearKernels;

// Packed weights, and what their integers are worth: laid out as above.
struct PackedWeights {
  const std::uint8_t* codes;
  const float* scales;                        // [N], or of blocks
  const std::uint8_t* zero_points = nullptr;  // of blocks, where the shape has them
};

// Where products of some columns of the weights go, float32.
struct QLinearOutput {
  float* y;                     // row 0
  std::size_t stride;           // from row to row, in elements, as below
  std::size_t column = 0;       // of the weights, where y begins: a multiple of 16
  const float* bias = nullptr;  // null: none; of the weights' column 0
  std::size_t bias_stride = 0;  // 0: every row has the same
  // Panels come in pairs, a and b, of which silu(a) * b is written; panels are multiplied in whole pairs. silu(x) =
  // x / (1 + exp(-x)).
  bool gated = false;
};

// Rows in integers, as the kernels in use want them.
class QuantizedRows {
 public:
  QuantizedRows(const QLinearKernels& kernels, const QLinearShape& shape, std::size_t rows);
  QuantizedRows(const QuantizedRows&) = delete;
  QuantizedRows& operator=(const QuantizedRows&) = delete;

  // Quantizes row `index`, of shape.depth values, times a positive factor. Different rows may be set on different
  // threads.
  void set(std::size_t index, const float* values, float factor = 1);

  std::size_t count() const { return count_; }

 private:
  friend void multiply(const QuantizedRows&, std::size_t, std::size_t, const PackedWeights&, const QLinearOutput&,
                       std::size_t, std::size_t);
  const QLinearKernels* kernels_;
  QLinearShape shape_;
  std::size_t count_;
  std::size_t row_bytes_;
  std::uint8_t* values_;
  std::int32_t* corrections_;  // [count][blocks]: what sums start from, or what zero points count
  float* scales_;
  // All of them: here if they are few, else elsewhere. No vector, which would clear what is written right after.
  std::unique_ptr<std::uint8_t[]> heap_;
  alignas(64) std::uint8_t local_[8192];
};

// 1 / sqrt(mean of squares + epsilon): what a row is multiplied by when it is normalized. The same bits on every CPU.
float norm_factor(const QLinearKernels& kernels, const float* values, std::size_t depth, float epsilon);

// Rows [first, end) times panels [first_panel, end_panel) of the packed weights, which are those of `output`. Only
// these rows and columns of y are written; all is aligned to its elements.
void multiply(const QuantizedRows& rows, std::size_t first, std::size_t end, const PackedWeights& weights,
              const QLinearOutput& output, std::size_t first_panel, std::size_t end_panel);

// The kernels in use: the fastest this CPU runs within what ONNX_QUAROT_ISA allows. Or those called `isa`, for tests.
const QLinearKernels& qlinear_kernels();
const QLinearKernels& qlinear_kernels(const std::string& isa);
// Names of the kernels this CPU can run, fastest first.
std::vector<std::string> qlinear_isas();
std::string qlinear_isa();

}  // namespace onnx_quarot

#endif
