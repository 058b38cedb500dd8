// Cross-entropy of rows of logits: losses, log-sum-exp and gradient.
// defines: CrossEntropyOptions, cross_entropy_losses, cross_entropy_gradients,
//          check_labels, ordered_sum, scale_in_place, accumulate
//
// N rows, V vocabulary; l = softcap(logits) in fp32. The loss of a row with label y is
//   (1 - s) * (lse - l_y) + s * (lse - mean_v l_v) + z * lse^2     s = label_smoothing, z = z_loss
// Every row is computed by one thread in a fixed order: the results do not depend on the threads.
#pragma once

#include <cstdint>

#include "float_type.h"

namespace fastlm {

struct CrossEntropyOptions {
  int64_t ignore_index = -100;
  // Only doubles from here, in the order of kernels/cross_entropy_op.py's Options.
  double label_smoothing = 0;
  double softcap = 0;  // 0: none; else l = softcap * tanh(logit / softcap)
  double z_loss = 0;
};

// (N, V) logits or gradients: rows `stride` elements apart, the elements of a row adjacent.
struct Rows {
  void* data;
  int64_t stride;
};

// Kept of a row for backward: p_v = exp(l_v - largest) / sum. The lse alone is not enough: for
// logits near 1e4 its rounding to fp32 would be an error of 1e-3 in every probability. In fp64: if
// p_v is nearly 1, all of 1 - p_v may lie in the sum's last digits.
struct RowStats {
  double largest;
  double sum;
};

// losses (N,): 0 for ignored rows (label ignore_index). lse (N,) and stats (N,): 0 for ignored rows
// unless all_lse.
// gradient, unless null: of gradient_scale * sum of the losses, in the logits' type; may be the
// logits themselves.
// Precondition (check_labels): every label lies in [0, V) or is ignore_index.
void cross_entropy_losses(Rows logits, FloatType type, int64_t N, int64_t V, const int64_t* targets,
                          const CrossEntropyOptions& options, bool all_lse, float* losses,
                          float* lse, RowStats* stats, const Rows* gradient, float gradient_scale);

// The gradient of sum_n grad_losses[n] * losses[n] + grad_lse[n] * lse[n] into `gradient`, which
// may be the logits. grad_losses: (N,), or one number for all rows if grad_losses_stride is 0.
// grad_lse: (N,) or null.
void cross_entropy_gradients(Rows logits, FloatType type, int64_t N, int64_t V,
                             const int64_t* targets, const RowStats* stats,
                             const CrossEntropyOptions& options, const float* grad_losses,
                             int64_t grad_losses_stride, const float* grad_lse, Rows gradient);

struct LabelCheck {
  int64_t first_bad;  // the first row with a label neither in [0, V) nor ignore_index, or -1
  int64_t count;      // labels that are not ignore_index, up to that row
};
LabelCheck check_labels(const int64_t* targets, int64_t N, int64_t V, int64_t ignore_index);

// The sum in fp64, first to last.
double ordered_sum(const float* values, int64_t n);

// x *= factor, rounded to x's type.
void scale_in_place(void* x, FloatType type, int64_t n, float factor);

// sum (fp32) += part, or = part if `first`; (rows, columns), rows of `sum` sum_stride apart.
void accumulate(float* sum, int64_t sum_stride, const void* part, FloatType type, int64_t rows,
                int64_t columns, bool first);

}  // namespace fastlm
