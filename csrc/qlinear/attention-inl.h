// Attention of some queries over the keys and values of one head. Part of kernel-inl.h, on the same struct `Isa`.
//
// Keys come in blocks of 64, softmax is carried on from block to block (Milakov and Gimelshein, "Online normalizer
// calculation for softmax", 2018; Dao et al., "FlashAttention", 2022). Sums over features and over keys run in order,
// those of weights in 16 parts, whatever the vectors hold: the same bits on every CPU with fused multiply-adds.
#include <algorithm>
#include <array>
#include <cstddef>
#include <cstring>
#include <utility>

#include "ends-inl.h"
#include "kernels.h"

namespace onnx_quarot {
namespace {

constexpr std::size_t kKeys = 64;
constexpr std::size_t kQueryRows = Isa::lanes == 4 ? 4 : 6;
// Panels side by side of some rows: few rows have few sums, which wait for one another.
constexpr std::size_t wide_of(std::size_t rows) {
  return Isa::lanes == 16 || rows == 1 ? 4 : rows == 2 && Isa::lanes == 8 ? 2 : 1;
}
using AllLanes = std::make_index_sequence<Isa::lanes>;

template <std::size_t Half, std::size_t... Lane>
inline Isa::Float even_parts(const Isa::Float& a, const Isa::Float& b, std::index_sequence<Lane...>) {
  return __builtin_shufflevector(a, b, ((Lane & Half) != 0 ? Isa::lanes + Lane - Half : Lane)...);
}

template <std::size_t Half, std::size_t... Lane>
inline Isa::Float odd_parts(const Isa::Float& a, const Isa::Float& b, std::index_sequence<Lane...>) {
  return __builtin_shufflevector(a, b, ((Lane & Half) != 0 ? Isa::lanes + Lane : Lane + Half)...);
}

template <std::size_t Half, std::size_t... Lane>
inline Isa::Float turned(const Isa::Float& a, std::index_sequence<Lane...>) {
  return __builtin_shufflevector(a, a, ((Lane + Half) % Isa::lanes)...);
}

// A square of the matrix, in place: halves of pairs of rows change places, at every distance.
template <std::size_t Half>
inline void transpose(Isa::Float* rows) {
  if constexpr (Half < Isa::lanes) {
    ONNX_QUAROT_UNROLL for (std::size_t i = 0; i < Isa::lanes; ++i) {
      if ((i & Half) != 0) continue;
      const Isa::Float a = rows[i], b = rows[i + Half];
      rows[i] = even_parts<Half>(a, b, AllLanes{});
      rows[i + Half] = odd_parts<Half>(a, b, AllLanes{});
    }
    transpose<2 * Half>(rows);
  }
}

template <std::size_t Half = Isa::lanes / 2>
inline float largest_lane(Isa::Float value) {
  if constexpr (Half == 0) {
    return value[0];
  } else {
    const Isa::Float other = turned<Half>(value, AllLanes{});
    return largest_lane<Half / 2>(value > other ? value : other);
  }
}

template <std::size_t Half = Isa::lanes / 2>
inline float sum_of_lanes(Isa::Float value) {
  if constexpr (Half == 0) {
    return value[0];
  } else {
    return sum_of_lanes<Half / 2>(value + turned<Half>(value, AllLanes{}));
  }
}

inline std::size_t filled(std::size_t keys) { return (keys + kPanelColumns - 1) / kPanelColumns * kPanelColumns; }

constexpr std::size_t kLine = kStepBytes / sizeof(float);

// [keys][size] to [size][64], as many as fill columns of 16, zeros behind the last key. Meanwhile, as much memory is
// fetched from `ahead` on, if that is not null.
void transpose_keys(const float* keys, std::size_t count, std::size_t size, float* to, const float* ahead) {
  for (std::size_t key = 0; key < filled(count); key += Isa::lanes) {
    for (std::size_t k = 0; k < size; k += Isa::lanes) {
      if (ahead != nullptr) {
        ONNX_QUAROT_UNROLL for (std::size_t i = 0; i < Isa::lanes * Isa::lanes; i += kLine)
            __builtin_prefetch(ahead + i);
        ahead += Isa::lanes * Isa::lanes;
      }
      Isa::Float square[Isa::lanes];
      if (key + Isa::lanes <= count) {
        ONNX_QUAROT_UNROLL for (std::size_t i = 0; i < Isa::lanes; ++i) {
          square[i] = load<Isa::Float>(keys + (key + i) * size + k);
        }
      } else {
        ONNX_QUAROT_UNROLL for (std::size_t i = 0; i < Isa::lanes; ++i) {
          square[i] = key + i < count ? load<Isa::Float>(keys + (key + i) * size + k) : Isa::Float{};
        }
      }
      transpose<1>(square);
      ONNX_QUAROT_UNROLL for (std::size_t i = 0; i < Isa::lanes; ++i) store(to + (k + i) * kKeys + key, square[i]);
    }
  }
}

// sums += a b: Rows rows of a, `depth` rows of b, of which 16 * Panels columns. If Fetch, as many lines are fetched
// from `ahead` on.
template <std::size_t Rows, std::size_t Panels, bool Fetch = false>
inline void add_product(const float* a, std::size_t a_stride, const float* b, std::size_t b_stride, std::size_t depth,
                        Isa::Float (&sums)[Rows][Panels * kVectors], const float* ahead = nullptr) {
  constexpr std::size_t vectors = Panels * kVectors;
  for (std::size_t k = 0; k < depth; ++k) {
    if constexpr (Fetch) {
      ONNX_QUAROT_UNROLL for (std::size_t i = 0; i < Panels; ++i) __builtin_prefetch(ahead + i * kLine);
      ahead += Panels * kLine;
    }
    Isa::Float operands[vectors];
    ONNX_QUAROT_UNROLL for (std::size_t v = 0; v < vectors; ++v) {
      operands[v] = load<Isa::Float>(b + k * b_stride + v * Isa::lanes);
    }
    ONNX_QUAROT_UNROLL for (std::size_t r = 0; r < Rows; ++r) {
      const Isa::Float factor = splat(a[r * a_stride + k]);
      ONNX_QUAROT_UNROLL for (std::size_t v = 0; v < vectors; ++v) sums[r][v] =
          Isa::multiply_add(factor, operands[v], sums[r][v]);
    }
  }
}

// One block of keys for rows [first, first + Rows).
struct KeyBlock {
  const AttendJob* job;
  std::size_t first_key, keys;
  const float* transposed;
  const float* next_keys;  // to fetch while values are added up, or null
};

template <std::size_t Rows, std::size_t Panels>
inline void add_scores(const AttendJob& job, const KeyBlock& block, std::size_t row, std::size_t key, float* scores) {
  Isa::Float sums[Rows][Panels * kVectors] = {};
  add_product<Rows, Panels>(job.queries + row * job.size, job.size, block.transposed + key, kKeys, job.size, sums);
  ONNX_QUAROT_UNROLL for (std::size_t r = 0; r < Rows; ++r) {
    ONNX_QUAROT_UNROLL for (std::size_t v = 0; v < Panels * kVectors; ++v) {
      store(scores + r * kKeys + key + v * Isa::lanes, sums[r][v]);
    }
  }
}

// Scores of a row become weights, of which those behind `visible` are zero. Returns what earlier results are multiplied
// by. state: [0] the largest score, [16, 32) sums of weights.
template <std::size_t Vectors>
inline float weigh(float* scores, std::size_t visible, bool is_first, float* state) {
  Isa::Int lane;
  for (std::size_t i = 0; i < Isa::lanes; ++i) lane[i] = static_cast<std::int32_t>(i);
  const auto hidden = [&](std::size_t v) {
    return lane >= splat(static_cast<std::int32_t>(visible) - static_cast<std::int32_t>(v * Isa::lanes));
  };
  constexpr float least = -3.0e38f;
  Isa::Float largest = splat(least);
  ONNX_QUAROT_UNROLL for (std::size_t v = 0; v < Vectors; ++v) {
    Isa::Float score = load<Isa::Float>(scores + v * Isa::lanes);
    if (visible < Vectors * Isa::lanes) score = hidden(v) ? splat(least) : score;
    largest = score > largest ? score : largest;
  }
  float peak = largest_lane(largest);
  if (!is_first) peak = std::max(peak, state[0]);
  const float kept = is_first ? 0.0f : exponential(splat(state[0] - peak))[0];
  state[0] = peak;
  Isa::Float sums[kVectors];
  ONNX_QUAROT_UNROLL for (std::size_t i = 0; i < kVectors; ++i) {
    sums[i] = is_first ? Isa::Float{} : load<Isa::Float>(state + kPanelColumns + i * Isa::lanes) * splat(kept);
  }
  ONNX_QUAROT_UNROLL for (std::size_t v = 0; v < Vectors; ++v) {
    Isa::Float weight = exponential(load<Isa::Float>(scores + v * Isa::lanes) - splat(peak));
    if (visible < Vectors * Isa::lanes) weight = hidden(v) ? Isa::Float{} : weight;
    store(scores + v * Isa::lanes, weight);
    sums[v % kVectors] = sums[v % kVectors] + weight;
  }
  ONNX_QUAROT_UNROLL for (std::size_t i = 0; i < kVectors; ++i) store(state + kPanelColumns + i * Isa::lanes, sums[i]);
  return kept;
}

// Of `keys` scores, a multiple of 16.
template <std::size_t Keys>
inline float weigh_filled(std::size_t keys, float* scores, std::size_t visible, bool is_first, float* state) {
  if constexpr (Keys > kPanelColumns) {
    if (keys < Keys) return weigh_filled<Keys - kPanelColumns>(keys, scores, visible, is_first, state);
  }
  return weigh<Keys / Isa::lanes>(scores, visible, is_first, state);
}

template <std::size_t Rows, std::size_t Panels, bool Fetch>
inline void add_values(const AttendJob& job, const KeyBlock& block, const std::array<float*, Rows>& results,
                       const float* weights, const std::array<float, Rows>& kept, std::size_t column) {
  Isa::Float sums[Rows][Panels * kVectors];
  ONNX_QUAROT_UNROLL for (std::size_t r = 0; r < Rows; ++r) {
    ONNX_QUAROT_UNROLL for (std::size_t v = 0; v < Panels * kVectors; ++v) {
      const float* from = results[r] + column + v * Isa::lanes;
      sums[r][v] = block.first_key == 0 ? Isa::Float{} : load<Isa::Float>(from) * splat(kept[r]);
    }
  }
  const float* values = job.values + block.first_key * job.size + column;
  const float* ahead = Fetch ? block.next_keys + column * block.keys : nullptr;
  add_product<Rows, Panels, Fetch>(weights, kKeys, values, job.size, block.keys, sums, ahead);
  ONNX_QUAROT_UNROLL for (std::size_t r = 0; r < Rows; ++r) {
    ONNX_QUAROT_UNROLL for (std::size_t v = 0; v < Panels * kVectors; ++v) {
      store(results[r] + column + v * Isa::lanes, sums[r][v]);
    }
  }
}

template <std::size_t Rows, bool Fetch>
inline void add_all_values(const AttendJob& job, const KeyBlock& block, const std::array<float*, Rows>& results,
                           const float* weights, const std::array<float, Rows>& kept) {
  std::size_t column = 0;
  for (; column + wide_of(Rows) * kPanelColumns <= job.size; column += wide_of(Rows) * kPanelColumns) {
    add_values<Rows, wide_of(Rows), Fetch>(job, block, results, weights, kept, column);
  }
  for (; column < job.size; column += kPanelColumns) {
    add_values<Rows, 1, Fetch>(job, block, results, weights, kept, column);
  }
}

template <std::size_t Rows>
__attribute__((noinline)) void attend_rows(const AttendJob& job, const KeyBlock& block, std::size_t row) {
  alignas(64) float weights[Rows * kKeys];
  constexpr std::size_t width = wide_of(Rows) * kPanelColumns;
  std::size_t key = 0;
  for (; key + width <= filled(block.keys); key += width)
    add_scores<Rows, wide_of(Rows)>(job, block, row, key, weights);
  for (; key < filled(block.keys); key += kPanelColumns) add_scores<Rows, 1>(job, block, row, key, weights);
  std::array<float, Rows> kept{};
  std::array<float*, Rows> results{};
  for (std::size_t r = 0; r < Rows; ++r) {
    const std::size_t seen = job.visible(row + r);
    const std::size_t visible = std::min(kKeys, seen > block.first_key ? seen - block.first_key : 0);
    kept[r] = weigh_filled<kKeys>(filled(block.keys), weights + r * kKeys, visible, block.first_key == 0,
                                  job.state + (row + r) * kAttendState);
    results[r] = job.result(row + r);
  }
  if (block.next_keys != nullptr) {
    add_all_values<Rows, true>(job, block, results, weights, kept);
  } else {
    add_all_values<Rows, false>(job, block, results, weights, kept);
  }
}

template <std::size_t Rows>
void attend_rows_of(std::size_t rows, const AttendJob& job, const KeyBlock& block, std::size_t row) {
  if constexpr (Rows > 1) {
    if (rows < Rows) return attend_rows_of<Rows - 1>(rows, job, block, row);
  }
  attend_rows<Rows>(job, block, row);
}

void attend_queries(const AttendJob& job) {
  alignas(64) float transposed[kMaxHeadSize * kKeys];
  const std::size_t keys = job.visible(job.rows - 1);
  // A decoded token's keys and values come from memory, which loads of rows apart do not keep busy: values are fetched
  // while keys are transposed, and the next keys while values are added up, a few lines at a time.
  const bool fetches = job.rows <= kQueryRows;
  std::size_t row = 0;
  for (std::size_t first = 0; first < keys; first += kKeys) {
    const std::size_t count = std::min(kKeys, keys - first), next = first + count;
    const bool more = fetches && next + count <= keys;
    const KeyBlock block{&job, first, count, transposed, more ? job.key_rows + next * job.size : nullptr};
    transpose_keys(job.key_rows + first * job.size, count, job.size, transposed,
                   fetches ? job.values + first * job.size : nullptr);
    while (job.visible(row) <= first) ++row;  // later rows see more
    for (std::size_t at = row; at < job.rows; at += kQueryRows) {
      attend_rows_of<kQueryRows>(std::min(kQueryRows, job.rows - at), job, block, at);
    }
  }
  for (std::size_t r = 0; r < job.rows; ++r) {
    const float* sums = job.state + r * kAttendState + kPanelColumns;
    Isa::Float parts[kVectors];
    ONNX_QUAROT_UNROLL for (std::size_t i = 0; i < kVectors; ++i) parts[i] = load<Isa::Float>(sums + i * Isa::lanes);
    for (std::size_t half = kVectors / 2; half > 0; half /= 2) {
      for (std::size_t i = 0; i < half; ++i) parts[i] = parts[i] + parts[i + half];
    }
    const Isa::Float inverse = splat(1.0f / sum_of_lanes(parts[0]));
    float* result = job.result(r);
    for (std::size_t k = 0; k < job.size; k += Isa::lanes) store(result + k, load<Isa::Float>(result + k) * inverse);
  }
}

// Pairs of features, half a rotary size apart, turned by a position's angles.
void turn_pairs(const TurnJob& job) {
  std::size_t i = 0;
  const float *first = job.from, *second = job.from + job.half;
  for (; i + Isa::lanes <= job.half; i += Isa::lanes) {
    const auto a = load<Isa::Float>(first + i), b = load<Isa::Float>(second + i);
    const auto cosine = load<Isa::Float>(job.cosines + i), sine = load<Isa::Float>(job.sines + i);
    store(job.to + i, (a * cosine - b * sine) * job.factor);
    store(job.to + job.half + i, (b * cosine + a * sine) * job.factor);
  }
  for (; i < job.half; ++i) {
    job.to[i] = (first[i] * job.cosines[i] - second[i] * job.sines[i]) * job.factor;
    job.to[job.half + i] = (second[i] * job.cosines[i] + first[i] * job.sines[i]) * job.factor;
  }
  for (i = 2 * job.half; i < job.size; ++i) job.to[i] = job.from[i] * job.factor;
}

}  // namespace
}  // namespace onnx_quarot
