// Transforms whose result is quantized at once, while it is in first-level cache.
#include <algorithm>
#include <cmath>
#include <memory>
#include <new>

#include "fwht.h"
#include "kernels.h"
#include "scratch.h"

namespace onnx_quarot {
namespace {

// Rows transformed together before they are quantized.
constexpr std::size_t kBatchBytes = 16384;

struct AlignedDelete {
  void operator()(float* p) const { ::operator delete[](p, std::align_val_t{kScratchAlignment}); }
};

constexpr float kSmallest = 0x1p-100f;

}  // namespace

// Calls batch(row, rows, values) for batches of transformed rows.
template <class Batch>
void Transform::in_batches(const float* in, std::size_t first, std::size_t count, const float* signs,
                           Batch batch) const {
  if (dtype_ != DType::float32) throw std::invalid_argument("only float32 can be quantized");
  const std::size_t together = std::max<std::size_t>(1, kBatchBytes / sizeof(float) / size_);
  alignas(kScratchAlignment) float local[kBatchBytes / sizeof(float)];
  std::unique_ptr<float[], AlignedDelete> heap;
  float* values = local;
  if (together * size_ * sizeof(float) > sizeof(local)) {
    heap.reset(static_cast<float*>(::operator new[](size_ * sizeof(float), std::align_val_t{kScratchAlignment})));
    values = heap.get();
  }
  const auto stride = static_cast<std::ptrdiff_t>(size_);
  for (std::size_t row = first; row < first + count; row += together) {
    const std::size_t some = std::min(together, first + count - row);
    rows(in + row * size_, values, some, stride, stride, signs);
    batch(row, some, values);
  }
}

void Transform::quantize(const float* in, void* out, std::size_t first, std::size_t count, const float* signs,
                         QuantizedType type, std::int32_t zero_point) const {
  const std::int32_t low = type == QuantizedType::int8 ? -128 : 0;
  in_batches(in, first, count, signs, [&](std::size_t row, std::size_t some, const float* values) {
    kernels_->quantize(
        {values, static_cast<unsigned char*>(out) + row * size_, some * size_, 1.0f, zero_point, low, low + 255});
  });
}

void Transform::quantize_dynamic(const float* in, std::int8_t* out, float* scales, std::size_t first, std::size_t count,
                                 const float* signs) const {
  in_batches(in, first, count, signs, [&](std::size_t row, std::size_t some, const float* values) {
    for (std::size_t i = 0; i < some; ++i) {
      const float* from = values + i * size_;
      const float most = kernels_->largest(from, size_);
      const bool zero = most < kSmallest;
      scales[row + i] = zero ? 1.0f : most / 127.0f;
      kernels_->quantize({from, out + (row + i) * size_, size_, zero ? 0.0f : 127.0f / most, 0, -127, 127});
    }
  });
}

}  // namespace onnx_quarot
