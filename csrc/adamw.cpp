#include "adamw.h"

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

namespace fastlm {
namespace {

struct Split {};

// What the elements of a tensor have in common.
struct Scalars {
  double decay, beta1, beta2, factor;
  double step_size;   // lr / (1 - beta1^t)
  double root_scale;  // 1 / sqrt(1 - beta2^t)
  double eps;
};

Scalars scalars_at(const AdamWOptions& o, double t, double factor) {
  return {1 - o.lr * o.weight_decay,
          o.beta1,
          o.beta2,
          factor,
          o.lr / (1 - std::pow(o.beta1, t)),
          1 / std::sqrt(1 - std::pow(o.beta2, t)),
          o.eps};
}

FASTLM_INLINE float single(double x) { return static_cast<float>(x); }

#define FASTLM_LOOPS "adamw.inc"
#include "each_isa.inc"

// An fp64 parameter, with gradient and moments of fp64.
void update_doubles(const TensorRow& row, int64_t begin, int64_t end, const Scalars& s) {
  double* p = pointer<double>(row.param);
  const double* g = pointer<const double>(row.grad);
  double *m = pointer<double>(row.exp_avg), *v = pointer<double>(row.exp_avg_sq);
  for (int64_t i = begin; i < end; ++i) {
    const double grad = s.factor * g[i];
    m[i] = s.beta1 * m[i] + (1 - s.beta1) * grad;
    v[i] = s.beta2 * v[i] + (1 - s.beta2) * grad * grad;
    p[i] = s.decay * p[i] - s.step_size * (m[i] / (std::sqrt(v[i]) * s.root_scale + s.eps));
  }
}

void update_chunk(const TensorRow& row, int64_t begin, int64_t end, const Scalars& s) {
  if (row.param_type == FloatType::kFloat64) return update_doubles(row, begin, end, s);
  with_float_type(row.grad_type, [&](auto g) {
    using G = decltype(g);
    if constexpr (!std::is_same_v<G, double>) {  // refused by the caller
      if (row.param_type == FloatType::kSplit) {
        FASTLM_DISPATCH(update_part<Split, G>(row, begin, end, s));
      }
      with_float_type(row.param_type, [&](auto p) {
        using P = decltype(p);
        if constexpr (!std::is_same_v<P, double>) {
          FASTLM_DISPATCH(update_part<P, G>(row, begin, end, s));
        }
      });
    }
  });
}

}  // namespace

void adamw(const TensorList& tensors, const AdamWOptions* options, double factor) {
  std::vector<Scalars> scalars(tensors.n);
  float last = 0;
  for (int64_t row = 0; row < tensors.n; ++row) {
    float* step = pointer<float>(tensors[row].step);
    *step += 1;
    // Most often the same as of the row before, and powers take time.
    if (row > 0 && tensors[row].group == tensors[row - 1].group && *step == last) {
      scalars[row] = scalars[row - 1];
    } else {
      scalars[row] = scalars_at(options[tensors[row].group], *step, factor);
    }
    last = *step;
  }
  Chunks(tensors).for_each([&](int64_t, const Chunk& chunk) {
    update_chunk(tensors[chunk.row], chunk.begin, chunk.end, scalars[chunk.row]);
  });
}

}  // namespace fastlm
