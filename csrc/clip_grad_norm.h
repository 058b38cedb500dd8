// Sums of squares of many gradients, and their scaling, each in one parallel region.
// defines: sum_squares, scale_gradients
#pragma once

#include <cstdint>

#include "tensors.h"

namespace fastlm {

// Adds to sums[sum_class] the squares of every row's gradient, in fp64 and in an order that
// depends on neither threads nor instruction set. Returns the first row with a gradient that is
// not finite, or -1.
int64_t sum_squares(const TensorList& tensors, double* sums);

// gradient *= factor, in fp32 (of fp64 gradients in fp64).
void scale_gradients(const TensorList& tensors, double factor);

}  // namespace fastlm
