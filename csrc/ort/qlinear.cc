#include "qlinear.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "fwht.h"
#include "node.h"
#include "operator.h"
#include "qlinear/qlinear.h"
#include "status.h"
#include "work.h"

namespace onnx_quarot::ort {
namespace {

// Rows quantized at a time: their integers stay in the second cache, or near it.
constexpr std::size_t kRows = 256;
// q, k and v.
constexpr std::size_t kMostOutputs = 3;
// Work handed to a thread at once, in products: about 20 us.
constexpr std::size_t kTaskProducts = std::size_t{1} << 21;
constexpr std::size_t kTaskValues = std::size_t{1} << 15;
// Rows from here on are copied before they are rotated: between passes, their values would share the first-level cache
// with those they are made from.
constexpr std::size_t kCopiedValues = 8192;
// Bytes of weights that are fetched before they are asked for.
constexpr std::size_t kFetched = 16384;

void check_dims(const char* name, const std::vector<std::int64_t>& found, const std::vector<std::size_t>& wanted) {
  const std::vector<std::int64_t> rule(wanted.begin(), wanted.end());
  if (found != rule)
    throw std::invalid_argument(std::string(name) + " has shape " + text_of(found) + ": it must be " + text_of(rule));
}

// float16 by its bits: exact, subnormal numbers, infinities and NaNs included.
float from_half(std::uint16_t half) {
  const std::uint32_t sign = (half & 0x8000u) << 16, magnitude = half & 0x7fffu;
  std::uint32_t bits = magnitude << 13;
  float value = 0;
  std::memcpy(&value, &bits, sizeof(value));
  value *= 0x1p112f;  // moves the exponent, and makes subnormal numbers normal
  std::memcpy(&bits, &value, sizeof(bits));
  if (magnitude >= 0x7c00u) bits = 0x7f800000u | (magnitude << 13);
  bits |= sign;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

std::uint16_t to_half(float value) {
  std::uint32_t bits = 0;
  std::memcpy(&bits, &value, sizeof(bits));
  const auto sign = static_cast<std::uint16_t>((bits >> 16) & 0x8000u);
  bits &= 0x7fffffffu;
  std::uint32_t half = 0;
  if (bits > 0x7f800000u) {
    half = 0x7e00u;
  } else if (bits >= 0x477ff000u) {
    half = 0x7c00u;
  } else if (bits < 0x38800000u) {  // subnormal: the addition rounds, to half even
    float small = 0;
    std::memcpy(&small, &bits, sizeof(small));
    small += 0.5f;
    std::memcpy(&half, &small, sizeof(half));
    half -= 0x3f000000u;
  } else {
    half = (bits - 0x38000000u + 0xfffu + ((bits >> 13) & 1u)) >> 13;
  }
  return static_cast<std::uint16_t>(sign | half);
}

float from_bfloat(std::uint16_t value) {
  const std::uint32_t bits = static_cast<std::uint32_t>(value) << 16;
  float wide = 0;
  std::memcpy(&wide, &bits, sizeof(wide));
  return wide;
}

std::uint16_t to_bfloat(float value) {
  std::uint32_t bits = 0;
  std::memcpy(&bits, &value, sizeof(bits));
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<std::uint16_t>((bits >> 16) | 0x40u);
  return static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

std::size_t at_least(std::int64_t least, const char* name, std::int64_t value) {
  if (value < least) {
    throw std::invalid_argument(std::string(name) + " is " + std::to_string(value) + ": it must be at least " +
                                std::to_string(least));
  }
  return static_cast<std::size_t>(value);
}

std::size_t required(const AttributeReader& reader, const char* name, std::int64_t least) {
  const std::optional<std::int64_t> value = reader.integer(name);
  if (!value) throw std::invalid_argument("attribute " + std::string(name) + " is missing: it must be an int");
  return at_least(least, name, *value);
}

std::size_t optional(const AttributeReader& reader, const char* name, std::int64_t otherwise, std::int64_t least) {
  return at_least(least, name, reader.integer(name).value_or(otherwise));
}

enum Input : std::size_t { kX, kWeights, kScales, kBias, kSigns, kZeroPoints, kInputs };

struct Inputs {
  const void* x = nullptr;
  PackedWeights weights{};
  const float* bias = nullptr;
  bool bias_rows = false;  // one for each row
  std::vector<std::int64_t> x_dims;
};

// An output of the operator, and what its columns are of the weights'.
struct Part {
  void* y = nullptr;
  std::size_t columns = 0, first = 0, end = 0;
};

// Immutable once made: one kernel runs on many threads at once.
class QLinearKernel {
 public:
  QLinearKernel(const Api* api, ElementType type, const KernelInfo* info) : api_(api), type_(type) {
    const AttributeReader reader(api, info);
    shape_.depth = required(reader, "K", 1);
    shape_.columns = required(reader, "N", 1);
    shape_.bits = optional(reader, "bits", 8, 1);
    shape_.block = optional(reader, "block", 0, 0);
    shape_.zero_points = has_input(info, kZeroPoints);
    check_shape(shape_);
    const std::size_t layout = required(reader, "layout_version", 0);
    if (layout != static_cast<std::size_t>(kPackedLayout)) {
      throw std::invalid_argument("layout_version is " + std::to_string(layout) + ": this library reads " +
                                  std::to_string(kPackedLayout));
    }
    gated_ = optional(reader, "gated", 0, 0) != 0;
    if (gated_ && shape_.columns % (2 * kPanelColumns) != 0) {
      throw std::invalid_argument("N is " + std::to_string(shape_.columns) +
                                  ": with gated=1 it must be a multiple of " + std::to_string(2 * kPanelColumns));
    }
    for (const std::int64_t width : reader.integers("splits")) splits_.push_back(at_least(1, "splits", width));
    check_splits();
    check_outputs(info);
    epsilon_ = reader.real("epsilon");
    if (epsilon_ && !(*epsilon_ >= 0)) {
      throw std::invalid_argument("epsilon is " + std::to_string(*epsilon_) + ": it must be at least 0");
    }
    if (optional(reader, "rotate", 0, 0) != 0) read_rotation(reader);
    read_constants(info);
  }

  const Api* api() const { return api_; }

  void compute(KernelContext* context) const {
    fetch_weights();
    std::vector<float> run_signs;
    Inputs inputs = read(context, run_signs);
    std::vector<std::int64_t> dims = std::move(inputs.x_dims);
    std::size_t rows = 1;
    for (std::size_t i = 0; i + 1 < dims.size(); ++i) rows *= static_cast<std::size_t>(dims[i]);
    Parts parts{};
    std::size_t column = 0;
    for (std::size_t i = 0; i < outputs(); ++i) {
      const std::size_t width = splits_.empty() ? shape_.columns : splits_[i];
      parts[i].columns = gated_ ? width / 2 : width;
      parts[i].first = column;
      parts[i].end = column += width;
      dims.back() = static_cast<std::int64_t>(parts[i].columns);
      Value* output = nullptr;
      check(api_, KernelContext_GetOutput(api_, context, i, dims.data(), dims.size(), &output));
      parts[i].y = const_cast<void*>(data_of(api_, output));
    }
    Rotation rotation{transform_ ? &*transform_ : nullptr, constant_signs_.empty() ? nullptr : constant_signs_.data()};
    std::optional<Transform> of_run;
    if (rotation_ && !transform_) {
      TransformSpec spec = *rotation_;
      spec.signs_length = run_signs.size();
      rotation = {&of_run.emplace(spec), run_signs.empty() ? nullptr : run_signs.data()};
    }
    for (std::size_t row = 0; row < rows; row += kRows) {
      run(context, inputs, rotation, row, std::min(kRows, rows - row), parts);
    }
  }

 private:
  using Parts = std::array<Part, kMostOutputs>;
  struct Rotation {
    const Transform* transform;  // null: none
    const float* signs;
  };

  void read_rotation(const AttributeReader& reader) {
    const Attributes attributes = read_attributes(reader);
    rotation_.emplace();
    rotation_->size = shape_.depth;
    rotation_->block_size = attributes.block_size.value_or(shape_.depth);
    rotation_->transpose = attributes.transpose;
    rotation_->scale = attributes.scale;
    const Transform valid(*rotation_);
  }

  std::size_t outputs() const { return std::max<std::size_t>(1, splits_.size()); }

  void check_splits() const {
    if (splits_.empty()) return;
    std::size_t total = 0;
    for (const std::size_t width : splits_) total += width;
    bool whole = total == shape_.columns && splits_.size() <= kMostOutputs && !gated_;
    for (std::size_t i = 0; i + 1 < splits_.size(); ++i) whole = whole && splits_[i] % kPanelColumns == 0;
    if (whole) return;
    throw std::invalid_argument("splits is " + text_of({splits_.begin(), splits_.end()}) + ": it must be up to " +
                                std::to_string(kMostOutputs) + " numbers that add up to N, which is " +
                                std::to_string(shape_.columns) + ", all but the last multiples of " +
                                std::to_string(kPanelColumns) + ", and none with gated=1");
  }

  // Those of the node are those of its attributes, and all are used: nothing else would say where columns are to go.
  void check_outputs(const KernelInfo* info) const {
    const std::string rule =
        "with splits " + text_of({splits_.begin(), splits_.end()}) + " there must be " + std::to_string(outputs());
    std::size_t count = 0;
    check(api_, KernelInfo_GetOutputCount(api_, info, &count));
    if (count != outputs()) throw std::invalid_argument("outputs are " + std::to_string(count) + ": " + rule);
    for (std::size_t i = 0; i < count; ++i) {
      if (is_named(KernelInfo_GetOutputName, info, i)) continue;
      throw std::invalid_argument("output Y" + std::to_string(i) + " is left out: " + rule);
    }
  }

  bool has_input(const KernelInfo* info, std::size_t index) const {
    std::size_t count = 0;
    check(api_, KernelInfo_GetInputCount(api_, info, &count));
    return index < count && is_named(KernelInfo_GetInputName, info, index);
  }

  // Inputs and outputs that are left out have empty names.
  template <class Getter>
  bool is_named(const Getter& name_of, const KernelInfo* info, std::size_t index) const {
    std::size_t size = 0;
    check(api_, name_of(api_, info, index, nullptr, &size));
    return size > 1;  // with the terminating zero
  }

  // A decoded token's first weights come from memory while everything else gets ready.
  void fetch_weights() const {
    const std::uint8_t* const codes = constants_.weights.codes;
    if (codes == nullptr) return;
    const std::size_t bytes = std::min(kFetched, shape_.panels() * shape_.panel_bytes());
    for (std::size_t i = 0; i < bytes; i += kStepBytes) __builtin_prefetch(codes + i, 0, 2);
  }

  // What is constant in the model is checked, and found, once. A bias of Y's shape has to wait for that.
  void read_constants(const KernelInfo* info) {
    std::size_t count = 0;
    check(api_, KernelInfo_GetInputCount(api_, info, &count));
    for (std::size_t i = kWeights; i < std::min<std::size_t>(count, kInputs); ++i) {
      int constant = 0;
      const Value* value = nullptr;
      // Fails for an optional input that is left out.
      if (!succeeded(api_, KernelInfoGetConstantInput_tensor(api_, info, i, &constant, &value))) continue;
      if (constant == 0 || value == nullptr || (i == kBias && dims_of(api_, value).size() != 1)) continue;
      take(i, value, constants_, constant_signs_);
      known_.at(i) = true;
    }
    if (rotation_ && (known_[kSigns] || !has_input(info, kSigns))) {
      rotation_->signs_length = constant_signs_.size();
      transform_.emplace(*rotation_);
    }
  }

  // signs: of this run, if they are no constant.
  Inputs read(const KernelContext* context, std::vector<float>& signs) const {
    Inputs inputs = constants_;
    const Value* x = nullptr;
    check(api_, KernelContext_GetInput(api_, context, kX, &x));
    inputs.x = data_of(api_, x);
    inputs.x_dims = dims_of(api_, x);
    if (inputs.x_dims.empty() || inputs.x_dims.back() != static_cast<std::int64_t>(shape_.depth)) {
      throw std::invalid_argument("X has shape " + text_of(inputs.x_dims) + ": its last axis must be K, which is " +
                                  std::to_string(shape_.depth));
    }
    std::size_t count = 0;
    check(api_, KernelContext_GetInputCount(api_, context, &count));
    for (std::size_t i = kWeights; i < std::min<std::size_t>(count, kInputs); ++i) {
      if (known_.at(i)) continue;
      const Value* value = nullptr;
      check(api_, KernelContext_GetInput(api_, context, i, &value));
      if (value != nullptr) take(i, value, inputs, signs);
    }
    return inputs;
  }

  // Checks an input, and puts down where it is.
  void take(std::size_t index, const Value* value, Inputs& inputs, std::vector<float>& signs) const {
    const std::vector<std::int64_t> dims = dims_of(api_, value);
    const void* data = data_of(api_, value);
    const std::size_t step = shape_.bits == 4 ? 2 : 1;
    switch (index) {
      case kWeights:
        check_dims("W", dims, {shape_.panels(), shape_.steps() / step, kPanelColumns, 4});
        inputs.weights.codes = static_cast<const std::uint8_t*>(data);
        return;
      case kScales:
        if (shape_.bits == 8) {
          check_dims("scales", dims, {shape_.columns});
        } else {
          check_dims("scales", dims, {shape_.panels(), shape_.blocks(), kPanelColumns});
        }
        inputs.weights.scales = static_cast<const float*>(data);
        return;
      case kBias:
        read_bias(dims, inputs);
        inputs.bias = static_cast<const float*>(data);
        return;
      case kSigns:
        if (rotation_) read_signs(dims, rotation_->block_size, static_cast<const std::int8_t*>(data), signs);
        return;
      default:
        check_dims("zero_points", dims, {shape_.panels(), shape_.blocks(), kPanelColumns / 2});
        inputs.weights.zero_points = static_cast<const std::uint8_t*>(data);
    }
  }

  // [N], or of the shape of the only output.
  void read_bias(const std::vector<std::int64_t>& dims, Inputs& inputs) const {
    const auto columns = static_cast<std::int64_t>(shape_.columns);
    inputs.bias_rows = dims.size() > 1 && splits_.empty() && !gated_;
    if (dims.size() == 1 && dims[0] == columns) return;
    std::vector<std::int64_t> whole = inputs.x_dims;
    if (!whole.empty()) whole.back() = columns;
    if (dims == whole && inputs.bias_rows) return;
    throw std::invalid_argument("bias has shape " + text_of(dims) + ": it must be " + text_of({columns}) +
                                (splits_.empty() && !gated_ && !whole.empty() ? " or " + text_of(whole) : ""));
  }

  void read_signs(const std::vector<std::int64_t>& dims, std::size_t block, const std::int8_t* values,
                  std::vector<float>& signs) const {
    const auto length = dims.size() == 1 ? static_cast<std::size_t>(dims[0]) : 0;
    if (length != shape_.depth && length != block) {
      throw std::invalid_argument("signs has shape " + text_of(dims) + ": it must have the length of a block or of K");
    }
    signs.assign(values, values + length);
  }

  // Quantizes a row of X, as float32, normalized, rotated: from X's own memory if nothing has to be done to it.
  void quantize(const Inputs& inputs, const Rotation& rotation, std::size_t row, float* room, QuantizedRows& rows,
                std::size_t index) const {
    const std::size_t size = shape_.depth, at = row * size;
    const auto* straight = static_cast<const float*>(inputs.x) + at;
    if (type_ != kFloat) {
      const auto* from = static_cast<const std::uint16_t*>(inputs.x) + at;
      for (std::size_t k = 0; k < size; ++k) room[k] = type_ == kFloat16 ? from_half(from[k]) : from_bfloat(from[k]);
      straight = room;
    }
    // A row's integers do not change with its length, so that normalizing it is a matter of its scale.
    const float factor = epsilon_ ? norm_factor(qlinear_kernels(), straight, size, *epsilon_) : 1.0f;
    if (rotation.transform != nullptr) {
      const auto stride = static_cast<std::ptrdiff_t>(size);
      if (size >= kCopiedValues && straight != room) {
        std::memcpy(room, straight, size * sizeof(float));
        straight = room;
      }
      rotation.transform->rows(straight, room, 1, stride, stride, rotation.signs);
      straight = room;
    }
    rows.set(index, straight, factor);
  }

  void run(const KernelContext* context, const Inputs& inputs, const Rotation& rotation, std::size_t row,
           std::size_t count, const Parts& parts) const {
    QuantizedRows rows(qlinear_kernels(), shape_, count);
    const std::size_t chunk = std::max<std::size_t>(1, kTaskValues / shape_.depth);
    parallel(api_, context, (count + chunk - 1) / chunk, [&](std::size_t i) {
      AlignedFloats room(rotation.transform == nullptr && type_ == kFloat ? 0 : shape_.depth);
      for (std::size_t r = i * chunk; r < std::min(count, (i + 1) * chunk); ++r) {
        quantize(inputs, rotation, row + r, room.data(), rows, r);
      }
    });

    std::vector<float> wide(type_ == kFloat ? 0 : count * (gated_ ? shape_.columns / 2 : shape_.columns));
    const auto target = [&](const Part& part) {
      QLinearOutput output{};
      output.y = type_ == kFloat ? static_cast<float*>(part.y) + row * part.columns : wide.data() + count * part.first;
      output.stride = part.columns;
      output.column = part.first;
      output.bias = inputs.bias == nullptr ? nullptr : inputs.bias + (inputs.bias_rows ? row * shape_.columns : 0);
      output.bias_stride = inputs.bias_rows ? shape_.columns : 0;
      output.gated = gated_;
      return output;
    };
    // Columns are shared out in whole panels, and rows where there are too few of those.
    const std::size_t panel_products = shape_.steps() * 4 * kPanelColumns;
    const std::size_t all_panels = shape_.panels();
    const std::size_t row_parts = all_panels < 16 ? std::max<std::size_t>(1, count / 64) : 1;
    const std::size_t row_products = panel_products * ((count + row_parts - 1) / row_parts);
    const std::size_t panels = std::min(all_panels, (kTaskProducts + row_products - 1) / row_products + 3) / 4 * 4;
    const std::size_t width = panels == 0 ? all_panels : panels, column_parts = (all_panels + width - 1) / width;
    parallel(api_, context, row_parts * column_parts, [&](std::size_t i) {
      const std::size_t part = i % row_parts, panel = i / row_parts * width;
      for (const Part& to : parts) {
        const std::size_t first = std::max(panel, to.first / kPanelColumns);
        const std::size_t end = std::min({all_panels, panel + width, (to.end + kPanelColumns - 1) / kPanelColumns});
        if (first >= end) continue;
        multiply(rows, count * part / row_parts, count * (part + 1) / row_parts, inputs.weights, target(to), first,
                 end);
      }
    });
    if (type_ == kFloat) return;
    for (const Part& part : parts) {
      auto* narrow = static_cast<std::uint16_t*>(part.y) + row * part.columns;
      const float* from = wide.data() + count * part.first;
      for (std::size_t i = 0; i < count * part.columns; ++i) {
        narrow[i] = type_ == kFloat16 ? to_half(from[i]) : to_bfloat(from[i]);
      }
    }
  }

  const Api* api_;
  ElementType type_;
  QLinearShape shape_;
  bool gated_ = false;
  std::vector<std::size_t> splits_;
  std::optional<float> epsilon_;
  std::optional<TransformSpec> rotation_;
  std::array<bool, kInputs> known_{};  // inputs that are constants, below
  Inputs constants_;
  std::vector<float> constant_signs_;
  std::optional<Transform> transform_;  // where its signs are known
};

// One definition answers for all types of X: the type is that of the input.
void infer_shape(const Api* api, ShapeInferContext* context) {
  TensorInfo* x = nullptr;
  check(api, ShapeInferContext_GetInputTypeShape(api, context, 0, &x));
  ElementType type = kFloat;
  check(api, GetTensorElementType(api, x, &type));
  // What does not fit is said when the kernel is made. Further outputs are as the model states them: whether the node
  // has them is not known here.
  const std::int64_t columns = first_integer(api, context, "N");
  const std::int64_t first = first_integer<kMostOutputs>(api, context, "splits", kIntsAttribute);
  if (first > 0) {
    infer_output(api, context, 0, type, first);
  } else if (columns > 0) {
    infer_output(api, context, 0, type, first_integer(api, context, "gated") != 0 ? columns / 2 : columns);
  }
}

const QLinearOp* self(const CustomOp* op) { return static_cast<const QLinearOp*>(op); }

ElementType input_type(const CustomOp* op, std::size_t index) {
  constexpr ElementType types[] = {kFloat, kUInt8, kFloat, kFloat, kInt8, kUInt8};
  return index == 0 ? self(op)->type : types[index];
}

}  // namespace

QLinearOp::QLinearOp(const Api* table, ElementType element) : CustomOp{}, api(table), type(element) {
  define_common<QLinearKernel>(*this);
  GetName = [](const CustomOp*) { return "QLinear"; };
  GetInputType = input_type;
  GetInputTypeCount = [](const CustomOp*) { return std::size_t{kInputs}; };
  GetInputCharacteristic = [](const CustomOp*, std::size_t index) { return index <= kScales ? kRequired : kOptional; };
  GetOutputType = [](const CustomOp* op, std::size_t) { return self(op)->type; };
  GetOutputTypeCount = [](const CustomOp*) { return kMostOutputs; };
  GetOutputCharacteristic = [](const CustomOp*, std::size_t index) { return index == 0 ? kRequired : kOptional; };
  CreateKernelV2 = [](const CustomOp* op, const Api* api_now, const KernelInfo* info, void** kernel) {
    return made(op, api_now, info, kernel, [&] { return new QLinearKernel(api_now, self(op)->type, info); });
  };
  InferOutputShapeFn = [](const CustomOp* op, ShapeInferContext* context) {
    return guarded(self(op)->api, [&] { infer_shape(self(op)->api, context); });
  };
}

}  // namespace onnx_quarot::ort
