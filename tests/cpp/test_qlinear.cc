// QLinear's kernels, those of this CPU and emulated ones, against int32 sums by definition: bit for bit.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <iterator>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "all_kernels.h"
#include "qlinear/kernels.h"
#include "qlinear/qlinear.h"

using namespace onnx_quarot;

namespace {

int failures = 0;

// How activations and weights are filled. pairs: activations are all pairs of integers in turn, weights are extreme.
enum class Fill { random, extreme, pairs };
// Features of a row of all pairs of -127..127.
constexpr std::size_t kPairs = 2 * 255 * 255;

struct Layer {
  QLinearShape shape;
  std::vector<std::int8_t> values;  // [K][N], what the weights mean with the zero points that all have by default
  std::vector<std::uint8_t> packed;
  std::vector<float> scales, bias;
  std::vector<std::uint8_t> zero_points;

  PackedWeights weights() const { return {packed.data(), scales.data(), zero_points.data()}; }
  // Of an output and block.
  float scale(std::size_t block, std::size_t n) const {
    return scales[(n / 16 * shape.blocks() + block) * 16 + n % 16];
  }
  std::int32_t zero_point(std::size_t block, std::size_t n) const {
    return zero_points[(n / 16 * shape.blocks() + block) * 8 + n % 8] >> n % 16 / 8 * 4 & 15;
  }
};

Layer make_layer(const QLinearShape& shape, Fill fill, std::mt19937& random) {
  Layer layer{shape, std::vector<std::int8_t>(shape.depth * shape.columns), {}, {}, {}, {}};
  const int top = shape.bits == 8 ? 127 : 7, bottom = shape.bits == 8 ? -127 : -8;
  for (auto& value : layer.values) {
    const int drawn = bottom + static_cast<int>(random() % static_cast<unsigned>(top - bottom + 1));
    value = static_cast<std::int8_t>(fill != Fill::random ? (drawn < 0 ? bottom : top) : drawn);
  }
  const std::size_t fours = shape.steps(), offset = shape.bits == 8 ? 128 : 8;
  const auto at = [&](std::size_t k, std::size_t n) {
    // Beside zero points, what fills a block is not read as zero: rows are zero there.
    const int filling = shape.zero_points ? top : 0;
    const int value = k < shape.depth && n < shape.columns ? layer.values[k * shape.columns + n] : filling;
    return static_cast<unsigned>(value + static_cast<int>(offset));
  };
  for (std::size_t p = 0; p < shape.panels(); ++p) {
    for (std::size_t s = 0; s < fours; s += shape.bits == 8 ? 1 : 2) {
      for (std::size_t c = p * 16; c < p * 16 + 16; ++c) {
        for (std::size_t j = 0; j < 4; ++j) {
          const unsigned high = shape.bits == 8 ? 0 : at(s * 4 + 4 + j, c) << 4;
          layer.packed.push_back(static_cast<std::uint8_t>(at(s * 4 + j, c) | high));
        }
      }
    }
  }
  const std::size_t scale_count = shape.bits == 8 ? shape.columns : shape.panels() * shape.blocks() * 16;
  for (std::size_t i = 0; i < scale_count; ++i)
    layer.scales.push_back(0.01f + static_cast<float>(random() % 100) / 1e4f);
  for (std::size_t i = 0; i < (shape.zero_points ? scale_count / 2 : 0); ++i) {
    const unsigned drawn = static_cast<unsigned>(random());
    layer.zero_points.push_back(static_cast<std::uint8_t>(fill == Fill::extreme ? drawn % 2 * 255 : drawn % 256));
  }
  for (std::size_t i = 0; i < shape.columns; ++i)
    layer.bias.push_back(static_cast<float>(random() % 100) / 10.0f - 5.0f);
  return layer;
}

std::vector<float> make_rows(const QLinearShape& shape, std::size_t rows, Fill fill, std::mt19937& random) {
  std::vector<float> x(rows * shape.depth);
  std::normal_distribution<float> normal;
  for (float& value : x) value = fill == Fill::extreme ? (random() % 2 == 0 ? 3.0f : -3.0f) : normal(random);
  for (std::size_t i = 0; fill == Fill::pairs && i < x.size(); ++i) {
    x[i] = static_cast<float>(i % 2 == 0 ? i / 2 % 255 : i / 2 / 255 % 255) - 127.0f;
  }
  // One row of zeros, one with a NaN, one with an infinity, when there are enough.
  if (rows > 4) {
    std::fill_n(x.begin() + static_cast<std::ptrdiff_t>(shape.depth), shape.depth, 0.0f);
    x[2 * shape.depth + shape.depth / 2] = std::numeric_limits<float>::quiet_NaN();
    x[4 * shape.depth - 1] = -std::numeric_limits<float>::infinity();
  }
  return x;
}

std::vector<float> reference(const Layer& layer, const std::vector<float>& x, std::size_t rows) {
  const QLinearShape& shape = layer.shape;
  std::vector<float> y(rows * shape.columns);
  std::vector<std::int32_t> q(shape.depth);
  for (std::size_t m = 0; m < rows; ++m) {
    float peak = 0;
    bool finite = true;
    for (std::size_t k = 0; k < shape.depth; ++k) {
      finite = finite && std::isfinite(x[m * shape.depth + k]);
      peak = std::max(peak, std::fabs(x[m * shape.depth + k]));
    }
    peak = std::max(peak, 1e-30f);
    const float inverse = 127.0f / peak, scale = peak / 127.0f;
    for (std::size_t k = 0; k < shape.depth && finite; ++k) {
      q[k] = static_cast<std::int32_t>(std::nearbyintf(x[m * shape.depth + k] * inverse));
    }
    for (std::size_t n = 0; n < shape.columns; ++n) {
      float& out = y[m * shape.columns + n];
      const std::size_t block = shape.bits == 8 ? shape.depth : shape.block;
      float total = 0;
      for (std::size_t b = 0; b < shape.blocks(); ++b) {
        std::int32_t sum = 0;
        const std::int32_t zero = shape.zero_points ? layer.zero_point(b, n) - 8 : 0;
        for (std::size_t k = b * block; k < std::min(shape.depth, (b + 1) * block); ++k) {
          sum += q[k] * (layer.values[k * shape.columns + n] - zero);
        }
        volatile float product = static_cast<float>(sum);
        if (shape.bits == 8) {
          product = product * scale;
          total = product;
        } else {
          product = product * layer.scale(b, n);
          total = total + product;
        }
      }
      volatile float scaled = total * (shape.bits == 8 ? layer.scales[n] : scale);
      out = finite ? scaled + layer.bias[n] : std::numeric_limits<float>::quiet_NaN();
    }
  }
  return y;
}

void check(const QLinearShape& shape, std::size_t count, Fill fill, std::mt19937& random) {
  check_shape(shape);
  const Layer layer = make_layer(shape, fill, random);
  const std::vector<float> x = make_rows(shape, count, fill, random), wanted = reference(layer, x, count);
  for (const QLinearKernels* kernels : all_kernels()) {
    QuantizedRows rows(*kernels, shape, count);
    for (std::size_t m = 0; m < count; ++m) rows.set(m, x.data() + m * shape.depth);
    // In one piece, and in four that share nothing.
    for (const bool pieces : {false, true}) {
      std::vector<float> y(wanted.size(), 77.0f);
      QLinearOutput output{};
      output.y = y.data();
      output.stride = shape.columns;
      output.bias = layer.bias.data();
      const std::size_t row = pieces ? count / 2 : 0, panel = pieces ? shape.panels() / 2 : 0;
      const auto part = [&](std::size_t r0, std::size_t r1, std::size_t p0, std::size_t p1) {
        if (r0 < r1 && p0 < p1) {
          multiply(rows, r0, r1, layer.weights(), output, p0, p1);
        }
      };
      part(0, row, 0, panel);
      part(row, count, 0, panel);
      part(0, row, panel, shape.panels());
      part(row, count, panel, shape.panels());
      for (std::size_t i = 0; i < y.size(); ++i) {
        if (std::memcmp(&y[i], &wanted[i], sizeof(float)) == 0 || (std::isnan(y[i]) && std::isnan(wanted[i]))) continue;
        ++failures;
        std::fprintf(stderr, "failed: %s, %zu bits%s, K %zu, N %zu, block %zu, M %zu: y[%zu] is %g and not %g\n",
                     kernels->name, shape.bits, shape.zero_points ? " with zero points" : "", shape.depth,
                     shape.columns, shape.block, count, i, static_cast<double>(y[i]), static_cast<double>(wanted[i]));
        break;
      }
    }
  }
}

// Gates and sums of squares: the same bits everywhere, near the truth.
void check_floats(std::mt19937& random) {
  std::vector<float> values(2 * 16 * 64);
  std::normal_distribution<float> normal(0.0f, 20.0f);
  for (float& value : values) value = normal(random);
  const float edges[] = {0.0f,
                         -0.0f,
                         88.0f,
                         -88.0f,
                         1e30f,
                         -1e30f,
                         std::numeric_limits<float>::infinity(),
                         std::numeric_limits<float>::quiet_NaN()};
  std::copy(std::begin(edges), std::end(edges), values.begin());
  std::vector<float> first(values.size() / 2), y(first.size());
  const std::vector<const QLinearKernels*> all = all_kernels();
  for (const QLinearKernels* kernels : all) {
    kernels->gate(values.data(), y.size() / 16, y.data());
    if (kernels == all.front()) first = y;
    for (std::size_t i = 0; i < y.size(); ++i) {
      const double a = values[i / 16 * 32 + i % 16], b = values[i / 16 * 32 + 16 + i % 16];
      const double wanted = a / (1 + std::exp(-a)) * b;
      const bool near = std::isnan(wanted)
                            ? std::isnan(y[i])
                            : std::isinf(wanted) || std::fabs(static_cast<double>(y[i]) - wanted) <=
                                                        1e-6 * std::fabs(wanted) + 1e-37 * std::fabs(a * b);
      if (near && (std::memcmp(&y[i], &first[i], sizeof(float)) == 0 || std::isnan(y[i]))) continue;
      ++failures;
      std::fprintf(stderr, "failed: %s, gate of %g and %g: %g and not %g\n", kernels->name, a, b,
                   static_cast<double>(y[i]), wanted);
    }
    for (const std::size_t depth : {1u, 63u, 64u, 100u, 2000u}) {
      const float* from = values.data() + 8;
      double wanted = 0;
      for (std::size_t k = 0; k < depth; ++k) wanted += static_cast<double>(from[k]) * static_cast<double>(from[k]);
      const float found = kernels->sum_squares(from, depth), other = all.front()->sum_squares(from, depth);
      if (found == other && std::fabs(static_cast<double>(found) - wanted) <= 1e-5 * wanted) continue;
      ++failures;
      std::fprintf(stderr, "failed: %s, sum of %zu squares\n", kernels->name, depth);
    }
  }
}

// Whether the kernels in use are those called `name`: 0 or 1, or 77 where this CPU does not run them.
int check_chosen(const std::string& name) {
  const std::vector<std::string> isas = qlinear_isas();
  if (std::find(isas.begin(), isas.end(), name) == isas.end()) return 77;
  std::printf("%s\n", qlinear_isa().c_str());
  return qlinear_isa() == name ? 0 : 1;
}

}  // namespace

// Without arguments, everything; with a name, whether these kernels were chosen.
int main(int count, char** arguments) {
  if (count > 1) return check_chosen(arguments[1]);
  std::mt19937 random(1);
  for (const std::size_t depth : {1u, 3u, 4u, 15u, 16u, 64u, 100u, 257u, 1029u, 2050u}) {
    for (const std::size_t columns : {1u, 15u, 16u, 17u, 63u, 64u, 130u}) {
      for (const std::size_t rows : {1u, 2u, 5u, 6u, 7u, 23u}) {
        check({depth, columns, 8, 0}, rows, Fill::random, random);
        for (const std::size_t block : {32u, 64u, 128u}) check({depth, columns, 4, block}, rows, Fill::random, random);
        check({depth, columns, 4, std::size_t{32} << (depth + columns + rows) % 3, true}, rows, Fill::random, random);
      }
    }
  }
  for (const std::size_t rows : {257u, 300u}) check({1500, 33, 8, 0}, rows, Fill::random, random);
  // The largest sums there are, at depths where 16-bit ones and float32 ones would fail.
  for (const std::size_t rows : {1u, 40u}) {
    check({32768, 20, 8, 0}, rows, Fill::extreme, random);
    for (const bool zero_points : {false, true}) {
      check({32768, 20, 4, 128, zero_points}, rows, Fill::extreme, random);
    }
  }
  // A single row reads long panels side by side on every CPU, and those left over one after the other.
  for (const std::size_t depth : {4096u, 8230u}) {
    for (const std::size_t columns : {64u, 150u}) {
      check({depth, columns, 8, 0}, 1, Fill::random, random);
      for (const std::size_t block : {32u, 64u, 128u}) {
        for (const bool zero_points : {false, true}) {
          check({depth, columns, 4, block, zero_points}, 1, Fill::random, random);
        }
      }
    }
  }
  check({131072, 3, 8, 0}, 1, Fill::extreme, random);
  // Where two products are added in 16 bits: whatever they are of.
  for (const std::size_t rows : {1u, 2u}) check({kPairs, 9, 8, 0}, rows, Fill::pairs, random);
  check_floats(random);
  std::printf("%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
