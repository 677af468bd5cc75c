// RegisterCustomOps: the one function that ONNX Runtime looks up in this library.
#include <array>
#include <map>
#include <memory>
#include <mutex>
#include <string>

#include "abi.h"
#include "attention.h"
#include "hadamard.h"
#include "hadamard_quantize.h"
#include "qlinear.h"
#include "status.h"

#if defined(_WIN32)
#define ONNX_QUAROT_EXPORT __declspec(dllexport)
#else
#define ONNX_QUAROT_EXPORT __attribute__((visibility("default")))
#endif

namespace onnx_quarot::ort {
namespace {

constexpr const char* kDomain = "onnx_quarot";
constexpr const char* kRegistered = "onnx_quarot.registered";

// The domain and its operators. Session options only point at them, so they live as long as the process does.
class Domain {
 public:
  explicit Domain(const Api* api)
      : hadamard_{{{api, kFloat}, {api, kFloat16}, {api, kBFloat16}, {api, kDouble}}},
        quantize_{{{api, kInt8}, {api, kUInt8}}},
        dynamic_quantize_(api),
        linears_{{{api, kFloat}, {api, kFloat16}, {api, kBFloat16}}},
        attention_(api) {
    const auto release = [api](CustomOpDomain* held) { ReleaseCustomOpDomain(api, held); };
    CustomOpDomain* made = nullptr;
    check(api, CreateCustomOpDomain(api, kDomain, &made));
    std::unique_ptr<CustomOpDomain, decltype(release)> owner(made, release);
    for (const HadamardOp& op : hadamard_) check(api, CustomOpDomain_Add(api, made, &op));
    for (const HadamardQuantizeOp& op : quantize_) check(api, CustomOpDomain_Add(api, made, &op));
    check(api, CustomOpDomain_Add(api, made, &dynamic_quantize_));
    for (const QLinearOp& op : linears_) check(api, CustomOpDomain_Add(api, made, &op));
    check(api, CustomOpDomain_Add(api, made, &attention_));
    handle_ = owner.release();
  }

  CustomOpDomain* handle() const { return handle_; }

 private:
  std::array<HadamardOp, 4> hadamard_;
  std::array<HadamardQuantizeOp, 2> quantize_;
  HadamardDynamicQuantizeOp dynamic_quantize_;
  std::array<QLinearOp, 3> linears_;
  AttentionOp attention_;
  CustomOpDomain* handle_ = nullptr;
};

// One domain for each ONNX Runtime in the process (onnxruntime-genai, for one, may bring its own), made at its first
// registration. Never destroyed: sessions may still be closing while static objects go away.
CustomOpDomain* domain_of(const Api* api) {
  static auto& mutex = *new std::mutex;
  static auto& domains = *new std::map<const Api*, std::unique_ptr<Domain>>;
  const std::lock_guard<std::mutex> lock(mutex);
  std::unique_ptr<Domain>& domain = domains[api];
  if (domain == nullptr) domain = std::make_unique<Domain>(api);
  return domain->handle();
}

// No session can be made from options that hold the same domain twice, be it of this file or of a copy of it, and they
// cannot be asked what they hold. An entry in them says so, which is copied and released with them.
void register_once(const Api* api, SessionOptions* options) {
  int registered = 0;
  check(api, HasSessionConfigEntry(api, options, kRegistered, &registered));
  if (registered != 0) return;
  check(api, AddCustomOpDomain(api, options, domain_of(api)));
  check(api, AddSessionConfigEntry(api, options, kRegistered, "1"));
}

}  // namespace
}  // namespace onnx_quarot::ort

extern "C" ONNX_QUAROT_EXPORT onnx_quarot::ort::Status* RegisterCustomOps(onnx_quarot::ort::SessionOptions* options,
                                                                          const onnx_quarot::ort::ApiBase* base) {
  using namespace onnx_quarot::ort;
  if (const Api* api = base->GetApi(kApiVersion)) {
    return guarded(api, [&] { register_once(api, options); });
  }
  const Api* oldest = base->GetApi(1);
  return guarded(oldest, [&] {
    throw std::invalid_argument("onnx_quarot: ONNX Runtime " + std::string(base->GetVersionString()) +
                                " is too old for this library: it must be 1." + std::to_string(kApiVersion) +
                                " or newer");
  });
}
