// Shared by the files that know Python: each adds an op's functions to the module.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "float_type.h"

namespace fastlm {

// "float32", "bfloat16" or "float16"; any other raises TypeError.
FloatType float_type(const std::string& kind);

void bind_attention(pybind11::module_& m);
void bind_cross_entropy(pybind11::module_& m);
void bind_gather_batch(pybind11::module_& m);
void bind_optimizer(pybind11::module_& m);

}  // namespace fastlm
