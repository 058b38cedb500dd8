// What the tests of csrc/ share: counted checks, random datasets, batches and their definition.
//
// Every buffer is a heap block of exactly the elements that may be touched, so that
// AddressSanitizer sees the first one too many.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "gather_batch.h"
#include "isa.h"
#include "parallel.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace fastlm {

inline int64_t passed = 0, failed = 0;

inline void check(bool ok, const std::string& what) {
  if (ok) {
    ++passed;
  } else if (++failed <= 20) {
    std::fprintf(stderr, "FAILED: %s\n", what.c_str());
  }
}

inline void check_equal(int64_t got, int64_t expected, const std::string& what) {
  check(got == expected,
        what + ": got " + std::to_string(got) + ", expected " + std::to_string(expected));
}

// Fixed, so that a failure comes again.
inline std::mt19937_64 random_bits(1);

inline int64_t random_below(int64_t n) { return static_cast<int64_t>(random_bits() % n); }

inline std::vector<Isa> supported_isas() {
  std::vector<Isa> found;
  for (Isa isa : {Isa::kPortable, Isa::kAvx2, Isa::kAvx512}) {
    if (isa <= best_isa()) found.push_back(isa);
  }
  return found;
}

// With those that multiply matrices their own way.
inline std::vector<Isa> matrix_isas() {
  std::vector<Isa> found = supported_isas();
  for (Isa isa : {Isa::kAvx512Bf16, Isa::kAmx}) {
    if (has_isa(isa)) found.push_back(isa);
  }
  return found;
}

// How many threads the next loops may use, where the backend lets us say.
inline void use_threads(int threads) {
#ifdef _OPENMP
  omp_set_num_threads(threads);
#else
  (void)threads;
#endif
}

template <class Token>
constexpr TokenType token_type_of = std::is_same_v<Token, uint8_t>    ? TokenType::kUint8
                                    : std::is_same_v<Token, uint16_t> ? TokenType::kUint16
                                    : std::is_same_v<Token, uint32_t> ? TokenType::kUint32
                                    : std::is_same_v<Token, int32_t>  ? TokenType::kInt32
                                                                      : TokenType::kInt64;
template <class Token>
const char* const name_of = std::is_same_v<Token, uint8_t>    ? "uint8"
                            : std::is_same_v<Token, uint16_t> ? "uint16"
                            : std::is_same_v<Token, uint32_t> ? "uint32"
                            : std::is_same_v<Token, int32_t>  ? "int32"
                                                              : "int64";
template <class Output>
constexpr OutputType output_type_of = sizeof(Output) == 4 ? OutputType::kInt32 : OutputType::kInt64;

// A dataset of random tokens in segments of the given sizes, `misalign` elements after the start of
// each heap block: the last token still ends it.
template <class Token>
struct Dataset {
  std::vector<std::vector<Token>> blocks;
  std::vector<Segment> segments;
  std::vector<Token> all;  // end to end

  // `limit`: tokens lie in [0, limit]; negative ones too where the type has them and `negative`.
  Dataset(const std::vector<int64_t>& sizes, int64_t misalign, int64_t limit, bool negative) {
    for (int64_t size : sizes) {
      std::vector<Token> block(size + misalign);
      for (Token& token : block) {
        const int64_t drawn = limit == std::numeric_limits<int64_t>::max()
                                  ? static_cast<int64_t>(random_bits() >> 1)
                                  : random_below(limit + 1);
        token = static_cast<Token>(negative && random_below(2) ? -1 - drawn : drawn);
      }
      all.insert(all.end(), block.begin() + misalign, block.end());
      blocks.push_back(std::move(block));
    }
    for (const std::vector<Token>& block : blocks) {
      segments.push_back({block.data() + misalign, static_cast<int64_t>(block.size()) - misalign});
    }
  }

  int64_t size() const { return static_cast<int64_t>(all.size()); }

  // Changes the token at `position` of the concatenation.
  void set(int64_t position, Token token) {
    all[position] = token;
    for (const Segment& segment : segments) {
      if (position < segment.size) {
        const_cast<Token*>(static_cast<const Token*>(segment.tokens))[position] = token;
        return;
      }
      position -= segment.size;
    }
  }
};

template <class Output>
struct Batch {
  std::vector<Output> x, y;  // (B, T) each
  int64_t lost;
};

template <class Output, class Token>
Batch<Output> gathered(const Dataset<Token>& data, const std::vector<int64_t>& starts, int64_t T) {
  const int64_t B = static_cast<int64_t>(starts.size());
  // Filled with what no token is, so that an element left out shows.
  Batch<Output> batch{std::vector<Output>(B * T, -77), std::vector<Output>(B * T, -77), 0};
  batch.lost = gather_batch(data.segments.data(), static_cast<int64_t>(data.segments.size()),
                            token_type_of<Token>, starts.data(), B, T, output_type_of<Output>,
                            batch.x.data(), batch.y.data());
  return batch;
}

// Is `batch` what the header defines?
template <class Output, class Token>
bool is_right(const Batch<Output>& batch, const Dataset<Token>& data,
              const std::vector<int64_t>& starts, int64_t T) {
  for (size_t b = 0; b < starts.size(); ++b) {
    for (int64_t t = 0; t < T; ++t) {
      if (batch.x[b * T + t] != static_cast<Output>(data.all[starts[b] + t])) return false;
      if (batch.y[b * T + t] != static_cast<Output>(data.all[starts[b] + t + 1])) return false;
    }
  }
  return true;
}

}  // namespace fastlm
