#include "cross_entropy.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "parallel.h"
#include "simd.h"

namespace fastlm {
namespace {

// Elements whose exponentials share one shift. Twice this in fp32 fits the L1 cache, and the fp32
// partial sums within a block are short.
constexpr int64_t kBlock = 2048;

constexpr float kLog2e = 1.44269502f;

// An output larger than this leaves the caches before it is read again: writing past them saves
// fetching the lines first.
constexpr int64_t kStreamBytes = int64_t{16} << 20;

struct LossArguments {
  Rows logits;
  int64_t N, V;
  const int64_t* targets;
  CrossEntropyOptions options;
  bool all_lse;
  float* losses;
  float* lse;
  RowStats* stats;
  Rows gradient;
  float gradient_scale;
  bool stream;  // the gradient is written past the caches
};

struct GradientArguments {
  Rows logits;
  int64_t V;
  const int64_t* targets;
  const RowStats* stats;
  CrossEntropyOptions options;
  const float* grad_losses;
  int64_t grad_losses_stride;
  const float* grad_lse;
  Rows gradient;
  bool stream;
};

#define FASTLM_LOOPS "cross_entropy.inc"
#include "each_isa.inc"

int64_t size_of(FloatType type) { return type == FloatType::kFloat32 ? 4 : 2; }

// Calls fn(std::bool_constant<value>{}).
template <class Fn>
void with_bool(bool value, const Fn& fn) {
  if (value) {
    fn(std::true_type{});
  } else {
    fn(std::false_type{});
  }
}

// Rows whose 64 K logits take about 50 us.
int64_t row_grain(int64_t V) { return std::max<int64_t>(1, (1 << 16) / std::max<int64_t>(V, 1)); }

}  // namespace

void cross_entropy_losses(Rows logits, FloatType type, int64_t N, int64_t V, const int64_t* targets,
                          const CrossEntropyOptions& options, bool all_lse, float* losses,
                          float* lse, RowStats* stats, const Rows* gradient, float gradient_scale) {
  // Over the logits themselves nothing has to be fetched first.
  const bool stream =
      gradient && gradient->data != logits.data && N * V * size_of(type) > kStreamBytes;
  const Rows into = gradient ? *gradient : Rows{nullptr, 0};
  const LossArguments a{logits, N,   V,     targets, options,        all_lse,
                        losses, lse, stats, into,    gradient_scale, stream};
  with_matmul_type(type, [&](auto t) {
    with_bool(options.softcap > 0, [&](auto softcap) {
      with_bool(gradient != nullptr, [&](auto with_gradient) {
        using T = decltype(t);
        constexpr bool kSoftcap = softcap, kGradient = with_gradient;
        parallel_for(N, row_grain(V), [&](int64_t begin, int64_t end) {
          FASTLM_DISPATCH(losses_of_rows<T, kSoftcap, kGradient>(a, begin, end));
        });
      });
    });
  });
}

void cross_entropy_gradients(Rows logits, FloatType type, int64_t N, int64_t V,
                             const int64_t* targets, const RowStats* stats,
                             const CrossEntropyOptions& options, const float* grad_losses,
                             int64_t grad_losses_stride, const float* grad_lse, Rows gradient) {
  const bool stream = gradient.data != logits.data && N * V * size_of(type) > kStreamBytes;
  const GradientArguments a{
      logits,   V,        targets, stats, options, grad_losses, grad_losses_stride,
      grad_lse, gradient, stream};
  with_matmul_type(type, [&](auto t) {
    with_bool(options.softcap > 0, [&](auto softcap) {
      using T = decltype(t);
      constexpr bool kSoftcap = softcap;
      parallel_for(N, row_grain(V), [&](int64_t begin, int64_t end) {
        FASTLM_DISPATCH(gradients_of_rows<T, kSoftcap>(a, begin, end));
      });
    });
  });
}

LabelCheck check_labels(const int64_t* targets, int64_t N, int64_t V, int64_t ignore_index) {
  int64_t count = 0;
  for (int64_t row = 0; row < N; ++row) {
    if (targets[row] == ignore_index) continue;
    if (targets[row] < 0 || targets[row] >= V) return {row, count};
    ++count;
  }
  return {-1, count};
}

double ordered_sum(const float* values, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += values[i];
  return sum;
}

void scale_in_place(void* x, FloatType type, int64_t n, float factor) {
  with_matmul_type(type, [&](auto t) {
    using T = decltype(t);
    T* values = static_cast<T*>(x);
    parallel_for(n, 1 << 17, [&](int64_t begin, int64_t end) {
      FASTLM_DISPATCH(scale_part(values + begin, end - begin, factor));
    });
  });
}

void accumulate(float* sum, int64_t sum_stride, const void* part, FloatType type, int64_t rows,
                int64_t columns, bool first) {
  with_matmul_type(type, [&](auto t) {
    using T = decltype(t);
    const T* values = static_cast<const T*>(part);
    const int64_t grain = std::max<int64_t>(1, (1 << 17) / std::max<int64_t>(columns, 1));
    parallel_for(rows, grain, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        FASTLM_DISPATCH(
            accumulate_part(sum + row * sum_stride, values + row * columns, columns, first));
      }
    });
  });
}

}  // namespace fastlm
