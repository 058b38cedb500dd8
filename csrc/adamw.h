// The AdamW update of many tensors in one parallel region.
// defines: AdamWOptions, adamw
#pragma once

#include <cstdint>

#include "tensors.h"

namespace fastlm {

struct AdamWOptions {
  double lr, beta1, beta2, eps, weight_decay;
};

// One update, with gradients times `factor`, of every tensor by the options of its group, and its
// step counter + 1 (formula: fastlm/ops/adamw.py). Computed in fp32, with moments of fp32: each of
// m, v and p is rounded once at its own size, and constants are as good as fp64's. A gradient may
// have any type but kSplit; fp64 gradients go with fp64 parameters, whose moments and arithmetic
// are fp64, too.
void adamw(const TensorList& tensors, const AdamWOptions* options, double factor);

}  // namespace fastlm
