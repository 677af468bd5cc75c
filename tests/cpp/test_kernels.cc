// Runs kernels on rows of many sizes. Prints what differs and returns how much did.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "cpu.h"
#include "fwht.h"
#include "kernels.h"
#include "orders.h"
#include "scratch.h"

#if defined(ONNX_QUAROT_WIDE_KERNELS)
namespace onnx_quarot {
extern const Kernels wide_kernels;
}
#endif

using namespace onnx_quarot;

namespace {

int failures = 0;

void expect(bool condition, const std::string& what) {
  if (condition) return;
  ++failures;
  std::fprintf(stderr, "failed: %s\n", what.c_str());
}

std::vector<const Kernels*> all_kernels() {
  std::vector<const Kernels*> all;
#if defined(ONNX_QUAROT_WIDE_KERNELS)
  all.push_back(&wide_kernels);
#endif
  for (const std::string& name : available_isas()) all.push_back(&find_kernels(name.c_str()));
#if defined(__x86_64__)
  if (detect_cpu().avx2) all.insert(all.end(), {&avx2_kernels, &avx2_turns_kernels, &avx2_fused_kernels});
  if (detect_cpu().avx512bf16) all.push_back(&avx512_kernels);
#endif
  return all;
}

struct Case {
  std::size_t size, block;
  bool transpose;
  std::size_t signs;  // 0, block or size
};

using Bytes = std::vector<unsigned char>;

// Rows that are measured while they are transformed: the same bits, and the largest magnitude of each.
void check_measures(const Kernels& kernels, const std::string& what, const Bytes& in, std::size_t rows, std::size_t n) {
  std::vector<float> from(rows * n), values(rows * n), transformed(rows * n), largest(rows);
  std::memcpy(from.data(), in.data(), in.size());
  kernels.types[static_cast<std::size_t>(DType::float32)].powers(from.data(), transformed.data(), rows, n, 1.0);
  kernels.measure_powers({from.data(), values.data(), largest.data(), rows, n});
  expect(std::memcmp(values.data(), transformed.data(), in.size()) == 0,
         what + "measured rows of " + kernels.name + " differ");
  for (std::size_t r = 0; r < rows; ++r) {
    const float found = kernels.largest(values.data() + r * n, n);
    expect(largest[r] == found,
           what + kernels.name + " measures " + std::to_string(largest[r]) + ", not " + std::to_string(found));
  }
}

// Runs a job on exactly sized, freshly allocated arrays, so that a sanitizer sees every access outside.
Bytes run(const Kernels& kernels, DType dtype, const Case& c, const Bytes& in, std::size_t rows,
          const std::vector<float>& signs, bool in_place) {
  const Factors factors = factorize(c.block);
  Job job{};
  Bytes out = in_place ? in : Bytes(in.size(), 0x55);
  job.in = in_place ? out.data() : in.data();
  job.out = out.data();
  job.rows = rows;
  job.blocks = c.size / c.block;
  job.in_stride = job.out_stride = static_cast<std::ptrdiff_t>(c.size);
  job.order = factors.order;
  job.power = std::size_t{1} << factors.log2_power;
  if (factors.order > 1) {
    const Order& found = order(factors.order);
    job.steps = c.transpose ? found.steps_transposed.data() : found.steps.data();
    job.step_count = found.steps.size();
  }
  job.signs = signs.empty() ? nullptr : signs.data();
  job.sign_step = signs.size() == c.size ? c.block : 0;
  job.transpose = c.transpose;
  job.scale = 1.0 / std::sqrt(static_cast<double>(c.block));
  const std::size_t compute = dtype == DType::float64 ? 8 : 4;
  const std::size_t bytes = padded(scratch_layout(job, element_size(dtype), compute, kernels.vector_bytes).total + 1);
  void* scratch = std::aligned_alloc(kScratchAlignment, bytes);
  job.scratch = scratch;
  const TypeKernels& run = kernels.types[static_cast<std::size_t>(dtype)];
  run.rows(job);
  // Where the short way is open it gives the same bits.
  const std::size_t compute_bytes = c.size * compute;
  if (job.order == 1 && job.blocks == 1 && job.signs == nullptr && compute_bytes >= kernels.vector_bytes &&
      (compute_bytes <= kTwoRowsBytes || compute == element_size(dtype))) {
    Bytes again = in_place ? in : Bytes(in.size());
    run.powers(in_place ? again.data() : in.data(), again.data(), rows, c.size, job.scale);
    const std::string what = "size " + std::to_string(c.size) + ": ";
    expect(again == out, what + "powers and rows of " + kernels.name + " differ");
    if (dtype == DType::float32) check_measures(kernels, what, in, rows, c.size);
  }
  std::free(scratch);
  return out;
}

// x H of one block in float64, by definition for H_K and by butterflies for the power of two.
std::vector<double> reference(const Case& c, std::vector<double> x, const std::vector<float>& signs) {
  const Factors factors = factorize(c.block);
  const std::size_t k = factors.order, m = std::size_t{1} << factors.log2_power;
  const auto sign = [&](std::size_t i) { return signs.empty() ? 1.0 : static_cast<double>(signs[i % signs.size()]); };
  std::vector<double> y(x.size());
  for (std::size_t start = 0; start < c.size; start += c.block) {
    for (std::size_t i = 0; i < c.block && !c.transpose; ++i) x[start + i] *= sign(start + i);
    for (std::size_t half = 1; half < m; half *= 2) {
      for (std::size_t i = 0; i < c.block; ++i) {
        if ((i % m & half) != 0) continue;
        const double a = x[start + i], b = x[start + i + half];
        x[start + i] = a + b;
        x[start + i + half] = a - b;
      }
    }
    const std::vector<std::int8_t> h = order_matrix(k);
    for (std::size_t b = 0; b < k; ++b) {
      double* const sums = y.data() + start + b * m;
      for (std::size_t a = 0; a < k; ++a) {
        const double* const values = x.data() + start + a * m;
        const double weight = c.transpose ? h[b * k + a] : h[a * k + b];
        for (std::size_t i = 0; i < m; ++i) sums[i] += values[i] * weight;
      }
      for (std::size_t i = 0; i < m; ++i) sums[i] /= std::sqrt(static_cast<double>(c.block));
    }
    for (std::size_t i = 0; i < c.block && c.transpose; ++i) y[start + i] *= sign(start + i);
  }
  return y;
}

void check(const Case& c, std::mt19937& random) {
  constexpr std::size_t rows = 3;
  std::vector<float> signs(c.signs);
  for (float& sign : signs) sign = (random() & 1u) != 0 ? 1.0f : -1.0f;
  const std::vector<const Kernels*> all = all_kernels();
  for (const DType dtype : {DType::float32, DType::float16, DType::bfloat16, DType::float64}) {
    const std::size_t count = rows * c.size, item = element_size(dtype);
    Bytes in(count * item);
    std::vector<double> values(count);
    for (std::size_t i = 0; i < count; ++i) {
      // Small multiples of 1/64 are exact in every type.
      const int n = static_cast<int>(random() % 255) - 127;
      const double value = n / 64.0;
      const float narrow = static_cast<float>(value);
      std::uint32_t bits = 0;
      std::memcpy(&bits, &narrow, 4);
      std::uint16_t half = static_cast<std::uint16_t>(bits >> 16);
      if (dtype == DType::float16) {
        half = static_cast<std::uint16_t>((bits >> 16) & 0x8000u);
        if (n != 0) half = static_cast<std::uint16_t>(half | (((bits & 0x7fffffffu) - 0x38000000u) >> 13));
      }
      const void* from = dtype == DType::float64   ? static_cast<const void*>(&value)
                         : dtype == DType::float32 ? static_cast<const void*>(&narrow)
                                                   : static_cast<const void*>(&half);
      std::memcpy(in.data() + i * item, from, item);
      values[i] = value;
    }
    const std::string what = "size " + std::to_string(c.size) + " block " + std::to_string(c.block) + " signs " +
                             std::to_string(c.signs) + (c.transpose ? " transposed" : "") + " type " +
                             std::to_string(static_cast<int>(dtype));
    const Bytes first = run(*all[0], dtype, c, in, rows, signs, false);
    for (const Kernels* kernels : all) {
      for (const bool in_place : {false, true}) {
        expect(run(*kernels, dtype, c, in, rows, signs, in_place) == first,
               what + ": " + kernels->name + (in_place ? " in place" : "") + " differs from " + all[0]->name);
      }
    }
    if (item < 4) continue;
    for (std::size_t r = 0; r < rows; ++r) {
      const auto begin = values.begin() + static_cast<std::ptrdiff_t>(r * c.size);
      const std::vector<double> y =
          reference(c, std::vector<double>(begin, begin + static_cast<std::ptrdiff_t>(c.size)), signs);
      double worst = 0;
      for (std::size_t i = 0; i < c.size; ++i) {
        double got = 0;
        if (dtype == DType::float64) {
          std::memcpy(&got, first.data() + (r * c.size + i) * item, item);
        } else {
          float narrow = 0;
          std::memcpy(&narrow, first.data() + (r * c.size + i) * item, item);
          got = static_cast<double>(narrow);
        }
        worst = std::max(worst, std::fabs(got - y[i]));
      }
      expect(worst < (dtype == DType::float64 ? 1e-13 : 1e-5), what + ": off by " + std::to_string(worst));
    }
  }
}

// More rows than are measured at once, one of them with a NaN, and magnitudes in every lane and place in turn.
void check_measured_rows() {
  constexpr std::size_t rows = 35;
  for (const Kernels* kernels : all_kernels()) {
    for (const std::size_t n : {16u, 256u, 512u, 1024u, 16384u}) {
      std::vector<float> in(rows * n), values(rows * n), largest(rows);
      for (std::size_t r = 0; r < rows; ++r) {
        // A row of H times a number transforms to that number in one place.
        for (std::size_t i = 0; i < n; ++i) {
          std::size_t both = i & (7 * r % n), minus = 0;
          for (; both != 0; both /= 2) minus ^= both & 1u;
          in[r * n + i] = static_cast<float>(r + 1) * (minus != 0 ? -1.0f : 1.0f);
        }
      }
      in[20 * n + 3] = NAN;
      kernels->measure_powers({in.data(), values.data(), largest.data(), rows, n});
      for (std::size_t r = 0; r < rows; ++r) {
        const bool right = r == 20 ? std::isnan(largest[r]) : largest[r] == static_cast<float>((r + 1) * n);
        expect(right, std::string(kernels->name) + ", size " + std::to_string(n) + ": row " + std::to_string(r) +
                          " measures " + std::to_string(largest[r]));
      }
    }
  }
}

// Quantization and the largest magnitude, of all counts around the width of vectors, with values half way between two
// integers, beyond the range, infinite and NaN.
void check_quantize(std::mt19937& random) {
  const std::vector<const Kernels*> all = all_kernels();
  for (std::size_t count = 0; count < 150; ++count) {
    std::vector<float> values(count);
    for (float& value : values) value = static_cast<float>(static_cast<int>(random() % 1201) - 600) / 4.0f;
    const bool beyond = count > 9 && count % 2 == 0;
    if (beyond) {
      values[3] = 3e38f;
      values[5] = -3e38f;
    }
    if (count > 99) {
      values[7] = INFINITY;
      values[8] = -INFINITY;
      values[9] = NAN;
      values[10] = -NAN;
    }
    for (const Kernels* kernels : all) {
      const std::string what = std::string(kernels->name) + ", " + std::to_string(count) + " values: ";
      float most = 0;
      for (const float value : values) most = std::max(most, std::fabs(value));
      const float found = kernels->largest(values.data(), count);
      expect(count > 99 ? std::isnan(found) : found == most, what + "largest is " + std::to_string(found));
      for (const int low : {-128, 0}) {
        for (const float factor : {1.0f, 0.5f}) {
          const int zero_point = low < 0 ? -7 : 120, high = low + 255;
          Bytes bytes(count);
          kernels->quantize({values.data(), bytes.data(), 1, count, &factor, zero_point, low, high, false});
          for (std::size_t i = 0; i < count; ++i) {
            const double exact = std::nearbyint(static_cast<double>(values[i] * factor)) + zero_point;
            int wanted = !(exact < high) ? high : exact < low ? low : static_cast<int>(exact);
            if (std::isnan(values[i]) && std::signbit(values[i])) wanted = low;
            const int got = low < 0 ? static_cast<int>(static_cast<std::int8_t>(bytes[i])) : static_cast<int>(bytes[i]);
            expect(got == wanted, what + std::to_string(values[i]) + " becomes " + std::to_string(got));
          }
        }
      }
      // Two rows with a factor each that leaves nothing to be cut off.
      std::vector<float> small(2 * count);
      for (float& value : small) value = static_cast<float>(static_cast<int>(random() % 255) - 127) / 4.0f;
      const float factors[2] = {4.0f, 1.0f};
      Bytes bytes(2 * count);
      kernels->quantize({small.data(), bytes.data(), 2, count, factors, 0, -127, 127, true});
      for (std::size_t i = 0; i < 2 * count; ++i) {
        const auto wanted = static_cast<int>(std::nearbyint(small[i] * factors[i / count]));
        const int got = static_cast<int>(static_cast<std::int8_t>(bytes[i]));
        expect(got == wanted, what + std::to_string(small[i]) + " within the range becomes " + std::to_string(got));
      }
    }
  }
}

// One value that 32 bits do not hold, in every place.
void check_overflows() {
  constexpr std::size_t count = 150;
  const float factor = 1.0f;
  for (const Kernels* kernels : all_kernels()) {
    for (std::size_t place = 0; place < count; ++place) {
      for (const float value : {2147483648.0f, -2147483648.0f, 40000.0f, -40000.0f, INFINITY}) {
        std::vector<float> values(count, 5.0f);
        values[place] = value;
        Bytes bytes(count);
        kernels->quantize({values.data(), bytes.data(), 1, count, &factor, 0, -128, 127, false});
        Bytes wanted(count, 5);
        wanted[place] = value > 0 ? 127 : 128;
        expect(bytes == wanted, std::string(kernels->name) + ": " + std::to_string(value) + " at " +
                                    std::to_string(place) + " becomes " + std::to_string(bytes[place]));
      }
    }
  }
}

}  // namespace

// An argument limits the sizes: under emulation and sanitizers the large ones take minutes.
int main(int argc, char** argv) {
  const std::size_t limit = argc > 1 ? std::strtoul(argv[1], nullptr, 10) : std::size_t{1} << 20;
  std::mt19937 random(1);
  check_quantize(random);
  check_overflows();
  check_measured_rows();
  std::vector<std::size_t> sizes;
  for (std::size_t n = 1; n <= 65536; n *= 2) sizes.push_back(n);
  for (const unsigned k : {12u, 20u, 28u, 36u, 44u, 52u, 60u, 76u, 92u, 108u, 140u, 156u, 188u, 212u, 300u}) {
    for (const unsigned m : {1u, 2u, 4u, 8u, 16u, 64u, 512u}) sizes.push_back(k * m);
  }
  for (const std::size_t n : sizes) {
    if (n > limit) continue;
    for (const bool transpose : {false, true}) {
      check({n, n, transpose, 0}, random);
      if (n <= 4096) {
        check({n, n, transpose, n}, random);
        check({3 * n, n, transpose, n}, random);
        check({3 * n, n, transpose, 3 * n}, random);
      }
    }
  }
  std::printf("%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
