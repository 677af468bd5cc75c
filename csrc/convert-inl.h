// Between the storage types and float64, elements that lie one after the other. Included by kernel-inl.h.
namespace onnx_quarot {
namespace {

constexpr std::size_t kHalfLanes = kVectorBytes / sizeof(double);

typedef float HalfFloats __attribute__((vector_size(kVectorBytes / 2)));
typedef std::int32_t HalfInts __attribute__((vector_size(kVectorBytes / 2)));
typedef std::int64_t Longs __attribute__((vector_size(kVectorBytes)));

template <int... I>
ONNX_QUAROT_INLINE Floats joined(HalfFloats low, HalfFloats high, Indices<I...>) {
  return __builtin_shufflevector(low, high, I...);
}
template <int... I>
ONNX_QUAROT_INLINE Doubles wide_half(Floats v, std::size_t half, Indices<I...>) {
  constexpr int lanes = sizeof...(I);
  return __builtin_convertvector(
      half == 0 ? __builtin_shufflevector(v, v, I...) : __builtin_shufflevector(v, v, (I + lanes)...), Doubles);
}

// float64 to float32 by rounding to odd: a second rounding, to fewer than 22 bits, is then as good as a single one.
#if defined(__AVX512F__)
ONNX_QUAROT_INLINE HalfFloats to_odd(Doubles v) {
  const __m512d x = reinterpret_cast<__m512d>(v);
  // Masked forms, as in simd-inl.h.
  const __m256 near = _mm512_maskz_cvt_roundpd_ps(0xff, x, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC);
  const __mmask8 inexact = _mm512_cmp_pd_mask(_mm512_maskz_cvtps_pd(0xff, near), x, _CMP_NEQ_UQ);
  const __m256i bits = _mm256_castps_si256(near);
  return reinterpret_cast<HalfFloats>(_mm256_mask_or_epi32(bits, inexact, bits, _mm256_set1_epi32(1)));
}
#else
ONNX_QUAROT_INLINE HalfFloats to_odd(Doubles x) {
  const HalfFloats near = __builtin_convertvector(x, HalfFloats);
  const Doubles back = __builtin_convertvector(near, Doubles);
  const Doubles size = x < 0 ? -x : x, back_size = back < 0 ? -back : back;
  const Longs away = back_size > size, inexact = back != x;  // -1 where true
  const HalfInts bits = reinterpret_cast<HalfInts>(near) + __builtin_convertvector(away, HalfInts);
  return reinterpret_cast<HalfFloats>(bits | (__builtin_convertvector(inexact, HalfInts) & 1));
}
#endif

template <class T>
ONNX_QUAROT_INLINE HalfFloats narrowed(Doubles x) {
  return to_odd(x);
}
template <>
ONNX_QUAROT_INLINE HalfFloats narrowed<float>(Doubles x) {
  return __builtin_convertvector(x, HalfFloats);
}

template <class T>
ONNX_QUAROT_INLINE void widen_vector(const T* from, double* to) {
  const Floats v = load(from);
  store(to, wide_half(v, 0, LanesOf<Doubles>{}));
  store(to + kHalfLanes, wide_half(v, 1, LanesOf<Doubles>{}));
}

template <class T>
ONNX_QUAROT_INLINE void narrow_vector(const double* from, T* to) {
  store(to, joined(narrowed<T>(load(from)), narrowed<T>(load(from + kHalfLanes)), LanesOf<Floats>{}));
}

// One after the other, what is left through buffers.
template <class From, class To, class Vector>
ONNX_QUAROT_INLINE void in_vectors(const From* from, To* to, std::size_t count, const Vector& vector) {
  constexpr std::size_t lanes = 2 * kHalfLanes;
  const std::size_t whole = count / lanes * lanes;
  for (std::size_t i = 0; i < whole; i += lanes) vector(from + i, to + i);
  if (whole < count) {
    From rest[lanes] = {};
    To converted[lanes];
    std::memcpy(rest, from + whole, (count - whole) * sizeof(From));
    vector(rest, converted);
    std::memcpy(to + whole, converted, (count - whole) * sizeof(To));
  }
}

template <class T>
void widen(const void* source, double* to, std::size_t count) {
  in_vectors(static_cast<const T*>(source), to, count, [](const T* some, double* wide) { widen_vector(some, wide); });
}

template <class T>
void narrow(const double* from, void* target, std::size_t count) {
  in_vectors(from, static_cast<T*>(target), count, [](const double* some, T* narrow) { narrow_vector(some, narrow); });
}

template <>
[[maybe_unused]] void widen<double>(const void* source, double* to, std::size_t count) {
  std::memcpy(to, source, count * sizeof(double));
}
template <>
[[maybe_unused]] void narrow<double>(const double* from, void* target, std::size_t count) {
  std::memcpy(target, from, count * sizeof(double));
}

}  // namespace
}  // namespace onnx_quarot
