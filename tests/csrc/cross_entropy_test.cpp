// Tests of csrc/cross_entropy.h and csrc/simd.h: against the formula in fp64, in heap blocks of
// exactly the elements that may be touched, for every instruction set, and for 1 to 3 threads.

#include "cross_entropy.h"

#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "isa.h"
#include "simd.h"
#include "testing.h"

namespace fastlm {
namespace {

template <class T>
constexpr FloatType logit_type_of = std::is_same_v<T, float>      ? FloatType::kFloat32
                                    : std::is_same_v<T, Bfloat16> ? FloatType::kBfloat16
                                                                  : FloatType::kFloat16;
template <class T>
constexpr double unit_of = std::is_same_v<T, float>      ? 1e-6
                           : std::is_same_v<T, Bfloat16> ? 1.0 / 256
                                                         : 1.0 / 2048;

struct Case {
  int64_t N, V, padding;  // elements between rows
  CrossEntropyOptions options;
  double scale = 3;
};

template <class T>
struct Outcome {
  std::vector<float> losses, lse;
  std::vector<RowStats> stats;
  std::vector<T> gradient, again;  // by cross_entropy_losses, and by cross_entropy_gradients

  bool operator==(const Outcome& other) const {
    const auto same = [](const auto& a, const auto& b) {
      return a.size() == b.size() && !std::memcmp(a.data(), b.data(), a.size() * sizeof(a[0]));
    };
    return same(losses, other.losses) && same(lse, other.lse) && same(stats, other.stats) &&
           same(gradient, other.gradient) && same(again, other.again);
  }
};

template <class T>
Outcome<T> outcome_of(const Case& c, std::vector<T> logits, const std::vector<int64_t>& targets) {
  const int64_t stride = c.V + c.padding;
  Outcome<T> out{std::vector<float>(c.N),
                 std::vector<float>(c.N),
                 std::vector<RowStats>(c.N),
                 std::vector<T>(c.N * c.V),
                 {}};
  const Rows x{logits.data(), stride}, gradient{out.gradient.data(), c.V};
  cross_entropy_losses(x, logit_type_of<T>, c.N, c.V, targets.data(), c.options, true,
                       out.losses.data(), out.lse.data(), out.stats.data(), &gradient, 0.5f);
  const float half = 0.5f;
  cross_entropy_gradients(x, logit_type_of<T>, c.N, c.V, targets.data(), out.stats.data(),
                          c.options, &half, 0, nullptr, x);
  out.again = std::move(logits);  // in place: what lies between the rows is as it was
  return out;
}

template <class T>
void check_case(const Case& c, const std::string& name) {
  const int64_t stride = c.V + c.padding, size = (c.N - 1) * stride + c.V;
  std::vector<T> logits(size);
  for (T& x : logits) {
    x = from_float<T>(static_cast<float>(c.scale * (random_below(20001) - 10000) / 5000.0));
  }
  std::vector<int64_t> targets(c.N);
  for (int64_t& y : targets) {
    y = random_below(4) ? random_below(c.V) : c.options.ignore_index;
  }
  // The formula, and how far each value may be from it.
  std::vector<double> losses(c.N), lses(c.N), sizes(c.N), gradient(c.N * c.V), bounds(c.N * c.V);
  for (int64_t row = 0; row < c.N; ++row) {
    std::vector<double> l(c.V);
    double largest = -INFINITY, sum = 0, mean = 0;
    const double cap = c.options.softcap;
    for (int64_t v = 0; v < c.V; ++v) {
      const double x = to_float(logits[row * stride + v]);
      l[v] = cap > 0 ? cap * std::tanh(x / cap) : x;
      largest = std::max(largest, l[v]);
      mean += l[v] / static_cast<double>(c.V);
    }
    for (double x : l) sum += std::exp(x - largest);
    const double lse = lses[row] = largest + std::log(sum);
    const bool ignored = targets[row] == c.options.ignore_index;
    const double s = c.options.label_smoothing, z = c.options.z_loss;
    if (!ignored) {
      losses[row] = (1 - s) * (lse - l[targets[row]]) + s * (lse - mean) + z * lse * lse;
    }
    sizes[row] = 1 + std::abs(lse) + std::abs(largest) + z * lse * lse;
    for (int64_t v = 0; v < c.V; ++v) {
      const double p = std::exp(l[v] - lse);
      double& g = gradient[row * c.V + v];
      if (!ignored) {
        g = 0.5 * ((1 + 2 * z * lse) * p - (1 - s) * (v == targets[row]) - s / c.V);
        if (cap > 0) g *= 1 - l[v] / cap * (l[v] / cap);
      }
      bounds[row * c.V + v] = 2 * unit_of<T> * (std::abs(g) + p * 0.01 + s / c.V * 0.01) + 1e-7;
    }
  }
  for (Isa isa : supported_isas()) {
    force_isa(isa);
    use_threads(1);
    const Outcome<T> out = outcome_of(c, logits, targets);
    bool right = true, untouched = true;
    for (int64_t row = 0; row < c.N; ++row) {
      right &= std::abs(out.losses[row] - losses[row]) < 2e-6 * sizes[row];
      right &= std::abs(out.lse[row] - lses[row]) < 2e-6 * sizes[row];
      for (int64_t v = 0; v < c.V; ++v) {
        const int64_t i = row * c.V + v;
        right &= std::abs(to_float(out.gradient[i]) - gradient[i]) < bounds[i];
        right &= std::abs(to_float(out.again[row * stride + v]) - gradient[i]) < bounds[i];
      }
      for (int64_t i = row * stride + c.V; i < std::min((row + 1) * stride, size); ++i) {
        untouched &= !std::memcmp(&out.again[i], &logits[i], sizeof(T));
      }
    }
    const std::string what = name + " " + std::to_string(c.N) + " x " + std::to_string(c.V) + " " +
                             isa_name(isa) + " type " +
                             std::to_string(static_cast<int>(logit_type_of<T>));
    check(right, "cross_entropy " + what);
    check(untouched, "cross_entropy between rows " + what);
    if (c.N * c.V < 1 << 18) continue;  // the calling thread alone, whatever there is
    for (int threads : {2, 3}) {
      use_threads(threads);
      check(outcome_of(c, logits, targets) == out, "cross_entropy threads " + what);
    }
  }
  force_isa(best_isa());
}

template <class T>
void test_type() {
  const CrossEntropyOptions plain, capped{-100, 0, 5, 0}, all{3, 0.2, 8, 0.02};
  // One row and class; around the vectors of every instruction set; around a block of 2048.
  for (int64_t V : {1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 65, 100, 2047, 2048, 2049, 4097}) {
    check_case<T>({3, V, 0, plain}, "plain");
    check_case<T>({2, V, 5, all}, "all options");
    check_case<T>({2, V, 1, capped}, "softcap");
  }
  check_case<T>({70, 301, 0, plain, 30}, "wide");
  // Past the caches: larger than 16 MB, rows that are not aligned.
  const int64_t V = sizeof(T) == 4 ? 70001 : 140003;
  check_case<T>({61, V, 0, plain}, "streamed");
}

void test_minus_infinity() {
  for (Isa isa : supported_isas()) {
    force_isa(isa);
    // The only finite logit stands in the third block.
    std::vector<float> logits(6000, -INFINITY), gradient(6000);
    logits[5000] = 2;
    const int64_t target = 5000;
    float loss, lse;
    RowStats stats;
    const Rows out{gradient.data(), 6000};
    cross_entropy_losses({logits.data(), 6000}, FloatType::kFloat32, 1, 6000, &target, {}, false,
                         &loss, &lse, &stats, &out, 1);
    check(loss == 0 && lse == 2, std::string("one finite logit ") + isa_name(isa));
    check(std::count(gradient.begin(), gradient.end(), 0.0f) == 6000, "its gradient");
  }
  force_isa(best_isa());
}

// Every 16-bit float, through each instruction set's conversions.
template <class T>
void test_conversions() {
  for (Isa isa : supported_isas()) {
    force_isa(isa);
    std::vector<T> values(65536);
    for (uint32_t bits = 0; bits < 65536; ++bits) values[bits].bits = static_cast<uint16_t>(bits);
    std::vector<float> wide(65536);
    accumulate(wide.data(), 65536, values.data(), logit_type_of<T>, 1, 65536, true);
    std::vector<T> back = values;
    scale_in_place(back.data(), logit_type_of<T>, 65536, 1.0f);
    bool right = true;
    for (uint32_t bits = 0; bits < 65536; ++bits) {
      const float expected = to_float(values[bits]);
      const bool nan = std::isnan(expected);
      right &= nan ? std::isnan(wide[bits]) : wide[bits] == expected;
      right &= nan ? std::isnan(to_float(back[bits])) : back[bits].bits == bits;
      if (!nan) right &= from_float<T>(expected).bits == bits;
    }
    check(right, std::string("16-bit floats ") + isa_name(isa));
    accumulate(wide.data(), 65536, values.data(), logit_type_of<T>, 1, 65536, false);
    check(wide[1] == 2 * to_float(values[1]), "accumulate");
  }
  force_isa(best_isa());
}

void test_labels() {
  const std::vector<int64_t> targets = {0, 4, -100, 2, -1, 5};
  check_equal(check_labels(targets.data(), 6, 5, -100).first_bad, 4, "first bad label");
  check_equal(check_labels(targets.data(), 4, 5, -100).first_bad, -1, "no bad label");
  check_equal(check_labels(targets.data(), 6, 6, -1).first_bad, 2, "another ignore_index");
  check_equal(check_labels(targets.data(), 4, 5, -100).count, 3, "labels that count");
  check_equal(check_labels(targets.data(), 0, 5, -100).count, 0, "no labels");
}

}  // namespace

void test_cross_entropy() {
  test_type<float>();
  test_type<Bfloat16>();
  test_type<Float16>();
  test_minus_infinity();
  test_conversions<Bfloat16>();
  test_conversions<Float16>();
  test_labels();
  use_threads(4);
}

}  // namespace fastlm
