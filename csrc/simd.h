// One interface over the instruction sets' vectors of fp32, for kernels written once.
// defines: Bfloat16, Float16, to_float, from_float, joined, split, PortableSimd; simd_x86.h:
// Avx2Simd, Avx512Simd
//
// FASTLM_SIMD names one of the structs in the loops of each_isa.inc.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "isa.h"

namespace fastlm {

// 16-bit floats as they lie in memory.
struct Bfloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

FASTLM_INLINE float to_float(float x) { return x; }
FASTLM_INLINE float to_float(Bfloat16 x) { return from_bits(static_cast<uint32_t>(x.bits) << 16); }
FASTLM_INLINE float to_float(Float16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff;
  // Normal and subnormal: the exponent is rebiased by a multiplication, which is exact.
  const float scaled = from_bits(rest << 13) * from_bits(0x77800000);  // 2^112
  const uint32_t magnitude = rest >= 0x7c00 ? (rest << 13) | 0x7f800000 : to_bits(scaled);
  return from_bits(sign | magnitude);
}

// Rounds to the nearest, ties to even. NaN stays NaN (in the vector versions to bf16 only if it is
// the quiet one that arithmetic makes, or was widened from 16 bits).
template <class T>
T from_float(float x);
template <>
FASTLM_INLINE float from_float<float>(float x) {
  return x;
}
template <>
FASTLM_INLINE Bfloat16 from_float<Bfloat16>(float x) {
  const uint32_t bits = to_bits(x);
  if ((bits & 0x7fffffff) > 0x7f800000) return {0x7fc0};
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
template <>
FASTLM_INLINE Float16 from_float<Float16>(float x) {
  const uint32_t bits = to_bits(x), sign = (bits >> 16) & 0x8000, rest = bits & 0x7fffffff;
  if (rest > 0x7f800000) return {0x7e00};
  if (rest >= 0x477ff000) return {static_cast<uint16_t>(sign | 0x7c00)};  // rounds to 65536
  if (rest < 0x38800000) {  // subnormal: adding 0.5 makes the hardware round at 2^-24
    const uint32_t rounded = to_bits(from_bits(rest) + 0.5f) - to_bits(0.5f);
    return {static_cast<uint16_t>(sign | rounded)};
  }
  return {static_cast<uint16_t>(sign | ((rest - 0x38000000 + 0xfff + ((rest >> 13) & 1)) >> 13))};
}

// An fp32 value in two halves: its upper 16 bits, rounded to the nearest, are a bf16; adding
// `rest`, sign-extended, to the bits of that bf16 gives the bits of the fp32 back. NaN must be a
// quiet one.
FASTLM_INLINE float joined(Bfloat16 high, int16_t rest) {
  return from_bits((static_cast<uint32_t>(high.bits) << 16) + static_cast<uint32_t>(rest));
}
FASTLM_INLINE void split(float x, Bfloat16& high, int16_t& rest) {
  high.bits = static_cast<uint16_t>((to_bits(x) + 0x8000) >> 16);
  rest = static_cast<int16_t>(to_bits(x) & 0xffff);
}

// Plain C++; the compiler uses the vectors that every CPU of the architecture has (SSE2, NEON).
struct PortableSimd {
  static constexpr int kLanes = 8;
  struct F {
    float lane[kLanes];
  };

#define FASTLM_EACH(expression)                                   \
  F result;                                                       \
  for (int i = 0; i < kLanes; ++i) result.lane[i] = (expression); \
  return result
  static FASTLM_INLINE F set(float x) { FASTLM_EACH(x); }
  static FASTLM_INLINE F add(F a, F b) { FASTLM_EACH(a.lane[i] + b.lane[i]); }
  static FASTLM_INLINE F sub(F a, F b) { FASTLM_EACH(a.lane[i] - b.lane[i]); }
  static FASTLM_INLINE F mul(F a, F b) { FASTLM_EACH(a.lane[i] * b.lane[i]); }
  static FASTLM_INLINE F div(F a, F b) { FASTLM_EACH(a.lane[i] / b.lane[i]); }
  // Rounded once, as the other instruction sets do it (without an fma, all but once: in fp64).
  static FASTLM_INLINE F fma(F a, F b, F c) {
#ifdef __FP_FAST_FMAF
    FASTLM_EACH(std::fma(a.lane[i], b.lane[i], c.lane[i]));
#else
    FASTLM_EACH(static_cast<float>(static_cast<double>(a.lane[i]) * b.lane[i] + c.lane[i]));
#endif
  }
  static FASTLM_INLINE F sqrt(F a) { FASTLM_EACH(std::sqrt(a.lane[i])); }
  // NaN becomes the one that can be rounded to bf16 or split.
  static FASTLM_INLINE F quiet(F a) {
    FASTLM_EACH(a.lane[i] == a.lane[i] ? a.lane[i] : from_bits(0x7fc00000));
  }
  // The second operand if either is NaN, as x86 does it.
  static FASTLM_INLINE F max(F a, F b) {
    FASTLM_EACH(a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]);
  }
  static FASTLM_INLINE F abs(F a) { FASTLM_EACH(std::fabs(a.lane[i])); }
  static FASTLM_INLINE F copy_sign(F a, F sign) {
    FASTLM_EACH(
        from_bits((to_bits(a.lane[i]) & 0x7fffffff) | (to_bits(sign.lane[i]) & 0x80000000)));
  }
  // a < b ? yes : no
  static FASTLM_INLINE F where_less(F a, F b, F yes, F no) {
    FASTLM_EACH(a.lane[i] < b.lane[i] ? yes.lane[i] : no.lane[i]);
  }
  static FASTLM_INLINE F floor(F a) { FASTLM_EACH(std::floor(a.lane[i])); }
  // d * log2(e) - n without the rounding error of the product, which a fused operation does not
  // make; with kExact without that of the constant, too.
  template <bool kExact>
  static FASTLM_INLINE F base2_rest(F d, F n) {
    FASTLM_EACH(static_cast<float>(static_cast<double>(d.lane[i]) * 1.4426950408889634 -
                                   static_cast<double>(n.lane[i])));
  }
  // a * 2^n for whole n in [-250, 126]
  static FASTLM_INLINE F scale_by_power(F a, F n) {
    F result;
    for (int i = 0; i < kLanes; ++i) {
      const int32_t whole = static_cast<int32_t>(n.lane[i]);
      const int32_t first = whole < -126 ? -126 : whole;  // in two steps through the subnormals
      const int32_t rest = whole - first < -126 ? -126 : whole - first;
      result.lane[i] = a.lane[i] * from_bits(static_cast<uint32_t>(first + 127) << 23) *
                       from_bits(static_cast<uint32_t>(rest + 127) << 23);
    }
    return result;
  }
  static FASTLM_INLINE double sum(F a) {
    double result = 0;
    for (int i = 0; i < kLanes; ++i) result += static_cast<double>(a.lane[i]);
    return result;
  }
  static FASTLM_INLINE float first(F a) { return a.lane[0]; }
  static FASTLM_INLINE float largest(F a) {
    float result = a.lane[0];
    for (int i = 1; i < kLanes; ++i) result = result > a.lane[i] ? result : a.lane[i];
    return result;
  }
  // The largest of n values, -infinity if n is 0. It may see some NaNs and miss others.
  template <class T>
  static FASTLM_INLINE float largest_of(const T* p, int n) {
    F result = set(-INFINITY);
    int i = 0;
    for (; i + kLanes <= n; i += kLanes) result = max(result, load(p + i));
    for (; i < n; ++i)
      result.lane[0] = result.lane[0] > to_float(p[i]) ? result.lane[0] : to_float(p[i]);
    return largest(result);
  }
  template <class T>
  static FASTLM_INLINE F load(const T* p) {
    FASTLM_EACH(to_float(p[i]));
  }
  template <class T>
  static FASTLM_INLINE F load_first(const T* p, int n, float rest) {
    FASTLM_EACH(i < n ? to_float(p[i]) : rest);
  }
  static FASTLM_INLINE F load_split(const Bfloat16* p, const int16_t* rest) {
    FASTLM_EACH(joined(p[i], rest[i]));
  }
  static FASTLM_INLINE void store_split(Bfloat16* p, int16_t* rest, F a) {
    for (int i = 0; i < kLanes; ++i) split(a.lane[i], p[i], rest[i]);
  }
  template <class T>
  static FASTLM_INLINE void store(T* p, F a) {
    for (int i = 0; i < kLanes; ++i) p[i] = from_float<T>(a.lane[i]);
  }
  template <class T>
  static FASTLM_INLINE void store_first(T* p, F a, int n) {
    for (int i = 0; i < n; ++i) p[i] = from_float<T>(a.lane[i]);
  }
  // Two vectors of elements that lie next to each other, in an order of the instruction set's
  // choice: put_two stores them from that order, sort_two brings them into that of memory.
  template <class T>
  static FASTLM_INLINE void get_two(const T* p, F& a, F& b) {
    a = load(p), b = load(p + kLanes);
  }
  template <class T>
  static FASTLM_INLINE void sort_two(F&, F&) {}
  template <bool kStream, class T>
  static FASTLM_INLINE void put_two(T* p, F a, F b) {
    store_two<kStream>(p, a, b);
  }
  // Two vectors; with kStream past the caches, if the instruction set can: p is then aligned to the
  // size of both in memory.
  template <bool kStream, class T>
  static FASTLM_INLINE void store_two(T* p, F a, F b) {
    store(p, a), store(p + kLanes, b);
  }
  // A square of kLanes x kLanes 32-bit words, rows at p, its columns to rows at `to`.
  static FASTLM_INLINE void transpose(const float* p, int64_t stride, float* to, int64_t step) {
    for (int i = 0; i < kLanes; ++i)
      for (int j = 0; j < kLanes; ++j) to[j * step + i] = p[i * stride + j];
  }
  static FASTLM_INLINE void prefetch(const void* p) { __builtin_prefetch(p); }
  static FASTLM_INLINE void fence() {}
#undef FASTLM_EACH
};

}  // namespace fastlm

#if FASTLM_X86
#include "simd_x86.h"
#endif
