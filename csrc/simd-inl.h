// Vectors: loads, stores and conversions on GCC's vector extensions. Included by each file in isa/ after it has defined
//   ONNX_QUAROT_VECTOR_BYTES   width of a vector
// Everything has internal linkage and is inlined: no function compiled here may be shared between CPUs.
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__F16C__) || defined(__AVX512F__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define ONNX_QUAROT_INLINE __attribute__((always_inline)) inline

namespace onnx_quarot {
namespace {

constexpr std::size_t kVectorBytes = ONNX_QUAROT_VECTOR_BYTES;

typedef float Floats __attribute__((vector_size(kVectorBytes)));
typedef double Doubles __attribute__((vector_size(kVectorBytes)));
typedef float FloatsAnywhere __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
typedef double DoublesAnywhere __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
typedef float HalfFloatsAnywhere __attribute__((vector_size(kVectorBytes / 2), aligned(4), may_alias));
typedef std::uint32_t Words __attribute__((vector_size(kVectorBytes)));
typedef std::uint32_t WordsAnywhere __attribute__((vector_size(kVectorBytes), aligned(2), may_alias));
typedef std::int32_t Ints __attribute__((vector_size(kVectorBytes)));
typedef std::uint16_t Shorts __attribute__((vector_size(kVectorBytes / 2)));
typedef std::uint16_t ShortsAnywhere __attribute__((vector_size(kVectorBytes / 2), aligned(2), may_alias));

// Storage types; both are computed in float.
struct Half {
  std::uint16_t bits;
};
struct BFloat {
  std::uint16_t bits;
};

// The type of computation of a storage type, and its vector.
template <class T>
struct Compute {
  using Scalar = float;
  using Vector = Floats;
};
template <>
struct Compute<double> {
  using Scalar = double;
  using Vector = Doubles;
};

template <int... I>
struct Indices {};
template <int N, int... I>
struct MakeIndices : MakeIndices<N - 1, N - 1, I...> {};
template <int... I>
struct MakeIndices<0, I...> {
  using Type = Indices<I...>;
};
template <class V>
using LanesOf = typename MakeIndices<static_cast<int>(sizeof(V) / sizeof(V{}[0]))>::Type;

template <class T>
constexpr std::size_t kLanes = kVectorBytes / sizeof(typename Compute<T>::Scalar);

ONNX_QUAROT_INLINE Floats load(const float* p) { return *reinterpret_cast<const FloatsAnywhere*>(p); }
ONNX_QUAROT_INLINE Doubles load(const double* p) { return *reinterpret_cast<const DoublesAnywhere*>(p); }
ONNX_QUAROT_INLINE void store(float* p, Floats v) { *reinterpret_cast<FloatsAnywhere*>(p) = v; }
ONNX_QUAROT_INLINE void store(double* p, Doubles v) { *reinterpret_cast<DoublesAnywhere*>(p) = v; }

// Signs are float whatever the type of computation.
ONNX_QUAROT_INLINE void load_signs(const float* p, Floats& v) { v = load(p); }
ONNX_QUAROT_INLINE void load_signs(const float* p, Doubles& v) {
  v = __builtin_convertvector(*reinterpret_cast<const HalfFloatsAnywhere*>(p), Doubles);
}

ONNX_QUAROT_INLINE Words load_words(const std::uint16_t* p) {
  return __builtin_convertvector(*reinterpret_cast<const ShortsAnywhere*>(p), Words);
}
// Words below 2^16.
ONNX_QUAROT_INLINE void store_words(std::uint16_t* p, Words w) {
#if defined(__AVX2__) && !defined(__AVX512F__)  // gcc masks every word before it packs them
  for (std::size_t i = 0; i < kVectorBytes / 32; ++i) {
    __m256i part;
    std::memcpy(&part, reinterpret_cast<const char*>(&w) + 32 * i, 32);
    const __m128i low = _mm256_castsi256_si128(part), high = _mm256_extracti128_si256(part, 1);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p) + i, _mm_packus_epi32(low, high));
  }
#else
  *reinterpret_cast<ShortsAnywhere*>(p) = __builtin_convertvector(w, Shorts);
#endif
}

ONNX_QUAROT_INLINE Floats load(const BFloat* p) { return reinterpret_cast<Floats>(load_words(&p->bits) << 16); }

// To nearest even; a NaN stays one, quiet.
ONNX_QUAROT_INLINE void store(BFloat* p, Floats v) {
  const Words bits = reinterpret_cast<Words>(v);
  const Words nan = reinterpret_cast<Words>(v != v);
  const Words rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  store_words(&p->bits, (nan != 0u ? bits | 0x400000u : rounded) >> 16);
}

// bfloat16 is the upper half of float: two of them in a word become floats, and back, by shifts and masks alone, where
// converting adjacent elements takes a shuffle. So it is loaded and stored in pairs of vectors, those of even elements
// and those of odd ones.
template <class T>
constexpr bool kPaired = false;
template <>
constexpr bool kPaired<BFloat> = true;
static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "pairs are read as words");

ONNX_QUAROT_INLINE void load_pair(const BFloat* p, Floats& even, Floats& odd) {
  const Words words = *reinterpret_cast<const WordsAnywhere*>(p);
  even = reinterpret_cast<Floats>(words << 16);
  odd = reinterpret_cast<Floats>(words & 0xffff0000u);
}
// To nearest even: up where the lower half is more than a half, or just that and the upper half is odd. That turns no
// NaN into a number: NaNs come from a bfloat16 or from an invalid operation, and both leave the lower half zero.
ONNX_QUAROT_INLINE void store_pair(BFloat* p, Floats even, Floats odd) {
#if defined(__AVX512BF16__)
  const __m512i apart =
      reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(odd), reinterpret_cast<__m512>(even)));
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,  //
                                         23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  _mm512_storeu_si512(p, _mm512_maskz_permutexvar_epi16(~__mmask32{0}, order, apart));
#else
  const Words e = reinterpret_cast<Words>(even), o = reinterpret_cast<Words>(odd);
#if defined(__AVX512BW__)
  constexpr __mmask64 even_words = 0x3333333333333333, odd_words = ~even_words;
  const __m512i one = _mm512_set1_epi16(1), half = _mm512_set1_epi16(static_cast<std::int16_t>(0x8000));
  const __m512i even_bits = reinterpret_cast<__m512i>(e), odd_bits = reinterpret_cast<__m512i>(o);
  const __m512i high = _mm512_mask_alignr_epi8(odd_bits, even_words, even_bits, even_bits, 2);
  const __m512i low = _mm512_mask_alignr_epi8(even_bits, odd_words, odd_bits, odd_bits, 14);
  constexpr int first_or_both_others = 0xf8;
  const __m512i rest = _mm512_ternarylogic_epi32(low, high, one, first_or_both_others);
  const __m512i rounded = _mm512_mask_add_epi16(high, _mm512_cmpgt_epu16_mask(rest, half), high, one);
  _mm512_storeu_si512(p, rounded);
#elif defined(__AVX2__) && ONNX_QUAROT_VECTOR_BYTES == 32
  // Half a last place is added. Where that leaves a lower half of 0, it was a tie: the upper half is made even.
  const auto words = [](Words w) { return reinterpret_cast<__m256i>(w); };
  const Words even_sum = e + 0x8000u, odd_sum = o + 0x8000u;
  const __m256i high = _mm256_blend_epi16(words(even_sum >> 16), words(odd_sum), 0xaa);
  const __m256i low = _mm256_blend_epi16(words(even_sum), words(odd_sum << 16), 0xaa);
  const __m256i kept = _mm256_adds_epu16(low, _mm256_set1_epi16(static_cast<std::int16_t>(0xfffe)));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_and_si256(high, kept));
#else
  const auto rounded = [](Words bits) { return bits + 0x7fffu + ((bits >> 16) & 1u); };
  *reinterpret_cast<WordsAnywhere*>(p) = (rounded(e) >> 16) | (rounded(o) & 0xffff0000u);
#endif
#endif
}
#if defined(__AVX512BF16__)
// Sums and differences of the even and the odd elements, as dot products with 1 and +-1: added to -0, they are those of
// an addition to the sign of a zero.
ONNX_QUAROT_INLINE void load_sums(const BFloat* p, Floats& sums, Floats& differences) {
  const __m512bh pairs = reinterpret_cast<__m512bh>(_mm512_loadu_si512(p));
  const auto sum = [&](std::uint32_t weights) {
    const __m512i factors = _mm512_set1_epi32(static_cast<std::int32_t>(weights));
    return reinterpret_cast<Floats>(
        _mm512_dpbf16_ps(_mm512_set1_ps(-0.0f), pairs, reinterpret_cast<__m512bh>(factors)));
  };
  sums = sum(0x3f803f80u);
  differences = sum(0xbf803f80u);
}
#endif
template <int... I>
ONNX_QUAROT_INLINE void load_pair(const float* p, Floats& even, Floats& odd, Indices<I...>) {
  const Floats low = load(p), high = load(p + sizeof...(I));
  even = __builtin_shufflevector(low, high, (2 * I)...);
  odd = __builtin_shufflevector(low, high, (2 * I + 1)...);
}
ONNX_QUAROT_INLINE void load_pair(const float* p, Floats& even, Floats& odd) {
  load_pair(p, even, odd, LanesOf<Floats>{});
}

#if defined(__AVX512F__)
// The masked forms, all lanes on: gcc 12 warns about the plain ones, whose unused operand it leaves undefined.
ONNX_QUAROT_INLINE Floats load(const Half* p) {
  return reinterpret_cast<Floats>(
      _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
}
ONNX_QUAROT_INLINE void store(Half* p, Floats v) {
  _mm256_storeu_si256(
      reinterpret_cast<__m256i*>(p),
      _mm512_maskz_cvtps_ph(0xffff, reinterpret_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif defined(__F16C__)
ONNX_QUAROT_INLINE Floats load(const Half* p) {
  Floats v;
  for (std::size_t i = 0; i < kVectorBytes / 32; ++i) {
    const __m256 part = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p) + i));
    std::memcpy(reinterpret_cast<char*>(&v) + 32 * i, &part, 32);
  }
  return v;
}
ONNX_QUAROT_INLINE void store(Half* p, Floats v) {
  for (std::size_t i = 0; i < kVectorBytes / 32; ++i) {
    __m256 part;
    std::memcpy(&part, reinterpret_cast<const char*>(&v) + 32 * i, 32);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p) + i,
                     _mm256_cvtps_ph(part, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
}
#elif defined(__aarch64__)
ONNX_QUAROT_INLINE Floats load(const Half* p) {
  Floats v;
  for (std::size_t i = 0; i < kVectorBytes / 16; ++i) {
    const float32x4_t part = vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&p->bits + 4 * i)));
    std::memcpy(reinterpret_cast<char*>(&v) + 16 * i, &part, 16);
  }
  return v;
}
ONNX_QUAROT_INLINE void store(Half* p, Floats v) {
  for (std::size_t i = 0; i < kVectorBytes / 16; ++i) {
    float32x4_t part;
    std::memcpy(&part, reinterpret_cast<const char*>(&v) + 16 * i, 16);
    vst1_u16(&p->bits + 4 * i, vreinterpret_u16_f16(vcvt_f16_f32(part)));
  }
}
#else
// Without conversion instructions: the exponent is moved by a multiplication, which also makes subnormals right.
ONNX_QUAROT_INLINE Floats load(const Half* p) {
  const Words half = load_words(&p->bits);
  const Words magnitude = (half & 0x7fffu) << 13;
  const Words scaled = reinterpret_cast<Words>(reinterpret_cast<Floats>(magnitude) * 0x1p112f);
  const Words special = reinterpret_cast<Words>(magnitude >= 0x0f800000u);  // infinity and NaN
  const Words quiet = reinterpret_cast<Words>(magnitude > 0x0f800000u) & 0x400000u;
  return reinterpret_cast<Floats>(((half & 0x8000u) << 16) | (special & (magnitude | 0x7f800000u | quiet)) |
                                  (~special & scaled));
}
ONNX_QUAROT_INLINE void store(Half* p, Floats v) {
  const Words bits = reinterpret_cast<Words>(v);
  const Words magnitude = bits & 0x7fffffffu;
  // Normal halves: round the 13 surplus bits to even, then rebias. A carry runs into the exponent, as it should.
  const Words normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13;
  // Subnormal halves: adding 0.5 leaves just their bits in the significand, rounded by the addition.
  const Words subnormal = reinterpret_cast<Words>(reinterpret_cast<Floats>(magnitude) + 0.5f) - 0x3f000000u;
  const Words small = reinterpret_cast<Words>(magnitude < 0x38800000u);
  const Words large = reinterpret_cast<Words>(magnitude >= 0x477ff000u);  // rounds to infinity
  const Words nan = reinterpret_cast<Words>(magnitude > 0x7f800000u);
  const Words finite = (small & subnormal) | (~small & normal);
  const Words special = (~nan & 0x7c00u) | (nan & (0x7e00u | ((magnitude >> 13) & 0x1ffu)));
  store_words(&p->bits, (large & special) | (~large & finite) | ((bits >> 16) & 0x8000u));
}
#endif

// One stage inside a vector: lanes i and i ^ D become their sum and difference. The product is exact, so that the
// result does not depend on whether the compiler fuses it. In 64-byte vectors the last stage is an addition to flipped
// signs instead: with four multiply-adds, the units for these would have three times the work of those that add.
template <int D, int... I>
ONNX_QUAROT_INLINE Floats lane_stage(Floats x, Indices<I...>) {
  const Floats other = __builtin_shufflevector(x, x, (I ^ D)...);
  if constexpr (kVectorBytes >= 64 && 2 * D == sizeof...(I)) {
    const Words flips = {((I & D) != 0 ? 0x80000000u : 0u)...};
    return reinterpret_cast<Floats>(reinterpret_cast<Words>(x) ^ flips) + other;
  } else {
    const Floats sign = {((I & D) != 0 ? -1.0f : 1.0f)...};
    return x * sign + other;
  }
}
template <int D, int... I>
ONNX_QUAROT_INLINE Doubles lane_stage(Doubles x, Indices<I...>) {
  const Doubles sign = {((I & D) != 0 ? -1.0 : 1.0)...};
  return x * sign + __builtin_shufflevector(x, x, (I ^ D)...);
}

// All stages inside each of R vectors. Stage by stage, not vector by vector: neighbouring instructions are then
// independent, and a row takes half the time.
template <std::size_t R, int D = 1, class V>
ONNX_QUAROT_INLINE void lane_stages(V* x) {
  if constexpr (static_cast<std::size_t>(D) < sizeof(V) / sizeof(V{}[0])) {
#pragma GCC unroll 64
    for (std::size_t i = 0; i < R; ++i) x[i] = lane_stage<D>(x[i], LanesOf<V>{});
    lane_stages<R, 2 * D>(x);
  }
}

// The stages inside groups of `width` lanes.
template <int D, class V>
ONNX_QUAROT_INLINE V lane_stages_below(V x, std::size_t width) {
  if constexpr (static_cast<std::size_t>(D) < sizeof(V) / sizeof(V{}[0])) {
    return static_cast<std::size_t>(D) < width ? lane_stages_below<2 * D>(lane_stage<D>(x, LanesOf<V>{}), width) : x;
  } else {
    return x;
  }
}

// On its way out of scope, clears the upper halves of vectors. The compiler does that at the end of each function, but
// not of one that takes vectors or ends with a call of one: what the caller computes in 16-byte vectors would then wait
// for the halves it keeps, 400 cycles on Zen 3.
struct UppersCleared {
  UppersCleared() = default;
  UppersCleared(const UppersCleared&) = delete;
  UppersCleared& operator=(const UppersCleared&) = delete;
  ONNX_QUAROT_INLINE ~UppersCleared() {
#if defined(__AVX__)
    _mm256_zeroupper();
#endif
  }
};

// Keeps the compiler from reading vectors again, as operands in memory, for every use: loads may be what is scarce.
template <class V>
ONNX_QUAROT_INLINE void in_registers(V& a, V& b, V& c, V& d) {
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64) __asm__("" : "+v"(a), "+v"(b), "+v"(c), "+v"(d));
#elif defined(__AVX__)
  if constexpr (sizeof(V) == 32) __asm__("" : "+x"(a), "+x"(b), "+x"(c), "+x"(d));
#endif
  (void)a, (void)b, (void)c, (void)d;
}

// A factor the compiler cannot see through. Multiplying by an opaque 1 turns a subtraction into a fused multiply-add,
// which some CPUs run beside the additions instead of after them.
template <class V>
ONNX_QUAROT_INLINE V opaque(typename Compute<float>::Scalar value) {
  // Through a register where that can be said: memory would cost the start of every call a round trip.
#if defined(__x86_64__)
  __asm__("" : "+x"(value));
#elif defined(__aarch64__)
  __asm__("" : "+w"(value));
#else
  __asm__("" : "+m"(value));
#endif
  V v{};
  return v + static_cast<decltype(V{}[0] + 0)>(value);
}

}  // namespace
}  // namespace onnx_quarot
