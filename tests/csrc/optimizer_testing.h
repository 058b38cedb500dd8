// Rows of random tensors of any type, in heap blocks of exactly the elements that may be touched.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "simd.h"
#include "tensors.h"
#include "testing.h"

namespace fastlm {

using Type = FloatType;
using Bytes = std::vector<char>;
constexpr Type kTypes[] = {Type::kFloat32, Type::kBfloat16, Type::kFloat16, Type::kFloat64};
// Around every vector and every chunk; several chunks, with a remainder.
inline const std::vector<int64_t> kLengths = {0,  1,  7,     8,     9,     31,
                                              32, 33, 16383, 16384, 16385, 33001};

inline int64_t size_of(Type type) {
  return type == Type::kFloat32 ? 4 : type == Type::kFloat64 ? 8 : 2;
}

template <class T>
T element(const Bytes& block, int64_t i) {
  T value;
  std::memcpy(&value, &block[i * sizeof(T)], sizeof(T));
  return value;
}
template <class T>
void set_element(Bytes& block, int64_t i, T value) {
  std::memcpy(&block[i * sizeof(T)], &value, sizeof(T));
}

inline double get(Type type, const Bytes& block, int64_t i) {
  if (type == Type::kFloat64) return element<double>(block, i);
  if (type == Type::kFloat32) return element<float>(block, i);
  if (type == Type::kFloat16) return to_float(element<Float16>(block, i));
  return to_float(element<Bfloat16>(block, i));
}
inline void put(Type type, Bytes& block, int64_t i, double x) {
  const float narrow = static_cast<float>(x);
  if (type == Type::kFloat64) return set_element(block, i, x);
  if (type == Type::kFloat32) return set_element(block, i, narrow);
  if (type == Type::kFloat16) return set_element(block, i, from_float<Float16>(narrow));
  set_element(block, i, from_float<Bfloat16>(narrow));
}

// A row of the table. Element 0 lies `offset` elements after the start of each heap block, the last
// one ends it.
struct Row {
  Type param_type, grad_type;
  int64_t n, offset = 0, group = 0;
  Bytes param, grad, mean, variance, rest;
  std::vector<float> step = {0};

  Row(Type param_type, Type grad_type, int64_t n, int64_t offset = 0)
      : param_type(param_type), grad_type(grad_type), n(n), offset(offset) {
    param = block(param_type), grad = block(grad_type);
    mean = block(moment_type()), variance = block(moment_type());
    for (int64_t i = offset; i < offset + std::min(n, kPeriod); ++i) {
      put(grad_type, grad, i, random(1));
      put(moment_type(), mean, i, random(0.5));
      put(moment_type(), variance, i, std::abs(random(0.1)));
      put(param_type, param, i, random(2));
    }
    repeat(param, param_type), repeat(grad, grad_type);
    repeat(mean, moment_type()), repeat(variance, moment_type());
  }

  Type moment_type() const {
    return param_type == Type::kFloat64 ? Type::kFloat64 : Type::kFloat32;
  }
  Bytes block(Type type) const { return Bytes((offset + n) * size_of(type)); }
  // Drawing and converting every element of the long rows would take most of the tests' time.
  // Prime, so that no vector or chunk is like another.
  static constexpr int64_t kPeriod = 4099;
  void repeat(Bytes& block, Type type) const {
    const int64_t start = offset * size_of(type), period = kPeriod * size_of(type);
    for (int64_t i = start + period, size = block.size(); i < size; i += period) {
      std::memcpy(&block[i], &block[start], std::min(period, size - i));
    }
  }
  static double random(double bound) { return bound * (random_below(20001) - 10000) / 10000.0; }

  bool operator==(const Row& o) const {
    return param == o.param && grad == o.grad && mean == o.mean && variance == o.variance &&
           rest == o.rest && step == o.step;
  }
};

struct Table {
  std::vector<TensorRow> rows;

  explicit Table(std::vector<Row>& tensors) {
    for (Row& row : tensors) {
      const auto start = [&](Bytes& block, Type type) -> int64_t {
        return block.empty() ? 0
                             : reinterpret_cast<int64_t>(block.data() + row.offset * size_of(type));
      };
      rows.push_back({start(row.param, row.param_type), start(row.grad, row.grad_type),
                      start(row.mean, row.moment_type()), start(row.variance, row.moment_type()),
                      start(row.rest, Type::kBfloat16), reinterpret_cast<int64_t>(row.step.data()),
                      row.n, row.param_type, row.grad_type, row.group, 0});
    }
  }
  TensorList list() const { return {rows.data(), static_cast<int64_t>(rows.size())}; }
};

}  // namespace fastlm
