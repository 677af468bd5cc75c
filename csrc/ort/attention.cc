#include "attention.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include "node.h"
#include "operator.h"
#include "qlinear/attention.h"
#include "qlinear/qlinear.h"
#include "status.h"
#include "work.h"

namespace onnx_quarot::ort {
namespace {

constexpr std::size_t kInputs = 9;
enum Input : std::size_t { kQuery, kKey, kValue, kPastKey, kPastValue, kLengths, kTotal, kCosines, kSines };
constexpr std::array<const char*, kInputs> kNames = {
    "query", "key", "value", "past_key", "past_value", "seqlens_k", "total_sequence_length", "cos_cache", "sin_cache"};
// Rows of a task: keys are transposed once for all of them.
constexpr std::size_t kRows = 192;
constexpr float kLog2E = 1.44269504f;  // weights are powers of two
// Products from which threads are worth waking, about 20 us.
constexpr std::size_t kThreadProducts = std::size_t{1} << 19;

std::size_t dimension(std::int64_t value) { return static_cast<std::size_t>(value); }

struct Tensor {
  std::vector<std::int64_t> dims;
  const void* data = nullptr;

  const float* floats() const { return static_cast<const float*>(data); }
  const std::int32_t* integers() const { return static_cast<const std::int32_t*>(data); }
  std::size_t size() const {
    std::size_t count = 1;
    for (const std::int64_t dim : dims) count *= dimension(dim);
    return count;
  }
};

// What a run is about.
struct Run {
  std::array<Tensor, kInputs> in;
  std::size_t batch = 0, length = 0, capacity = 0, total = 0, room = 0;  // room: of the present caches
  std::size_t rotary = 0;                                                // half of the features that are turned
  std::vector<std::size_t> past, keys;                                   // of each sequence
  float* output = nullptr;
  std::array<float*, 2> present{};

  const float* row(std::size_t input, std::size_t sequence, std::size_t position) const {
    const Tensor& tensor = in[input];
    return tensor.floats() + (sequence * length + position) * dimension(tensor.dims[2]);
  }
};

// Immutable once made: one kernel runs on many threads at once.
class AttentionKernel {
 public:
  AttentionKernel(const Api* api, const KernelInfo* info) : api_(api) {
    const AttributeReader reader(api, info);
    heads_ = positive(reader, "num_heads");
    kv_heads_ = positive(reader, "kv_num_heads");
    size_ = positive(reader, "head_size");
    if (heads_ % kv_heads_ != 0) {
      throw std::invalid_argument("num_heads is " + std::to_string(heads_) + ": it must be a multiple of " +
                                  std::to_string(kv_heads_) + ", kv_num_heads");
    }
    if (size_ % kPanelColumns != 0 || size_ > kMaxHeadSize) {
      throw std::invalid_argument("head_size is " + std::to_string(size_) + ": it must be a multiple of 16, at most " +
                                  std::to_string(kMaxHeadSize));
    }
    scale_ = reader.real("scale").value_or(1.0f / std::sqrt(static_cast<float>(size_)));
  }

  const Api* api() const { return api_; }

  void compute(KernelContext* context) const {
    Run run = read(context);
    const std::array<std::int64_t, 3> dims = {run.in[kQuery].dims[0], run.in[kQuery].dims[1],
                                              static_cast<std::int64_t>(heads_ * size_)};
    run.output = output(context, 0, dims.data(), dims.size());
    std::array<std::int64_t, 4> cache{};
    std::copy_n(run.in[kPastKey].dims.begin(), cache.size(), cache.begin());
    cache[2] = static_cast<std::int64_t>(run.room);
    for (std::size_t i = 0; i < 2; ++i) run.present[i] = output(context, i + 1, cache.data(), cache.size());
    if (run.length == 0 || run.batch == 0) return;
    const std::size_t products = run.batch * heads_ * run.length * run.total * size_;
    for_each(context, run.batch * kv_heads_, products,
             [&](std::size_t i) { extend(run, i / kv_heads_, i % kv_heads_); });
    const std::size_t positions = std::max<std::size_t>(1, kRows / (heads_ / kv_heads_));
    const std::size_t pieces = (run.length + positions - 1) / positions;
    // The last pieces see the most keys: they come first, so that no thread is left with one of them at the end.
    for_each(context, run.batch * kv_heads_ * pieces, products, [&](std::size_t i) {
      const std::size_t first = (pieces - 1 - i / (run.batch * kv_heads_)) * positions;
      const std::size_t head = i % (run.batch * kv_heads_);
      attend(run, head / kv_heads_, head % kv_heads_, first, std::min(positions, run.length - first));
    });
  }

 private:
  static std::size_t positive(const AttributeReader& reader, const char* name) {
    const std::optional<std::int64_t> value = reader.integer(name);
    if (!value) throw std::invalid_argument("attribute " + std::string(name) + " is missing: it must be an int");
    if (*value < 1 || *value > 65536) {
      throw std::invalid_argument(std::string(name) + " is " + std::to_string(*value) + ": it must be 1 to 65536");
    }
    return static_cast<std::size_t>(*value);
  }

  template <class Task>
  void for_each(const KernelContext* context, std::size_t count, std::size_t products, const Task& task) const {
    if (count > 1 && products >= kThreadProducts) return parallel(api_, context, count, task);
    for (std::size_t i = 0; i < count; ++i) task(i);
  }

  float* output(KernelContext* context, std::size_t index, const std::int64_t* dims, std::size_t rank) const {
    Value* made = nullptr;
    check(api_, KernelContext_GetOutput(api_, context, index, dims, rank, &made));
    if (made == nullptr) throw std::invalid_argument("output " + std::to_string(index) + " is left out");
    return static_cast<float*>(const_cast<void*>(data_of(api_, made)));
  }

  Run read(const KernelContext* context) const {
    std::size_t count = 0;
    check(api_, KernelContext_GetInputCount(api_, context, &count));
    Run run;
    std::array<bool, kInputs> given{};
    for (std::size_t i = 0; i < std::min(count, kInputs); ++i) {
      const Value* value = nullptr;
      check(api_, KernelContext_GetInput(api_, context, i, &value));
      if (value == nullptr) continue;
      given[i] = true;
      run.in[i] = {dims_of(api_, value), data_of(api_, value)};
    }
    if (given[kKey] != given[kValue]) throw std::invalid_argument("key and value: there must be both or none");
    if (given[kCosines] != given[kSines]) {
      throw std::invalid_argument("cos_cache and sin_cache: there must be both or none");
    }
    const std::vector<std::int64_t>& query = run.in[kQuery].dims;
    if (query.size() != 3) refuse(run, kQuery, "it must have three axes");
    run.batch = dimension(query[0]);
    run.length = dimension(query[1]);
    const auto width = [&](std::size_t heads) { return static_cast<std::int64_t>(heads * size_); };
    expect(run, kQuery, {query[0], query[1], width(given[kKey] ? heads_ : heads_ + 2 * kv_heads_)});
    if (given[kKey]) {
      for (const std::size_t i : {kKey, kValue}) expect(run, i, {query[0], query[1], width(kv_heads_)});
    }
    const std::vector<std::int64_t>& past = run.in[kPastKey].dims;
    if (past.size() != 4) refuse(run, kPastKey, "it must have four axes");
    run.capacity = dimension(past[2]);
    for (const std::size_t i : {kPastKey, kPastValue})
      expect(run, i, {query[0], width(kv_heads_) / width(1), past[2], width(1)});
    read_lengths(run);
    if (given[kCosines]) read_angles(run);
    return run;
  }

  void read_lengths(Run& run) const {
    if (run.in[kTotal].size() != 1) refuse(run, kTotal, "it must have one element");
    if (run.in[kLengths].size() != run.batch) refuse(run, kLengths, "it must have an element for each sequence");
    const std::int64_t total = *run.in[kTotal].integers(), length = static_cast<std::int64_t>(run.length);
    const std::int64_t most = length + static_cast<std::int64_t>(run.capacity);
    if (total < length || total > most) {
      throw std::invalid_argument("total_sequence_length is " + std::to_string(total) + ": it must be " +
                                  std::to_string(length) + ", the length of query, to " + std::to_string(most) +
                                  ", with all of the cache");
    }
    run.total = dimension(total);
    run.room = std::max(run.capacity, run.total);
    for (std::size_t i = 0; i < run.batch; ++i) {
      const std::int64_t keys = std::int64_t{run.in[kLengths].integers()[i]} + 1,
                         past = total == length ? 0 : keys - length;
      if (keys < 1 || keys > total || past < 0 || past > static_cast<std::int64_t>(run.capacity)) {
        throw std::invalid_argument("seqlens_k[" + std::to_string(i) + "] is " + std::to_string(keys - 1) +
                                    ": it does not fit a total_sequence_length of " + std::to_string(total) +
                                    ", a length of " + std::to_string(length) + " and a cache of " +
                                    std::to_string(run.capacity));
      }
      run.keys.push_back(dimension(keys));
      run.past.push_back(dimension(past));
    }
  }

  void read_angles(Run& run) const {
    const std::vector<std::int64_t>& dims = run.in[kCosines].dims;
    if (dims.size() != 2 || dims[1] > static_cast<std::int64_t>(size_ / 2)) {
      refuse(run, kCosines, "it must have two axes, the last at most half of head_size");
    }
    expect(run, kSines, {dims[0], dims[1]});
    run.rotary = dimension(dims[1]);
    for (const std::size_t past : run.past) {
      if (past + run.length <= dimension(dims[0])) continue;
      throw std::invalid_argument("cos_cache has " + std::to_string(dims[0]) +
                                  " positions: " + std::to_string(past + run.length) + " are needed");
    }
  }

  [[noreturn]] static void refuse(const Run& run, std::size_t input, const std::string& rule) {
    throw std::invalid_argument(std::string(kNames.at(input)) + " has shape " + text_of(run.in[input].dims) + ": " +
                                rule);
  }

  static void expect(const Run& run, std::size_t input, const std::vector<std::int64_t>& dims) {
    if (run.in[input].dims != dims) refuse(run, input, "it must be " + text_of(dims));
  }

  // Where a head's keys or values are, of a position of the new ones. which: 0 for queries, 1 for keys, 2 for values.
  const float* features(const Run& run, std::size_t which, std::size_t sequence, std::size_t position,
                        std::size_t head) const {
    if (run.in[kKey].data != nullptr || which == 0) return run.row(which, sequence, position) + head * size_;
    return run.row(kQuery, sequence, position) + (heads_ + (which - 1) * kv_heads_ + head) * size_;
  }

  void turn(const Run& run, const float* from, std::size_t position, float factor, float* to) const {
    const std::size_t at = position * run.rotary;
    const float* angles = run.rotary == 0 ? nullptr : run.in[kCosines].floats() + at;
    onnx_quarot::turn(
        {from, angles, run.rotary == 0 ? nullptr : run.in[kSines].floats() + at, run.rotary, size_, factor, to});
  }

  // The caches of a head: what was there, and what is new.
  void extend(const Run& run, std::size_t sequence, std::size_t head) const {
    const std::size_t index = sequence * kv_heads_ + head, past = run.past[sequence];
    for (std::size_t which = 0; which < 2; ++which) {
      const float* old = run.in[kPastKey + which].floats() + index * run.capacity * size_;
      float* cache = run.present[which] + index * run.room * size_;
      float* added = cache + past * size_;
      const std::size_t rest = run.room - past - std::min(run.length, run.room - past);
      if (run.in[kPastKey + which].data != run.present[which]) {
        if (past > 0) std::memcpy(cache, old, past * size_ * sizeof(float));
        std::memset(added + run.length * size_, 0, rest * size_ * sizeof(float));
      }
      for (std::size_t i = 0; i < run.length; ++i) {
        const float* from = features(run, which + 1, sequence, i, head);
        if (which == 0) {
          turn(run, from, past + i, 1.0f, added + i * size_);
        } else {
          std::memcpy(added + i * size_, from, size_ * sizeof(float));
        }
      }
    }
  }

  // Positions [first, first + count) of the heads that share a head of keys.
  void attend(const Run& run, std::size_t sequence, std::size_t kv_head, std::size_t first, std::size_t count) const {
    const std::size_t group = heads_ / kv_heads_, rows = count * group;
    AlignedFloats room(rows * (size_ + kAttendState));
    for (std::size_t row = 0; row < rows; ++row) {
      const std::size_t position = first + row / group;
      const float* from = features(run, 0, sequence, position, kv_head * group + row % group);
      turn(run, from, run.past[sequence] + position, kLog2E * scale_, room.data() + row * size_);
    }
    const std::size_t at = (sequence * kv_heads_ + kv_head) * run.room * size_;
    AttendJob job{};
    job.queries = room.data();
    job.rows = rows;
    job.size = size_;
    job.heads = group;
    job.first_visible = run.past[sequence] + first + 1;
    job.keys = run.keys[sequence];
    job.key_rows = run.present[0] + at;
    job.values = run.present[1] + at;
    job.stride = heads_ * size_;
    job.results = run.output + (sequence * run.length + first) * job.stride + kv_head * group * size_;
    job.state = room.data() + rows * size_;
    onnx_quarot::attend(job);
  }

  const Api* api_;
  std::size_t heads_ = 0, kv_heads_ = 0, size_ = 0;
  float scale_ = 0;
};

// Caches have the shapes that the model states: their lengths are the values of an input.
void infer_shape(const Api* api, ShapeInferContext* context) {
  const std::int64_t heads = first_integer(api, context, "num_heads"), size = first_integer(api, context, "head_size");
  if (heads < 1 || size < 1 || heads > 65536 || size > 65536) return;  // said when the kernel is made
  infer_output(api, context, 0, kFloat, heads * size);
}

ElementType input_type(const CustomOp*, std::size_t index) {
  return index == kLengths || index == kTotal ? kInt32 : kFloat;
}

}  // namespace

AttentionOp::AttentionOp(const Api* table) : CustomOp{}, api(table) {
  define_common<AttentionKernel>(*this);
  GetName = [](const CustomOp*) { return "GroupQueryAttention"; };
  GetInputType = input_type;
  GetInputTypeCount = [](const CustomOp*) { return kInputs; };
  GetInputCharacteristic = [](const CustomOp*, std::size_t index) {
    return index == kKey || index == kValue || index > kTotal ? kOptional : kRequired;
  };
  GetOutputType = [](const CustomOp*, std::size_t) { return kFloat; };
  GetOutputTypeCount = [](const CustomOp*) { return std::size_t{3}; };
  CreateKernelV2 = [](const CustomOp* op, const Api* api_now, const KernelInfo* info, void** kernel) {
    return made(op, api_now, info, kernel, [&] { return new AttentionKernel(api_now, info); });
  };
  InferOutputShapeFn = [](const CustomOp* op, ShapeInferContext* context) {
    const Api* api_now = static_cast<const AttentionOp*>(op)->api;
    return guarded(api_now, [&] { infer_shape(api_now, context); });
  };
}

}  // namespace onnx_quarot::ort
