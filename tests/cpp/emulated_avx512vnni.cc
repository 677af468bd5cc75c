// The AVX-512 VNNI kernel of QLinear for CPUs without it: its dot product in plain C++. Slow, and just as right.
#define ONNX_QUAROT_EMULATE_DOT
#define qlinear_avx512vnni qlinear_emulated_avx512vnni
#include "isa_avx512vnni.cc"
