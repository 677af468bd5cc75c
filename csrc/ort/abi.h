// The slice of ONNX Runtime's C ABI that the custom operators use, and nothing else of it.
//
// The Python wheels of ONNX Runtime ship no headers, so building against them would mean downloading a release archive
// that matches. There is no need to: the ABI is a table of function pointers (`OrtApi`) that only ever grows at its
// end, so the position of an entry, its slot, is fixed for good from the version that added it. The slots below are
// zero-based positions in that table; abi_check.cc compares them with the official header wherever one is found.
#ifndef ONNX_QUAROT_ORT_ABI_H
#define ONNX_QUAROT_ORT_ABI_H

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(_WIN32) && !defined(_WIN64)
#error \
    "ONNX Runtime's functions are __stdcall on 32-bit Windows; these declarations are for one calling convention only."
#endif

namespace onnx_quarot::ort {

// The version of the table that is asked for: the first one with all slots below (1.17 brought shape inference and
// ParallelFor to custom operators). Every later ONNX Runtime serves it too.
inline constexpr std::uint32_t kApiVersion = 17;

// Opaque to us. A Status* of null is success; any other has one owner, who releases it.
struct Status;
struct Value;
struct TypeInfo;
struct TensorInfo;  // OrtTensorTypeAndShapeInfo
struct SessionOptions;
struct CustomOpDomain;
struct KernelInfo;
struct KernelContext;
struct ShapeInferContext;
struct OpAttribute;  // OrtOpAttr
struct Api;          // OrtApi: read through Entry only

struct ApiBase {
  const Api* (*GetApi)(std::uint32_t version);  // null if this ONNX Runtime is older than `version`
  const char* (*GetVersionString)();
};

enum ErrorCode : int { kFail = 1, kInvalidArgument = 2 };

// ONNXTensorElementDataType, which is also onnx.TensorProto.DataType for these.
enum ElementType : int { kFloat = 1, kUInt8 = 2, kInt8 = 3, kInt32 = 6, kFloat16 = 10, kDouble = 11, kBFloat16 = 16 };

enum Characteristic : int { kRequired = 0, kOptional = 1 };

enum AttributeType : int { kIntAttribute = 1, kIntsAttribute = 2 };

enum MemoryType : int { kDefaultMemory = 0 };

struct CustomOp;

// One entry of the table: called with the table first, Entry<...>{}(api, arguments...).
template <std::size_t Slot, class Signature>
struct Entry;

template <std::size_t Slot, class Result, class... Arguments>
struct Entry<Slot, Result(Arguments...)> {
  static constexpr std::size_t slot = Slot;

  Result operator()(const Api* api, Arguments... arguments) const {
    Result (*function)(Arguments...);
    std::memcpy(static_cast<void*>(&function), reinterpret_cast<const char*>(api) + Slot * sizeof(function),
                sizeof(function));
    return function(arguments...);
  }
};

// Registration. CreateStatus is in every version of the table, so that "too old" itself can be reported.
inline constexpr Entry<0, Status*(ErrorCode, const char* message)> CreateStatus{};
inline constexpr Entry<93, void(Status*)> ReleaseStatus{};
inline constexpr Entry<26, Status*(const char* domain, CustomOpDomain** out)> CreateCustomOpDomain{};
inline constexpr Entry<27, Status*(CustomOpDomain*, const CustomOp*)> CustomOpDomain_Add{};
inline constexpr Entry<28, Status*(SessionOptions*, CustomOpDomain*)> AddCustomOpDomain{};
inline constexpr Entry<130, Status*(SessionOptions*, const char* key, const char* value)> AddSessionConfigEntry{};
inline constexpr Entry<237, Status*(const SessionOptions*, const char* key, int* out)> HasSessionConfigEntry{};
inline constexpr Entry<101, void(CustomOpDomain*)> ReleaseCustomOpDomain{};

// Making a kernel. An absent attribute and one of another type both come back as a failure. Given null for `out`, the
// entries with a size only store how much there is.
inline constexpr Entry<85, Status*(const KernelInfo*, const char* name, float* out)> KernelInfoGetAttribute_float{};
inline constexpr Entry<86, Status*(const KernelInfo*, const char* name, std::int64_t* out)>
    KernelInfoGetAttribute_int64{};
inline constexpr Entry<87, Status*(const KernelInfo*, const char* name, char* out, std::size_t* size)>
    KernelInfoGetAttribute_string{};
inline constexpr Entry<162, Status*(const KernelInfo*, const char* name, float* out, std::size_t* size)>
    KernelInfoGetAttributeArray_float{};
inline constexpr Entry<163, Status*(const KernelInfo*, const char* name, std::int64_t* out, std::size_t* size)>
    KernelInfoGetAttributeArray_int64{};
inline constexpr Entry<244, Status*(const KernelInfo*, char* out, std::size_t* size)> KernelInfo_GetNodeName{};
inline constexpr Entry<230, Status*(const KernelInfo*, std::size_t* out)> KernelInfo_GetInputCount{};
inline constexpr Entry<231, Status*(const KernelInfo*, std::size_t* out)> KernelInfo_GetOutputCount{};
// Empty for an optional input or output that is left out.
inline constexpr Entry<232, Status*(const KernelInfo*, std::size_t index, char* out, std::size_t* size)>
    KernelInfo_GetInputName{};
inline constexpr Entry<233, Status*(const KernelInfo*, std::size_t index, char* out, std::size_t* size)>
    KernelInfo_GetOutputName{};
// Makes a TypeInfo that the caller releases; the TensorInfo that it is cast to is part of it.
inline constexpr Entry<234, Status*(const KernelInfo*, std::size_t index, TypeInfo** out)>
    KernelInfo_GetInputTypeInfo{};
inline constexpr Entry<55, Status*(const TypeInfo*, const TensorInfo** out)> CastTypeInfoToTensorInfo{};
inline constexpr Entry<98, void(TypeInfo*)> ReleaseTypeInfo{};
// *value stays null and *constant zero when the input is not an initializer. The value belongs to the session.
inline constexpr Entry<249, Status*(const KernelInfo*, std::size_t index, int* constant, const Value** value)>
    KernelInfoGetConstantInput_tensor{};

// Running it. Inputs and outputs belong to the context; *input is null for an optional input left out.
inline constexpr Entry<88, Status*(const KernelContext*, std::size_t* out)> KernelContext_GetInputCount{};
inline constexpr Entry<90, Status*(const KernelContext*, std::size_t index, const Value** input)>
    KernelContext_GetInput{};
inline constexpr Entry<91, Status*(KernelContext*, std::size_t index, const std::int64_t* dims, std::size_t rank,
                                   Value** out)>
    KernelContext_GetOutput{};
// Calls function(data, i) for i in [0, total) on the session's intra-op threads and returns when all are done.
// batches 0: each i is a task of its own.
inline constexpr Entry<274, Status*(const KernelContext*, void (*function)(void* data, std::size_t i),
                                    std::size_t total, std::size_t batches, void* data)>
    KernelContext_ParallelFor{};

// Tensors. GetTensorTypeAndShape makes a TensorInfo that the caller releases.
inline constexpr Entry<51, Status*(Value*, void** data)> GetTensorMutableData{};
inline constexpr Entry<65, Status*(const Value*, TensorInfo** out)> GetTensorTypeAndShape{};
inline constexpr Entry<99, void(TensorInfo*)> ReleaseTensorTypeAndShapeInfo{};
inline constexpr Entry<60, Status*(const TensorInfo*, ElementType* out)> GetTensorElementType{};
inline constexpr Entry<61, Status*(const TensorInfo*, std::size_t* rank)> GetDimensionsCount{};
// Of a TensorInfo that the caller made, and releases.
inline constexpr Entry<57, Status*(TensorInfo** out)> CreateTensorTypeAndShapeInfo{};
inline constexpr Entry<58, Status*(TensorInfo*, ElementType)> SetTensorElementType{};
inline constexpr Entry<59, Status*(TensorInfo*, const std::int64_t* dims, std::size_t rank)> SetDimensions{};
// The names of dimensions, empty where there is none; owned by the TensorInfo.
inline constexpr Entry<63, Status*(const TensorInfo*, const char** names, std::size_t rank)> GetSymbolicDimensions{};
inline constexpr Entry<271, Status*(TensorInfo*, const char** names, std::size_t rank)> SetSymbolicDimensions{};
// -1 stands for a dimension that is not known yet.
inline constexpr Entry<62, Status*(const TensorInfo*, std::int64_t* dims, std::size_t rank)> GetDimensions{};

// Shape inference. The TensorInfo belongs to the context. An unknown rank reads as rank 0. A failure that is returned
// from here is ignored unless the session asks for strict inference, so arguments are checked when kernels are made.
inline constexpr Entry<268, Status*(const ShapeInferContext*, std::size_t index, TensorInfo** out)>
    ShapeInferContext_GetInputTypeShape{};
// Undefined behaviour for an output the node does not have, and nothing tells how many those are.
inline constexpr Entry<270, Status*(const ShapeInferContext*, std::size_t index, const TensorInfo*)>
    ShapeInferContext_SetOutputTypeShape{};
// The attribute belongs to the context; *attribute stays null where there is none of this name. Reading one of another
// type is a failure.
inline constexpr Entry<269, Status*(const ShapeInferContext*, const char* name, const OpAttribute** attribute)>
    ShapeInferContext_GetAttribute{};
inline constexpr Entry<272,
                       Status*(const OpAttribute*, AttributeType, void* out, std::size_t size, std::size_t* written)>
    ReadOpAttr{};

// OrtCustomOp as of version 17: ONNX Runtime reads no field beyond those of the version stated in the first one.
struct CustomOp {
  std::uint32_t version;
  void* (*CreateKernel)(const CustomOp*, const Api*, const KernelInfo*);  // superseded by CreateKernelV2
  const char* (*GetName)(const CustomOp*);
  const char* (*GetExecutionProviderType)(const CustomOp*);  // null: CPU
  ElementType (*GetInputType)(const CustomOp*, std::size_t index);
  std::size_t (*GetInputTypeCount)(const CustomOp*);
  ElementType (*GetOutputType)(const CustomOp*, std::size_t index);
  std::size_t (*GetOutputTypeCount)(const CustomOp*);
  void (*KernelCompute)(void* kernel, KernelContext*);  // superseded by KernelComputeV2
  void (*KernelDestroy)(void* kernel);
  Characteristic (*GetInputCharacteristic)(const CustomOp*, std::size_t index);
  Characteristic (*GetOutputCharacteristic)(const CustomOp*, std::size_t index);
  MemoryType (*GetInputMemoryType)(const CustomOp*, std::size_t index);
  int (*GetVariadicInputMinArity)(const CustomOp*);
  int (*GetVariadicInputHomogeneity)(const CustomOp*);
  int (*GetVariadicOutputMinArity)(const CustomOp*);
  int (*GetVariadicOutputHomogeneity)(const CustomOp*);
  Status* (*CreateKernelV2)(const CustomOp*, const Api*, const KernelInfo*, void** kernel);
  Status* (*KernelComputeV2)(void* kernel, KernelContext*);
  Status* (*InferOutputShapeFn)(const CustomOp*, ShapeInferContext*);
  int (*GetStartVersion)(const CustomOp*);
  int (*GetEndVersion)(const CustomOp*);
};
static_assert(sizeof(CustomOp) == 22 * sizeof(void*), "OrtCustomOp has 22 fields in version 17");

}  // namespace onnx_quarot::ort

#endif
