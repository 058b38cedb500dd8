// The element types of tensors, known at run time only.
// defines: FloatType, with_float_type, with_matmul_type
#pragma once

#include <cstdint>

#include "simd.h"

namespace fastlm {

// The numbers are those of kernels/collect.py's CODE. kSplit: a bf16 parameter with the rest of its
// fp32 value beside it (simd.h's split).
enum class FloatType : int64_t { kFloat32, kBfloat16, kFloat16, kFloat64, kSplit };

// Calls fn(T{}) with the type of the elements. kSplit is none: nothing is called.
template <class Fn>
void with_float_type(FloatType type, const Fn& fn) {
  switch (type) {
    case FloatType::kFloat32: return fn(float{});
    case FloatType::kBfloat16: return fn(Bfloat16{});
    case FloatType::kFloat16: return fn(Float16{});
    case FloatType::kFloat64: return fn(double{});
    case FloatType::kSplit: return;
  }
}

// The same for the types that matrices are multiplied in: fp32, bf16 and fp16. Of the others, which
// callers refuse, nothing is called.
template <class Fn>
void with_matmul_type(FloatType type, const Fn& fn) {
  switch (type) {
    case FloatType::kFloat32: return fn(float{});
    case FloatType::kBfloat16: return fn(Bfloat16{});
    case FloatType::kFloat16: return fn(Float16{});
    case FloatType::kFloat64:
    case FloatType::kSplit: return;
  }
}

}  // namespace fastlm
