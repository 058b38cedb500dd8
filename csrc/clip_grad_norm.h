// Sums of squares of many gradients, and their scaling, each in one parallel region.
// defines: SquareSum, sum_squares, scale_gradients
#pragma once

#include <cstdint>

#include "tensors.h"

namespace fastlm {

struct SquareSum {
  double sum;
  int64_t bad;  // the first row with a gradient that is not finite, or -1
};

// The sum of the squares of all gradients, in fp64 and in an order that depends on neither threads
// nor instruction set.
SquareSum sum_squares(const TensorList& tensors);

// gradient *= factor, in fp32 (of fp64 gradients in fp64).
void scale_gradients(const TensorList& tensors, double factor);

}  // namespace fastlm
