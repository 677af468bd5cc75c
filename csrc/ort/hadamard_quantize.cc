#include "hadamard_quantize.h"

#include <cmath>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "node.h"
#include "operator.h"

namespace onnx_quarot::ort {
namespace {

void* output(const Api* api, KernelContext* context, std::size_t index, const std::vector<std::int64_t>& dims) {
  Value* value = nullptr;
  check(api, KernelContext_GetOutput(api, context, index, dims.data(), dims.size(), &value));
  return const_cast<void*>(data_of(api, value));
}

// The only element of an input.
const void* element(const Api* api, const KernelContext* context, std::size_t index, const char* name) {
  const Value* value = nullptr;
  check(api, KernelContext_GetInput(api, context, index, &value));
  std::int64_t count = 1;
  for (const std::int64_t dim : dims_of(api, value)) count *= dim;
  if (count != 1)
    throw std::invalid_argument(std::string(name) + " has " + std::to_string(count) + " elements: it must have 1");
  return data_of(api, value);
}

class QuantizeKernel {
 public:
  QuantizeKernel(const Api* api, ElementType type, const KernelInfo* info)
      : node_(api, DType::float32, info, 3), type_(type == kInt8 ? QuantizedType::int8 : QuantizedType::uint8) {}

  const Api* api() const { return node_.api(); }

  void compute(KernelContext* context) const {
    const Input x = read_input(api(), context);
    const float y_scale = *static_cast<const float*>(element(api(), context, 1, "y_scale"));
    const void* zero = element(api(), context, 2, "y_zero_point");
    void* y = output(api(), context, 0, x.dims);
    if (!(y_scale > 0) || std::isinf(y_scale)) {
      throw std::invalid_argument("y_scale is " + std::to_string(y_scale) + ": it must be positive and finite");
    }
    std::vector<float> storage;
    const std::vector<float>& signs = node_.signs(context, storage);
    if (x.size == 0) return;
    TransformSpec spec = node_.spec(x.size, signs.size());
    const auto block = static_cast<double>(spec.block_size == 0 ? spec.size : spec.block_size);
    spec.scale = spec.scale.value_or(1.0 / std::sqrt(block)) / static_cast<double>(y_scale);
    const Transform transform(spec);
    const std::int32_t zero_point = type_ == QuantizedType::int8
                                        ? std::int32_t{*static_cast<const std::int8_t*>(zero)}
                                        : std::int32_t{*static_cast<const std::uint8_t*>(zero)};
    const float* sign_values = signs.empty() ? nullptr : signs.data();
    run_rows(api(), context, transform, x.rows, [&](std::size_t first, std::size_t count) {
      transform.quantize(static_cast<const float*>(x.data), y, first, count, sign_values, type_, zero_point);
    });
  }

 private:
  HadamardNode node_;
  QuantizedType type_;
};

class DynamicQuantizeKernel {
 public:
  DynamicQuantizeKernel(const Api* api, const KernelInfo* info) : node_(api, DType::float32, info, 1) {}

  const Api* api() const { return node_.api(); }

  void compute(KernelContext* context) const {
    const Input x = read_input(api(), context);
    std::vector<std::int64_t> scale_dims = x.dims;
    scale_dims.back() = 1;
    auto* y = static_cast<std::int8_t*>(output(api(), context, 0, x.dims));
    auto* y_scale = static_cast<float*>(output(api(), context, 1, scale_dims));
    std::vector<float> storage;
    const std::vector<float>& signs = node_.signs(context, storage);
    if (x.size == 0) throw std::invalid_argument("X has a last axis of length 0: a row without elements has no scale");
    const Transform transform(node_.spec(x.size, signs.size()));
    const float* sign_values = signs.empty() ? nullptr : signs.data();
    run_rows(api(), context, transform, x.rows, [&](std::size_t first, std::size_t count) {
      transform.quantize_dynamic(static_cast<const float*>(x.data), y, y_scale, first, count, sign_values);
    });
  }

 private:
  HadamardNode node_;
};

const HadamardQuantizeOp* static_op(const CustomOp* op) { return static_cast<const HadamardQuantizeOp*>(op); }
const HadamardDynamicQuantizeOp* dynamic_op(const CustomOp* op) {
  return static_cast<const HadamardDynamicQuantizeOp*>(op);
}

}  // namespace

HadamardQuantizeOp::HadamardQuantizeOp(const Api* table, ElementType element) : CustomOp{}, api(table), type(element) {
  define_common<QuantizeKernel>(*this);
  GetName = [](const CustomOp*) { return "HadamardQuantizeLinear"; };
  GetInputTypeCount = [](const CustomOp*) { return std::size_t{4}; };
  GetInputType = [](const CustomOp* op, std::size_t index) {
    return index < 2 ? kFloat : index == 2 ? static_op(op)->type : kInt8;
  };
  GetInputCharacteristic = [](const CustomOp*, std::size_t index) { return index < 3 ? kRequired : kOptional; };
  GetOutputTypeCount = [](const CustomOp*) { return std::size_t{1}; };
  GetOutputType = [](const CustomOp* op, std::size_t) { return static_op(op)->type; };
  CreateKernelV2 = [](const CustomOp* op, const Api* now, const KernelInfo* info, void** kernel) {
    return made(op, now, info, kernel, [&] { return new QuantizeKernel(now, static_op(op)->type, info); });
  };
  InferOutputShapeFn = [](const CustomOp* op, ShapeInferContext* context) {
    const Api* api_now = static_op(op)->api;
    // One definition answers for all types of zero point: the type is that of the input.
    return guarded(api_now, [&] {
      TensorInfo* zero_point = nullptr;
      check(api_now, ShapeInferContext_GetInputTypeShape(api_now, context, 2, &zero_point));
      ElementType element_type = kInt8;
      check(api_now, GetTensorElementType(api_now, zero_point, &element_type));
      infer_output(api_now, context, 0, element_type, 0);
    });
  };
}

HadamardDynamicQuantizeOp::HadamardDynamicQuantizeOp(const Api* table) : CustomOp{}, api(table) {
  define_common<DynamicQuantizeKernel>(*this);
  GetName = [](const CustomOp*) { return "HadamardDynamicQuantizeLinear"; };
  GetInputTypeCount = [](const CustomOp*) { return std::size_t{2}; };
  GetInputType = [](const CustomOp*, std::size_t index) { return index == 0 ? kFloat : kInt8; };
  GetInputCharacteristic = [](const CustomOp*, std::size_t index) { return index == 0 ? kRequired : kOptional; };
  GetOutputTypeCount = [](const CustomOp*) { return std::size_t{2}; };
  GetOutputType = [](const CustomOp*, std::size_t index) { return index == 0 ? kInt8 : kFloat; };
  CreateKernelV2 = [](const CustomOp* op, const Api* now, const KernelInfo* info, void** kernel) {
    return made(op, now, info, kernel, [&] { return new DynamicQuantizeKernel(now, info); });
  };
  InferOutputShapeFn = [](const CustomOp* op, ShapeInferContext* context) {
    const Api* api_now = dynamic_op(op)->api;
    return guarded(api_now, [&] {
      infer_output(api_now, context, 0, kInt8, 0);
      infer_output(api_now, context, 1, kFloat, 1);
    });
  };
}

}  // namespace onnx_quarot::ort
