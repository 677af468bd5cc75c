#include "hadamard.h"

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "fwht.h"
#include "orders.h"
#include "status.h"

namespace onnx_quarot::ort {
namespace {

// Work handed to a thread at once, in additions: 10 to 20 us, far above what waking a thread costs. Inputs of less than
// two such pieces never touch the pool.
constexpr std::size_t kChunkCost = std::size_t{1} << 18;

// Additions a row, about: the stages of the power of two, and a quarter of each order (the kernels look up sums of four).
std::size_t row_cost(const Transform& transform) {
  const Factors factors = factorize(transform.block_size());
  std::size_t cost = 1 + factors.log2_power;
  if (factors.order > 1) {
    for (const std::size_t order : order_factors(factors.order)) cost += order / 4;
  }
  return transform.size() * cost;
}

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

Attributes read_attributes(const AttributeReader& reader) {
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

// Shape of an input as far as the model states it; empty for an unknown rank.
std::vector<std::int64_t> declared_dims(const Api* api, const KernelInfo* info, std::size_t input) {
  TypeInfo* type = nullptr;
  check(api, KernelInfo_GetInputTypeInfo(api, info, input, &type));
  const auto release = [api](TypeInfo* held) { ReleaseTypeInfo(api, held); };
  const std::unique_ptr<TypeInfo, decltype(release)> owner(type, release);
  const TensorInfo* tensor = nullptr;
  check(api, CastTypeInfoToTensorInfo(api, type, &tensor));
  return tensor == nullptr ? std::vector<std::int64_t>() : dims_of(api, tensor);
}

std::string name_of(const Api* api, const KernelInfo* info) {
  std::size_t size = 0;
  check(api, KernelInfo_GetNodeName(api, info, nullptr, &size));
  std::string name(size, '\0');
  check(api, KernelInfo_GetNodeName(api, info, name.data(), &size));
  return name.c_str();  // the size counts the terminating zero
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

// Immutable once made: one kernel runs on many threads at once.
class HadamardKernel {
 public:
  HadamardKernel(const Api* api, ElementType type, const KernelInfo* info)
      : api_(api), dtype_(dtype_of(type)), attributes_(read_attributes(AttributeReader(api, info))) {
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

  void compute(KernelContext* context) const {
    const Value* x = nullptr;
    check(api_, KernelContext_GetInput(api_, context, 0, &x));
    const std::vector<std::int64_t> dims = dims_of(api_, x);
    if (dims.empty()) throw std::invalid_argument("X has rank 0: it must have a last axis to transform");
    Value* y = nullptr;
    check(api_, KernelContext_GetOutput(api_, context, 0, dims.data(), dims.size(), &y));

    std::vector<float> given_signs;
    const std::vector<float>& signs = constant_signs_ ? *constant_signs_ : (given_signs = signs_input(context));
    const auto size = static_cast<std::size_t>(dims.back());
    std::size_t rows = 1;
    for (std::size_t i = 0; i + 1 < dims.size(); ++i) rows *= static_cast<std::size_t>(dims[i]);
    if (size == 0) return;
    const Transform transform(spec(size, signs.size()));
    if (rows == 0) return;
    run(context, transform, data_of(api_, x), const_cast<void*>(data_of(api_, y)), rows,
        signs.empty() ? nullptr : signs.data());
  }

 private:
  void read_constant_signs(const KernelInfo* info) {
    std::size_t inputs = 0;
    check(api_, KernelInfo_GetInputCount(api_, info, &inputs));
    if (inputs < 2) return;
    int constant = 0;
    const Value* value = nullptr;
    // Fails for an optional input that is left out: then there is nothing to keep.
    if (succeeded(api_, KernelInfoGetConstantInput_tensor(api_, info, 1, &constant, &value)) && constant != 0 &&
        value != nullptr) {
      constant_signs_ = read_signs(api_, value);
    }
  }

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

  std::vector<float> signs_input(const KernelContext* context) const {
    std::size_t inputs = 0;
    check(api_, KernelContext_GetInputCount(api_, context, &inputs));
    const Value* value = nullptr;
    if (inputs > 1) check(api_, KernelContext_GetInput(api_, context, 1, &value));
    return value == nullptr ? std::vector<float>() : read_signs(api_, value);
  }

  void run(const KernelContext* context, const Transform& transform, const void* in, void* out, std::size_t rows,
           const float* signs) const {
    const std::size_t chunk = std::max<std::size_t>(1, kChunkCost / row_cost(transform));
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

// Called whatever the type of X is: the type travels with the shape.
void infer_shape(const Api* api, ShapeInferContext* context) {
  TensorInfo* x = nullptr;
  check(api, ShapeInferContext_GetInputTypeShape(api, context, 0, &x));
  // Rank 0 is an unknown rank, which must not turn into a scalar, or a scalar, which fails when it runs.
  if (!dims_of(api, static_cast<const TensorInfo*>(x)).empty()) {
    check(api, ShapeInferContext_SetOutputTypeShape(api, context, 0, x));
  }
}

// ONNX Runtime names the node in errors of running it, but not in those of making it.
HadamardKernel* make_kernel(const Api* api, ElementType type, const KernelInfo* info) {
  try {
    return new HadamardKernel(api, type, info);
  } catch (const std::invalid_argument& error) {
    throw std::invalid_argument("Hadamard node '" + name_of(api, info) + "': " + error.what());
  }
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
    return guarded(table_now, [&] { *kernel = make_kernel(table_now, self(op)->type, info); });
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
