#include "hadamard.h"

#include <stdexcept>
#include <string>
#include <vector>

#include "node.h"

namespace onnx_quarot::ort {
namespace {

// Immutable once made: one kernel runs on many threads at once.
class HadamardKernel {
 public:
  HadamardKernel(const Api* api, ElementType type, const KernelInfo* info) : node_(api, dtype_of(type), info, 1) {}

  const Api* api() const { return node_.api(); }

  void compute(KernelContext* context) const {
    const Input x = read_input(api(), context);
    Value* y = nullptr;
    check(api(), KernelContext_GetOutput(api(), context, 0, x.dims.data(), x.dims.size(), &y));
    std::vector<float> storage;
    const std::vector<float>& signs = node_.signs(context, storage);
    if (x.size == 0) return;
    const Transform transform(node_.spec(x.size, signs.size()));
    if (x.rows == 0) return;
    void* out = const_cast<void*>(data_of(api(), y));
    const float* sign_values = signs.empty() ? nullptr : signs.data();
    run_rows(api(), context, transform, x.rows,
             [&](std::size_t first, std::size_t count) { transform.range(x.data, out, first, count, sign_values); });
  }

 private:
  HadamardNode node_;
};

// Called whatever the type of X is: the type travels with the shape.
void infer_shape(const Api* api, ShapeInferContext* context) {
  TensorInfo* x = nullptr;
  check(api, ShapeInferContext_GetInputTypeShape(api, context, 0, &x));
  // Rank 0 is an unknown rank, which must not turn into a scalar, or a scalar, which fails when it runs.
  const std::vector<std::int64_t> dims = dims_of(api, static_cast<const TensorInfo*>(x));
  if (dims.empty()) return;
  // A dimension that is neither known nor named would be stored as the number -1, which shape arithmetic downstream
  // takes at its word.
  std::vector<const char*> names(dims.size());
  check(api, GetSymbolicDimensions(api, x, names.data(), names.size()));
  for (std::size_t i = 0; i < dims.size(); ++i) {
    if (dims[i] < 0 && (names[i] == nullptr || *names[i] == '\0')) return;
  }
  check(api, ShapeInferContext_SetOutputTypeShape(api, context, 0, x));
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
