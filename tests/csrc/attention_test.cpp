// Tests of csrc/attention.h: against the formulas in fp64, for every instruction set and matrix
// unit (tiles: emulated_tiles.h), in heap blocks of exactly the elements that may be touched, and
// the same bits for any number of threads.

#include "attention.h"

#include <cmath>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "isa.h"
#include "testing.h"

namespace fastlm {
namespace {

struct Case {
  int64_t B, H, H_kv, Tq, Tk, d;
  bool rotary = false;
  bool joined = false;   // q, k and v are views of one projection, (B, T, heads, d)
  double largest = 0.8;  // of the elements of q and k
};

template <class T>
constexpr FloatType type_of = std::is_same_v<T, float>      ? FloatType::kFloat32
                              : std::is_same_v<T, Bfloat16> ? FloatType::kBfloat16
                                                            : FloatType::kFloat16;
template <class T>
constexpr double unit_of = std::is_same_v<T, float>      ? 1.0 / (1 << 22)
                           : std::is_same_v<T, Bfloat16> ? 1.0 / 256
                                                         : 1.0 / 2048;

// (B, heads, rows, d), every row followed by `padding` elements, but the last one by none.
template <class T>
struct Block {
  int64_t heads, count, d, padding;
  std::vector<T> elements;

  Block(int64_t B, int64_t heads, int64_t count, int64_t d, int64_t padding)
      : heads(heads),
        count(count),
        d(d),
        padding(padding),
        elements(B * heads * count * (d + padding) - padding) {}
  HeadRows rows() {
    const int64_t row = d + padding;
    return {elements.data(), heads * count * row, count * row, row};
  }
  void fill(double largest) {
    for (T& x : elements)
      x = from_float<T>(static_cast<float>(largest * (random_below(20001) - 10000) / 1e4));
  }
  // NaN: an element left out shows, and one between the rows that was written.
  void fill_with_nan() { std::memset(elements.data(), 0xff, elements.size() * sizeof(T)); }
  bool untouched_between_rows() const {
    uint8_t nan[sizeof(T)];
    std::memset(nan, 0xff, sizeof(T));
    for (size_t i = 0; i < elements.size(); ++i)
      if (static_cast<int64_t>(i) % (d + padding) >= d && std::memcmp(&elements[i], nan, sizeof(T)))
        return false;
    return true;
  }
};

template <class T>
struct Outcome {
  Block<T> out, dq, dk, dv;
  std::vector<AttentionStats> stats;

  explicit Outcome(const Case& c)
      : out(c.B, c.H, c.Tq, c.d, 3),
        dq(c.B, c.H, c.Tq, c.d, 1),
        dk(c.B, c.H_kv, c.Tk, c.d, 0),
        dv(c.B, c.H_kv, c.Tk, c.d, 5),
        stats(c.B * c.H * c.Tq) {
    for (Block<T>* block : {&out, &dq, &dk, &dv}) block->fill_with_nan();
  }
  bool operator==(const Outcome& other) const {
    const auto same = [](const auto& a, const auto& b) {
      return a.size() == b.size() && !std::memcmp(a.data(), b.data(), a.size() * sizeof(a[0]));
    };
    return same(out.elements, other.out.elements) && same(dq.elements, other.dq.elements) &&
           same(dk.elements, other.dk.elements) && same(dv.elements, other.dv.elements) &&
           same(stats, other.stats);
  }
};

// What the functions get.
template <class T>
struct Inputs {
  Attention a{};
  std::vector<Block<T>> blocks;
  std::vector<float> cos, sin;
  HeadRows grad_out;

  explicit Inputs(const Case& c) {
    a.B = c.B, a.H = c.H, a.H_kv = c.H_kv, a.Tq = c.Tq, a.Tk = c.Tk, a.d = c.d;
    a.scale = 1.0f / std::sqrt(static_cast<float>(c.d));
    a.type = type_of<T>;
    if (c.joined) {
      const int64_t heads = c.H + 2 * c.H_kv, row = heads * c.d;
      blocks.emplace_back(c.B, c.Tq, heads, c.d, 0);
      T* const first = blocks[0].elements.data();
      a.q = {first, c.Tq * row, c.d, row};
      a.k = {first + c.H * c.d, c.Tq * row, c.d, row};
      a.v = {first + (c.H + c.H_kv) * c.d, c.Tq * row, c.d, row};
    } else {
      blocks.emplace_back(c.B, c.H, c.Tq, c.d, 2);
      blocks.emplace_back(c.B, c.H_kv, c.Tk, c.d, 0);
      blocks.emplace_back(c.B, c.H_kv, c.Tk, c.d, 7);
      a.q = blocks[0].rows(), a.k = blocks[1].rows(), a.v = blocks[2].rows();
    }
    for (Block<T>& block : blocks) block.fill(c.largest);
    blocks.emplace_back(c.B, c.H, c.Tq, c.d, 1);
    blocks.back().fill(1);
    grad_out = blocks.back().rows();
    if (c.rotary) {
      for (int64_t i = 0; i < c.Tk * (c.d / 2); ++i) {
        cos.push_back(std::cos(static_cast<float>(i % 101)));
        sin.push_back(std::sin(static_cast<float>(i % 101)));
      }
      a.cos = cos.data(), a.sin = sin.data();
    }
  }
};

template <class T>
Outcome<T> outcome_of(const Case& c, const Inputs<T>& inputs) {
  Outcome<T> result(c);
  attention_forward(inputs.a, result.out.rows(), result.stats.data());
  attention_backward(inputs.a, inputs.grad_out, result.out.rows(), result.stats.data(),
                     result.dq.rows(), result.dk.rows(), result.dv.rows());
  return result;
}

// On the calling thread: a loop inside another one's piece is its caller's alone.
template <class T>
Outcome<T> outcome_on_one_thread(const Case& c, const Inputs<T>& inputs) {
  std::unique_ptr<Outcome<T>> result;
  const auto fn = [&] { result = std::make_unique<Outcome<T>>(outcome_of(c, inputs)); };
  const auto run = [](const void* opaque, int64_t piece) {
    if (piece == 0) (*static_cast<decltype(fn)*>(opaque))();
  };
  run_pieces(2, 2, run, &fn);
  return *result;
}

// A matrix of fp64 values and of how far a result may be from each, in units of the operands'
// rounding (`operand`) and of the results' (`result`), and in fp32's (`fp32`).
struct Values {
  int64_t d;
  std::vector<double> value, bound;
  Values(int64_t rows, int64_t d) : d(d), value(rows * d), bound(rows * d) {}
  double* row(int64_t r) { return value.data() + r * d; }
  double* bounds(int64_t r) { return bound.data() + r * d; }
  void rotate(const Attention& a, int64_t rows, double direction) {
    for (int64_t r = 0; a.cos && r < rows; ++r) {
      for (int64_t i = 0; i < d / 2; ++i) {
        const double cos = static_cast<double>(a.cos[r * (d / 2) + i]);
        const double sin = direction * static_cast<double>(a.sin[r * (d / 2) + i]);
        double *x = row(r) + 2 * i, *b = bounds(r) + 2 * i;
        const double even = x[0], odd = x[1], sum = b[0] + b[1];
        x[0] = even * cos - odd * sin, x[1] = even * sin + odd * cos;
        b[0] = b[1] = sum;
      }
    }
  }
};

template <class T>
Values read(const HeadRows& rows, int64_t b, int64_t h, int64_t T_rows, int64_t d) {
  Values result(T_rows, d);
  for (int64_t t = 0; t < T_rows; ++t) {
    const T* x = static_cast<const T*>(rows.data) + b * rows.batch + h * rows.head + t * rows.row;
    for (int64_t i = 0; i < d; ++i) result.row(t)[i] = static_cast<double>(to_float(x[i]));
  }
  return result;
}

double dot(const double* a, const double* b, int64_t d, double& size) {
  double sum = 0;
  size = 0;
  for (int64_t i = 0; i < d; ++i) sum += a[i] * b[i], size += std::fabs(a[i] * b[i]);
  return sum;
}

// The gradients and the output of every head, in fp64, and their bounds where the operands of
// matrix products are rounded to `operand`.
struct Expected {
  std::vector<Values> out, dq, dk, dv;  // by batch and head
};
template <class T>
Expected expected_of(const Attention& a, const HeadRows& grad_out, double operand) {
  constexpr double kFp32 = 4e-7, kTiny = 1e-7, unit = unit_of<T>;
  const double scale = static_cast<double>(a.scale), rotation = a.cos ? 2 * operand : 0;
  const int64_t d = a.d, offset = a.Tk - a.Tq, group = a.H / a.H_kv;
  Expected result;
  for (int64_t b = 0; b < a.B; ++b) {
    for (int64_t h = 0; h < a.H; ++h) {
      Values q = read<T>(a.q, b, h, a.Tq, d), g = read<T>(grad_out, b, h, a.Tq, d);
      Values k = read<T>(a.k, b, h / group, a.Tk, d), v = read<T>(a.v, b, h / group, a.Tk, d);
      q.rotate(a, a.Tq, 1), k.rotate(a, a.Tk, 1);
      if (h % group == 0) {
        result.dk.emplace_back(a.Tk, d);
        result.dv.emplace_back(a.Tk, d);
      }
      Values out(a.Tq, d), dq(a.Tq, d), &dk = result.dk.back(), &dv = result.dv.back();
      std::vector<double> w(a.Tk);
      for (int64_t i = 0; i < a.Tq; ++i) {
        const int64_t keys = i + offset + 1;
        double largest = -INFINITY, sizes = 0, sum = 0, size;
        for (int64_t j = 0; j < keys; ++j) {
          w[j] = scale * dot(q.row(i), k.row(j), d, size);
          largest = std::max(largest, w[j]), sizes = std::max(sizes, scale * size);
        }
        for (int64_t j = 0; j < keys; ++j) sum += w[j] = std::exp(w[j] - largest);
        // Of a weight, relative: its rounding, and its score's and the row's largest one's error.
        const double error = operand + 2 * (kFp32 + rotation) * (1 + sizes);
        double *o = out.row(i), *bound = out.bounds(i);
        for (int64_t j = 0; j < keys; ++j) {
          w[j] /= sum;
          for (int64_t c = 0; c < d; ++c) {
            o[c] += w[j] * v.row(j)[c];
            bound[c] += error * w[j] * std::fabs(v.row(j)[c]);
          }
        }
        for (int64_t c = 0; c < d; ++c) bound[c] += unit * std::fabs(o[c]) + kTiny;
        const double* const grad = g.row(i);
        const double total = dot(grad, o, d, size);
        double total_error = kFp32 * size;
        for (int64_t c = 0; c < d; ++c) total_error += std::fabs(grad[c]) * bound[c];
        for (int64_t j = 0; j < keys; ++j) {
          const double ds = scale * w[j] * (dot(grad, v.row(j), d, size) - total);
          const double ds_error = std::fabs(ds) * (error + operand + rotation) +
                                  scale * w[j] * (kFp32 * size + total_error);
          for (int64_t c = 0; c < d; ++c) {
            dv.row(j)[c] += w[j] * grad[c];
            dv.bounds(j)[c] += error * w[j] * std::fabs(grad[c]);
            dq.row(i)[c] += ds * k.row(j)[c];
            dq.bounds(i)[c] += ds_error * std::fabs(k.row(j)[c]);
            dk.row(j)[c] += ds * q.row(i)[c];
            dk.bounds(j)[c] += ds_error * std::fabs(q.row(i)[c]);
          }
        }
      }
      dq.rotate(a, a.Tq, -1);
      if (h % group == group - 1) dk.rotate(a, a.Tk, -1);
      result.out.push_back(std::move(out));
      result.dq.push_back(std::move(dq));
    }
  }
  for (std::vector<Values>* heads : {&result.dq, &result.dk, &result.dv})
    for (Values& head : *heads)
      for (size_t i = 0; i < head.value.size(); ++i)
        head.bound[i] += unit * std::fabs(head.value[i]) + kTiny;
  return result;
}

template <class T>
void check_values(Block<T>& got, std::vector<Values>& expected, int64_t heads,
                  const std::string& what) {
  double worst = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    const int64_t b = static_cast<int64_t>(i) / heads, h = static_cast<int64_t>(i) % heads;
    const int64_t rows = static_cast<int64_t>(expected[i].value.size()) / got.d;
    const Values values = read<T>(got.rows(), b, h, rows, got.d);
    for (size_t e = 0; e < values.value.size(); ++e) {
      const double error = std::fabs(values.value[e] - expected[i].value[e]);
      const double ratio = error / expected[i].bound[e];
      if (!(ratio <= worst)) worst = ratio;  // NaN stays
    }
  }
  check(worst <= 1, what + ": error " + std::to_string(worst) + " of what it may be");
  check(got.untouched_between_rows(), what + ": written between rows");
}

template <class T>
void check_case(const Case& c) {
  const Inputs<T> inputs(c);
  const std::vector<std::vector<T>> before = [&] {
    std::vector<std::vector<T>> copies;
    for (const Block<T>& block : inputs.blocks) copies.push_back(block.elements);
    return copies;
  }();
  Expected wide = expected_of<T>(inputs.a, inputs.grad_out, 4e-7);
  Expected narrow{};
  for (Isa isa : matrix_isas()) {
    const bool pairs = isa == Isa::kAvx512Bf16 || isa == Isa::kAmx;
    if (pairs && !std::is_same_v<T, Bfloat16>) continue;  // as kAvx512
    if (pairs && narrow.out.empty()) {
      narrow = expected_of<T>(inputs.a, inputs.grad_out, unit_of<Bfloat16>);
    }
    Expected& expected = pairs ? narrow : wide;
    force_isa(isa);
    const std::string what = "attention " + std::to_string(c.B) + "x" + std::to_string(c.H) + "/" +
                             std::to_string(c.H_kv) + "x" + std::to_string(c.Tq) + "/" +
                             std::to_string(c.Tk) + "x" + std::to_string(c.d) +
                             (c.rotary ? " rotary " : " ") + isa_name(isa) + " type " +
                             std::to_string(static_cast<int>(type_of<T>));
    Outcome<T> got = outcome_on_one_thread(c, inputs);
    check_values(got.out, expected.out, c.H, what + " out");
    check_values(got.dq, expected.dq, c.H, what + " dq");
    check_values(got.dk, expected.dk, c.H_kv, what + " dk");
    check_values(got.dv, expected.dv, c.H_kv, what + " dv");
    if (c.B * c.H_kv == 1 && c.Tk <= 256) continue;  // one task
    for (int threads : threads_are_openmps() ? std::vector<int>{2, 3} : std::vector<int>{2}) {
      use_threads(threads);
      check(outcome_of(c, inputs) == got, what + " on several threads");
    }
  }
  force_isa(best_isa());
  for (size_t i = 0; i < before.size(); ++i)
    check(!std::memcmp(before[i].data(), inputs.blocks[i].elements.data(),
                       before[i].size() * sizeof(T)),
          "attention leaves its inputs as they are");
}

template <class T>
void test_type() {
  const Case cases[] = {
      // B H H_kv Tq Tk d: around the vectors, panels and tiles of every instruction set
      {1, 1, 1, 1, 1, 1},
      {2, 1, 1, 2, 2, 2, true},
      {1, 1, 1, 15, 15, 8},
      {1, 2, 2, 16, 16, 16, true, true},
      {1, 1, 1, 17, 17, 17},
      {1, 4, 2, 31, 31, 24, true},
      {1, 1, 1, 33, 33, 33},
      {1, 3, 1, 63, 63, 40, false, true},
      {1, 1, 1, 64, 64, 64, true},
      {1, 1, 1, 65, 65, 80},
      {1, 1, 1, 97, 97, 100, true},
      {1, 1, 1, 20, 20, 128},
      {1, 1, 1, 18, 18, 256, true},
      // around a block of 256 keys
      {1, 1, 1, 255, 255, 2},
      {1, 1, 1, 257, 257, 16, true, true},
      // fewer queries than keys
      {1, 1, 1, 1, 70, 16},
      {1, 2, 1, 17, 300, 8},
      {1, 1, 1, 40, 97, 33},
      // scores of 1e4 and more, and of one key alone
      {1, 1, 1, 65, 65, 16, false, false, 100},
  };
  for (const Case& c : cases) check_case<T>(c);
}

}  // namespace

void test_attention() {
  test_type<float>();
  test_type<Bfloat16>();
  test_type<Float16>();
  check_case<Float16>({1, 1, 1, 300, 300, 2});
  // 512 queries and 256 keys are a task's
  check_case<float>({1, 1, 1, 600, 600, 2, true});
  check_case<Bfloat16>({1, 1, 1, 600, 600, 2});
  use_threads(4);
}

}  // namespace fastlm
