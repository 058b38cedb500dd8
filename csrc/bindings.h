// What the files that know Python share.
#pragma once

#include <pybind11/pybind11.h>

namespace fastlm {

// Adds the optimizer's functions and classes (bindings_optimizer.cpp) to the module.
void bind_optimizer(pybind11::module_& m);

}  // namespace fastlm
