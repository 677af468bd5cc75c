#include "hadamard.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "fwht.h"
#include "status.h"

namespace onnx_quarot::ort {
namespace {

// Work handed to a thread at once, in elements: about 10 us for float32, far above what waking a thread costs. Inputs
// under two such pieces never touch the pool.
constexpr std::size_t kChunkElements = std::size_t{1} << 15;

DType dtype_of(ElementType type) {
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

// `read_int(name)` and `read_float(name)` return what is there, as std::optional, and throw on another type.
template <class ReadInt, class ReadFloat>
Attributes read_attributes(ReadInt&& read_int, ReadFloat&& read_float) {
  Attributes attributes;
  if (const std::optional<std::int64_t> block = read_int("block_size")) {
    if (*block < 1) {
      throw std::invalid_argument("Hadamard: block_size is " + std::to_string(*block) + ": it must be at least 1");
    }
    attributes.block_size = static_cast<std::size_t>(*block);
    factorize(*attributes.block_size);
  }
  if (const std::optional<std::int64_t> transpose = read_int("transpose")) {
    if (*transpose != 0 && *transpose != 1) {
      throw std::invalid_argument("Hadamard: transpose is " + std::to_string(*transpose) + ": it must be 0 or 1");
    }
    attributes.transpose = *transpose == 1;
  }
  if (const std::optional<float> scale = read_float("scale")) {
    if (!std::isfinite(*scale)) {
      throw std::invalid_argument("Hadamard: scale is " + std::to_string(*scale) + ": it must be finite");
    }
    attributes.scale = static_cast<double>(*scale);
  }
  return attributes;
}

[[noreturn]] void wrong_type(const char* name, const char* expected) {
  throw std::invalid_argument("Hadamard: attribute " + std::string(name) + " has the wrong type: it must be " + expected);
}

// The kernel's view of a node does not tell an absent attribute from one of another type. Asking for the other number
// type catches what a model can hold here; shape inference, which always runs first, has seen the type itself.
Attributes attributes_of(const Api* api, const KernelInfo* info) {
  const auto as_int = [&](const char* name) -> std::optional<std::int64_t> {
    std::int64_t value = 0;
    if (!succeeded(api, KernelInfoGetAttribute_int64(api, info, name, &value))) return std::nullopt;
    return value;
  };
  const auto as_float = [&](const char* name) -> std::optional<float> {
    float value = 0;
    if (!succeeded(api, KernelInfoGetAttribute_float(api, info, name, &value))) return std::nullopt;
    return value;
  };
  return read_attributes(
      [&](const char* name) {
        const auto value = as_int(name);
        if (!value && as_float(name)) wrong_type(name, "an int");
        return value;
      },
      [&](const char* name) {
        const auto value = as_float(name);
        if (!value && as_int(name)) wrong_type(name, "a float");
        return value;
      });
}

Attributes attributes_of(const Api* api, const ShapeInferContext* context) {
  const auto read = [&](const char* name, AttributeType type, auto zero, const char* expected) {
    std::optional<decltype(zero)> result;
    const Attribute* attribute = nullptr;
    if (!succeeded(api, ShapeInferContext_GetAttribute(api, context, name, &attribute)) || attribute == nullptr) return result;
    std::size_t bytes = 0;
    auto value = zero;
    if (!succeeded(api, ReadOpAttr(api, attribute, type, &value, sizeof(value), &bytes))) wrong_type(name, expected);
    result = value;
    return result;
  };
  return read_attributes([&](const char* name) { return read(name, kAttributeInt, std::int64_t{0}, "an int"); },
                         [&](const char* name) { return read(name, kAttributeFloat, 0.0F, "a float"); });
}

std::vector<std::int64_t> dims_of(const Api* api, const TensorInfo* info) {
  std::size_t rank = 0;
  check(api, GetDimensionsCount(api, info, &rank));
  std::vector<std::int64_t> dims(rank);
  check(api, GetDimensions(api, info, dims.data(), rank));
  return dims;
}

std::vector<std::int64_t> dims_of(const Api* api, const Value* value) {
  TensorInfo* info = nullptr;
  check(api, GetTensorTypeAndShape(api, value, &info));
  const auto release = [api](TensorInfo* held) { ReleaseTensorTypeAndShapeInfo(api, held); };
  const std::unique_ptr<TensorInfo, decltype(release)> owner(info, release);
  return dims_of(api, static_cast<const TensorInfo*>(info));
}

const void* data_of(const Api* api, const Value* value) {
  void* data = nullptr;
  // The table has one entry for reading and writing.
  check(api, GetTensorMutableData(api, const_cast<Value*>(value), &data));
  return data;
}

std::vector<float> read_signs(const Api* api, const Value* value) {
  const std::vector<std::int64_t> dims = dims_of(api, value);
  if (dims.size() != 1 || dims[0] < 1) {
    throw std::invalid_argument("Hadamard: signs has rank " + std::to_string(dims.size()) + " and length " +
                                std::to_string(dims.empty() ? 1 : dims[0]) + ": it must be a vector that is not empty");
  }
  const auto* data = static_cast<const std::int8_t*>(data_of(api, value));
  std::vector<float> signs(static_cast<std::size_t>(dims[0]));
  for (std::size_t i = 0; i < signs.size(); ++i) {
    if (data[i] != 1 && data[i] != -1) {
      throw std::invalid_argument("Hadamard: signs[" + std::to_string(i) + "] is " + std::to_string(data[i]) +
                                  ": it must be 1 or -1");
    }
    signs[i] = static_cast<float>(data[i]);
  }
  return signs;
}

// Immutable once made: one kernel runs on many threads at once.
class HadamardKernel {
 public:
  HadamardKernel(const Api* api, ElementType type, const KernelInfo* info)
      : api_(api), dtype_(dtype_of(type)), attributes_(attributes_of(api, info)) {
    active_isa();  // a bad ONNX_QUAROT_ISA is an error of the session, not of its first run
    std::size_t inputs = 0;
    check(api, KernelInfo_GetInputCount(api, info, &inputs));
    if (inputs < 2) return;
    int constant = 0;
    const Value* value = nullptr;
    // Fails for an optional input that is left out: then there is nothing to keep.
    if (succeeded(api, KernelInfoGetConstantInput_tensor(api, info, 1, &constant, &value)) && constant != 0 &&
        value != nullptr) {
      constant_signs_ = read_signs(api, value);
    }
  }

  const Api* api() const { return api_; }

  void compute(KernelContext* context) const {
    const Value* x = nullptr;
    check(api_, KernelContext_GetInput(api_, context, 0, &x));
    const std::vector<std::int64_t> dims = dims_of(api_, x);
    if (dims.empty()) throw std::invalid_argument("Hadamard: X has rank 0: it must have a last axis to transform");
    Value* y = nullptr;
    check(api_, KernelContext_GetOutput(api_, context, 0, dims.data(), dims.size(), &y));

    std::vector<float> given_signs;
    const std::vector<float>& signs = constant_signs_ ? *constant_signs_ : (given_signs = signs_input(context));
    TransformSpec spec;
    spec.dtype = dtype_;
    spec.size = static_cast<std::size_t>(dims.back());
    spec.block_size = attributes_.block_size.value_or(0);
    spec.transpose = attributes_.transpose;
    spec.scale = attributes_.scale;
    spec.signs_length = signs.size();

    std::size_t rows = 1;
    for (std::size_t i = 0; i + 1 < dims.size(); ++i) rows *= static_cast<std::size_t>(dims[i]);
    if (rows == 0 || spec.size == 0) return;
    const Transform transform(spec);
    run(context, transform, data_of(api_, x), const_cast<void*>(data_of(api_, y)), rows, signs.empty() ? nullptr : signs.data());
  }

 private:
  std::vector<float> signs_input(const KernelContext* context) const {
    std::size_t inputs = 0;
    check(api_, KernelContext_GetInputCount(api_, context, &inputs));
    const Value* value = nullptr;
    if (inputs > 1) check(api_, KernelContext_GetInput(api_, context, 1, &value));
    return value == nullptr ? std::vector<float>() : read_signs(api_, value);
  }

  void run(const KernelContext* context, const Transform& transform, const void* in, void* out, std::size_t rows,
           const float* signs) const {
    const std::size_t chunk = std::max<std::size_t>(1, kChunkElements / transform.size());
    const std::size_t chunks = rows / chunk;
    if (chunks < 2) return transform.range(in, out, 0, rows, signs);

    struct Work {
      const Api* api;
      const Transform& transform;
      const void* in;
      void* out;
      const float* signs;
      std::size_t rows;
      std::size_t chunks;
      std::vector<Status*> failures;  // one slot a chunk, so that no two threads write to the same one
    } work{api_, transform, in, out, signs, rows, chunks, std::vector<Status*>(chunks, nullptr)};

    // Rows are shared out evenly, and a row is computed the same way wherever it falls: the result does not depend on
    // the number of threads.
    Status* status = KernelContext_ParallelFor(
        api_, context,
        [](void* data, std::size_t i) {
          auto& job = *static_cast<Work*>(data);
          const std::size_t first = job.rows / job.chunks * i + std::min(i, job.rows % job.chunks);
          const std::size_t count = job.rows / job.chunks + (i < job.rows % job.chunks ? 1 : 0);
          job.failures[i] =
              guarded(job.api, [&] { job.transform.range(job.in, job.out, first, count, job.signs); });
        },
        chunks, 0, &work);
    for (Status* failure : work.failures) {
      if (failure == nullptr) continue;
      if (status == nullptr) {
        status = failure;
      } else {
        ReleaseStatus(api_, failure);
      }
    }
    check(api_, status);
  }

  const Api* api_;
  DType dtype_;
  Attributes attributes_;
  std::optional<std::vector<float>> constant_signs_;  // empty optional: signs absent, or known only when running
};

// Called for the node whatever the type of X: the type travels with the shape. ONNX Runtime reports what it returns
// when the model is loaded.
void infer_shape(const Api* api, ShapeInferContext* context) {
  const Attributes attributes = attributes_of(api, context);
  TensorInfo* x = nullptr;
  check(api, ShapeInferContext_GetInputTypeShape(api, context, 0, &x));
  const std::vector<std::int64_t> dims = dims_of(api, static_cast<const TensorInfo*>(x));
  if (dims.empty()) return;  // an unknown rank, or a scalar, which fails when it runs
  if (dims.back() >= 1) {
    const auto size = static_cast<std::size_t>(dims.back());
    const std::size_t block = attributes.block_size.value_or(size);
    if (size % block != 0) {
      throw std::invalid_argument("Hadamard: block_size is " + std::to_string(block) +
                                  ": it must divide the last axis of X, of length " + std::to_string(size));
    }
    factorize(block);
  }
  check(api, ShapeInferContext_SetOutputTypeShape(api, context, 0, x));
}

const HadamardOp* self(const CustomOp* op) { return static_cast<const HadamardOp*>(op); }

}  // namespace

HadamardOp::HadamardOp(const Api* table, ElementType element) : CustomOp{}, api(table), type(element) {
  version = kApiVersion;
  GetName = [](const CustomOp*) { return "Hadamard"; };
  GetExecutionProviderType = [](const CustomOp*) -> const char* { return nullptr; };
  GetInputType = [](const CustomOp* op, std::size_t index) { return index == 0 ? self(op)->type : kInt8; };
  GetInputTypeCount = [](const CustomOp*) { return std::size_t{2}; };
  GetInputCharacteristic = [](const CustomOp*, std::size_t index) { return index == 0 ? kRequired : kOptional; };
  GetInputMemoryType = [](const CustomOp*, std::size_t) { return kDefaultMemory; };
  GetOutputType = [](const CustomOp* op, std::size_t) { return self(op)->type; };
  GetOutputTypeCount = [](const CustomOp*) { return std::size_t{1}; };
  GetOutputCharacteristic = [](const CustomOp*, std::size_t) { return kRequired; };
  GetVariadicInputMinArity = GetVariadicInputHomogeneity = [](const CustomOp*) { return 0; };
  GetVariadicOutputMinArity = GetVariadicOutputHomogeneity = [](const CustomOp*) { return 0; };
  GetStartVersion = [](const CustomOp*) { return 1; };
  GetEndVersion = [](const CustomOp*) { return 1; };
  CreateKernelV2 = [](const CustomOp* op, const Api* table_now, const KernelInfo* info, void** kernel) {
    return guarded(table_now, [&] { *kernel = new HadamardKernel(table_now, self(op)->type, info); });
  };
  KernelComputeV2 = [](void* kernel, KernelContext* context) {
    const auto* self_kernel = static_cast<const HadamardKernel*>(kernel);
    return guarded(self_kernel->api(), [&] { self_kernel->compute(context); });
  };
  KernelDestroy = [](void* kernel) { delete static_cast<HadamardKernel*>(kernel); };
  InferOutputShapeFn = [](const CustomOp* op, ShapeInferContext* context) {
    return guarded(self(op)->api, [&] { infer_shape(self(op)->api, context); });
  };
}

}  // namespace onnx_quarot::ort
