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

// 2^t for t up to 0, below -126 as there, and NaN for NaN: 2^n times a polynomial of degree 6 on the rest, +-1/2, whose
// relative error is at most 2.1e-9 (minimax, 1 at 0).
inline Isa::Float power_of_two(Isa::Float t) {
  constexpr float magic = 12582912.0f;
  float least = -126.0f;
  asm("" : "+m"(least));  // gcc makes one instruction of a maximum if it knows neither side
  t = splat(least) > t ? splat(least) : t;
  const Isa::Float shifted = t + magic;  // the whole part in the low bits
  const Isa::Float rest = t - (shifted - magic);
  Isa::Float p = splat(1.5355155e-4f);
  ONNX_QUAROT_UNROLL for (const float c :
                          {1.3398936e-3f, 9.6184295e-3f, 5.5503324e-2f, 2.4022648e-1f, 6.931472e-1f, 1.0f}) {
    p = Isa::multiply_add(p, rest, splat(c));
  }
  return p * reinterpret_cast<Isa::Float>((reinterpret_cast<Isa::Int>(shifted) << 23) + 0x3f800000);
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

// Which lanes of vector `v` are behind `visible`.
inline Isa::Int hidden(std::size_t v, std::size_t visible) {
  Isa::Int lane;
  for (std::size_t i = 0; i < Isa::lanes; ++i) lane[i] = static_cast<std::int32_t>(i);
  return lane >= splat(static_cast<std::int32_t>(visible) - static_cast<std::int32_t>(v * Isa::lanes));
}

// The largest score of a row.
template <bool Hides>
inline float peak_of(const float* scores, std::size_t vectors, std::size_t visible) {
  constexpr float least = -3.0e38f;
  Isa::Float largest = splat(least);
  for (std::size_t v = 0; v < vectors; ++v) {
    Isa::Float score = load<Isa::Float>(scores + v * Isa::lanes);
    if (Hides) score = hidden(v, visible) ? splat(least) : score;
    largest = score > largest ? score : largest;
  }
  return largest_lane(largest);
}

// Scores of a row to weights, which are added to `sums`.
template <bool Hides>
inline void weigh_row(float* scores, std::size_t vectors, std::size_t visible, Isa::Float peak,
                      Isa::Float (&sums)[kVectors]) {
  for (std::size_t v = 0; v < vectors; v += kVectors) {
    ONNX_QUAROT_UNROLL for (std::size_t i = 0; i < kVectors; ++i) {
      float* at = scores + (v + i) * Isa::lanes;
      Isa::Float weight = power_of_two(load<Isa::Float>(at) - peak);
      if (Hides) weight = hidden(v + i, visible) ? Isa::Float{} : weight;
      store(at, weight);
      sums[i] = sums[i] + weight;
    }
  }
}

// Scores of rows become weights, of which those behind what a row sees are zero. Returns what earlier results are
// multiplied by. A row's state: [0] the largest score, [16, 32) sums of weights.
template <std::size_t Rows>
inline std::array<float, Rows> weigh(const AttendJob& job, const KeyBlock& block, std::size_t row, std::size_t vectors,
                                     float* scores) {
  static_assert(Rows <= Isa::lanes);
  const bool is_first = block.first_key == 0;
  float* states = job.state + row * kAttendState;
  std::size_t visible[Rows];
  float peaks[Rows], steps[Isa::lanes] = {};
  // The largest scores of all rows first: to find one takes longer than to compute with it.
  ONNX_QUAROT_UNROLL for (std::size_t r = 0; r < Rows; ++r) {
    visible[r] = job.visible(row + r) - block.first_key;
    const float* from = scores + r * kKeys;
    peaks[r] = visible[r] < vectors * Isa::lanes ? peak_of<true>(from, vectors, visible[r])
                                                 : peak_of<false>(from, vectors, visible[r]);
    float* state = states + r * kAttendState;
    if (!is_first) {
      peaks[r] = std::max(peaks[r], state[0]);
      steps[r] = state[0] - peaks[r];
    }
    state[0] = peaks[r];
  }
  std::array<float, Rows> kept{};
  if (!is_first) {
    const Isa::Float factors = power_of_two(load<Isa::Float>(steps));
    ONNX_QUAROT_UNROLL for (std::size_t r = 0; r < Rows; ++r) kept[r] = factors[r];
  }
  for (std::size_t r = 0; r < Rows; ++r) {
    float* total = states + r * kAttendState + kPanelColumns;
    Isa::Float sums[kVectors] = {};
    if (visible[r] < vectors * Isa::lanes) {
      weigh_row<true>(scores + r * kKeys, vectors, visible[r], splat(peaks[r]), sums);
    } else {
      weigh_row<false>(scores + r * kKeys, vectors, visible[r], splat(peaks[r]), sums);
    }
    ONNX_QUAROT_UNROLL for (std::size_t i = 0; i < kVectors; ++i) {
      if (!is_first) sums[i] = sums[i] + load<Isa::Float>(total + i * Isa::lanes) * splat(kept[r]);
      store(total + i * Isa::lanes, sums[i]);
    }
  }
  return kept;
}

template <std::size_t Rows, std::size_t Panels, bool Fetch>
inline void add_values(const AttendJob& job, const KeyBlock& block, std::size_t keys,
                       const std::array<float*, Rows>& results, const float* weights,
                       const std::array<float, Rows>& kept, std::size_t column) {
  Isa::Float sums[Rows][Panels * kVectors];
  ONNX_QUAROT_UNROLL for (std::size_t r = 0; r < Rows; ++r) {
    ONNX_QUAROT_UNROLL for (std::size_t v = 0; v < Panels * kVectors; ++v) {
      const float* from = results[r] + column + v * Isa::lanes;
      sums[r][v] = block.first_key == 0 ? Isa::Float{} : load<Isa::Float>(from) * splat(kept[r]);
    }
  }
  const float* values = job.values + block.first_key * job.size + column;
  const float* ahead = Fetch ? block.next_keys + column * block.keys : nullptr;
  add_product<Rows, Panels, Fetch>(weights, kKeys, values, job.size, keys, sums, ahead);
  ONNX_QUAROT_UNROLL for (std::size_t r = 0; r < Rows; ++r) {
    ONNX_QUAROT_UNROLL for (std::size_t v = 0; v < Panels * kVectors; ++v) {
      store(results[r] + column + v * Isa::lanes, sums[r][v]);
    }
  }
}

template <std::size_t Rows, bool Fetch>
inline void add_all_values(const AttendJob& job, const KeyBlock& block, std::size_t keys,
                           const std::array<float*, Rows>& results, const float* weights,
                           const std::array<float, Rows>& kept) {
  std::size_t column = 0;
  for (; column + wide_of(Rows) * kPanelColumns <= job.size; column += wide_of(Rows) * kPanelColumns) {
    add_values<Rows, wide_of(Rows), Fetch>(job, block, keys, results, weights, kept, column);
  }
  for (; column < job.size; column += kPanelColumns) {
    add_values<Rows, 1, Fetch>(job, block, keys, results, weights, kept, column);
  }
}

template <std::size_t Rows>
__attribute__((noinline)) void attend_rows(const AttendJob& job, const KeyBlock& block, std::size_t row) {
  alignas(64) float weights[Rows * kKeys];
  const std::size_t keys = std::min(block.keys, job.visible(row + Rows - 1) - block.first_key);  // none sees more
  constexpr std::size_t width = wide_of(Rows) * kPanelColumns;
  std::size_t key = 0;
  for (; key + width <= filled(keys); key += width) add_scores<Rows, wide_of(Rows)>(job, block, row, key, weights);
  for (; key < filled(keys); key += kPanelColumns) add_scores<Rows, 1>(job, block, row, key, weights);
  const std::array<float, Rows> kept = weigh<Rows>(job, block, row, filled(keys) / Isa::lanes, weights);
  std::array<float*, Rows> results{};
  for (std::size_t r = 0; r < Rows; ++r) results[r] = job.result(row + r);
  if (block.next_keys != nullptr) {
    add_all_values<Rows, true>(job, block, keys, results, weights, kept);
  } else {
    add_all_values<Rows, false>(job, block, keys, results, weights, kept);
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
