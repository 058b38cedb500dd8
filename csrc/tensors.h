// Many tensors as one table, and its division among threads.
// defines: TensorRow, TensorList, Chunk, Chunks
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "float_type.h"
#include "parallel.h"

namespace fastlm {

// A tensor, dense in memory: a row of kernels/collect.py's TensorTable. A missing tensor's address
// is 0.
struct TensorRow {
  int64_t param, grad, exp_avg, exp_avg_sq, remainder, step;
  int64_t numel;
  FloatType param_type, grad_type;
  int64_t group, index;  // the parameter's place; it has the options of its group
};

template <class T>
T* pointer(int64_t address) {
  return reinterpret_cast<T*>(address);
}

struct TensorList {
  const TensorRow* rows;
  int64_t n;

  const TensorRow& operator[](int64_t row) const { return rows[row]; }
};

struct Chunk {
  int64_t row, begin, end;  // elements [begin, end) of a tensor
};

// All elements of a list of tensors in pieces that do not depend on the number of threads.
class Chunks {
 public:
  explicit Chunks(const TensorList& tensors) {
    starts_.push_back(0);
    for (int64_t row = 0; row < tensors.n; ++row) {
      for (int64_t begin = 0; begin < tensors[row].numel; begin += kElements) {
        const int64_t end = std::min(begin + kElements, tensors[row].numel);
        chunks_.push_back({row, begin, end});
        starts_.push_back(starts_.back() + (end - begin) + kOverhead);
      }
    }
  }

  int64_t size() const { return static_cast<int64_t>(chunks_.size()); }
  const Chunk& operator[](int64_t i) const { return chunks_[i]; }

  // Calls fn(i, (*this)[i]) for every i: a thread takes adjoining chunks, and all threads about as
  // many elements. One parallel region for any number of tensors.
  template <class Fn>
  void for_each(const Fn& fn) const {
    parallel_for(starts_.back(), kGrain, [&](int64_t begin, int64_t end) {
      const auto first = std::lower_bound(starts_.begin(), starts_.end() - 1, begin);
      for (int64_t i = first - starts_.begin(); i < size() && starts_[i] < end; ++i) {
        fn(i, chunks_[i]);
      }
    });
  }

 private:
  static constexpr int64_t kElements = 1 << 14;  // shared evenly, and still a run for prefetchers
  static constexpr int64_t kOverhead = 64;       // the cost of starting a chunk, in elements
  static constexpr int64_t kGrain = 1 << 14;     // less is not worth waking a thread
  std::vector<Chunk> chunks_;
  std::vector<int64_t> starts_;  // the cost of all chunks before, one more than chunks
};

}  // namespace fastlm
