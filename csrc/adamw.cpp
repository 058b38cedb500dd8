#include "adamw.h"

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "simd_double.h"

namespace fastlm {
namespace {

struct Split {};

// What the elements of a tensor have in common. The step size s = lr / (1 - beta1^t) is divided
// out of the denominator, whose constants are then root_scale and eps:
// s m / (sqrt(v) / sqrt(1 - beta2^t) + eps) = m / (sqrt(v) root_scale + eps)
struct Scalars {
  double decay, beta1, beta2, root_scale, eps;
  double grad_to_mean;        // (1 - beta1) factor
  double square_to_variance;  // (1 - beta2) factor^2
  bool still;                 // so small a step size that 1 / s overflows: nothing is subtracted
};

Scalars scalars_at(const AdamWOptions& o, double t, double factor) {
  Scalars s;
  s.decay = 1 - o.lr * o.weight_decay;
  s.beta1 = o.beta1, s.beta2 = o.beta2;
  s.grad_to_mean = (1 - o.beta1) * factor;
  s.square_to_variance = (1 - o.beta2) * factor * factor;
  const double step_size = o.lr / (1 - std::pow(o.beta1, t));
  s.root_scale = 1 / (step_size * std::sqrt(1 - std::pow(o.beta2, t)));
  s.eps = o.eps / step_size;
  s.still = std::abs(step_size) < 1e-200;
  return s;
}

#define FASTLM_LOOPS "adamw.inc"
#include "each_isa.inc"

// Calls fn(P{}, G{}, M{}) with the types of a row.
template <class Fn>
void with_types(FloatType param, FloatType grad, const Fn& fn) {
  const auto with_grad = [&](auto p) {
    switch (grad) {
      case FloatType::kFloat32: return fn(p, float{}, float{});
      case FloatType::kBfloat16: return fn(p, Bfloat16{}, float{});
      case FloatType::kFloat16: return fn(p, Float16{}, float{});
      case FloatType::kFloat64:
      case FloatType::kSplit: return;  // refused by the caller
    }
  };
  switch (param) {
    case FloatType::kFloat32: return with_grad(float{});
    case FloatType::kBfloat16: return with_grad(Bfloat16{});
    case FloatType::kFloat16: return with_grad(Float16{});
    case FloatType::kSplit: return with_grad(Split{});
    case FloatType::kFloat64: return fn(double{}, double{}, double{});
  }
}

}  // namespace

void adamw(const TensorList& tensors, const int64_t* groups, const AdamWOptions* options,
           double factor) {
  std::vector<Scalars> scalars(tensors.n);
  for (int64_t row = 0; row < tensors.n; ++row) {
    float* step = pointer<float>(tensors.pointers[row].step);
    *step += 1;
    const float before = row > 0 ? *pointer<float>(tensors.pointers[row - 1].step) : 0;
    // Most often the same as of the row before, and powers take time.
    if (row > 0 && groups[row] == groups[row - 1] && *step == before) {
      scalars[row] = scalars[row - 1];
    } else {
      scalars[row] = scalars_at(options[groups[row]], *step, factor);
    }
  }
  Chunks(tensors).for_each([&](int64_t, const Chunk& chunk) {
    with_types(tensors.param_type(chunk.row), tensors.grad_type(chunk.row),
               [&](auto p, auto g, auto m) {
                 using P = decltype(p);
                 using G = decltype(g);
                 using M = decltype(m);
                 FASTLM_DISPATCH(update_part<P, G, M>(tensors.pointers[chunk.row], chunk.begin,
                                                      chunk.end, scalars[chunk.row]));
               });
  });
}

}  // namespace fastlm
