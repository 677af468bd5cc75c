// What this CPU and its operating system can run. Compiled without instruction-set flags.
#ifndef ONNX_QUAROT_CPU_H
#define ONNX_QUAROT_CPU_H

namespace onnx_quarot {

struct CpuFeatures {
  bool avx2 = false;               // AVX2, FMA, F16C, and 256-bit registers saved by the system
  bool short_lookahead = false;    // few instructions ahead are looked at, as on AMD's Zen 1 to 4
  bool plain_differences = false;  // and multiply-adds and stores hinder each other, as on Zen 1 to 3
  bool several_streams = false;    // memory gives most to several streams at a time, as on AMD's Zen 1 to 3
  bool avx512 = false;             // AVX-512 F, BW, DQ, VL, and 512-bit registers saved by the system
  bool avx512vnni = false;         // and its dot products of bytes
  bool avx512bf16 = false;         // and its conversions to bfloat16
  bool avxvnni = false;            // the same in 256 bits, without AVX-512
  bool neon = false;               // 64-bit Arm: always there
  bool neon_dot = false;           // and its dot products of bytes
};

CpuFeatures detect_cpu();

}  // namespace onnx_quarot

#endif
