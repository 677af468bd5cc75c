// From a Job to the passes: rows, blocks, signs, and blocks shorter than a vector. Included by kernel-inl.h.
#include "rows-inl.h"

namespace onnx_quarot {
namespace {

// Blocks at least a vector wide in their power of two.
template <class T, bool SignIn, bool SignOut>
void wide_blocks(const Job& job) {
  using C = typename Compute<T>::Scalar;
  using V = typename Compute<T>::Vector;
  constexpr bool direct = sizeof(T) == sizeof(C);  // values can be kept in the output
  constexpr Finish finish = SignOut ? Finish::scale_and_sign : Finish::scale;
  const ScratchLayout layout = scratch_layout(job, sizeof(T), sizeof(C), kVectorBytes);
  char* scratch = static_cast<char*>(job.scratch);
  const V one = opaque<V>(1.0f);
  const V scale = V{} + static_cast<C>(job.scale);
  const std::size_t block = job.order * job.power;
  [[maybe_unused]] const bool pairs = kPaired<T> && job.power > kLanes<T>;

  // Adjacent rows are one long row of blocks, unless signs tell them apart.
  std::size_t rows = job.rows, blocks = job.blocks;
  const auto row = static_cast<std::ptrdiff_t>(blocks * block);
  if (job.in_stride == row && job.out_stride == row && (job.sign_step == 0 || blocks == 1)) {
    blocks *= rows;
    rows = 1;
  }
  const std::size_t sign_step = blocks == 1 || job.blocks == 1 ? 0 : job.sign_step;
  for (std::size_t r = 0; r < rows; ++r) {
    const T* in = static_cast<const T*>(job.in) + static_cast<std::ptrdiff_t>(r) * job.in_stride;
    T* out = static_cast<T*>(job.out) + static_cast<std::ptrdiff_t>(r) * job.out_stride;
    if (job.order == 1) {
      C* values = direct ? reinterpret_cast<C*>(out) : reinterpret_cast<C*>(scratch + layout.values);
      const Rows<C> between{values, block, direct ? kEveryRow : block * sizeof(C) <= kTwoRowsBytes ? kTwoRows : 0};
      power_rows(Source<T, SignIn>{in, job.signs}, between, Sink<T, finish>{out, job.signs, scale}, blocks, sign_step,
                 block, one);
      continue;
    }
    for (std::size_t b = 0; b < blocks; ++b, in += block, out += block) {
      const float* signs = job.signs + b * sign_step;
      C* values = direct ? reinterpret_cast<C*>(out) : reinterpret_cast<C*>(scratch + layout.values);
      power_rows(Source<T, SignIn>{in, signs}, Rows<C>{values, job.power, kEveryRow},
                 Sink<C, Finish::none>{values, nullptr, one}, job.order, job.power, job.power, one);
      order_steps(values, job.power, job, scratch, layout, scale, one);
      if constexpr (!direct || SignOut) {
        const Sink<T, finish> sink{out, signs, one};
        if constexpr (kPaired<T>) {
          if (pairs) {
            for (std::size_t i = 0; i < block; i += 2 * kLanes<T>) {
              sink.put_pair(i, load(values + i), load(values + i + kLanes<T>));
            }
            continue;
          }
        }
        for (std::size_t i = 0; i < block; i += kLanes<T>) sink.put(i, load(values + i));
      }
    }
  }
}

template <std::size_t P, class T>
ONNX_QUAROT_INLINE void copy_pieces(const T* from, std::size_t from_step, T* to, std::size_t to_step,
                                    std::size_t count) {
  for (std::size_t i = 0; i < count; ++i) std::memcpy(to + i * to_step, from + i * from_step, P * sizeof(T));
}

// Copies `count` pieces of `power` elements, power less than a vector of any CPU.
template <class T>
void copy_pieces(const T* from, std::size_t from_step, T* to, std::size_t to_step, std::size_t count,
                 std::size_t power) {
  switch (power) {
    case 1:
      return copy_pieces<1>(from, from_step, to, to_step, count);
    case 2:
      return copy_pieces<2>(from, from_step, to, to_step, count);
    case 4:
      return copy_pieces<4>(from, from_step, to, to_step, count);
    default:
      return copy_pieces<8>(from, from_step, to, to_step, count);
  }
}

// Blocks whose power of two is shorter than a vector: as many as fill one are packed side by side.
template <class T, bool SignIn, bool SignOut>
void narrow_blocks(const Job& job) {
  using C = typename Compute<T>::Scalar;
  using V = typename Compute<T>::Vector;
  constexpr std::size_t lanes = kLanes<T>;
  constexpr Finish finish = SignOut ? Finish::scale_and_sign : Finish::scale;
  const ScratchLayout layout = scratch_layout(job, sizeof(T), sizeof(C), kVectorBytes);
  char* scratch = static_cast<char*>(job.scratch);
  C* values = reinterpret_cast<C*>(scratch + layout.values);
  T* gathered = reinterpret_cast<T*>(scratch + layout.gathered);
  T* scattered = reinterpret_cast<T*>(scratch + layout.scattered);
  float* signs = reinterpret_cast<float*>(scratch + layout.signs);
  const V one = opaque<V>(1.0f);
  const V scale = V{} + static_cast<C>(job.scale);
  const std::size_t order = job.order, power = job.power, block = order * power, together = lanes / power;
  std::memset(gathered, 0, order * lanes * sizeof(T));
  std::memset(signs, 0, order * lanes * sizeof(float));

  const Source<T, SignIn> source{gathered, signs};
  const std::size_t total = job.rows * job.blocks;
  for (std::size_t first = 0; first < total; first += together) {
    const std::size_t count = total - first < together ? total - first : together;
    for (std::size_t u = 0; u < count; ++u) {
      const std::size_t r = (first + u) / job.blocks, b = (first + u) % job.blocks;
      const T* in = static_cast<const T*>(job.in) + static_cast<std::ptrdiff_t>(r) * job.in_stride + b * block;
      copy_pieces(in, power, gathered + u * power, lanes, order, power);
      if constexpr (SignIn || SignOut) {
        copy_pieces(job.signs + b * job.sign_step, power, signs + u * power, lanes, order, power);
      }
    }
    const Sink<T, finish> sink{scattered, signs, order == 1 ? scale : one};
    if (order == 1) {
      sink.put(0, lane_stages_below<1>(source.get(0), power));
    } else {
      for (std::size_t k = 0; k < order; ++k) {
        store(values + k * lanes, lane_stages_below<1>(source.get(k * lanes), power));
      }
      order_steps(values, lanes, job, scratch, layout, scale, one);
      for (std::size_t i = 0; i < order * lanes; i += lanes) sink.put(i, load(values + i));
    }
    for (std::size_t u = 0; u < count; ++u) {
      const std::size_t r = (first + u) / job.blocks, b = (first + u) % job.blocks;
      T* out = static_cast<T*>(job.out) + static_cast<std::ptrdiff_t>(r) * job.out_stride + b * block;
      copy_pieces(static_cast<const T*>(scattered) + u * power, lanes, out, power, order, power);
    }
  }
}

template <class T, bool SignIn, bool SignOut>
void run(const Job& job) {
  return job.power < kLanes<T> ? narrow_blocks<T, SignIn, SignOut>(job) : wide_blocks<T, SignIn, SignOut>(job);
}

template <class T>
void run_powers(const void* in, void* out, std::size_t count, std::size_t n, double scale) {
  using C = typename Compute<T>::Scalar;
  using V = typename Compute<T>::Vector;
  const UppersCleared cleared;
  const V one = opaque<V>(1.0f);
  const Source<T, false> from{static_cast<const T*>(in), nullptr};
  const Sink<T, Finish::scale> to{static_cast<T*>(out), nullptr, V{} + static_cast<C>(scale)};
  if constexpr (sizeof(T) == sizeof(C)) {
    power_rows(from, Rows<C>{static_cast<C*>(out), n, kEveryRow}, to, count, 0, n, one);
  } else {
    alignas(kScratchAlignment) C between[2 * kTwoRowsBytes / sizeof(C)];
    power_rows(from, Rows<C>{between, n, kTwoRows}, to, count, 0, n, one);
  }
}

template <class T>
void run(const Job& job) {
  const UppersCleared cleared;
  if (job.signs == nullptr) return run<T, false, false>(job);
  return job.transpose ? run<T, false, true>(job) : run<T, true, false>(job);
}

template <class T>
constexpr TypeKernels kTypeKernels = {run<T>, run_powers<T>, widen<T>, narrow<T>};

}  // namespace
}  // namespace onnx_quarot

// Defines the table `variable` of this file's kernels.
#define ONNX_QUAROT_KERNELS(variable, name)                                                                          \
  namespace onnx_quarot {                                                                                            \
  const Kernels variable = {                                                                                         \
      name,     kVectorBytes, {kTypeKernels<float>, kTypeKernels<Half>, kTypeKernels<BFloat>, kTypeKernels<double>}, \
      quantize, largest,      measure_powers};                                                                       \
  }
