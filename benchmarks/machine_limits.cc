// What a core can do at most, for bench_qlinear.py, which compiles this file for the CPU it runs on:
//   dot_rate()         8-bit products and additions a second of instructions that only touch registers
//   read_seconds(...)  time to read memory once, from its beginning to its end
#include <cstddef>
#include <cstdint>
#include <ctime>

#if defined(__AVX512VNNI__)
#include <immintrin.h>
using Vector = __m512i;
constexpr double kOperations = 128;
#define ONNX_QUAROT_DOT(sum, a, b) asm volatile("vpdpbusd %1, %2, %0" : "+v"(sum) : "v"(a), "v"(b))
#elif defined(__AVX2__)
#include <immintrin.h>
using Vector = __m256i;
#if defined(__AVXVNNI__)
constexpr double kOperations = 64;
#define ONNX_QUAROT_DOT(sum, a, b) asm volatile("%{vex%} vpdpbusd %1, %2, %0" : "+x"(sum) : "x"(a), "x"(b))
#else
// Without VNNI: pairs of products in 16 bits, two of these in 32, and a sum.
constexpr double kOperations = 64;
#define ONNX_QUAROT_DOT(sum, a, b)                                                   \
  do {                                                                               \
    Vector part;                                                                     \
    asm volatile("vpmaddubsw %2, %3, %1\n\tvpmaddwd %1, %3, %1\n\tvpaddd %1, %0, %0" \
                 : "+x"(sum), "=&x"(part)                                            \
                 : "x"(a), "x"(b));                                                  \
  } while (false)
#endif
#else
#error "The limits are those of x86-64 CPUs with AVX2."
#endif

namespace {

double now() {
  timespec time{};
  clock_gettime(CLOCK_MONOTONIC, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

}  // namespace

extern "C" double dot_rate() {
  constexpr int chains = 12, loops = 50000;
  Vector sums[chains] = {}, a = {}, b = {};
  asm volatile("" : "+x"(a), "+x"(b));
  const double start = now();
  for (int i = 0; i < loops; ++i) {
#pragma GCC unroll 12
    for (int c = 0; c < chains; ++c) ONNX_QUAROT_DOT(sums[c], a, b);
  }
  return loops * chains * kOperations / (now() - start);
}

extern "C" double read_seconds(const std::uint8_t* from, std::size_t bytes) {
  constexpr std::size_t chains = 8, step = sizeof(Vector);
  using Words [[gnu::vector_size(sizeof(Vector)), gnu::aligned(1), gnu::may_alias]] = long long;
  Words sums[chains] = {};
  const double start = now();
  for (std::size_t at = 0; at + chains * step <= bytes; at += chains * step) {
#pragma GCC unroll 8
    for (std::size_t c = 0; c < chains; ++c) sums[c] += *reinterpret_cast<const Words*>(from + at + c * step);
  }
  for (std::size_t c = 0; c < chains; ++c) asm volatile("" : : "x"(sums[c]));
  return now() - start;
}
