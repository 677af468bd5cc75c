// Compiled, and never linked, where ONNX Runtime's own header is at hand: abi.h must say what it says.
#include <onnxruntime_c_api.h>

#include "abi.h"

namespace onnx_quarot::ort {

#define CHECK_SLOT(name) \
  static_assert(offsetof(OrtApi, name) == decltype(name)::slot * sizeof(void (*)()), #name " is in another slot")

CHECK_SLOT(CreateStatus);
CHECK_SLOT(ReleaseStatus);
CHECK_SLOT(CreateCustomOpDomain);
CHECK_SLOT(CustomOpDomain_Add);
CHECK_SLOT(AddCustomOpDomain);
CHECK_SLOT(AddSessionConfigEntry);
CHECK_SLOT(HasSessionConfigEntry);
CHECK_SLOT(ReleaseCustomOpDomain);
CHECK_SLOT(KernelInfoGetAttribute_float);
CHECK_SLOT(KernelInfoGetAttribute_int64);
CHECK_SLOT(KernelInfoGetAttribute_string);
CHECK_SLOT(KernelInfoGetAttributeArray_float);
CHECK_SLOT(KernelInfoGetAttributeArray_int64);
CHECK_SLOT(KernelInfo_GetNodeName);
CHECK_SLOT(KernelInfo_GetInputTypeInfo);
CHECK_SLOT(CastTypeInfoToTensorInfo);
CHECK_SLOT(ReleaseTypeInfo);
CHECK_SLOT(KernelInfo_GetInputCount);
CHECK_SLOT(KernelInfo_GetOutputCount);
CHECK_SLOT(KernelInfo_GetInputName);
CHECK_SLOT(KernelInfo_GetOutputName);
CHECK_SLOT(KernelInfoGetConstantInput_tensor);
CHECK_SLOT(KernelContext_GetInputCount);
CHECK_SLOT(KernelContext_GetInput);
CHECK_SLOT(KernelContext_GetOutput);
CHECK_SLOT(KernelContext_ParallelFor);
CHECK_SLOT(GetTensorMutableData);
CHECK_SLOT(GetTensorTypeAndShape);
CHECK_SLOT(ReleaseTensorTypeAndShapeInfo);
CHECK_SLOT(CreateTensorTypeAndShapeInfo);
CHECK_SLOT(SetTensorElementType);
CHECK_SLOT(SetDimensions);
CHECK_SLOT(GetSymbolicDimensions);
CHECK_SLOT(SetSymbolicDimensions);
CHECK_SLOT(GetTensorElementType);
CHECK_SLOT(GetDimensionsCount);
CHECK_SLOT(GetDimensions);
CHECK_SLOT(ShapeInferContext_GetInputTypeShape);
CHECK_SLOT(ShapeInferContext_SetOutputTypeShape);
CHECK_SLOT(ShapeInferContext_GetAttribute);
CHECK_SLOT(ReadOpAttr);

#define CHECK_FIELD(name) static_assert(offsetof(OrtCustomOp, name) == offsetof(CustomOp, name), #name " is elsewhere")

CHECK_FIELD(version);
CHECK_FIELD(CreateKernel);
CHECK_FIELD(GetName);
CHECK_FIELD(GetExecutionProviderType);
CHECK_FIELD(GetInputType);
CHECK_FIELD(GetInputTypeCount);
CHECK_FIELD(GetOutputType);
CHECK_FIELD(GetOutputTypeCount);
CHECK_FIELD(KernelCompute);
CHECK_FIELD(KernelDestroy);
CHECK_FIELD(GetInputCharacteristic);
CHECK_FIELD(GetOutputCharacteristic);
CHECK_FIELD(GetInputMemoryType);
CHECK_FIELD(GetVariadicInputMinArity);
CHECK_FIELD(GetVariadicInputHomogeneity);
CHECK_FIELD(GetVariadicOutputMinArity);
CHECK_FIELD(GetVariadicOutputHomogeneity);
CHECK_FIELD(CreateKernelV2);
CHECK_FIELD(KernelComputeV2);
CHECK_FIELD(InferOutputShapeFn);
CHECK_FIELD(GetStartVersion);
CHECK_FIELD(GetEndVersion);

static_assert(offsetof(OrtApiBase, GetApi) == offsetof(ApiBase, GetApi));
static_assert(offsetof(OrtApiBase, GetVersionString) == offsetof(ApiBase, GetVersionString));
static_assert(ORT_FAIL == static_cast<int>(kFail) && ORT_INVALID_ARGUMENT == static_cast<int>(kInvalidArgument));
static_assert(ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT == static_cast<int>(kFloat));
static_assert(ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8 == static_cast<int>(kUInt8));
static_assert(ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8 == static_cast<int>(kInt8));
static_assert(ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 == static_cast<int>(kFloat16));
static_assert(ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE == static_cast<int>(kDouble));
static_assert(ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16 == static_cast<int>(kBFloat16));
static_assert(INPUT_OUTPUT_REQUIRED == static_cast<int>(kRequired));
static_assert(INPUT_OUTPUT_OPTIONAL == static_cast<int>(kOptional));
static_assert(ORT_OP_ATTR_INTS == static_cast<int>(kIntsAttribute));
static_assert(ORT_OP_ATTR_INT == static_cast<int>(kIntAttribute) && sizeof(OrtOpAttrType) == sizeof(AttributeType));
static_assert(OrtMemTypeDefault == static_cast<int>(kDefaultMemory));
static_assert(sizeof(OrtErrorCode) == sizeof(ErrorCode) && sizeof(OrtMemType) == sizeof(MemoryType));

}  // namespace onnx_quarot::ort
