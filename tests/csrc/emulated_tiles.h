// AMX's tile instructions in memory, so that the loops written for tiles run, sanitizers watching,
// on machines that have AVX-512-BF16 alone. defines: _tile_loadconfig, _tile_release, _tile_zero,
// _tile_loadd, _tile_stored, _tile_dpbf16ps
//
// Included by csrc/attention.cpp in builds of the C++ tests (FASTLM_EMULATED_TILES). As the
// processor does, it stops a program that uses tiles before their shapes are loaded, after they
// were released, or that multiplies tiles whose shapes do not fit.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "../../csrc/isa.h"

namespace fastlm {
namespace tiles {

struct State {
  bool configured = false;
  uint16_t bytes[8];  // of a row
  uint8_t rows[8];
  alignas(64) uint8_t data[8][16][64];
};
inline thread_local State state;

inline void require(bool ok, const char* what) {
  if (ok) return;
  std::fprintf(stderr, "tiles: %s\n", what);
  std::abort();
}

// The tile, which must have a shape.
inline uint8_t (*tile(int t))[64] {
  require(state.configured && t < 8 && state.rows[t] > 0, "used without a shape");
  return state.data[t];
}

inline void zero(int t) { std::memset(tile(t), 0, sizeof(state.data[t])); }

inline void configure(const void* shapes) {
  uint8_t config[64];
  std::memcpy(config, shapes, 64);
  require(config[0] == 1 && config[1] == 0, "palette 1 and start row 0 are wanted");
  for (int i = 2; i < 16; ++i) require(config[i] == 0, "a reserved byte is not 0");
  for (int t = 0; t < 16; ++t) {
    uint16_t bytes;
    std::memcpy(&bytes, config + 16 + 2 * t, 2);
    const uint8_t rows = config[48 + t];
    require(bytes <= (t < 8 ? 64 : 0) && rows <= (t < 8 ? 16 : 0), "no such shape");
    require((bytes > 0) == (rows > 0), "rows without bytes, or bytes without rows");
    if (t < 8) state.bytes[t] = bytes, state.rows[t] = rows;
  }
  state.configured = true;
  std::memset(state.data, 0, sizeof(state.data));
}

inline void release() { state.configured = false; }

inline void load(int t, const void* base, int64_t stride) {
  zero(t);
  for (int r = 0; r < state.rows[t]; ++r)
    std::memcpy(tile(t)[r], static_cast<const uint8_t*>(base) + r * stride, state.bytes[t]);
}

inline void store(int t, void* base, int64_t stride) {
  for (int r = 0; r < state.rows[t]; ++r)
    std::memcpy(static_cast<uint8_t*>(base) + r * stride, tile(t)[r], state.bytes[t]);
}

// c += a b: a's rows hold pairs of bf16, b's row p the p-th pair of every column. As the
// processor's manual has it, the products of the pairs' first elements are summed apart from those
// of the second.
FASTLM_TARGET_AVX512_BF16 inline void multiply(int c, int a, int b) {
  uint8_t (*const sums)[64] = tile(c);
  const uint8_t (*const left)[64] = tile(a);
  const uint8_t (*const right)[64] = tile(b);
  require(c != a && c != b && a != b, "the operands are not three tiles");
  require(state.rows[a] == state.rows[c] && state.bytes[b] == state.bytes[c] &&
              state.bytes[a] == 4 * state.rows[b],
          "shapes that do not fit");
  for (int r = 0; r < state.rows[c]; ++r) {
    __m512 sum[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    for (int p = 0; p < state.rows[b]; ++p) {
      int32_t pair;
      std::memcpy(&pair, left[r] + 4 * p, 4);
      for (int i = 0; i < 2; ++i) {
        const __m512i half = _mm512_set1_epi32(i ? 0xffff0000 : 0xffff);
        const __m512i x = _mm512_and_si512(_mm512_set1_epi32(pair), half);
        const __m512i y = _mm512_and_si512(_mm512_load_si512(right[p]), half);
        sum[i] =
            _mm512_dpbf16_ps(sum[i], reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(y));
      }
    }
    const __m512 both = _mm512_add_ps(sum[0], sum[1]);
    _mm512_store_ps(sums[r], _mm512_add_ps(_mm512_load_ps(sums[r]), both));
  }
}

}  // namespace tiles
}  // namespace fastlm

// The compiler's are macros or functions, depending on its version and options.
#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig ::fastlm::tiles::configure
#define _tile_release ::fastlm::tiles::release
#define _tile_zero ::fastlm::tiles::zero
#define _tile_loadd ::fastlm::tiles::load
#define _tile_stored ::fastlm::tiles::store
#define _tile_dpbf16ps ::fastlm::tiles::multiply
