// Tests of csrc/clip_grad_norm.h: against the definition, for every type and instruction set, and
// for 1 to 4 threads.

#include "clip_grad_norm.h"

#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "isa.h"
#include "optimizer_testing.h"

namespace fastlm {
namespace {

SquareSum sum_of(std::vector<Row>& rows) { return sum_squares(Table(rows).list()); }

// Of each row alone, and of all.
std::vector<double> sums_of(const std::vector<Row>& rows) {
  std::vector<double> sums;
  for (const Row& row : rows) {
    std::vector<Row> alone = {row};
    const SquareSum found = sum_of(alone);
    check_equal(found.bad, -1, "sum_squares of finite gradients");
    sums.push_back(found.sum);
  }
  std::vector<Row> all = rows;
  sums.push_back(sum_of(all).sum);
  return sums;
}

void test_sum_squares() {
  std::vector<Row> rows;
  for (Type type : kTypes) {
    for (int64_t n : kLengths) rows.emplace_back(type, type, n, rows.size() % 4);
  }
  for (int i = 0; i < 500; ++i) {
    const Type type = kTypes[random_below(4)];
    rows.emplace_back(type, type, random_below(70), random_below(4));
  }
  // Many sums, since the largest swallow what a square that is not rounded by itself would change.
  std::vector<long double> expected(rows.size() + 1);
  for (size_t k = 0; k < rows.size(); ++k) {
    const Row& row = rows[k];
    for (int64_t i = row.offset; i < row.offset + row.n; ++i) {
      const long double x = get(row.grad_type, row.grad, i);
      expected[k] += x * x;
    }
    expected.back() += expected[k];
  }
  use_threads(1);
  force_isa(Isa::kPortable);
  const std::vector<double> first = sums_of(rows);
  for (size_t k = 0; k < first.size(); ++k) {
    check(std::abs(first[k] - expected[k]) <= 1e-13L * expected[k], "sum_squares");
  }
  for (Isa isa : supported_isas()) {
    force_isa(isa);
    for (int threads : {1, 2, 3, 4}) {
      use_threads(threads);
      check(!std::memcmp(sums_of(rows).data(), first.data(), 8 * first.size()),
            std::string("bits of sum_squares ") + isa_name(isa) + " threads " +
                std::to_string(threads));
    }
  }
}

// NaN and infinity at the ends and in between, one or two of them, for every type.
void test_first_bad() {
  for (Type type : kTypes) {
    for (Isa isa : supported_isas()) {
      force_isa(isa);
      const std::string what = std::string("first bad gradient ") + isa_name(isa) + " type " +
                               std::to_string(static_cast<int>(type));
      std::vector<Row> rows;
      for (int64_t n : {0, 1, 8, 33, 16385}) rows.emplace_back(type, type, n, 1);
      for (size_t bad = 0; bad < rows.size(); ++bad) {
        Row& row = rows[bad];
        for (double value : {NAN, INFINITY, -INFINITY}) {
          for (int64_t i : {int64_t{0}, row.n / 2, row.n - 1}) {
            if (row.n == 0) continue;
            const Bytes good = row.grad;
            put(type, row.grad, row.offset + i, value);
            const SquareSum found = sum_of(rows);
            check_equal(found.bad, bad, what);
            check(std::isnan(found.sum) == std::isnan(value) && !std::isfinite(found.sum),
                  what + ", sum");
            if (bad + 1 < rows.size()) {  // another, later
              put(type, rows.back().grad, 1, NAN);
              check_equal(sum_of(rows).bad, bad, what + ", two of them");
              put(type, rows.back().grad, 1, 0.5);
            }
            row.grad = good;
          }
        }
      }
      // The largest finite gradients are not bad: only of fp64 does their square overflow.
      const double largest = type == Type::kFloat16    ? 65504
                             : type == Type::kBfloat16 ? 3.38953139e38
                             : type == Type::kFloat32  ? 3.40282347e38
                                                       : 1e150;
      for (int64_t i = 0; i < 33; ++i) put(type, rows[3].grad, 1 + i, i % 2 ? largest : -largest);
      check_equal(sum_of(rows).bad, -1, what + ", largest numbers");
    }
  }
  force_isa(best_isa());
}

void test_scale_gradients() {
  std::vector<Row> rows;
  for (Type type : kTypes) {
    for (int64_t n : kLengths) rows.emplace_back(type, type, n, rows.size() % 4);
    for (int i = 0; i < 200; ++i) rows.emplace_back(type, type, random_below(70), random_below(4));
    rows.emplace_back(type, type, 4);
    put(type, rows.back().grad, 0, NAN), put(type, rows.back().grad, 1, -INFINITY);
  }
  const double factor = 0.123456789;
  std::vector<Row> expected = rows;
  for (Row& row : expected) {
    for (int64_t i = row.offset; i < row.offset + row.n; ++i) {
      const double x = get(row.grad_type, row.grad, i);
      const bool wide = row.grad_type == Type::kFloat64;
      put(row.grad_type, row.grad, i,
          wide ? factor * x : static_cast<float>(factor) * static_cast<float>(x));
    }
  }
  for (Isa isa : supported_isas()) {
    force_isa(isa);
    for (int threads : {1, 2, 3, 4}) {
      use_threads(threads);
      std::vector<Row> scaled = rows;
      scale_gradients(Table(scaled).list(), factor);
      for (size_t i = 0; i < rows.size(); ++i) {
        check(scaled[i] == expected[i], std::string("scale_gradients ") + isa_name(isa) + " row " +
                                            std::to_string(i) + " threads " +
                                            std::to_string(threads));
      }
    }
  }
  force_isa(best_isa());
}

}  // namespace

void test_clip_grad_norm() {
  test_sum_squares();
  test_first_bad();
  test_scale_gradients();
  force_isa(best_isa());
  use_threads(4);
}

}  // namespace fastlm
