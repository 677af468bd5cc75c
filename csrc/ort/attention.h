// The operator onnx_quarot::GroupQueryAttention, version 1: causal attention of float32, as com.microsoft's operator of
// that name computes it with these inputs and attributes.
//
//   inputs      query                  float32, [batch, length, num_heads * head_size]; without key and value,
//                                      [batch, length, (num_heads + 2 * kv_num_heads) * head_size]
//               key, value             optional; float32, [batch, length, kv_num_heads * head_size]
//               past_key, past_value   float32, [batch, kv_num_heads, capacity, head_size]
//               seqlens_k              int32, [batch] or [batch, 1]: keys of each sequence, the new ones included,
//               minus one total_sequence_length  int32, one element: the most of these. Where it is the length, caches
//               are empty. cos_cache, sin_cache   optional; float32, [positions, rotary size / 2]: queries and keys are
//               turned
//   outputs     output                 float32, [batch, length, num_heads * head_size]
//               present_key, present_value   [batch, kv_num_heads, max(capacity, total_sequence_length), head_size];
//                                      may be the memory of the past ones
//   attributes  num_heads, kv_num_heads, head_size   int; head_size is a multiple of 16, 256 at most
//               scale                  float, default 1 / sqrt(head_size)
#ifndef ONNX_QUAROT_ORT_ATTENTION_H
#define ONNX_QUAROT_ORT_ATTENTION_H

#include "abi.h"

namespace onnx_quarot::ort {

struct AttentionOp : CustomOp {
  explicit AttentionOp(const Api* api);

  const Api* api;
};

}  // namespace onnx_quarot::ort

#endif
