// What the operators of this domain define in the same way.
#ifndef ONNX_QUAROT_ORT_OPERATOR_H
#define ONNX_QUAROT_ORT_OPERATOR_H

#include <stdexcept>
#include <string>

#include "abi.h"
#include "node.h"
#include "status.h"

namespace onnx_quarot::ort {

// Every callback but those about the operator's own inputs, outputs and shapes. A Kernel has api() and
// compute(context).
template <class Kernel>
void define_common(CustomOp& op) {
  op.version = kApiVersion;
  op.GetExecutionProviderType = [](const CustomOp*) -> const char* { return nullptr; };
  op.GetInputMemoryType = [](const CustomOp*, std::size_t) { return kDefaultMemory; };
  op.GetOutputCharacteristic = [](const CustomOp*, std::size_t) { return kRequired; };
  op.GetVariadicInputMinArity = op.GetVariadicInputHomogeneity = [](const CustomOp*) { return 0; };
  op.GetVariadicOutputMinArity = op.GetVariadicOutputHomogeneity = [](const CustomOp*) { return 0; };
  op.GetStartVersion = [](const CustomOp*) { return 1; };
  op.GetEndVersion = [](const CustomOp*) { return 1; };
  op.KernelComputeV2 = [](void* kernel, KernelContext* context) {
    const auto* self = static_cast<const Kernel*>(kernel);
    return guarded(self->api(), [&] { self->compute(context); });
  };
  op.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
}

// Stores what make() returns as the kernel of a node. ONNX Runtime names the node in errors of running a kernel, but
// not in those of making it.
template <class Make>
Status* made(const CustomOp* op, const Api* api, const KernelInfo* info, void** kernel, const Make& make) {
  return guarded(api, [&] {
    try {
      *kernel = make();
    } catch (const std::invalid_argument& error) {
      throw std::invalid_argument(std::string(op->GetName(op)) + " node '" + name_of(api, info) + "': " + error.what());
    }
  });
}

}  // namespace onnx_quarot::ort

#endif
