// What the kernels of this domain share: reading a node's attributes, shapes and signs, and running rows on the
// session's threads.
#ifndef ONNX_QUAROT_ORT_NODE_H
#define ONNX_QUAROT_ORT_NODE_H

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "fwht.h"
#include "orders.h"
#include "status.h"
#include "work.h"

namespace onnx_quarot::ort {

// Work handed to a thread at once, in additions: 10 to 20 us, far above what waking a thread costs. Inputs of less than
// two such pieces never touch the pool.
inline constexpr std::size_t kChunkCost = std::size_t{1} << 18;

// Additions a row, about: the stages of the power of two, and a quarter of each order (the kernels look up sums of
// four).
inline std::size_t row_cost(const Transform& transform) {
  const Factors factors = factorize(transform.block_size());
  std::size_t cost = 1 + factors.log2_power;
  if (factors.order > 1) {
    for (const std::size_t order : order_factors(factors.order)) cost += order / 4;
  }
  return transform.size() * cost;
}

inline DType dtype_of(ElementType type) {
  switch (type) {
    case kFloat16:
      return DType::float16;
    case kBFloat16:
      return DType::bfloat16;
    case kDouble:
      return DType::float64;
    default:
      return DType::float32;
  }
}

struct Attributes {
  std::optional<std::size_t> block_size;
  bool transpose = false;
  std::optional<double> scale;
};

// A node's view of its attributes does not tell an absent one from one of another type: both fail to be read.
class AttributeReader {
 public:
  AttributeReader(const Api* api, const KernelInfo* info) : api_(api), info_(info) {}

  std::optional<std::int64_t> integer(const char* name) const {
    std::int64_t value = 0;
    if (succeeded(api_, KernelInfoGetAttribute_int64(api_, info_, name, &value))) return value;
    float other = 0;
    if (succeeded(api_, KernelInfoGetAttribute_float(api_, info_, name, &other)) || is_text_or_list(name)) {
      throw std::invalid_argument("attribute " + std::string(name) + " has another type: it must be an int");
    }
    return std::nullopt;
  }

  // Empty where there is none, or an empty list.
  std::vector<std::int64_t> integers(const char* name) const {
    std::size_t size = 0;
    std::vector<std::int64_t> values;
    if (succeeded(api_, KernelInfoGetAttributeArray_int64(api_, info_, name, nullptr, &size)) && size > 0) {
      values.resize(size);
      check(api_, KernelInfoGetAttributeArray_int64(api_, info_, name, values.data(), &size));
      return values;
    }
    std::int64_t integer = 0;
    float real = 0;
    if (succeeded(api_, KernelInfoGetAttribute_int64(api_, info_, name, &integer)) ||
        succeeded(api_, KernelInfoGetAttribute_float(api_, info_, name, &real)) || is_text_or_list(name)) {
      throw std::invalid_argument("attribute " + std::string(name) + " has another type: it must be ints");
    }
    return values;
  }

  std::optional<float> real(const char* name) const {
    float value = 0;
    if (succeeded(api_, KernelInfoGetAttribute_float(api_, info_, name, &value))) return value;
    std::int64_t other = 0;
    if (succeeded(api_, KernelInfoGetAttribute_int64(api_, info_, name, &other)) || is_text_or_list(name)) {
      throw std::invalid_argument("attribute " + std::string(name) + " has another type: it must be a float");
    }
    return std::nullopt;
  }

 private:
  bool is_text_or_list(const char* name) const {
    std::size_t size = 0;
    return succeeded(api_, KernelInfoGetAttribute_string(api_, info_, name, nullptr, &size)) ||
           (succeeded(api_, KernelInfoGetAttributeArray_int64(api_, info_, name, nullptr, &size)) && size > 0) ||
           (succeeded(api_, KernelInfoGetAttributeArray_float(api_, info_, name, nullptr, &size)) && size > 0);
  }

  const Api* api_;
  const KernelInfo* info_;
};

inline Attributes read_attributes(const AttributeReader& reader) {
  Attributes attributes;
  if (const auto block = reader.integer("block_size")) {
    if (*block < 1) throw std::invalid_argument("block_size is " + std::to_string(*block) + ": it must be at least 1");
    attributes.block_size = static_cast<std::size_t>(*block);
  }
  if (const auto transpose = reader.integer("transpose")) {
    if (*transpose != 0 && *transpose != 1) {
      throw std::invalid_argument("transpose is " + std::to_string(*transpose) + ": it must be 0 or 1");
    }
    attributes.transpose = *transpose == 1;
  }
  if (const auto scale = reader.real("scale")) attributes.scale = static_cast<double>(*scale);
  return attributes;
}

inline std::vector<std::int64_t> dims_of(const Api* api, const TensorInfo* info) {
  std::size_t rank = 0;
  check(api, GetDimensionsCount(api, info, &rank));
  std::vector<std::int64_t> dims(rank);
  check(api, GetDimensions(api, info, dims.data(), rank));
  return dims;
}

inline std::vector<std::int64_t> dims_of(const Api* api, const Value* value) {
  TensorInfo* info = nullptr;
  check(api, GetTensorTypeAndShape(api, value, &info));
  const auto release = [api](TensorInfo* held) { ReleaseTensorTypeAndShapeInfo(api, held); };
  const std::unique_ptr<TensorInfo, decltype(release)> owner(info, release);
  return dims_of(api, static_cast<const TensorInfo*>(info));
}

// Says that an output has this type and the shape of X, its last axis replaced unless `last` is 0.
inline void infer_output(const Api* api, ShapeInferContext* context, std::size_t index, ElementType type,
                         std::int64_t last) {
  TensorInfo* x = nullptr;
  check(api, ShapeInferContext_GetInputTypeShape(api, context, 0, &x));
  std::vector<std::int64_t> dims = dims_of(api, static_cast<const TensorInfo*>(x));
  if (dims.empty()) return;  // unknown
  std::vector<const char*> names(dims.size());
  check(api, GetSymbolicDimensions(api, x, names.data(), names.size()));
  if (last != 0) {
    dims.back() = last;
    names.back() = "";
  }
  for (std::size_t i = 0; i < dims.size(); ++i) {
    if (dims[i] < 0 && *names[i] == '\0') return;  // an unknown length without a name cannot be stated
  }
  TensorInfo* made = nullptr;
  check(api, CreateTensorTypeAndShapeInfo(api, &made));
  const auto release = [api](TensorInfo* held) { ReleaseTensorTypeAndShapeInfo(api, held); };
  const std::unique_ptr<TensorInfo, decltype(release)> owner(made, release);
  check(api, SetTensorElementType(api, made, type));
  check(api, SetDimensions(api, made, dims.data(), dims.size()));
  check(api, SetSymbolicDimensions(api, made, names.data(), names.size()));
  check(api, ShapeInferContext_SetOutputTypeShape(api, context, index, made));
}

// The first of the integers of an attribute of this kind, while shapes are inferred: 0 where there is none. `most`: how
// many there may be.
template <std::size_t most = 1>
std::int64_t first_integer(const Api* api, const ShapeInferContext* context, const char* name,
                           AttributeType kind = kIntAttribute) {
  std::array<std::int64_t, most> values{};
  const OpAttribute* attribute = nullptr;
  std::size_t size = 0;
  const bool found = succeeded(api, ShapeInferContext_GetAttribute(api, context, name, &attribute));
  if (found && attribute != nullptr) {
    check(api, ReadOpAttr(api, attribute, kind, values.data(), sizeof(values), &size));
  }
  return values[0];
}

// Shape of an input as far as the model states it; empty for an unknown rank.
inline std::vector<std::int64_t> declared_dims(const Api* api, const KernelInfo* info, std::size_t input) {
  TypeInfo* type = nullptr;
  check(api, KernelInfo_GetInputTypeInfo(api, info, input, &type));
  const auto release = [api](TypeInfo* held) { ReleaseTypeInfo(api, held); };
  const std::unique_ptr<TypeInfo, decltype(release)> owner(type, release);
  const TensorInfo* tensor = nullptr;
  check(api, CastTypeInfoToTensorInfo(api, type, &tensor));
  return tensor == nullptr ? std::vector<std::int64_t>() : dims_of(api, tensor);
}

inline std::string name_of(const Api* api, const KernelInfo* info) {
  std::size_t size = 0;
  check(api, KernelInfo_GetNodeName(api, info, nullptr, &size));
  std::string name(size, '\0');
  check(api, KernelInfo_GetNodeName(api, info, name.data(), &size));
  return name.c_str();  // the size counts the terminating zero
}

inline const void* data_of(const Api* api, const Value* value) {
  void* data = nullptr;
  // The table has one entry for reading and writing.
  check(api, GetTensorMutableData(api, const_cast<Value*>(value), &data));
  return data;
}

inline std::vector<float> read_signs(const Api* api, const Value* value) {
  const std::vector<std::int64_t> dims = dims_of(api, value);
  if (dims.size() != 1 || dims[0] < 1) {
    throw std::invalid_argument(dims.size() == 1 ? "signs has length 0: it must be the block size or the last axis"
                                                 : "signs has rank " + std::to_string(dims.size()) + ": it must be 1");
  }
  const auto* data = static_cast<const std::int8_t*>(data_of(api, value));
  std::vector<float> signs(static_cast<std::size_t>(dims[0]));
  for (std::size_t i = 0; i < signs.size(); ++i) {
    if (data[i] != 1 && data[i] != -1) {
      throw std::invalid_argument("signs[" + std::to_string(i) + "] is " + std::to_string(data[i]) +
                                  ": it must be 1 or -1");
    }
    signs[i] = static_cast<float>(data[i]);
  }
  return signs;
}

// The attributes and the signs of a node, checked when its kernel is made as far as they are known then.
class HadamardNode {
 public:
  HadamardNode(const Api* api, DType dtype, const KernelInfo* info, std::size_t signs_input)
      : api_(api), dtype_(dtype), signs_input_(signs_input), attributes_(read_attributes(AttributeReader(api, info))) {
    read_constant_signs(info);
    // What can be known to be wrong now is an error of the session, not of its first run.
    const std::vector<std::int64_t> dims = declared_dims(api, info, 0);
    const std::size_t signs_length = constant_signs_ ? constant_signs_->size() : 0;
    if (!dims.empty() && dims.back() > 0) {
      const Transform valid(spec(static_cast<std::size_t>(dims.back()), signs_length));
    } else if (attributes_.block_size) {
      const Transform valid(spec(*attributes_.block_size, 0));
    }
  }

  const Api* api() const { return api_; }

  TransformSpec spec(std::size_t size, std::size_t signs_length) const {
    TransformSpec spec;
    spec.dtype = dtype_;
    spec.size = size;
    spec.block_size = attributes_.block_size.value_or(0);
    spec.transpose = attributes_.transpose;
    spec.scale = attributes_.scale;
    spec.signs_length = signs_length;
    return spec;
  }

  // The signs of this run; `storage` holds them where they are no constant.
  const std::vector<float>& signs(const KernelContext* context, std::vector<float>& storage) const {
    if (constant_signs_) return *constant_signs_;
    std::size_t inputs = 0;
    check(api_, KernelContext_GetInputCount(api_, context, &inputs));
    const Value* value = nullptr;
    if (inputs > signs_input_) check(api_, KernelContext_GetInput(api_, context, signs_input_, &value));
    storage = value == nullptr ? std::vector<float>() : read_signs(api_, value);
    return storage;
  }

 private:
  void read_constant_signs(const KernelInfo* info) {
    std::size_t inputs = 0;
    check(api_, KernelInfo_GetInputCount(api_, info, &inputs));
    if (inputs <= signs_input_) return;
    int constant = 0;
    const Value* value = nullptr;
    // Fails for an optional input that is left out: then there is nothing to keep.
    if (succeeded(api_, KernelInfoGetConstantInput_tensor(api_, info, signs_input_, &constant, &value)) &&
        constant != 0 && value != nullptr) {
      constant_signs_ = read_signs(api_, value);
    }
  }

  const Api* api_;
  DType dtype_;
  std::size_t signs_input_;
  Attributes attributes_;
  std::optional<std::vector<float>> constant_signs_;  // empty optional: signs absent, or known only when running
};

// X of a run, as rows of its last axis.
struct Input {
  std::vector<std::int64_t> dims;
  const void* data = nullptr;
  std::size_t rows = 1;
  std::size_t size = 0;
};

inline Input read_input(const Api* api, const KernelContext* context) {
  const Value* x = nullptr;
  check(api, KernelContext_GetInput(api, context, 0, &x));
  Input input;
  input.dims = dims_of(api, x);
  if (input.dims.empty()) throw std::invalid_argument("X has rank 0: it must have a last axis to transform");
  input.data = data_of(api, x);
  for (std::size_t i = 0; i + 1 < input.dims.size(); ++i) input.rows *= static_cast<std::size_t>(input.dims[i]);
  input.size = static_cast<std::size_t>(input.dims.back());
  return input;
}

// Calls range(first, count) for pieces of the rows, on the session's threads where there is enough work for them. Rows
// are shared out evenly, and a row is computed the same way wherever it falls: the result does not depend on the number
// of threads.
template <class Range>
void run_rows(const Api* api, const KernelContext* context, const Transform& transform, std::size_t rows,
              const Range& range) {
  const std::size_t chunk = std::max<std::size_t>(1, kChunkCost / row_cost(transform));
  const std::size_t chunks = rows / chunk;
  if (chunks < 2) return range(std::size_t{0}, rows);
  parallel(api, context, chunks, [&](std::size_t i) {
    const std::size_t first = rows / chunks * i + std::min(i, rows % chunks);
    const std::size_t count = rows / chunks + (i < rows % chunks ? 1 : 0);
    range(first, count);
  });
}

}  // namespace onnx_quarot::ort

#endif
