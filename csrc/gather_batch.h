// Batches of token windows out of memory-mapped token files.
// defines: TokenType, Segment, gather_batch, first_out_of_range
//
// B windows (rows), T context length. All sizes and positions count tokens, not bytes.
#pragma once

#include <cstdint>

namespace fastlm {

enum class TokenType { kUint8, kUint16, kUint32, kInt32, kInt64 };
enum class OutputType { kInt32, kInt64 };

// One file of a dataset; a dataset is its segments end to end.
struct Segment {
  const void* tokens;
  int64_t size;
};

// Copies window b = tokens [starts[b], starts[b] + T] of the concatenated segments (T + 1 tokens,
// fetched from memory once) to x[b, :] (the first T) and y[b, :] (the last T), widened to the
// output type. Windows may cross segments.
//   x, y: (B, T), contiguous, not overlapping the segments.
// Precondition (checked by the caller): 0 <= starts[b] <= total - T - 1.
// Returns -1, or the position (in the concatenated segments) of a token that does not fit int32.
int64_t gather_batch(const Segment* segments, int64_t num_segments, TokenType token_type,
                     const int64_t* starts, int64_t B, int64_t T, OutputType output_type, void* x,
                     void* y);

// The position of the first token that is negative or >= vocab_size; -1 if there is none.
int64_t first_out_of_range(const void* tokens, int64_t size, TokenType token_type,
                           int64_t vocab_size);

}  // namespace fastlm
