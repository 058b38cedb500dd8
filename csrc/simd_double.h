// Vectors of fp64 over memory of any float type, for kernels that compute wider than they store.
// defines: PortableDoubles, Avx2Doubles, Avx512Doubles
//
// Used as simd.h is: a kernel's loops are included once for each instruction set.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "isa.h"
#include "simd.h"

#if FASTLM_X86
#include <immintrin.h>
#endif

namespace fastlm {

// An fp32 value in two halves: its upper 16 bits, rounded to the nearest, are a bf16; adding
// `rest`, sign-extended, to the bits of that bf16 gives the bits of the fp32 back.
inline float joined(Bfloat16 high, int16_t rest) {
  return from_bits((static_cast<uint32_t>(high.bits) << 16) + static_cast<uint32_t>(rest));
}
// NaN becomes the quiet one: others would round to an infinity or, all bits set, to -0.
inline void split(float x, Bfloat16& high, int16_t& rest) {
  const uint32_t bits = x == x ? to_bits(x) : 0x7fc00000;
  high.bits = static_cast<uint16_t>((bits + 0x8000) >> 16);
  rest = static_cast<int16_t>(bits & 0xffff);
}

struct PortableDoubles {
  static constexpr int kLanes = 8;
  struct V {
    double lane[kLanes];
  };

#define FASTLM_EACH(expression)                                   \
  V result;                                                       \
  for (int i = 0; i < kLanes; ++i) result.lane[i] = (expression); \
  return result
  static FASTLM_INLINE V set(double x) { FASTLM_EACH(x); }
  static FASTLM_INLINE V add(V a, V b) { FASTLM_EACH(a.lane[i] + b.lane[i]); }
  static FASTLM_INLINE V mul(V a, V b) { FASTLM_EACH(a.lane[i] * b.lane[i]); }
  // a * b + c and c - a * b; fused where the instruction set does it
  static FASTLM_INLINE V fma(V a, V b, V c) { FASTLM_EACH(a.lane[i] * b.lane[i] + c.lane[i]); }
  static FASTLM_INLINE V fnma(V a, V b, V c) { FASTLM_EACH(c.lane[i] - a.lane[i] * b.lane[i]); }
  // a - b / (sqrt(c) * scale + eps) for c >= 0, the ratio to 41 bits at least; of kExact every
  // operation is rounded once.
  template <bool kExact>
  static FASTLM_INLINE V minus_ratio(V a, V b, V c, V scale, V eps) {
    FASTLM_EACH(a.lane[i] - b.lane[i] / (std::sqrt(c.lane[i]) * scale.lane[i] + eps.lane[i]));
  }
  template <class T>
  static FASTLM_INLINE double get(T x) {
    if constexpr (std::is_same_v<T, double>)
      return x;
    else
      return static_cast<double>(to_float(x));
  }
  template <class T>
  static FASTLM_INLINE T put(double x) {
    if constexpr (std::is_same_v<T, double>)
      return x;
    else
      return from_float<T>(static_cast<float>(x));
  }
  template <class T>
  static FASTLM_INLINE V load(const T* p) {
    FASTLM_EACH(get(p[i]));
  }
  static FASTLM_INLINE V load_split(const Bfloat16* p, const int16_t* rest) {
    FASTLM_EACH(static_cast<double>(joined(p[i], rest[i])));
  }
  template <class T>
  static FASTLM_INLINE void store(T* p, V a) {
    for (int i = 0; i < kLanes; ++i) p[i] = put<T>(a.lane[i]);
  }
  static FASTLM_INLINE void store_split(Bfloat16* p, int16_t* rest, V a) {
    for (int i = 0; i < kLanes; ++i) split(static_cast<float>(a.lane[i]), p[i], rest[i]);
  }
#undef FASTLM_EACH
};

#if FASTLM_X86
struct Avx2Doubles {
#define FASTLM_FN FASTLM_TARGET_AVX2 static FASTLM_INLINE
  static constexpr int kLanes = 4;
  using V = __m256d;

  FASTLM_FN V set(double x) { return _mm256_set1_pd(x); }
  FASTLM_FN V add(V a, V b) { return _mm256_add_pd(a, b); }
  FASTLM_FN V mul(V a, V b) { return _mm256_mul_pd(a, b); }
  FASTLM_FN V fma(V a, V b, V c) { return _mm256_fmadd_pd(a, b, c); }
  FASTLM_FN V fnma(V a, V b, V c) { return _mm256_fnmadd_pd(a, b, c); }
  template <bool kExact>
  FASTLM_FN V minus_ratio(V a, V b, V c, V scale, V eps) {
    return _mm256_sub_pd(a, _mm256_div_pd(b, fma(_mm256_sqrt_pd(c), scale, eps)));
  }
  FASTLM_FN V load(const double* p) { return _mm256_loadu_pd(p); }
  FASTLM_FN V load(const float* p) { return _mm256_cvtps_pd(_mm_loadu_ps(p)); }
  FASTLM_FN __m128i words(const void* p) { return _mm_loadl_epi64(static_cast<const __m128i*>(p)); }
  FASTLM_FN V load(const Bfloat16* p) {
    return _mm256_cvtps_pd(_mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(words(p)), 16)));
  }
  FASTLM_FN V load(const Float16* p) { return _mm256_cvtps_pd(_mm_cvtph_ps(words(p))); }
  FASTLM_FN V load_split(const Bfloat16* p, const int16_t* rest) {
    const __m128i high = _mm_slli_epi32(_mm_cvtepu16_epi32(words(p)), 16);
    const __m128i bits = _mm_add_epi32(high, _mm_cvtepi16_epi32(words(rest)));
    return _mm256_cvtps_pd(_mm_castsi128_ps(bits));
  }
  FASTLM_FN void store(double* p, V a) { _mm256_storeu_pd(p, a); }
  FASTLM_FN void store(float* p, V a) { _mm_storeu_ps(p, _mm256_cvtpd_ps(a)); }
  template <class T>
  FASTLM_FN void store(T* p, V a) {
    alignas(16) float lanes[kLanes];
    _mm_store_ps(lanes, _mm256_cvtpd_ps(a));
    for (int i = 0; i < kLanes; ++i) p[i] = from_float<T>(lanes[i]);
  }
  FASTLM_FN void store_split(Bfloat16* p, int16_t* rest, V a) {
    alignas(16) float lanes[kLanes];
    _mm_store_ps(lanes, _mm256_cvtpd_ps(a));
    for (int i = 0; i < kLanes; ++i) split(lanes[i], p[i], rest[i]);
  }
#undef FASTLM_FN
};

struct Avx512Doubles {
#define FASTLM_FN FASTLM_TARGET_AVX512 static FASTLM_INLINE
  static constexpr int kLanes = 8;
  using V = __m512d;

  FASTLM_FN V set(double x) { return _mm512_set1_pd(x); }
  FASTLM_FN V add(V a, V b) { return _mm512_add_pd(a, b); }
  FASTLM_FN V mul(V a, V b) { return _mm512_mul_pd(a, b); }
  FASTLM_FN V fma(V a, V b, V c) { return _mm512_fmadd_pd(a, b, c); }
  FASTLM_FN V fnma(V a, V b, V c) { return _mm512_fnmadd_pd(a, b, c); }
  // One use of the divider is hidden behind the other operations, two are not: the quotient is a
  // table's 14 bits and one step of third order, with a relative error of 2^-42.
  template <bool kExact>
  FASTLM_FN V minus_ratio(V a, V b, V c, V scale, V eps) {
    const V d = fma(_mm512_sqrt_pd(c), scale, eps);
    if constexpr (kExact) return _mm512_sub_pd(a, _mm512_div_pd(b, d));
    const V y = _mm512_rcp14_pd(d), q = mul(b, y);  // where d is infinite, y is 0
    const __mmask8 finite = _mm512_cmp_pd_mask(d, set(INFINITY), _CMP_NEQ_UQ);
    // 1 / d = y / (1 - e) = y (1 + e + e^2 + ...)
    const V e = _mm512_mask3_fnmadd_pd(d, y, set(1), finite);
    return fnma(q, fma(e, e, e), _mm512_sub_pd(a, q));
  }
  FASTLM_FN V widen(__m128i bits, Bfloat16) {
    return _mm512_cvtps_pd(_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16)));
  }
  FASTLM_FN V widen(__m128i bits, Float16) { return _mm512_cvtps_pd(_mm256_cvtph_ps(bits)); }
  FASTLM_FN __m128i words(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
  FASTLM_FN V load(const double* p) { return _mm512_loadu_pd(p); }
  FASTLM_FN V load(const float* p) { return _mm512_cvtps_pd(_mm256_loadu_ps(p)); }
  template <class T>
  FASTLM_FN V load(const T* p) {
    return widen(words(p), T{});
  }
  FASTLM_FN V load_split(const Bfloat16* p, const int16_t* rest) {
    const __m256i high = _mm256_slli_epi32(_mm256_cvtepu16_epi32(words(p)), 16);
    const __m256i bits = _mm256_add_epi32(high, _mm256_cvtepi16_epi32(words(rest)));
    return _mm512_cvtps_pd(_mm256_castsi256_ps(bits));
  }
  FASTLM_FN __m128i narrow(__m256 a, Bfloat16) {
    const __m256i bits = _mm256_castps_si256(a), one = _mm256_set1_epi32(1);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), one);
    const __m256i half = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
    // Of a NaN with all bits set the sum would wrap.
    const __mmask8 nan = _mm256_cmp_ps_mask(a, a, _CMP_UNORD_Q);
    const __m256i sum =
        _mm256_mask_mov_epi32(_mm256_add_epi32(bits, half), nan, _mm256_set1_epi32(0x7fc00000));
    return _mm256_cvtepi32_epi16(_mm256_srli_epi32(sum, 16));
  }
  FASTLM_FN __m128i narrow(__m256 a, Float16) {
    return _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  FASTLM_FN void store(double* p, V a) { _mm512_storeu_pd(p, a); }
  FASTLM_FN void store(float* p, V a) { _mm256_storeu_ps(p, _mm512_cvtpd_ps(a)); }
  template <class T>
  FASTLM_FN void store(T* p, V a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(_mm512_cvtpd_ps(a), T{}));
  }
  FASTLM_FN void store_split(Bfloat16* p, int16_t* rest, V a) {
    const __m256 x = _mm512_cvtpd_ps(a);
    const __mmask8 nan = _mm256_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    const __m256i bits =
        _mm256_mask_mov_epi32(_mm256_castps_si256(x), nan, _mm256_set1_epi32(0x7fc00000));
    const __m256i high = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x8000)), 16);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtepi32_epi16(high));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(rest), _mm256_cvtepi32_epi16(bits));
  }
#undef FASTLM_FN
};
#endif

}  // namespace fastlm
