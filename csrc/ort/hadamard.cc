#include "hadamard.h"

#include <vector>

#include "node.h"
#include "operator.h"

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

// One definition answers for all types of X: the type is that of the input.
void infer_shape(const Api* api, ShapeInferContext* context) {
  TensorInfo* x = nullptr;
  check(api, ShapeInferContext_GetInputTypeShape(api, context, 0, &x));
  ElementType type = kFloat;
  check(api, GetTensorElementType(api, x, &type));
  infer_output(api, context, 0, type, 0);
}

const HadamardOp* self(const CustomOp* op) { return static_cast<const HadamardOp*>(op); }

}  // namespace

HadamardOp::HadamardOp(const Api* table, ElementType element) : CustomOp{}, api(table), type(element) {
  define_common<HadamardKernel>(*this);
  GetName = [](const CustomOp*) { return "Hadamard"; };
  GetInputTypeCount = [](const CustomOp*) { return std::size_t{2}; };
  GetInputType = [](const CustomOp* op, std::size_t index) { return index == 0 ? self(op)->type : kInt8; };
  GetInputCharacteristic = [](const CustomOp*, std::size_t index) { return index == 0 ? kRequired : kOptional; };
  GetOutputTypeCount = [](const CustomOp*) { return std::size_t{1}; };
  GetOutputType = [](const CustomOp* op, std::size_t) { return self(op)->type; };
  CreateKernelV2 = [](const CustomOp* op, const Api* now, const KernelInfo* info, void** kernel) {
    return made(op, now, info, kernel, [&] { return new HadamardKernel(now, self(op)->type, info); });
  };
  InferOutputShapeFn = [](const CustomOp* op, ShapeInferContext* context) {
    return guarded(self(op)->api, [&] { infer_shape(self(op)->api, context); });
  };
}

}  // namespace onnx_quarot::ort
