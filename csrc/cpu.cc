#include "cpu.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "fwht.h"
#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace onnx_quarot {
namespace {

constexpr const char* kVariable = "ONNX_QUAROT_ISA";

struct Candidate {
  const Kernels* kernels;
  bool runs;
  const char* name;  // in the variable
};

#if defined(__x86_64__)
Kernels with_bfloat16(Kernels kernels) {
  kernels.types[static_cast<std::size_t>(DType::bfloat16)] = avx512_bfloat16_kernels;
  return kernels;
}
#endif

std::vector<Candidate> find_candidates() {
  std::vector<Candidate> found;
  const CpuFeatures cpu = detect_cpu();
#if defined(__x86_64__)
  static const Kernels converting = with_bfloat16(avx512_kernels);
  found.push_back({cpu.avx512bf16 ? &converting : &avx512_kernels, cpu.avx512, "avx512"});
  const Kernels* const avx2 = cpu.plain_differences ? &avx2_kernels
                              : cpu.short_lookahead ? &avx2_turns_kernels
                                                    : &avx2_fused_kernels;
  found.push_back({avx2, cpu.avx2, "avx2"});
  // Transforms have no use for its dot products, which QLinear has.
  found.push_back({avx2, cpu.avxvnni, "avxvnni"});
#elif defined(__aarch64__)
  found.push_back({&neon_kernels, cpu.neon, "neon"});
#endif
  found.push_back({&baseline_kernels, true, "baseline"});
  return found;
}

// Every kernel of this build, fastest first. Detected once: cpuid traps on a virtual machine and takes microseconds.
const std::vector<Candidate>& candidates() {
  static const std::vector<Candidate> found = find_candidates();
  return found;
}

// `source` says who asked, for the message.
const Kernels& choose(const std::string& name, const char* source) {
  for (const Candidate& candidate : candidates()) {
    if (name != candidate.name) continue;
    if (candidate.runs) return *candidate.kernels;
    throw std::invalid_argument(std::string(source) + " is '" + name + "', which this CPU cannot run");
  }
  std::string known;
  for (const Candidate& candidate : candidates()) {
    known += (known.empty() ? "" : ", ") + std::string(candidate.name);
  }
  throw std::invalid_argument(std::string(source) + " is '" + name + "'; this build knows " + known);
}

const Kernels& choose_from_environment() {
  const char* forced = std::getenv(kVariable);
  if (forced != nullptr && *forced != '\0') return choose(forced, kVariable);
  for (const Candidate& candidate : candidates()) {
    if (candidate.runs) return *candidate.kernels;
  }
  return baseline_kernels;
}

}  // namespace

#if defined(__x86_64__)
namespace {

// Which of AMD's Zen 1 (or 2), 3 and 4 this is, by vendor, family and model, as cpuid's leaves 0 and 1 say; 0: none.
unsigned zen_generation() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (__get_cpuid(0, &a, &b, &c, &d) == 0 || b != signature_AMD_ebx || c != signature_AMD_ecx) return 0;
  if (__get_cpuid(1, &a, &b, &c, &d) == 0 || (a >> 8 & 0xfu) != 0xfu) return 0;
  const unsigned family = 0xfu + (a >> 20 & 0xffu), model = (a >> 12 & 0xf0u) | (a >> 4 & 0xfu);
  if (family == 0x17u) return 1;
  if (family != 0x19u) return 0;
  return model < 0x10u || (model >= 0x20u && model < 0x60u) ? 3 : 4;
}

}  // namespace
#endif

CpuFeatures detect_cpu() {
  CpuFeatures features;
#if defined(__x86_64__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (__get_cpuid(1, &a, &b, &c, &d) == 0) return features;
  const bool fma = (c & bit_FMA) != 0, f16c = (c & bit_F16C) != 0, avx = (c & bit_AVX) != 0;
  if ((c & bit_OSXSAVE) == 0 || !avx) return features;
  unsigned saved = 0, high = 0;  // XCR0: the register states that the system saves on a context switch
  __asm__ volatile("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return features;
  constexpr unsigned ymm = 0x6, zmm = 0xe6;
  const unsigned zen = zen_generation();
  features.short_lookahead = zen != 0;
  features.plain_differences = features.several_streams = zen != 0 && zen < 4;
  features.avx2 = (saved & ymm) == ymm && fma && f16c && (b & bit_AVX2) != 0;
  const unsigned wanted = bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL;
  features.avx512 = features.avx2 && (saved & zmm) == zmm && (b & wanted) == wanted;
  // Not all compilers' headers have names for these.
  constexpr unsigned avx512_vnni = 1u << 11, avx_vnni = 1u << 4, avx512_bf16 = 1u << 5;
  features.avx512vnni = features.avx512 && (c & avx512_vnni) != 0;
  const bool subleaf = a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0;
  features.avxvnni = features.avx2 && subleaf && (a & avx_vnni) != 0;
  features.avx512bf16 = features.avx512 && subleaf && (a & avx512_bf16) != 0;
#elif defined(__aarch64__)
  features.neon = true;
#if defined(__linux__)
  constexpr unsigned long dot_product = 1ul << 20;  // HWCAP_ASIMDDP
  features.neon_dot = (getauxval(AT_HWCAP) & dot_product) != 0;
#elif defined(__APPLE__)
  features.neon_dot = true;
#endif
#endif
  return features;
}

const Kernels& active_kernels() {
  static const Kernels& chosen = choose_from_environment();
  return chosen;
}

const Kernels& find_kernels(const char* name) { return choose(name, "isa"); }

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Candidate& candidate : candidates()) {
    const bool other = std::strcmp(candidate.name, candidate.kernels->name) != 0;
    if (candidate.runs && !other) names.emplace_back(candidate.name);
  }
  return names;
}

std::string active_isa() { return active_kernels().name; }

}  // namespace onnx_quarot
