// Float values to 8 bits, and their largest magnitude: what follows a transform whose result is quantized, or
// is found by its last pass. Included by kernel-inl.h.

namespace onnx_quarot {
namespace {

struct Rounder {
  std::int32_t zero_point, low, high;
};

// The bytes of four vectors, one behind the other.
typedef std::uint8_t Bytes __attribute__((vector_size(kVectorBytes)));
typedef std::uint8_t BytesAnywhere __attribute__((vector_size(kVectorBytes), aligned(1), may_alias));
typedef std::uint8_t QuarterBytes __attribute__((vector_size(kVectorBytes / 4)));

// The smaller of two, compared as integers: of two positive floats the smaller, and any negative one.
ONNX_QUAROT_INLINE Ints smaller(Ints a, Ints b) {
#if defined(__AVX2__) && ONNX_QUAROT_VECTOR_BYTES == 32  // gcc compares and blends
  return reinterpret_cast<Ints>(_mm256_min_epi32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#elif defined(__AVX512F__) && ONNX_QUAROT_VECTOR_BYTES == 64
  return reinterpret_cast<Ints>(
      _mm512_maskz_min_epi32(0xffff, reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#else
  return a < b ? a : b;
#endif
}
// v, but at most a limit of 0 or more. The units that compare floats are busy with conversions.
ONNX_QUAROT_INLINE Floats at_most(Floats v, float limit) {
  return reinterpret_cast<Floats>(smaller(reinterpret_cast<Ints>(v), reinterpret_cast<Ints>(Floats{} + limit)));
}

// What is known of the values. `within`: as QuantizeJob says; `centred`: signed bytes whose zero point is 0.
enum class Range { within, centred, signed_bytes, unsigned_bytes };
constexpr bool adds_zero_point(Range range) { return range == Range::signed_bytes || range == Range::unsigned_bytes; }

[[maybe_unused]] constexpr float kMost = 0x1p30f;  // beyond 32 bits a conversion gives the least integer

#if defined(__AVX2__) && ONNX_QUAROT_VECTOR_BYTES == 32
// The least 16-bit integer among converted values is also what those too large for 32 bits become: where there is none,
// nothing had to be limited first.
constexpr bool kLooksBack = true;
class Least {
 public:
  ONNX_QUAROT_INLINE void add(__m256i v) { least_ = _mm256_min_epi16(least_, v); }
  ONNX_QUAROT_INLINE bool reached() const {
    return _mm256_movemask_epi8(_mm256_cmpeq_epi16(least_, _mm256_set1_epi16(-32768))) != 0;
  }

 private:
  __m256i least_ = _mm256_setzero_si256();
};

template <Range range, bool Limited>
ONNX_QUAROT_INLINE Bytes round_to_bytes(const Rounder& rounder, const Floats* x, Least& least) {
  const __m256i zero_point = _mm256_set1_epi16(static_cast<std::int16_t>(rounder.zero_point));
  const auto rounded_vector = [&](std::size_t i) {
    const Floats v = Limited ? at_most(x[i], kMost) : x[i];
    return _mm256_cvtps_epi32(reinterpret_cast<__m256>(v));
  };
  // The zero point joins where sums saturate: in 32 bits the least integer would wrap around.
  const auto pair = [&](std::size_t i) {
    const __m256i both = _mm256_packs_epi32(rounded_vector(i), rounded_vector(i + 1));
    if constexpr (!Limited && range != Range::within) least.add(both);
    return adds_zero_point(range) ? _mm256_adds_epi16(both, zero_point) : both;
  };
  const __m256i a = pair(0), b = pair(2);
  const __m256i bytes = range == Range::unsigned_bytes ? _mm256_packus_epi16(a, b) : _mm256_packs_epi16(a, b);
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  return reinterpret_cast<Bytes>(_mm256_permutevar8x32_epi32(bytes, order));
}
#elif defined(__AVX512BW__) && ONNX_QUAROT_VECTOR_BYTES == 64
// The same on 512 bits; the masked forms, all lanes on, for gcc's warnings.
constexpr bool kLooksBack = false;
struct Least {
  static constexpr bool reached() { return false; }
};

template <Range range, bool Limited>
ONNX_QUAROT_INLINE Bytes round_to_bytes(const Rounder& rounder, const Floats* x, Least&) {
  const __m512i zero_point = _mm512_set1_epi16(static_cast<std::int16_t>(rounder.zero_point));
  const auto rounded_vector = [&](std::size_t i) {
    const Floats v = Limited ? at_most(x[i], kMost) : x[i];
    return _mm512_maskz_cvtps_epi32(0xffff, reinterpret_cast<__m512>(v));
  };
  const auto pair = [&](std::size_t i) {
    const __m512i both = _mm512_packs_epi32(rounded_vector(i), rounded_vector(i + 1));
    return adds_zero_point(range) ? _mm512_adds_epi16(both, zero_point) : both;
  };
  const __m512i a = pair(0), b = pair(2);
  const __m512i bytes = range == Range::unsigned_bytes ? _mm512_packus_epi16(a, b) : _mm512_packs_epi16(a, b);
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return reinterpret_cast<Bytes>(_mm512_maskz_permutexvar_epi32(0xffff, order, bytes));
}
#else
// The nearest integer of each value of magnitude below 2^22 stands in the low bits of the sum with 1.5 * 2^23.
constexpr float kRound = 12582912.0f;
constexpr bool kLooksBack = false;
struct Least {
  static constexpr bool reached() { return false; }
};

template <Range range, bool Limited>
ONNX_QUAROT_INLINE Bytes round_to_bytes(const Rounder& rounder, const Floats* x, Least&) {
  const Floats low = Floats{} + static_cast<float>(rounder.low - rounder.zero_point);
  const float high = static_cast<float>(rounder.high - rounder.zero_point);
  const Words zero_point = Words{} + static_cast<std::uint32_t>(rounder.zero_point);
  Bytes bytes;
#pragma GCC unroll 4
  for (std::size_t i = 0; i < 4; ++i) {
    Floats v = at_most(x[i], high);
    v = v > low ? v : low;
    const Words words = (reinterpret_cast<Words>(v + kRound) + zero_point) & 0xffu;
    const QuarterBytes quarter = __builtin_convertvector(words, QuarterBytes);
    std::memcpy(reinterpret_cast<char*>(&bytes) + i * sizeof(quarter), &quarter, sizeof(quarter));
  }
  return bytes;
}
#endif

template <Range range, bool Limited, bool Scaled>
ONNX_QUAROT_INLINE Bytes load_bytes(const Rounder& rounder, const float* in, Floats factor, Least& least) {
  Floats x[4];
#pragma GCC unroll 4
  for (std::size_t i = 0; i < 4; ++i) {
    x[i] = load(in + i * kLanes<float>);
    if constexpr (Scaled) x[i] *= factor;
  }
  return round_to_bytes<range, Limited>(rounder, x, least);
}

// Whether values were not, but would have had to be, `Limited` to what a conversion can take.
template <Range range, bool Limited, bool Scaled>
ONNX_QUAROT_INLINE bool row_overflows(const QuantizeJob& job, const float* in, std::uint8_t* out, float scalar) {
  const Rounder rounder{job.zero_point, job.low, job.high};
  const Floats factor = Floats{} + scalar;
  Least least;
  std::size_t i = 0;
  for (; i + kVectorBytes <= job.count; i += kVectorBytes) {
    *reinterpret_cast<BytesAnywhere*>(out + i) = load_bytes<range, Limited, Scaled>(rounder, in + i, factor, least);
  }
  if (i < job.count) {
    float rest[kVectorBytes] = {};
    std::memcpy(rest, in + i, (job.count - i) * sizeof(float));
    const Bytes bytes = load_bytes<range, Limited, Scaled>(rounder, rest, factor, least);
    std::memcpy(out + i, &bytes, job.count - i);
  }
  return least.reached();
}

template <Range range, bool Scaled>
ONNX_QUAROT_INLINE void quantize_row(const QuantizeJob& job, const float* in, std::uint8_t* out, float scalar) {
  if constexpr (range == Range::within) {
    row_overflows<range, false, Scaled>(job, in, out, scalar);
  } else if (!kLooksBack || row_overflows<range, false, Scaled>(job, in, out, scalar)) {
    row_overflows<range, true, Scaled>(job, in, out, scalar);
  }
}

template <Range range>
void quantize(const QuantizeJob& job) {
  auto* out = static_cast<std::uint8_t*>(job.out);
  for (std::size_t r = 0; r < job.rows; ++r) {
    const float* in = job.in + r * job.count;
    if (job.factors == nullptr) {
      quantize_row<range, false>(job, in, out + r * job.count, 1.0f);
    } else {
      quantize_row<range, true>(job, in, out + r * job.count, job.factors[r]);
    }
  }
}

[[maybe_unused]] void quantize(const QuantizeJob& job) {
  if (job.within) return quantize<Range::within>(job);
  if (job.low >= 0) return quantize<Range::unsigned_bytes>(job);
  return job.zero_point == 0 ? quantize<Range::centred>(job) : quantize<Range::signed_bytes>(job);
}

// Magnitudes compare as integers, and a NaN as more than any of them.
ONNX_QUAROT_INLINE Ints magnitude(Floats v) { return reinterpret_cast<Ints>(v) & 0x7fffffff; }
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
ONNX_QUAROT_INLINE float largest_lane(Ints x, Indices<I...> lanes) {
  if constexpr (D > 0) {
    return largest_lane<D / 2>(larger(x, __builtin_shufflevector(x, x, (I ^ D)...)), lanes);
  } else {
    return reinterpret_cast<Floats>(x)[0];
  }
}
ONNX_QUAROT_INLINE float largest_lane(Ints x) {
  return largest_lane<static_cast<int>(kLanes<float> / 2)>(x, LanesOf<Ints>{});
}

[[maybe_unused]] float largest(const float* values, std::size_t count) {
  constexpr std::size_t lanes = kLanes<float>;
  Ints most[4] = {};
  std::size_t i = 0;
  for (; i + 4 * lanes <= count; i += 4 * lanes) {
#pragma GCC unroll 4
    for (std::size_t v = 0; v < 4; ++v) most[v] = larger(most[v], magnitude(load(values + i + v * lanes)));
  }
  for (; i < count; i += lanes) {
    float rest[lanes] = {};
    std::memcpy(rest, values + i, (count - i < lanes ? count - i : lanes) * sizeof(float));
    most[0] = larger(most[0], magnitude(load(rest)));
  }
  return largest_lane(larger(larger(most[0], most[1]), larger(most[2], most[3])));
}

class MeasuringLoop;

// Values go to memory, and the largest magnitude of each lane to `most`, one vector a row.
struct MeasuringSink {
  static constexpr bool paired = false;
  using Vector = Floats;
  using Loop = MeasuringLoop;
  float* values;
  Ints* most;
  ONNX_QUAROT_INLINE void put(std::size_t i, Floats v) const {
    store(values + i, v);
    *most = larger(*most, magnitude(v));
  }
  template <std::size_t R>
  ONNX_QUAROT_INLINE void put_all(const Floats* x, std::size_t step) const {
    Ints found[R];
#pragma GCC unroll 64
    for (std::size_t i = 0; i < R; ++i) {
      store(values + i * step, x[i]);
      found[i] = magnitude(x[i]);
    }
#pragma GCC unroll 8
    for (std::size_t half = R / 2; half > 0; half /= 2) {
#pragma GCC unroll 64
      for (std::size_t i = 0; i < half; ++i) found[i] = larger(found[i], found[i + half]);
    }
    *most = larger(*most, found[0]);
  }
  ONNX_QUAROT_INLINE MeasuringSink at(std::size_t i) const { return {values + i, most}; }
  ONNX_QUAROT_INLINE MeasuringSink at(std::size_t i, std::size_t row) const { return {values + i, most + row}; }
};

// Its largest magnitudes in a register: through memory, columns would wait for those before them.
class MeasuringLoop {
 public:
  ONNX_QUAROT_INLINE explicit MeasuringLoop(const MeasuringSink& sink) : sink_(sink), most_(*sink.most) {}
  ONNX_QUAROT_INLINE ~MeasuringLoop() { *sink_.most = most_; }
  MeasuringLoop(const MeasuringLoop&) = delete;
  MeasuringLoop& operator=(const MeasuringLoop&) = delete;
  ONNX_QUAROT_INLINE MeasuringSink at(std::size_t i) { return {sink_.values + i, &most_}; }

 private:
  MeasuringSink sink_;
  Ints most_;
};

[[maybe_unused]] void measure_powers(const MeasureJob& job) {
  constexpr std::size_t together = 16;
  const UppersCleared cleared;
  const Floats one = opaque<Floats>(1.0f);
  // Known zeros would be written by `rep stos`, which takes 30 nanoseconds to start.
  const Ints none = reinterpret_cast<Ints>(opaque<Floats>(0.0f));
  for (std::size_t done = 0; done < job.rows; done += together) {
    const std::size_t rows = job.rows - done < together ? job.rows - done : together;
    Ints most[together];
    for (std::size_t r = 0; r < rows; ++r) most[r] = none;
    float* values = job.values + done * job.n;
    power_rows(Source<float, false>{job.in + done * job.n, nullptr}, Rows<float>{values, job.n, kEveryRow},
               MeasuringSink{values, most}, rows, 1, job.n, one);
    for (std::size_t r = 0; r < rows; ++r) job.largest[done + r] = largest_lane(most[r]);
  }
}

}  // namespace
}  // namespace onnx_quarot
