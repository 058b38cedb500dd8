// Tests of csrc/adamw.h, csrc/tensors.h and simd.h's split: against the formula in fp64, for
// every combination of types, every instruction set, and for 1 to 4 threads.

#include <cmath>
#include <string>
#include <vector>

#include "adamw.h"
#include "isa.h"
#include "optimizer_testing.h"
#include "simd.h"

namespace fastlm {
namespace {

// The same row with its fp32 parameter in two halves, by the definition: the rest is the lower 16
// bits with a sign, and the upper half what remains of the bits.
Row as_split(Row row) {
  Bytes high(row.param.size() / 2), rest(row.param.size() / 2);
  for (int64_t i = 0; i < row.offset + row.n; ++i) {
    const uint32_t bits = element<uint32_t>(row.param, i);
    const int16_t low = static_cast<int16_t>(bits & 0xffff);
    const uint32_t above = bits - static_cast<uint32_t>(static_cast<int32_t>(low));
    set_element(high, i, static_cast<uint16_t>(above >> 16));
    set_element(rest, i, low);
  }
  row.param_type = Type::kSplit, row.param = std::move(high), row.rest = std::move(rest);
  return row;
}
Row as_joined(Row row) {
  Bytes whole(row.param.size() * 2);
  for (int64_t i = 0; i < row.offset + row.n; ++i) {
    const uint32_t high = element<uint16_t>(row.param, i);
    const int32_t low = element<int16_t>(row.rest, i);
    set_element(whole, i, (high << 16) + static_cast<uint32_t>(low));
  }
  row.param_type = Type::kFloat32, row.param = std::move(whole), row.rest.clear();
  return row;
}

std::vector<Row> stepped(std::vector<Row> rows, const std::vector<AdamWOptions>& options,
                         double factor) {
  const Table table(rows);
  adamw(table.list(), options.data(), factor);
  return rows;
}

// Is `actual` the number `expected`, rounded to `type` after an error of at most `slack`?
bool rounded(Type type, double actual, double expected, double slack) {
  if (std::isnan(expected)) return std::isnan(actual);
  const double overflow = type == Type::kFloat64   ? INFINITY
                          : type == Type::kFloat16 ? 65520
                                                   : 3.5e38;
  if (std::abs(expected) >= overflow) return actual == std::copysign(INFINITY, expected);
  int digits, least;  // of the mantissa; frexp's exponent of the smallest normal number
  switch (type) {
    case Type::kFloat64: digits = 53, least = -1021; break;
    case Type::kFloat32: digits = 24, least = -125; break;
    case Type::kFloat16: digits = 11, least = -13; break;
    default: digits = 8, least = -125;
  }
  int exponent;
  std::frexp(expected, &exponent);
  const double ulp = std::ldexp(1.0, std::max(exponent, least) - digits);
  // The formula is computed in fp64, too, with roundings of its own.
  return std::abs(actual - expected) <= (type == Type::kFloat64 ? 2 : 0.51) * ulp + slack;
}

// Is `after` what the formula makes of `before`?
bool is_updated(const Row& before, const Row& after, const AdamWOptions& o, double factor) {
  const double t = before.step[0] + 1.0;
  const double bias1 = 1 - std::pow(o.beta1, t), bias2 = 1 - std::pow(o.beta2, t);
  const Type param = before.param_type, moment = before.moment_type();
  bool right = after.step[0] == before.step[0] + 1 && after.grad == before.grad;
  for (int64_t i = before.offset; i < before.offset + before.n; ++i) {
    // Of long rows all elements next to a chunk's ends, and enough of the others.
    const int64_t in_chunk = (i - before.offset) % 16384;
    if (before.n > 1000 && i % 7 && in_chunk > 40 && in_chunk < 16340 &&
        i < before.offset + before.n - 40) {
      continue;
    }
    const double g = factor * get(before.grad_type, before.grad, i);
    const double old_part = o.beta1 * get(moment, before.mean, i), new_part = (1 - o.beta1) * g;
    const double terms = std::abs(old_part) + std::abs(new_part);  // which may cancel
    const double m = old_part + new_part;
    const double v = o.beta2 * get(moment, before.variance, i) + (1 - o.beta2) * g * g;
    const double p = get(param, before.param, i) * (1 - o.lr * o.weight_decay);
    const double scale = o.lr / bias1 / (std::sqrt(v / bias2) + o.eps);
    const double change = m * scale;
    // What the operations before the last one may be off, in units of their results, or of the
    // smallest normal number.
    const double unit = param == Type::kFloat64 ? 0x1p-50 : 0x1p-23;
    const double slack = 3 * unit * (std::abs(change) + (terms + 0x1p-126) * scale);
    right &= rounded(param, get(param, after.param, i), p - change, slack);
    right &= rounded(moment, get(moment, after.mean, i), m, unit * terms);
    right &= rounded(moment, get(moment, after.variance, i), v, 2 * unit * v);
  }
  const auto untouched = [&](const Bytes& now, const Bytes& then, Type type) {
    return std::equal(then.begin(), then.begin() + before.offset * size_of(type), now.begin());
  };
  return right && untouched(after.param, before.param, param) &&
         untouched(after.mean, before.mean, moment) &&
         untouched(after.variance, before.variance, moment);
}

std::string name_of_row(const Row& row) {
  return " param " + std::to_string(static_cast<int>(row.param_type)) + " grad " +
         std::to_string(static_cast<int>(row.grad_type)) + " of " + std::to_string(row.n);
}

// A step of `rows` by every instruction set and number of threads. Split rows: bit for bit what
// their fp32 values become.
void check_step(const std::vector<Row>& rows, const std::vector<AdamWOptions>& options,
                double factor, const std::string& name) {
  std::vector<Row> whole = rows;
  for (Row& row : whole) row = row.param_type == Type::kSplit ? as_joined(row) : row;
  for (Isa isa : supported_isas()) {
    force_isa(isa);
    use_threads(1);
    const std::string what = name + " " + isa_name(isa);
    const std::vector<Row> after = stepped(rows, options, factor);
    const std::vector<Row> expected = stepped(whole, options, factor);
    for (size_t i = 0; i < rows.size(); ++i) {
      if (rows[i].param_type == Type::kSplit) {
        check(as_joined(after[i]) == expected[i], what + ", split as fp32" + name_of_row(rows[i]));
      }
      check(is_updated(whole[i], expected[i], options[rows[i].group], factor),
            what + name_of_row(rows[i]));
    }
    for (int threads : {2, 3, 4}) {
      use_threads(threads);
      check(stepped(rows, options, factor) == after,
            what + ", " + std::to_string(threads) + " threads");
    }
  }
  force_isa(best_isa());
}

std::vector<std::pair<Type, Type>> combinations() {
  std::vector<std::pair<Type, Type>> found = {{Type::kFloat64, Type::kFloat64}};
  for (Type param : {Type::kFloat32, Type::kBfloat16, Type::kFloat16, Type::kSplit}) {
    for (Type grad : {Type::kFloat32, Type::kBfloat16, Type::kFloat16}) {
      found.push_back({param, grad});
    }
  }
  return found;
}

Row random_row(Type param, Type grad, int64_t n, int64_t offset) {
  return param == Type::kSplit ? as_split(Row(Type::kFloat32, grad, n, offset))
                               : Row(param, grad, n, offset);
}

void test_every_combination() {
  for (const auto& [param, grad] : combinations()) {
    std::vector<Row> rows;
    for (int64_t n : kLengths) rows.push_back(random_row(param, grad, n, rows.size() % 4));
    check_step(rows, {{3e-3, 0.9, 0.95, 1e-8, 0.1}}, 0.37, "adamw");
  }
}

// Groups and step counters change from row to row, also back to those of the row before last.
void test_many_small_tensors() {
  const std::vector<AdamWOptions> options = {{3e-3, 0.9, 0.95, 1e-8, 0.1},
                                             {1e-2, 0.5, 0.9999, 1e-3, 0},
                                             {1e-4, 0.9, 0.999, 0.1, 0.01},
                                             {1, 0, 0, 1e-8, 0.5}};
  const auto kinds = combinations();
  std::vector<Row> rows;
  for (int i = 0; i < 3000; ++i) {
    const auto [param, grad] = kinds[random_below(kinds.size())];
    rows.push_back(random_row(param, grad, random_below(70), random_below(4)));
    rows.back().group = i % 7 < 3 ? 0 : random_below(options.size());
    rows.back().step[0] = std::vector<float>{0, 0, 1, 17, 20000}[random_below(5)];
  }
  check_step(rows, options, 1, "adamw of many");
  check_step({}, options, 1, "adamw of none");
}

// A learning rate of 0, as warm-up starts with: moments move, no bit of a parameter does.
void test_lr_zero() {
  for (const auto& [param, grad] : combinations()) {
    Row row(param == Type::kSplit ? Type::kFloat32 : param, grad, 35, 1);
    if (param == Type::kSplit) row = as_split(row);
    for (Isa isa : supported_isas()) {
      force_isa(isa);
      const std::vector<Row> after = stepped({row}, {{0, 0.9, 0.95, 1e-8, 0.1}}, 1);
      const std::string what = std::string("lr = 0 ") + isa_name(isa) + name_of_row(row);
      check(after[0].param == row.param && after[0].rest == row.rest, what);
      check(!(after[0].mean == row.mean) && !(after[0].variance == row.variance), what);
      check(after[0].step[0] == 1, what + ", step counter");
    }
  }
  force_isa(best_isa());
}

// What an exponential schedule ends with: 1 / lr overflows, the update does not.
void test_tiny_lr() {
  for (double lr : {1e-100, 1e-200, 1e-290, 1e-300, 1e-310, 5e-324}) {
    for (const auto& [param, grad] : combinations()) {
      std::vector<Row> rows = {random_row(param, grad, 35, 0)};
      for (int i = 0; i < 35; i += 2) put(rows[0].moment_type(), rows[0].variance, i, 1e35);
      check_step(rows, {{lr, 0.9, 0.95, 1e-8, 0.1}}, 1, "lr = " + std::to_string(std::log10(lr)));
    }
  }
}

// Second moments of zero (no gradient yet, or underflow) and infinity; subnormals, infinities and
// NaN everywhere: what the formula says.
void test_special_values() {
  const double tiny = 1e-42, inf = INFINITY, nan = NAN;
  const AdamWOptions options = {1e-3, 0.9, 0.999, 1e-8, 0.1};
  for (const auto& [param, grad] : combinations()) {
    const bool split = param == Type::kSplit;
    for (double p : {0.0, 1.5, inf, nan}) {
      for (double g : {0.0, -0.5, inf, -inf, nan}) {
        Row row(split ? Type::kFloat32 : param, grad, 9);
        for (int64_t i = 0; i < 9; ++i) {
          put(row.param_type, row.param, i, p), put(grad, row.grad, i, g);
          put(row.moment_type(), row.mean, i, std::vector<double>{0, 0.25, tiny}[i / 3]);
          put(row.moment_type(), row.variance, i, std::vector<double>{0, inf, tiny}[i % 3]);
        }
        for (Isa isa : supported_isas()) {
          force_isa(isa);
          Row after = stepped({split ? as_split(row) : row}, {options}, 1)[0];
          if (split) after = as_joined(after);
          const std::string what = std::string("special values ") + isa_name(isa) + " p " +
                                   std::to_string(p) + " g " + std::to_string(g);
          check(is_updated(row, after, options, 1), what + name_of_row(row));
          for (int64_t i = 0; split && i < 9; ++i) {
            const float x = element<float>(after.param, i);
            check(x == x || to_bits(x) == 0x7fc00000, what + ", the quiet NaN");
          }
        }
      }
    }
  }
  force_isa(best_isa());
}

// Bit patterns of every kind pass through the two halves unchanged; NaN becomes the quiet one.
void test_split() {
  std::vector<uint32_t> patterns = {0,          0x80000000, 1,          0x807fffff, 0x7f7fffff,
                                    0xff7fffff, 0x7f7f8000, 0x7f7f7fff, 0x7f800000, 0xff800000,
                                    0x3f808000, 0x3f807fff, 0x7f800001, 0xffffffff, 0x7fc00001};
  while (patterns.size() < 5000) patterns.push_back(static_cast<uint32_t>(random_bits()));
  Row row(Type::kFloat32, Type::kFloat32, patterns.size());
  for (size_t i = 0; i < patterns.size(); ++i) set_element(row.param, i, patterns[i]);
  for (Bytes* block : {&row.grad, &row.mean, &row.variance}) {
    std::fill(block->begin(), block->end(), 0);
  }
  const Row before = as_split(row);
  check(as_joined(before) == row, "the test's own halves");
  for (Isa isa : supported_isas()) {
    force_isa(isa);
    const Row after = stepped({before}, {{1e-3, 0.9, 0.95, 1e-8, 0}}, 1)[0];
    const Row whole = as_joined(after);
    bool right = true;
    for (size_t i = 0; i < patterns.size(); ++i) {
      const bool nan = (patterns[i] & 0x7fffffff) > 0x7f800000;
      const uint32_t expected = nan ? 0x7fc00000 : patterns[i];
      right &= element<uint32_t>(whole.param, i) == expected;
      Bfloat16 high;
      int16_t rest;
      split(from_bits(expected), high, rest);
      right &= to_bits(joined(high, rest)) == expected;
      right &= high.bits == element<uint16_t>(after.param, i);
      right &= rest == element<int16_t>(after.rest, i);
    }
    check(right, std::string("halves of fp32 ") + isa_name(isa));
  }
  force_isa(best_isa());
}

}  // namespace

void test_adamw() {
  test_every_combination();
  test_many_small_tensors();
  test_lr_zero();
  test_tiny_lr();
  test_special_values();
  test_split();
  use_threads(4);
}

}  // namespace fastlm
