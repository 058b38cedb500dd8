#include "clip_grad_norm.h"

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

namespace fastlm {
namespace {

FASTLM_INLINE double to_double(double x) { return x; }
template <class T>
FASTLM_INLINE double to_double(T x) {
  return static_cast<double>(to_float(x));
}

#define FASTLM_LOOPS "clip_grad_norm.inc"
#include "each_isa.inc"

}  // namespace

SquareSum sum_squares(const TensorList& tensors) {
  const Chunks chunks(tensors);
  std::vector<double> parts(chunks.size());
  chunks.for_each([&](int64_t i, const Chunk& chunk) {
    with_float_type(tensors[chunk.row].grad_type, [&](auto t) {
      const auto* grad = pointer<const decltype(t)>(tensors[chunk.row].grad);
      parts[i] = FASTLM_DISPATCH(squares_of(grad + chunk.begin, chunk.end - chunk.begin));
    });
  });
  SquareSum result{0, -1};
  for (int64_t i = 0; i < chunks.size(); ++i) {
    result.sum += parts[i];
    if (result.bad < 0 && !std::isfinite(parts[i])) result.bad = chunks[i].row;
  }
  return result;
}

void scale_gradients(const TensorList& tensors, double factor) {
  Chunks(tensors).for_each([&](int64_t, const Chunk& chunk) {
    with_float_type(tensors[chunk.row].grad_type, [&](auto t) {
      auto* grad = pointer<decltype(t)>(tensors[chunk.row].grad);
      FASTLM_DISPATCH(scale_part(grad + chunk.begin, chunk.end - chunk.begin, factor));
    });
  });
}

}  // namespace fastlm
