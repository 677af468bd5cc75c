// Causal attention of float32, on the kernels that QLinear has for this CPU.
#ifndef ONNX_QUAROT_QLINEAR_ATTENTION_H
#define ONNX_QUAROT_QLINEAR_ATTENTION_H

#include <cstddef>

namespace onnx_quarot {

// Attention of `rows` queries over one head's keys and values, [keys][size] each. Queries are those of `heads` heads at
// position after position, and see one key more at each position.
constexpr std::size_t kMaxHeadSize = 256;
constexpr std::size_t kAttendState = 32;  // floats a row to work with
struct AttendJob {
  const float* queries;  // [rows][size]: scaled, and times log2(e): 2^(query . key) is a key's weight
  std::size_t rows, size, heads;
  std::size_t first_visible, keys;  // keys that the first position sees, and any can see
  const float* key_rows;
  const float* values;
  float* results;      // of the first position's first head
  std::size_t stride;  // from position to position
  float* state;

  std::size_t visible(std::size_t row) const {
    const std::size_t seen = first_visible + row / heads;
    return seen < keys ? seen : keys;
  }
  float* result(std::size_t row) const { return results + row / heads * stride + row % heads * size; }
};

// to = from, features i and half + i turned by an angle, times a factor; what is behind 2 * half is only multiplied.
struct TurnJob {
  const float* from;
  const float* cosines;
  const float* sines;
  std::size_t half, size;
  float factor;
  float* to;
};

// By the kernels in use (qlinear.h). Neither allocates; `results` and `state` are written to, and nothing else.
void attend(const AttendJob& job);
void turn(const TurnJob& job);

}  // namespace onnx_quarot

#endif
