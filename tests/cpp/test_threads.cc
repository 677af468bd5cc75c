// Eight threads at once: orders that all of them use first together, transforms and packed weights that they share,
// rows that they quantize into one buffer and panels that they multiply, and the threads behind the Python module. What
// the thread sanitizer looks at.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <thread>
#include <vector>

#include "fwht.h"
#include "qlinear.h"
#include "workers.h"

using namespace onnx_quarot;

namespace {

constexpr std::size_t kThreads = 8;
constexpr std::size_t kRows = 3;

// All threads start together: what is made on first use is made by all of them.
void together(const std::function<void(std::size_t)>& task) {
  std::atomic<std::size_t> waiting{kThreads};
  std::vector<std::thread> threads;
  for (std::size_t i = 0; i < kThreads; ++i) {
    threads.emplace_back([&, i] {
      waiting.fetch_sub(1);
      while (waiting.load() != 0) std::this_thread::yield();
      task(i);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

std::vector<float> values(std::size_t count) {
  std::vector<float> made(count);
  for (std::size_t i = 0; i < count; ++i) made[i] = static_cast<float>(i * 37 % 101) / 50.0f - 1.0f;
  return made;
}

int differing(const std::vector<std::vector<float>>& results, const char* what) {
  int failures = 0;
  for (const std::vector<float>& result : results) {
    failures += std::memcmp(result.data(), results[0].data(), result.size() * sizeof(float)) != 0;
  }
  if (failures != 0) std::fprintf(stderr, "%s: %d threads have another result\n", what, failures);
  return failures;
}

// Every thread makes the transform anew, or uses the one they share; some sizes have orders nobody has used before.
int transforms(std::size_t size, bool shared) {
  TransformSpec spec;
  spec.size = size;
  spec.signs_length = size;
  const std::vector<float> x = values(kRows * size), signs(size, -1.0f);
  std::vector<std::vector<float>> results(kThreads, std::vector<float>(x.size()));
  const std::vector<Transform> one(shared ? 1 : 0, Transform(spec));
  together([&](std::size_t i) {
    const auto run = [&](const Transform& transform) {
      transform.range(x.data(), results[i].data(), 0, kRows, signs.data());
    };
    shared ? run(one[0]) : run(Transform(spec));
  });
  return differing(results, "transform");
}

int linear_layer(std::size_t bits, bool zero_points) {
  QLinearShape shape;
  shape.depth = 96;
  shape.columns = 16 * kThreads;
  shape.bits = bits;
  shape.block = bits == 4 ? 32 : 0;
  shape.zero_points = zero_points;
  check_shape(shape);
  const std::vector<std::uint8_t> weights(shape.panels() * shape.panel_bytes(), bits == 4 ? 0x5a : 200);
  const std::vector<std::uint8_t> zeros(shape.panels() * shape.blocks() * kPanelColumns / 2, 0x3c);
  const std::vector<float> scales(shape.panels() * shape.blocks() * kPanelColumns, 0.25f), bias = values(shape.columns);
  const std::vector<float> x = values(kThreads * shape.depth);
  std::vector<std::vector<float>> results(2, std::vector<float>(kThreads * shape.columns));
  for (std::vector<float>& y : results) {
    const bool alone = &y == results.data();
    QuantizedRows rows(qlinear_kernels(), shape, kThreads);
    const auto set = [&](std::size_t i) { rows.set(i, x.data() + i * shape.depth); };
    QLinearOutput output{};
    output.y = y.data();
    output.stride = shape.columns;
    output.bias = bias.data();
    const auto run = [&](std::size_t i) {
      multiply(rows, 0, kThreads, {weights.data(), scales.data(), zeros.data()}, output, i, i + 1);
    };
    for (std::size_t i = 0; alone && i < kThreads; ++i) set(i);
    for (std::size_t i = 0; alone && i < kThreads; ++i) run(i);
    if (alone) continue;
    together(set);
    together(run);
  }
  return differing(results, "linear layer");
}

// Calls of several threads at once, each with many short parts: every part runs once, and an exception comes back.
int parts() {
  std::atomic<int> failures{0};
  together([&](std::size_t i) {
    for (std::size_t count : {std::size_t{0}, std::size_t{1}, std::size_t{2}, std::size_t{100}}) {
      for (std::size_t threads = 0; threads < 4; ++threads) {
        std::vector<int> runs(count);
        run_parts(count, threads, [&](std::size_t part) { ++runs[part]; });
        for (const int run : runs) failures += run != 1;
        if (count == 0) continue;
        const std::size_t bad = i % count;
        try {
          run_parts(count, threads, [&](std::size_t part) {
            if (part == bad) throw std::runtime_error("a part");
          });
          ++failures;
        } catch (const std::runtime_error&) {
        }
      }
    }
  });
  if (failures != 0)
    std::fprintf(stderr, "run_parts: %d parts did not run once, or calls that did not throw\n", failures.load());
  return failures;
}

}  // namespace

int main() {
  int failures = 0;
  for (int repeat = 0; repeat < 20; ++repeat) failures += parts();
  // Orders 12, 20, 36, 92 and 172: each for the first time by all threads together.
  for (const std::size_t size :
       {std::size_t{96}, std::size_t{320}, std::size_t{576}, std::size_t{736}, std::size_t{1376}}) {
    failures += transforms(size, false);
  }
  for (const std::size_t size : {std::size_t{64}, std::size_t{4096}, std::size_t{1376}})
    failures += transforms(size, true);
  for (int repeat = 0; repeat < 20; ++repeat) {
    failures += linear_layer(8, false) + linear_layer(4, false) + linear_layer(4, true);
  }
  together([&](std::size_t) {
    if (active_isa().empty() || qlinear_isa().empty() || !has_order(1536)) std::abort();
  });
  return failures == 0 ? 0 : 1;
}
