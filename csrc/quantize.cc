// Transforms whose result is quantized at once, while it is in registers or first-level cache.
#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <new>

#include "fwht.h"
#include "kernels.h"
#include "scratch.h"

namespace onnx_quarot {
namespace {

// Rows transformed together before they are quantized.
constexpr std::size_t kBatchBytes = 16384;
constexpr std::size_t kBatchRows = 64;

struct AlignedDelete {
  void operator()(float* p) const { ::operator delete[](p, std::align_val_t{kScratchAlignment}); }
};

// Memory for values: on the stack where a batch is enough.
class Values {
 public:
  explicit Values(std::size_t count) {
    if (count * sizeof(float) <= sizeof(local_)) return;
    heap_.reset(static_cast<float*>(::operator new[](count * sizeof(float), std::align_val_t{kScratchAlignment})));
  }
  float* data() { return heap_ ? heap_.get() : local_; }

 private:
  alignas(kScratchAlignment) float local_[kBatchBytes / sizeof(float)];
  std::unique_ptr<float[], AlignedDelete> heap_;
};

constexpr float kSmallest = 0x1p-100f;

}  // namespace

void Transform::quantize(const float* in, void* out, std::size_t first, std::size_t count, const float* signs,
                         QuantizedType type, std::int32_t zero_point) const {
  if (dtype_ != DType::float32) throw std::invalid_argument("only float32 can be quantized");
  const std::int32_t low = type == QuantizedType::int8 ? -128 : 0;
  const std::size_t together = std::max<std::size_t>(1, kBatchBytes / sizeof(float) / size_);
  Values values(together * size_);
  const auto stride = static_cast<std::ptrdiff_t>(size_);
  for (std::size_t row = first; row < first + count; row += together) {
    const std::size_t some = std::min(together, first + count - row);
    rows(in + row * size_, values.data(), some, stride, stride, signs);
    kernels_->quantize({values.data(), static_cast<unsigned char*>(out) + row * size_, 1, some * size_, nullptr,
                        zero_point, low, low + 255, false});
  }
}

void Transform::quantize_dynamic(const float* in, std::int8_t* out, float* scales, std::size_t first, std::size_t count,
                                 const float* signs) const {
  if (dtype_ != DType::float32) throw std::invalid_argument("only float32 can be quantized");
  const std::size_t together = std::clamp<std::size_t>(kBatchBytes / sizeof(float) / size_, 1, kBatchRows);
  Values values(together * size_);
  const auto stride = static_cast<std::ptrdiff_t>(size_);
  for (std::size_t row = first; row < first + count; row += together) {
    const std::size_t some = std::min(together, first + count - row);
    float largest[kBatchRows], factors[kBatchRows];
    float left = 1.0f;  // what the values are yet to be multiplied by
    if (plain_power() && signs == nullptr) {
      kernels_->measure_powers({in + row * size_, values.data(), largest, some, size_});
      left = static_cast<float>(scale_);
    } else {
      rows(in + row * size_, values.data(), some, stride, stride, signs);
      for (std::size_t i = 0; i < some; ++i) largest[i] = kernels_->largest(values.data() + i * size_, size_);
    }
    // A loop of its own and without branches, so that several rows are divided at once.
    const float steps = std::copysign(127.0f, left);
    int finite = 1;
    for (std::size_t i = 0; i < some; ++i) {
      const float scaled = std::fabs(largest[i] * left), scale = scaled / 127.0f, factor = steps / largest[i];
      const bool none = (largest[i] < kSmallest) | (scaled < kSmallest);
      scales[row + i] = none ? 1.0f : scale;
      factors[i] = none ? 0.0f : factor;
      finite &= largest[i] <= std::numeric_limits<float>::max() ? 1 : 0;
    }
    kernels_->quantize({values.data(), out + row * size_, some, size_, factors, 0, -127, 127, finite != 0});
  }
}

}  // namespace onnx_quarot
