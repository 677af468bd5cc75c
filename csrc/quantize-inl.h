// Float values to 8 bits, and their largest magnitude: what follows a transform whose result is quantized. Included by
// kernel-inl.h.

namespace onnx_quarot {
namespace {

typedef std::uint8_t BytesAnywhere __attribute__((vector_size(kVectorBytes / 4), aligned(1), may_alias));
typedef std::uint8_t Bytes __attribute__((vector_size(kVectorBytes / 4)));

struct Rounder {
  Floats factor;
  std::int32_t zero_point, low, high;
};

// Four vectors at once. Without Scaled the factor is 1. A NaN becomes `high`.
#if defined(__AVX2__) && ONNX_QUAROT_VECTOR_BYTES == 32
template <bool Scaled>
ONNX_QUAROT_INLINE void quantize_vectors(const Rounder& rounder, const float* in, std::uint8_t* out) {
  const __m256 most = _mm256_set1_ps(0x1p30f);  // beyond 32 bits a conversion gives the least integer
  const __m256i zero_point = _mm256_set1_epi16(static_cast<std::int16_t>(rounder.zero_point));
  const auto rounded_vector = [&](std::size_t i) {
    Floats v = load(in + 8 * i);
    if constexpr (Scaled) v *= rounder.factor;
    return _mm256_cvtps_epi32(_mm256_min_ps(reinterpret_cast<__m256>(v), most));
  };
  // The zero point joins where sums saturate: in 32 bits the least integer would wrap around.
  const auto pair = [&](std::size_t i) {
    return _mm256_adds_epi16(_mm256_packs_epi32(rounded_vector(i), rounded_vector(i + 1)), zero_point);
  };
  const __m256i a = pair(0), b = pair(2);
  const __m256i bytes = rounder.low < 0 ? _mm256_packs_epi16(a, b) : _mm256_packus_epi16(a, b);
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_permutevar8x32_epi32(bytes, order));
}
#elif defined(__AVX512BW__) && ONNX_QUAROT_VECTOR_BYTES == 64
// The same on 512 bits; the masked forms, all lanes on, for gcc's warnings.
template <bool Scaled>
ONNX_QUAROT_INLINE void quantize_vectors(const Rounder& rounder, const float* in, std::uint8_t* out) {
  const __m512 most = _mm512_set1_ps(0x1p30f);
  const __m512i zero_point = _mm512_set1_epi16(static_cast<std::int16_t>(rounder.zero_point));
  const auto rounded_vector = [&](std::size_t i) {
    Floats v = load(in + 16 * i);
    if constexpr (Scaled) v *= rounder.factor;
    return _mm512_maskz_cvtps_epi32(0xffff, _mm512_maskz_min_ps(0xffff, reinterpret_cast<__m512>(v), most));
  };
  const auto pair = [&](std::size_t i) {
    return _mm512_adds_epi16(_mm512_packs_epi32(rounded_vector(i), rounded_vector(i + 1)), zero_point);
  };
  const __m512i a = pair(0), b = pair(2);
  const __m512i bytes = rounder.low < 0 ? _mm512_packs_epi16(a, b) : _mm512_packus_epi16(a, b);
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  _mm512_storeu_si512(out, _mm512_maskz_permutexvar_epi32(0xffff, order, bytes));
}
#else
// The nearest integer of each value of magnitude below 2^22 stands in the low bits of the sum with 1.5 * 2^23.
constexpr float kRound = 12582912.0f;

template <bool Scaled>
ONNX_QUAROT_INLINE void quantize_vectors(const Rounder& rounder, const float* in, std::uint8_t* out) {
  const Floats low = Floats{} + static_cast<float>(rounder.low - rounder.zero_point);
  const Floats high = Floats{} + static_cast<float>(rounder.high - rounder.zero_point);
  const Words zero_point = Words{} + static_cast<std::uint32_t>(rounder.zero_point);
#pragma GCC unroll 4
  for (std::size_t i = 0; i < 4; ++i) {
    Floats v = load(in + i * kLanes<float>);
    if constexpr (Scaled) v *= rounder.factor;
    v = v < high ? v : high;
    v = v > low ? v : low;
    const Words words = (reinterpret_cast<Words>(v + kRound) + zero_point) & 0xffu;
    *reinterpret_cast<BytesAnywhere*>(out + i * kLanes<float>) = __builtin_convertvector(words, Bytes);
  }
}
#endif

template <bool Scaled>
void quantize(const QuantizeJob& job) {
  const Rounder rounder{Floats{} + job.factor, job.zero_point, job.low, job.high};
  constexpr std::size_t width = 4 * kLanes<float>;
  auto* out = static_cast<std::uint8_t*>(job.out);
  std::size_t i = 0;
  for (; i + width <= job.count; i += width) quantize_vectors<Scaled>(rounder, job.in + i, out + i);
  if (i == job.count) return;
  float in[width] = {};
  std::uint8_t rest[width];
  std::memcpy(in, job.in + i, (job.count - i) * sizeof(float));
  quantize_vectors<Scaled>(rounder, in, rest);
  std::memcpy(out + i, rest, job.count - i);
}

void quantize(const QuantizeJob& job) { return job.factor == 1.0f ? quantize<false>(job) : quantize<true>(job); }

// Magnitudes compare as integers, and a NaN as more than any of them.
ONNX_QUAROT_INLINE Ints larger(Ints a, Ints b) {
#if defined(__AVX2__) && ONNX_QUAROT_VECTOR_BYTES == 32  // gcc compares and blends
  return reinterpret_cast<Ints>(_mm256_max_epi32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#elif defined(__AVX512F__) && ONNX_QUAROT_VECTOR_BYTES == 64
  return reinterpret_cast<Ints>(
      _mm512_maskz_max_epi32(0xffff, reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#else
  return a > b ? a : b;
#endif
}

template <int D, int... I>
ONNX_QUAROT_INLINE std::int32_t largest_lane(Ints x, Indices<I...> lanes) {
  if constexpr (D > 0) {
    return largest_lane<D / 2>(larger(x, __builtin_shufflevector(x, x, (I ^ D)...)), lanes);
  } else {
    return x[0];
  }
}

float largest(const float* values, std::size_t count) {
  constexpr std::size_t lanes = kLanes<float>;
  const auto magnitude = [](const float* from) { return reinterpret_cast<Ints>(load(from)) & 0x7fffffff; };
  Ints most[4] = {};
  std::size_t i = 0;
  for (; i + 4 * lanes <= count; i += 4 * lanes) {
#pragma GCC unroll 4
    for (std::size_t v = 0; v < 4; ++v) most[v] = larger(most[v], magnitude(values + i + v * lanes));
  }
  for (; i < count; i += lanes) {
    float rest[lanes] = {};
    std::memcpy(rest, values + i, (count - i < lanes ? count - i : lanes) * sizeof(float));
    most[0] = larger(most[0], magnitude(rest));
  }
  const Ints all = larger(larger(most[0], most[1]), larger(most[2], most[3]));
  const std::int32_t bits = largest_lane<static_cast<int>(lanes / 2)>(all, LanesOf<Ints>{});
  float value = 0;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

}  // namespace
}  // namespace onnx_quarot
