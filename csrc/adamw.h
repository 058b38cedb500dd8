// The AdamW update of many tensors in one parallel region.
// defines: AdamWOptions, adamw
#pragma once

#include <cstdint>

#include "tensors.h"

namespace fastlm {

struct AdamWOptions {
  double lr, beta1, beta2, eps, weight_decay;
};

// Updates every tensor once by the options of its group, with gradients times `factor`, and adds 1
// to its step counter (formula: fastlm/ops/adamw.py). Arithmetic and moments are fp32: m, v and p
// are each rounded once at their own size, and constants are as good as fp64's. A gradient may have
// any type but kSplit. fp64 parameters have fp64 gradients, moments and arithmetic.
void adamw(const TensorList& tensors, const AdamWOptions* options, double factor);

}  // namespace fastlm
