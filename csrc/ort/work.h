// What the operators that share out work in tasks have in common: running them, room for them, and shapes in messages.
#ifndef ONNX_QUAROT_ORT_WORK_H
#define ONNX_QUAROT_ORT_WORK_H

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "abi.h"
#include "status.h"

namespace onnx_quarot::ort {

inline std::string text_of(const std::vector<std::int64_t>& dims) {
  std::string joined;
  for (const std::int64_t dim : dims) joined += (joined.empty() ? "" : ", ") + std::to_string(dim);
  return "[" + joined + "]";
}

// Runs task(i) for i in [0, total) on the session's threads; the first failure is thrown.
template <class Task>
void parallel(const Api* api, const KernelContext* context, std::size_t total, const Task& task) {
  if (total == 1) return task(0);
  struct Work {
    const Api* api;
    const Task& task;
    std::vector<Status*> failures;  // one a task, so that no two threads write to the same one
  } work{api, task, std::vector<Status*>(total, nullptr)};
  Status* status = KernelContext_ParallelFor(
      api, context,
      [](void* data, std::size_t i) {
        auto& job = *static_cast<Work*>(data);
        job.failures[i] = guarded(job.api, [&] { job.task(i); });
      },
      total, 0, &work);
  for (Status* failure : work.failures) {
    if (failure == nullptr) continue;
    if (status == nullptr) {
      status = failure;
    } else {
      ReleaseStatus(api, failure);
    }
  }
  check(api, status);
}

// Room for rows: on a boundary of cache lines, where the transform is fastest, and not cleared. A little is on the
// stack, as a decoded token needs no more.
class AlignedFloats {
 public:
  explicit AlignedFloats(std::size_t count)
      : floats_(count <= kLocal ? nullptr : static_cast<float*>(::operator new[](count * sizeof(float), kAlignment))) {}
  float* data() { return floats_ ? floats_.get() : local_; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  static constexpr std::size_t kLocal = 4096;
  struct Delete {
    void operator()(float* floats) const { ::operator delete[](floats, kAlignment); }
  };
  std::unique_ptr<float[], Delete> floats_;
  alignas(64) float local_[kLocal];
};

}  // namespace onnx_quarot::ort

#endif
