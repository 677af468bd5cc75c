#include "qlinear.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <stdexcept>

#include "cpu.h"
#include "fwht.h"
#include "kernels.h"

namespace onnx_quarot {
namespace {

// What 4-bit weights without zero points are too large by.
constexpr std::int32_t kOffset4 = 8;

struct Candidate {
  const QLinearKernels* kernels;
  bool runs;
  const char* isa;  // the value of ONNX_QUAROT_ISA that allows it, of those before it and itself the narrowest
};

const std::vector<Candidate>& candidates() {
  static const std::vector<Candidate> found = [] {
    std::vector<Candidate> all;
    [[maybe_unused]] const CpuFeatures cpu = detect_cpu();
#if defined(__x86_64__)
    all.push_back({&qlinear_avx512vnni, cpu.avx512vnni, "avx512"});
    all.push_back({&qlinear_avxvnni, cpu.avxvnni, "avxvnni"});
    all.push_back({&qlinear_avx2, cpu.avx2, "avx2"});
#elif defined(ONNX_QUAROT_QLINEAR_NEON)
    all.push_back({&qlinear_neon, cpu.neon_dot, "neon"});
#endif
    all.push_back({&qlinear_baseline, true, "baseline"});
    return all;
  }();
  return found;
}

const QLinearKernels& choose() {
  const char* forced = std::getenv("ONNX_QUAROT_ISA");
  const std::string limit = forced == nullptr ? "" : forced;
  if (!limit.empty()) active_isa();  // which checks the name
  bool allowed = limit.empty();
  for (const Candidate& candidate : candidates()) {
    allowed = allowed || limit == candidate.isa;
    if (allowed && candidate.runs) return *candidate.kernels;
  }
  return qlinear_baseline;
}

}  // namespace

void check_shape(const QLinearShape& shape) {
  if (shape.depth < 1 || shape.depth > kMaxDepth) {
    throw std::invalid_argument("K is " + std::to_string(shape.depth) + ": it must be 1 to " +
                                std::to_string(kMaxDepth));
  }
  if (shape.columns < 1) throw std::invalid_argument("N is 0: it must be at least 1");
  if (shape.bits != 8 && shape.bits != 4) {
    throw std::invalid_argument("bits is " + std::to_string(shape.bits) + ": it must be 8 or 4");
  }
  if (shape.bits == 4 && shape.block != 32 && shape.block != 64 && shape.block != 128) {
    throw std::invalid_argument("block is " + std::to_string(shape.block) + ": it must be 32, 64 or 128");
  }
  if (shape.bits != 4 && shape.zero_points) {
    throw std::invalid_argument("zero_points are given with bits " + std::to_string(shape.bits) +
                                ": only weights of 4 bits have them");
  }
}

QuantizedRows::QuantizedRows(const QLinearKernels& kernels, const QLinearShape& shape, std::size_t rows)
    : kernels_(&kernels), shape_(shape), count_(rows) {
  // Rows a power of two apart would fall into the same few cache sets.
  row_bytes_ = shape.steps() * kStepValues + kRowPadding;
  if (shape.bits == 8 && kernels.has_excess) row_bytes_ += excess_bytes(shape.steps());
  static_assert(kRowPadding % alignof(std::int32_t) == 0, "what follows the rows is aligned");
  const std::size_t values = rows * row_bytes_, numbers = rows * (shape.blocks() + 1);
  if (values + numbers * sizeof(float) > sizeof(local_)) {
    heap_.reset(new std::uint8_t[values + numbers * sizeof(float)]);
  }
  values_ = heap_ ? heap_.get() : local_;
  corrections_ = reinterpret_cast<std::int32_t*>(values_ + values);
  scales_ = reinterpret_cast<float*>(corrections_ + rows * shape.blocks());
}

void QuantizedRows::set(std::size_t index, const float* values, float factor) {
  const std::uint32_t largest = kernels_->peak_bits(values, shape_.depth);
  const bool finite = largest < 0x7f800000u;
  float peak = 0;
  std::memcpy(&peak, &largest, sizeof(peak));
  if (peak < 1e-30f) peak = 1e-30f;
  std::uint8_t* out = values_ + index * row_bytes_;
  std::int32_t* corrections = corrections_ + index * shape_.blocks();
  if (!finite) {
    scales_[index] = std::numeric_limits<float>::quiet_NaN();
    std::memset(out, 0, row_bytes_);
    std::memset(corrections, 0, shape_.blocks() * sizeof(*corrections));
    return;
  }
  scales_[index] = peak / 127.0f * factor;
  // Zero points are an offset that differs from output to output: sums are multiplied by them later.
  const std::int32_t offset = shape_.bits == 8 ? kernels_->offset8 : shape_.zero_points ? 1 : kOffset4;
  const QuantizeJob job{values,        shape_.depth, shape_.steps(), shape_.steps() / shape_.blocks(),
                        127.0f / peak, out,          corrections,    offset};
  (shape_.bits == 4 ? kernels_->quantize4 : kernels_->quantize8)(job);
}

float norm_factor(const QLinearKernels& kernels, const float* values, std::size_t depth, float epsilon) {
  return 1.0f / std::sqrt(kernels.sum_squares(values, depth) / static_cast<float>(depth) + epsilon);
}

void multiply(const QuantizedRows& rows, std::size_t first, std::size_t end, const PackedWeights& weights,
              const QLinearOutput& output, std::size_t first_panel, std::size_t end_panel) {
  static const bool several_streams = detect_cpu().several_streams;  // cpuid takes microseconds on a virtual machine
  const QLinearShape& shape = rows.shape_;
  const auto run = [&](std::size_t row, std::size_t row_end, std::size_t panel, std::size_t panel_end, float* y,
                       std::size_t stride) {
    const std::size_t column = panel * kPanelColumns;
    MultiplyJob job{};
    job.values = rows.values_ + row * rows.row_bytes_;
    job.row_bytes = rows.row_bytes_;
    job.corrections = rows.corrections_ + row * shape.blocks();
    job.row_scales = rows.scales_ + row;
    job.rows = row_end - row;
    job.weights = weights.codes + panel * shape.panel_bytes();
    job.panel_bytes = shape.panel_bytes();
    job.steps = shape.steps();
    job.block_steps = shape.steps() / shape.blocks();
    job.scales = weights.scales + column * shape.blocks();
    job.zero_points = shape.zero_points ? weights.zero_points + column / 2 * shape.blocks() : nullptr;
    job.bias = output.bias == nullptr ? nullptr : output.bias + row * output.bias_stride + column;
    job.bias_stride = output.bias_stride;
    job.y = y;
    job.y_stride = stride;
    job.columns = std::min(panel_end * kPanelColumns, shape.columns) - column;
    job.reach = shape.columns - column;
    job.several_streams = several_streams;
    (shape.bits == 4 ? rows.kernels_->multiply4 : rows.kernels_->multiply8)(job);
  };
  if (!output.gated) {
    const std::size_t column = first_panel * kPanelColumns - output.column;
    return run(first, end, first_panel, end_panel, output.y + first * output.stride + column, output.stride);
  }
  // Both sides of a gate meet in the second cache.
  constexpr std::size_t most_rows = 256, room = most_rows * 4 * kPanelColumns;
  alignas(64) float sides[room];
  for (std::size_t row = first; row < end; row += most_rows) {
    const std::size_t row_end = std::min(end, row + most_rows);
    const std::size_t width = room / (row_end - row) / (4 * kPanelColumns) * 4;
    for (std::size_t panel = first_panel; panel < end_panel; panel += width) {
      const std::size_t count = std::min(width, end_panel - panel), stride = count * kPanelColumns;
      run(row, row_end, panel, panel + count, sides, stride);
      float* y = output.y + row * output.stride + (panel * kPanelColumns - output.column) / 2;
      for (std::size_t r = 0; r < row_end - row; ++r) {
        rows.kernels_->gate(sides + r * stride, count / 2, y + r * output.stride);
      }
    }
  }
}

void attend(const AttendJob& job) { qlinear_kernels().attend(job); }

void turn(const TurnJob& job) { qlinear_kernels().turn(job); }

const QLinearKernels& qlinear_kernels() {
  static const QLinearKernels& chosen = choose();
  return chosen;
}

const QLinearKernels& qlinear_kernels(const std::string& isa) {
  for (const Candidate& candidate : candidates()) {
    if (isa == candidate.kernels->name && candidate.runs) return *candidate.kernels;
  }
  throw std::invalid_argument("isa is '" + isa + "', which this build or this CPU does not have");
}

std::vector<std::string> qlinear_isas() {
  std::vector<std::string> names;
  for (const Candidate& candidate : candidates()) {
    if (candidate.runs) names.emplace_back(candidate.kernels->name);
  }
  return names;
}

std::string qlinear_isa() { return qlinear_kernels().name; }

}  // namespace onnx_quarot
