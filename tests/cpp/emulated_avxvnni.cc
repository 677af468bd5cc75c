// The AVX-VNNI kernel of QLinear, likewise.
#define ONNX_QUAROT_EMULATE_DOT
#define qlinear_avxvnni qlinear_emulated_avxvnni
#include "isa_avxvnni.cc"
