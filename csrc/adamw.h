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
// step counter + 1 (formula: fastlm/ops/adamw.py). Moments are fp32, of fp64 parameters fp64.
// Computed in fp64: what is stored differs from the formula by the rounding to its own type.
// A gradient may have any type but kSplit; an fp64 one goes with an fp64 parameter.
void adamw(const TensorList& tensors, const int64_t* groups, const AdamWOptions* options,
           double factor);

}  // namespace fastlm
