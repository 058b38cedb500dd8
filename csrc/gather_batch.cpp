#include "gather_batch.h"

#include <algorithm>
#include <atomic>
#include <limits>
#include <type_traits>
#include <vector>

#include "isa.h"
#include "parallel.h"

namespace fastlm {
namespace {

// Can every value of Token be held by Output?
template <class Token, class Output>
constexpr bool fits = sizeof(Token) < sizeof(Output) || std::is_same_v<Token, Output>;

// Nonzero where a 32- or 64-bit token does not fit int32.
template <class Token>
FASTLM_INLINE uint64_t beyond_int32(Token token) {
  return (static_cast<uint64_t>(token) + (uint64_t{1} << 31)) >> 32;
}

#define FASTLM_LOOPS "gather_batch.inc"
#include "each_isa.inc"

template <class Fn>
auto with_token_type(TokenType type, const Fn& fn) {
  switch (type) {
    case TokenType::kUint8: return fn(uint8_t{});
    case TokenType::kUint16: return fn(uint16_t{});
    case TokenType::kUint32: return fn(uint32_t{});
    case TokenType::kInt32: return fn(int32_t{});
    case TokenType::kInt64: break;
  }
  return fn(int64_t{});
}

void atomic_min(std::atomic<int64_t>& target, int64_t value) {
  int64_t seen = target.load(std::memory_order_relaxed);
  while (value < seen && !target.compare_exchange_weak(seen, value, std::memory_order_relaxed)) {
  }
}

constexpr int64_t kNone = std::numeric_limits<int64_t>::max();

template <class Token, class Output>
int64_t gather(const std::vector<const Token*>& tokens, const std::vector<int64_t>& ends,
               const int64_t* starts, int64_t B, int64_t T, Output* x, Output* y) {
  std::atomic<int64_t> first_lost{kNone};
  const auto segment_at = [&](int64_t position) {
    return std::upper_bound(ends.begin(), ends.end(), position) - ends.begin();
  };
  const auto begin_of = [&](int64_t segment) { return segment == 0 ? 0 : ends[segment - 1]; };
  // The windows lie anywhere: most of the time would go by waiting for their first lines and pages.
  const auto prefetch = [&](int64_t row) {
    constexpr int64_t kLine = 64, kMost = 32;  // the processor fetches the rest by itself
    const int64_t segment = segment_at(starts[row]);
    const Token* first = tokens[segment] + (starts[row] - begin_of(segment));
    const int64_t n = std::min(ends[segment] - starts[row], T + 1);
    const char* line = reinterpret_cast<const char*>(first);
    const char* end = line + std::min<int64_t>(n * sizeof(Token), kMost * kLine);
    for (; line < end; line += kLine) __builtin_prefetch(line);
  };
  const auto rows = [&](int64_t row_begin, int64_t row_end) {
    constexpr int64_t kAhead = 4;
    for (int64_t row = row_begin; row < std::min(row_begin + kAhead, row_end); ++row) prefetch(row);
    for (int64_t row = row_begin; row < row_end; ++row) {
      if (row + kAhead < row_end) prefetch(row + kAhead);
      // The window piece by piece, a piece a segment: [done, done + n) of its T + 1 tokens.
      const int64_t start = starts[row];
      int64_t segment = segment_at(start);
      for (int64_t done = 0; done < T + 1; ++segment) {
        const int64_t n = std::min(ends[segment] - (start + done), T + 1 - done);
        if (n == 0) continue;  // an empty segment
        const Token* source = tokens[segment] + (start + done - begin_of(segment));
        uint64_t lost = FASTLM_DISPATCH(widen(source, std::min(n, T - done), x + row * T + done));
        // y lacks the window's first token; the second pass over the piece hits the L1 cache.
        const int64_t skip = done == 0 ? 1 : 0;
        lost |= FASTLM_DISPATCH(widen(source + skip, n - skip, y + row * T + done - 1 + skip));
        if (lost) {
          for (int64_t i = 0; i < n; ++i) {
            if (beyond_int32(source[i])) {
              atomic_min(first_lost, start + done + i);
              break;
            }
          }
        }
        done += n;
      }
    }
  };
  parallel_for(B, std::max<int64_t>(1, (1 << 15) / (T + 1)), rows);
  const int64_t lost = first_lost.load();
  return lost == kNone ? -1 : lost;
}

}  // namespace

int64_t gather_batch(const Segment* segments, int64_t num_segments, TokenType token_type,
                     const int64_t* starts, int64_t B, int64_t T, OutputType output_type, void* x,
                     void* y) {
  return with_token_type(token_type, [&](auto token) {
    using Token = decltype(token);
    std::vector<const Token*> tokens;
    std::vector<int64_t> ends;  // where each segment ends in the concatenation
    int64_t end = 0;
    for (int64_t s = 0; s < num_segments; ++s) {
      tokens.push_back(static_cast<const Token*>(segments[s].tokens));
      ends.push_back(end += segments[s].size);
    }
    if (output_type == OutputType::kInt32) {
      return gather(tokens, ends, starts, B, T, static_cast<int32_t*>(x), static_cast<int32_t*>(y));
    }
    return gather(tokens, ends, starts, B, T, static_cast<int64_t*>(x), static_cast<int64_t*>(y));
  });
}

int64_t first_out_of_range(const void* data, int64_t size, TokenType token_type,
                           int64_t vocab_size) {
  constexpr int64_t kBlock = 1 << 16;
  return with_token_type(token_type, [&](auto token) {
    using Token = decltype(token);
    const Token* tokens = static_cast<const Token*>(data);
    using Unsigned = std::make_unsigned_t<Token>;
    // Never above the type's own maximum + 1: there a negative token begins, seen as unsigned.
    const uint64_t limit = std::min(static_cast<uint64_t>(std::max<int64_t>(vocab_size, 0)),
                                    static_cast<uint64_t>(std::numeric_limits<Token>::max()) + 1);
    std::atomic<int64_t> first_block{kNone};
    const int64_t blocks = (size + kBlock - 1) / kBlock;
    parallel_for(blocks, 4, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        // A later block cannot hold the first one.
        if (block > first_block.load(std::memory_order_relaxed)) return;
        const int64_t offset = block * kBlock;
        if (FASTLM_DISPATCH(
                any_out_of_range(tokens + offset, std::min(kBlock, size - offset), limit))) {
          atomic_min(first_block, block);
          return;
        }
      }
    });
    if (first_block.load() == kNone) return int64_t{-1};
    int64_t position = first_block.load() * kBlock;
    while (static_cast<Unsigned>(tokens[position]) < limit) ++position;
    return position;
  });
}

}  // namespace fastlm
