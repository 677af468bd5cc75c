#include "fwht.h"

#include <cmath>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <numeric>

#include "kernels.h"
#include "orders.h"
#include "scratch.h"

namespace onnx_quarot {
namespace {

unsigned log2_of(std::size_t power_of_two) {
  unsigned log2 = 0;
  for (; power_of_two > 1; power_of_two /= 2) ++log2;
  return log2;
}

std::string number(std::size_t value) { return std::to_string(value); }

// Scratch of ordinary sizes lives on the stack: a malloc would be a large part of a short call.
constexpr std::size_t kStackScratch = 65536;

struct AlignedDelete {
  void operator()(unsigned char* p) const { ::operator delete[](p, std::align_val_t{kScratchAlignment}); }
};

}  // namespace

std::size_t element_size(DType dtype) {
  switch (dtype) {
    case DType::float16:
    case DType::bfloat16:
      return 2;
    case DType::float64:
      return 8;
    case DType::float32:
      break;
  }
  return 4;
}

namespace {

// Columns that fill the vectors of every CPU. A row with a smaller power of two leaves the rest of them empty.
constexpr unsigned kVectorLog2Columns = 4;

Factors find_factors(std::size_t n) {
  std::size_t odd = n;
  unsigned twos = 0;
  for (; odd % 2 == 0; odd /= 2) ++twos;
  // The orders with the smallest sum: a step costs about as many additions an element as its order has fours.
  std::size_t best = 0, best_sum = 0;
  for (unsigned used = 2; used <= twos; ++used) {
    const std::vector<std::size_t> orders = order_factors(odd << used);
    if (orders.empty()) continue;
    std::size_t sum = std::accumulate(orders.begin(), orders.end(), std::size_t{0});
    if (orders.size() > 1 && used + kVectorLog2Columns > twos) sum <<= used + kVectorLog2Columns - twos;
    if (best == 0 || sum < best_sum) {
      best = odd << used;
      best_sum = sum;
    }
  }
  if (best != 0) return {best, static_cast<unsigned>(twos - log2_of(best / odd))};
  throw UnsupportedOrder("size " + number(n) + " = " + number(odd) + " * 2^" + std::to_string(twos) +
                         " has no Hadamard matrix here: it must be K * 2^m for a supported order K; a block_size that "
                         "divides it can be used instead");
}

}  // namespace

Factors factorize(std::size_t n) {
  if (n == 0) throw UnsupportedOrder("size 0 has no Hadamard matrix: it must be at least 1");
  if ((n & (n - 1)) == 0) return {1, log2_of(n)};
  static std::mutex mutex;
  static std::map<std::size_t, Factors> found;
  const std::lock_guard<std::mutex> lock(mutex);
  auto entry = found.find(n);
  if (entry == found.end()) entry = found.emplace(n, find_factors(n)).first;
  return entry->second;
}

bool has_order(std::size_t n) {
  try {
    factorize(n);
    return true;
  } catch (const UnsupportedOrder&) {
    return false;
  }
}

Transform::Transform(const TransformSpec& spec)
    : dtype_(spec.dtype),
      transpose_(spec.transpose),
      size_(spec.size),
      block_(spec.block_size == 0 ? spec.size : spec.block_size),
      signs_length_(spec.signs_length),
      power_(0),
      order_(nullptr),
      scale_(0),
      kernels_(spec.isa.empty() ? &active_kernels() : &find_kernels(spec.isa.c_str())) {
  if (size_ == 0) throw std::invalid_argument("the last axis has length 0: it must be at least 1");
  if (size_ % block_ != 0) {
    throw std::invalid_argument("block_size is " + number(block_) + ": it must divide the last axis, of length " +
                                number(size_));
  }
  if (signs_length_ != 0 && signs_length_ != block_ && signs_length_ != size_) {
    throw std::invalid_argument("signs has length " + number(signs_length_) + ": it must be the block size (" +
                                number(block_) + ") or the last axis (" + number(size_) + ")");
  }
  const Factors factors = factorize(block_);
  power_ = std::size_t{1} << factors.log2_power;
  if (factors.order > 1) order_ = &order(factors.order);
  scale_ = spec.scale.value_or(1.0 / std::sqrt(static_cast<double>(block_)));
  if (!std::isfinite(scale_)) throw std::invalid_argument("scale is " + std::to_string(scale_) + ": it must be finite");
}

bool Transform::plain_power() const {
  return order_ == nullptr && block_ == size_ && signs_length_ == 0 && size_ * compute_size() >= kernels_->vector_bytes;
}

void Transform::rows(const void* in, void* out, std::size_t rows, std::ptrdiff_t in_stride, std::ptrdiff_t out_stride,
                     const float* signs) const {
  if ((signs != nullptr) != (signs_length_ != 0)) {
    throw std::invalid_argument("signs: given if and only if the transform was made with a signs_length");
  }
  if (rows == 0) return;
  const auto row = static_cast<std::ptrdiff_t>(size_);
  const std::size_t compute_bytes = size_ * compute_size();
  if (plain_power() && (compute_bytes <= kTwoRowsBytes || compute_size() == element_size(dtype_)) &&
      (rows == 1 || (in_stride == row && out_stride == row))) {
    return kernels_->types[static_cast<std::size_t>(dtype_)].powers(in, out, rows, size_, scale_);
  }
  run(in, out, rows, in_stride, out_stride, signs);
}

// Any call: in a function of its own, whose stack frame is large.
void Transform::run(const void* in, void* out, std::size_t rows, std::ptrdiff_t in_stride, std::ptrdiff_t out_stride,
                    const float* signs) const {
  Job job{};
  job.in = in;
  job.out = out;
  job.rows = rows;
  job.blocks = size_ / block_;
  job.in_stride = in_stride;
  job.out_stride = out_stride;
  job.order = order_ == nullptr ? 1 : order_->k;
  job.power = power_;
  if (order_ != nullptr) {
    job.steps = transpose_ ? order_->steps_transposed.data() : order_->steps.data();
    job.step_count = order_->steps.size();
  }
  job.signs = signs;
  job.sign_step = signs_length_ == size_ ? block_ : 0;
  job.transpose = transpose_;
  job.scale = scale_;

  const std::size_t needed = scratch_layout(job, element_size(dtype_), compute_size(), kernels_->vector_bytes).total;
  alignas(kScratchAlignment) unsigned char local[kStackScratch];
  std::unique_ptr<unsigned char[], AlignedDelete> heap;
  job.scratch = local;
  if (needed > sizeof(local)) {
    heap.reset(static_cast<unsigned char*>(::operator new[](needed, std::align_val_t{kScratchAlignment})));
    job.scratch = heap.get();
  }
  kernels_->types[static_cast<std::size_t>(dtype_)].rows(job);
}

void Transform::range(const void* in, void* out, std::size_t first, std::size_t count, const float* signs) const {
  const std::size_t offset = first * size_ * element_size(dtype_);
  const auto stride = static_cast<std::ptrdiff_t>(size_);
  rows(static_cast<const unsigned char*>(in) + offset, static_cast<unsigned char*>(out) + offset, count, stride, stride,
       signs);
}

}  // namespace onnx_quarot
