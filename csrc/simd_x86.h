// The structs of simd.h for AVX2 and AVX-512. PortableSimd says what each function does.
// defines: Avx2Simd, Avx512Simd
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "isa.h"
#include "simd.h"

namespace fastlm {

struct Avx2Simd {
#define FASTLM_FN FASTLM_TARGET_AVX2 static FASTLM_INLINE
  static constexpr int kLanes = 8;
  using F = __m256;

  FASTLM_FN F set(float x) { return _mm256_set1_ps(x); }
  FASTLM_FN F add(F a, F b) { return _mm256_add_ps(a, b); }
  FASTLM_FN F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  FASTLM_FN F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  FASTLM_FN F div(F a, F b) { return _mm256_div_ps(a, b); }
  FASTLM_FN F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  FASTLM_FN F sqrt(F a) { return _mm256_sqrt_ps(a); }
  FASTLM_FN F quiet(F a) {
    return _mm256_blendv_ps(a, set(NAN), _mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  }
  FASTLM_FN F max(F a, F b) { return _mm256_max_ps(a, b); }
  FASTLM_FN F abs(F a) { return _mm256_andnot_ps(set(-0.0f), a); }
  FASTLM_FN F copy_sign(F a, F sign) {
    const F mask = set(-0.0f);
    return _mm256_or_ps(_mm256_andnot_ps(mask, a), _mm256_and_ps(mask, sign));
  }
  FASTLM_FN F where_less(F a, F b, F yes, F no) {
    return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
  }
  FASTLM_FN F floor(F a) { return _mm256_floor_ps(a); }
  template <bool kExact>
  FASTLM_FN F base2_rest(F d, F n) {
    const F rest = _mm256_fmsub_ps(d, set(1.44269502f), n);
    return kExact ? fma(d, set(1.925963e-8f), rest) : rest;
  }
  FASTLM_FN F power_of_two(__m256i n) {  // 2^n for n in [-126, 127]
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
  }
  FASTLM_FN F scale_by_power(F a, F n) {
    const __m256i least = _mm256_set1_epi32(-126), whole = _mm256_cvttps_epi32(n);
    const __m256i first = _mm256_max_epi32(whole, least);
    const __m256i rest = _mm256_max_epi32(_mm256_sub_epi32(whole, first), least);
    return mul(mul(a, power_of_two(first)), power_of_two(rest));
  }
  FASTLM_FN double sum(F a) {
    const __m256d low = _mm256_cvtps_pd(_mm256_castps256_ps128(a));
    const __m256d x = _mm256_add_pd(low, _mm256_cvtps_pd(_mm256_extractf128_ps(a, 1)));
    const __m128d y = _mm_add_pd(_mm256_castpd256_pd128(x), _mm256_extractf128_pd(x, 1));
    return _mm_cvtsd_f64(_mm_add_sd(y, _mm_unpackhi_pd(y, y)));
  }
  FASTLM_FN float first(F a) { return _mm256_cvtss_f32(a); }
  FASTLM_FN float largest(F a) {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
  }
  FASTLM_FN F load(const float* p) { return _mm256_loadu_ps(p); }
  FASTLM_FN F load(const Bfloat16* p) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
  FASTLM_FN F load(const Float16* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  FASTLM_FN F load_split(const Bfloat16* p, const int16_t* rest) {
    const __m256i low =
        _mm256_cvtepi16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(rest)));
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(load(p)), low));
  }
  FASTLM_FN void store_split(Bfloat16* p, int16_t* rest, F a) {
    alignas(32) float lanes[kLanes];
    _mm256_store_ps(lanes, a);
    for (int i = 0; i < kLanes; ++i) split(lanes[i], p[i], rest[i]);
  }
  template <class T>
  FASTLM_FN F load_first(const T* p, int n, float rest) {
    alignas(32) float lanes[kLanes];
    for (int i = 0; i < kLanes; ++i) lanes[i] = i < n ? to_float(p[i]) : rest;
    return _mm256_load_ps(lanes);
  }
  FASTLM_FN float largest_of(const float* p, int n) {
    F a = set(-INFINITY), b = a;
    int i = 0;
    for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
      a = max(a, load(p + i)), b = max(b, load(p + i + kLanes));
    }
    for (; i < n; i += kLanes)
      a = max(a, load_first(p + i, n - i < kLanes ? n - i : kLanes, -INFINITY));
    return largest(max(a, b));
  }
  // As integers: 16-bit floats are sign and magnitude. The largest positive one is the largest
  // signed integer; if none is positive, the smallest unsigned one.
  template <class T>
  FASTLM_FN float largest_of(const T* p, int n) {
    constexpr int kWords = 2 * kLanes;
    __m256i high = _mm256_set1_epi16(INT16_MIN), low = _mm256_set1_epi16(-1);
    int i = 0;
    for (; i + kWords <= n; i += kWords) {
      const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + i));
      high = _mm256_max_epi16(high, bits), low = _mm256_min_epu16(low, bits);
    }
    int16_t highs[kWords];
    uint16_t lows[kWords];
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(highs), high);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(lows), low);
    int16_t top = INT16_MIN;
    uint16_t bottom = UINT16_MAX;
    for (int lane = 0; lane < kWords; ++lane) {
      top = top > highs[lane] ? top : highs[lane];
      bottom = bottom < lows[lane] ? bottom : lows[lane];
    }
    for (; i < n; ++i) {
      const int16_t bits = static_cast<int16_t>(p[i].bits);
      top = top > bits ? top : bits;
      bottom = bottom < p[i].bits ? bottom : p[i].bits;
    }
    if (n == 0) return -INFINITY;
    return to_float(T{top >= 0 ? static_cast<uint16_t>(top) : bottom});
  }
  FASTLM_FN __m128i narrow(F a, Bfloat16) {
    const __m256i bits = _mm256_castps_si256(a), one = _mm256_set1_epi32(1);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), one);
    const __m256i half = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
    const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, half), 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
  }
  FASTLM_FN __m128i narrow(F a, Float16) {
    return _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  FASTLM_FN void store(float* p, F a) { _mm256_storeu_ps(p, a); }
  template <class T>
  FASTLM_FN void store(T* p, F a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(a, T{}));
  }
  template <class T>
  FASTLM_FN void store_first(T* p, F a, int n) {
    alignas(32) T lanes[kLanes];
    store(lanes, a);
    for (int i = 0; i < n; ++i) p[i] = lanes[i];
  }
  template <class T>
  FASTLM_FN void get_two(const T* p, F& a, F& b) {
    a = load(p), b = load(p + kLanes);
  }
  template <class T>
  FASTLM_FN void sort_two(F&, F&) {}
  template <bool kStream, class T>
  FASTLM_FN void put_two(T* p, F a, F b) {
    store_two<kStream>(p, a, b);
  }
  template <bool kStream>
  FASTLM_FN void store_two(float* p, F a, F b) {
    if (kStream) {
      _mm256_stream_ps(p, a), _mm256_stream_ps(p + kLanes, b);
    } else {
      store(p, a), store(p + kLanes, b);
    }
  }
  template <bool kStream, class T>
  FASTLM_FN void store_two(T* p, F a, F b) {
    const __m256i both = _mm256_set_m128i(narrow(b, T{}), narrow(a, T{}));
    if (kStream) {
      _mm256_stream_si256(reinterpret_cast<__m256i*>(p), both);
    } else {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), both);
    }
  }
  FASTLM_FN void transpose(const float* p, int64_t stride, float* to, int64_t step) {
    F a[kLanes], b[kLanes];
    for (int i = 0; i < kLanes; ++i) a[i] = load(p + i * stride);
    for (int i = 0; i < kLanes; i += 2) {
      b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
      b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
    }
    for (int i = 0; i < kLanes; i += 4) {
      for (int j = 0; j < 2; ++j) {
        a[i + 2 * j] = _mm256_shuffle_ps(b[i + j], b[i + j + 2], 0x44);
        a[i + 2 * j + 1] = _mm256_shuffle_ps(b[i + j], b[i + j + 2], 0xee);
      }
    }
    for (int i = 0; i < 4; ++i) {
      store(to + i * step, _mm256_permute2f128_ps(a[i], a[i + 4], 0x20));
      store(to + (i + 4) * step, _mm256_permute2f128_ps(a[i], a[i + 4], 0x31));
    }
  }
  FASTLM_FN void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }
  FASTLM_FN void fence() { _mm_sfence(); }
#undef FASTLM_FN
};

struct Avx512Simd {
#define FASTLM_FN FASTLM_TARGET_AVX512 static FASTLM_INLINE
  static constexpr int kLanes = 16;
  using F = __m512;

  FASTLM_FN F set(float x) { return _mm512_set1_ps(x); }
  FASTLM_FN F add(F a, F b) { return _mm512_add_ps(a, b); }
  FASTLM_FN F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  FASTLM_FN F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  FASTLM_FN F div(F a, F b) { return _mm512_div_ps(a, b); }
  FASTLM_FN F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  FASTLM_FN F sqrt(F a) { return _mm512_sqrt_ps(a); }
  FASTLM_FN F quiet(F a) {
    return _mm512_mask_mov_ps(a, _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), set(NAN));
  }
  FASTLM_FN F max(F a, F b) { return _mm512_max_ps(a, b); }
  FASTLM_FN F abs(F a) { return _mm512_abs_ps(a); }
  FASTLM_FN F copy_sign(F a, F sign) {
    const F mask = set(-0.0f);
    return _mm512_or_ps(_mm512_andnot_ps(mask, a), _mm512_and_ps(mask, sign));
  }
  FASTLM_FN F where_less(F a, F b, F yes, F no) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes);
  }
  FASTLM_FN F floor(F a) {
    return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  }
  template <bool kExact>
  FASTLM_FN F base2_rest(F d, F n) {
    const F rest = _mm512_fmsub_ps(d, set(1.44269502f), n);
    return kExact ? fma(d, set(1.925963e-8f), rest) : rest;
  }
  FASTLM_FN F scale_by_power(F a, F n) { return _mm512_scalef_ps(a, n); }
  FASTLM_FN double sum(F a) {
    const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(a));
    return _mm512_reduce_add_pd(_mm512_add_pd(low, _mm512_cvtps_pd(_mm512_extractf32x8_ps(a, 1))));
  }
  FASTLM_FN float first(F a) { return _mm512_cvtss_f32(a); }
  FASTLM_FN float largest(F a) { return _mm512_reduce_max_ps(a); }
  FASTLM_FN __mmask16 mask(int n) { return static_cast<__mmask16>((1u << n) - 1); }
  FASTLM_FN F widen(__m256i bits, Bfloat16) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  FASTLM_FN F widen(__m256i bits, Float16) { return _mm512_cvtph_ps(bits); }
  FASTLM_FN F load(const float* p) { return _mm512_loadu_ps(p); }
  template <class T>
  FASTLM_FN F load(const T* p) {
    return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), T{});
  }
  FASTLM_FN F load_split(const Bfloat16* p, const int16_t* rest) {
    const __m512i low =
        _mm512_cvtepi16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(rest)));
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(load(p)), low));
  }
  FASTLM_FN void store_split(Bfloat16* p, int16_t* rest, F a) {
    const __m512i bits = _mm512_castps_si512(a);
    const __m512i high = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x8000)), 16);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(high));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(rest), _mm512_cvtepi32_epi16(bits));
  }
  FASTLM_FN F load_first(const float* p, int n, float rest) {
    return _mm512_mask_loadu_ps(set(rest), mask(n), p);
  }
  template <class T>
  FASTLM_FN F load_first(const T* p, int n, float rest) {
    const F values = widen(_mm256_maskz_loadu_epi16(mask(n), p), T{});
    return _mm512_mask_blend_ps(mask(n), set(rest), values);
  }
  FASTLM_FN float largest_of(const float* p, int n) {
    F a = set(-INFINITY), b = a;
    int i = 0;
    for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
      a = max(a, load(p + i)), b = max(b, load(p + i + kLanes));
    }
    for (; i < n; i += kLanes)
      a = max(a, load_first(p + i, n - i < kLanes ? n - i : kLanes, -INFINITY));
    return largest(max(a, b));
  }
  // As integers: 16-bit floats are sign and magnitude. The largest positive one is the largest
  // signed integer; if none is positive, the smallest unsigned one.
  template <class T>
  FASTLM_FN float largest_of(const T* p, int n) {
    constexpr int kWords = 2 * kLanes;
    __m512i high = _mm512_set1_epi16(INT16_MIN), low = _mm512_set1_epi16(-1);
    int i = 0;
    for (; i + kWords <= n; i += kWords) {
      const __m512i bits = _mm512_loadu_si512(p + i);
      high = _mm512_max_epi16(high, bits), low = _mm512_min_epu16(low, bits);
    }
    int16_t highs[kWords];
    uint16_t lows[kWords];
    _mm512_storeu_si512(highs, high);
    _mm512_storeu_si512(lows, low);
    int16_t top = INT16_MIN;
    uint16_t bottom = UINT16_MAX;
    for (int lane = 0; lane < kWords; ++lane) {
      top = top > highs[lane] ? top : highs[lane];
      bottom = bottom < lows[lane] ? bottom : lows[lane];
    }
    for (; i < n; ++i) {
      const int16_t bits = static_cast<int16_t>(p[i].bits);
      top = top > bits ? top : bits;
      bottom = bottom < p[i].bits ? bottom : p[i].bits;
    }
    if (n == 0) return -INFINITY;
    return to_float(T{top >= 0 ? static_cast<uint16_t>(top) : bottom});
  }
  // The upper half of each word is the bf16.
  FASTLM_FN __m512i rounded(F a) {
    const __m512i bits = _mm512_castps_si512(a), one = _mm512_set1_epi32(1);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), one);
    return _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  }
  FASTLM_FN __m256i narrow(F a, Bfloat16) {
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded(a), 16));
  }
  FASTLM_FN __m512i narrow_two(F a, F b, Bfloat16) {
    const __m512i words = _mm512_set1_epi32(0x00020000);
    const __m512i lanes =
        _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 52, 56, 60);
    // Words 1, 3, 5 ... of a, then of b.
    const __m512i low = _mm512_add_epi32(lanes, _mm512_set1_epi32(1));
    const __m512i order = _mm512_or_si512(low, _mm512_add_epi32(_mm512_slli_epi32(low, 16), words));
    return _mm512_permutex2var_epi16(rounded(a), order, rounded(b));
  }
  FASTLM_FN __m512i narrow_two(F a, F b, Float16) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(narrow(a, Float16{})), narrow(b, Float16{}),
                              1);
  }
  FASTLM_FN __m256i narrow(F a, Float16) {
    return _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  FASTLM_FN void store(float* p, F a) { _mm512_storeu_ps(p, a); }
  template <class T>
  FASTLM_FN void store(T* p, F a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(a, T{}));
  }
  FASTLM_FN void store_first(float* p, F a, int n) { _mm512_mask_storeu_ps(p, mask(n), a); }
  template <class T>
  FASTLM_FN void store_first(T* p, F a, int n) {
    _mm256_mask_storeu_epi16(p, mask(n), narrow(a, T{}));
  }
  // For bf16 the even elements, then the odd ones: a shift and a mask widen them.
  template <class T>
  FASTLM_FN void get_two(const T* p, F& a, F& b) {
    if constexpr (std::is_same_v<T, Bfloat16>) {
      const __m512i bits = _mm512_loadu_si512(p);
      a = _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
      b = _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(-0x10000)));
    } else {
      a = load(p), b = load(p + kLanes);
    }
  }
  template <class T>
  FASTLM_FN void sort_two(F& a, F& b) {
    if constexpr (std::is_same_v<T, Bfloat16>) {
      const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
      const F first = _mm512_permutex2var_ps(a, low, b);
      b = _mm512_permutex2var_ps(a, _mm512_add_epi32(low, _mm512_set1_epi32(8)), b);
      a = first;
    }
  }
  template <bool kStream, class T>
  FASTLM_FN void put_two(T* p, F a, F b) {
    if constexpr (std::is_same_v<T, Bfloat16>) {
      const __m512i even = _mm512_srli_epi32(rounded(a), 16);
      const __m512i both = _mm512_mask_blend_epi16(0xaaaaaaaa, even, rounded(b));
      if (kStream) {
        _mm512_stream_si512(reinterpret_cast<__m512i*>(p), both);
      } else {
        _mm512_storeu_si512(p, both);
      }
    } else {
      store_two<kStream>(p, a, b);
    }
  }
  template <bool kStream>
  FASTLM_FN void store_two(float* p, F a, F b) {
    if (kStream) {
      _mm512_stream_ps(p, a), _mm512_stream_ps(p + kLanes, b);
    } else {
      store(p, a), store(p + kLanes, b);
    }
  }
  template <bool kStream, class T>
  FASTLM_FN void store_two(T* p, F a, F b) {
    const __m512i both = narrow_two(a, b, T{});
    if (kStream) {
      _mm512_stream_si512(reinterpret_cast<__m512i*>(p), both);
    } else {
      _mm512_storeu_si512(p, both);
    }
  }
  FASTLM_FN void transpose(const float* p, int64_t stride, float* to, int64_t step) {
    F a[kLanes], b[kLanes];
    for (int i = 0; i < kLanes; ++i) a[i] = load(p + i * stride);
    for (int i = 0; i < kLanes; i += 2) {
      b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
      b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
    }
    for (int i = 0; i < kLanes; i += 4) {
      for (int j = 0; j < 2; ++j) {
        a[i + 2 * j] = _mm512_shuffle_ps(b[i + j], b[i + j + 2], 0x44);
        a[i + 2 * j + 1] = _mm512_shuffle_ps(b[i + j], b[i + j + 2], 0xee);
      }
    }
    // a[4g + c] holds, in its quarter q, column 4q + c of rows 4g to 4g + 3.
    for (int c = 0; c < 4; ++c) {
      const F even01 = _mm512_shuffle_f32x4(a[c], a[c + 4], 0x88);
      const F odd01 = _mm512_shuffle_f32x4(a[c], a[c + 4], 0xdd);
      const F even23 = _mm512_shuffle_f32x4(a[c + 8], a[c + 12], 0x88);
      const F odd23 = _mm512_shuffle_f32x4(a[c + 8], a[c + 12], 0xdd);
      store(to + c * step, _mm512_shuffle_f32x4(even01, even23, 0x88));
      store(to + (c + 8) * step, _mm512_shuffle_f32x4(even01, even23, 0xdd));
      store(to + (c + 4) * step, _mm512_shuffle_f32x4(odd01, odd23, 0x88));
      store(to + (c + 12) * step, _mm512_shuffle_f32x4(odd01, odd23, 0xdd));
    }
  }
  FASTLM_FN void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }
  FASTLM_FN void fence() { _mm_sfence(); }
#undef FASTLM_FN
};

}  // namespace fastlm
