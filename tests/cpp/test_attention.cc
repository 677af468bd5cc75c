// The attention kernels of every instruction set, emulated ones too: against float64, and bit for bit the same where
// multiply-adds are fused.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "all_kernels.h"
#include "qlinear/kernels.h"
#include "qlinear/qlinear.h"

using namespace onnx_quarot;

namespace {

int failures = 0;

void expect(bool holds, const char* kernels, const char* what, std::size_t a, std::size_t b, std::size_t c) {
  if (holds) return;
  ++failures;
  std::fprintf(stderr, "failed: %s, %s (%zu, %zu, %zu)\n", kernels, what, a, b, c);
}

std::vector<float> normal(std::size_t count, std::mt19937& random) {
  std::normal_distribution<float> distribution;
  std::vector<float> values(count);
  for (float& value : values) value = distribution(random);
  return values;
}

// `positions` positions of `heads` heads, the first of which sees `first_visible` keys. spread: of scores.
void check(std::size_t size, std::size_t heads, std::size_t positions, std::size_t first_visible, std::size_t keys,
           std::mt19937& random, float spread = 1) {
  const std::size_t rows = positions * heads, stride = heads * size + 5;
  std::vector<float> queries = normal(rows * size, random);
  const std::vector<float> key_rows = normal(keys * size, random), values = normal(keys * size, random);
  for (float& value : queries) value *= spread / std::sqrt(static_cast<float>(size));
  if (rows > 3) queries[2 * size] = std::numeric_limits<float>::quiet_NaN();
  AttendJob job{};
  job.queries = queries.data();
  job.rows = rows;
  job.size = size;
  job.heads = heads;
  job.first_visible = first_visible;
  job.keys = keys;
  job.key_rows = key_rows.data();
  job.values = values.data();
  job.stride = stride;
  std::vector<float> first;
  for (const QLinearKernels* kernels : all_kernels()) {
    std::vector<float> results(positions * stride, 7.0f), state(rows * kAttendState);
    job.results = results.data();
    job.state = state.data();
    kernels->attend(job);
    bool right = true;
    for (std::size_t row = 0; row < rows; ++row) {
      const float* found = job.result(row);
      if (rows > 3 && row == 2) {
        for (std::size_t k = 0; k < size; ++k) right = right && std::isnan(found[k]);
        continue;
      }
      std::vector<double> weights(std::min(keys, first_visible + row / heads));
      double peak = -1e300, total = 0;
      for (std::size_t key = 0; key < weights.size(); ++key) {
        double score = 0;
        for (std::size_t k = 0; k < size; ++k) {
          score += static_cast<double>(queries[row * size + k]) * static_cast<double>(key_rows[key * size + k]);
        }
        weights[key] = score;
        peak = std::max(peak, score);
      }
      for (double& weight : weights) total += weight = std::exp2(weight - peak);
      for (std::size_t k = 0; k < size; ++k) {
        double wanted = 0;
        for (std::size_t key = 0; key < weights.size(); ++key) {
          wanted += weights[key] / total * static_cast<double>(values[key * size + k]);
        }
        right = right && std::fabs(wanted - static_cast<double>(found[k])) < 2e-5 * static_cast<double>(spread);
      }
    }
    for (std::size_t position = 0; position < positions; ++position) {  // what is between rows is not touched
      for (std::size_t k = heads * size; k < stride; ++k) right = right && results[position * stride + k] == 7.0f;
    }
    expect(right, kernels->name, "attention", size, positions, keys);
    if (std::strcmp(kernels->name, "baseline") == 0) continue;  // rounds products where it was built for older CPUs
    if (first.empty()) first = results;
    const bool same = std::memcmp(first.data(), results.data(), first.size() * sizeof(float)) == 0;
    expect(same, kernels->name, "bits of attention", size, positions, keys);
  }
}

void check_turn(std::size_t size, std::size_t half, std::mt19937& random) {
  const std::vector<float> from = normal(size, random), cosines = normal(half, random), sines = normal(half, random);
  for (const QLinearKernels* kernels : all_kernels()) {
    std::vector<float> to(size + 1, 7.0f);
    kernels->turn({from.data(), cosines.data(), sines.data(), half, size, 0.5f, to.data()});
    bool right = to[size] == 7.0f;
    for (std::size_t i = 0; i < size; ++i) {
      const float cosine = i < 2 * half ? cosines[i % half] : 1.0f, sine = i < 2 * half ? sines[i % half] : 0.0f;
      const float other = i < half ? -from[half + i] : i < 2 * half ? from[i - half] : 0.0f;
      right = right && std::fabs((from[i] * cosine + other * sine) * 0.5f - to[i]) < 1e-5f;
    }
    expect(right, kernels->name, "turn", size, half, 0);
  }
}

}  // namespace

int main() {
  std::mt19937 random(1);
  for (const std::size_t size : {16u, 80u, 256u}) {
    for (const std::size_t heads : {1u, 3u}) {
      for (const std::size_t positions : {1u, 2u, 9u, 70u}) {
        for (const std::size_t past : {0u, 5u, 63u, 64u, 150u}) {
          check(size, heads, positions, past + 1, past + positions, random);
        }
      }
    }
  }
  check(32, 2, 20, 1, 12, random);         // a prompt that ends before its last positions
  check(48, 2, 70, 31, 100, random, 100);  // most weights are nothing
  for (const std::size_t half : {0u, 1u, 5u, 16u, 40u}) check_turn(80, half, random);
  std::printf("%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
