// Python's side of gather_batch.h.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <vector>

#include "bindings.h"
#include "gather_batch.h"

namespace py = pybind11;

namespace fastlm {
namespace {

std::optional<TokenType> token_type(const py::array& array) {
  const py::dtype dtype = array.dtype();
  if (dtype.byteorder() == '>') return std::nullopt;
  const char kind = dtype.kind();
  const py::ssize_t size = dtype.itemsize();
  if (kind == 'u' && size == 1) return TokenType::kUint8;
  if (kind == 'u' && size == 2) return TokenType::kUint16;
  if (kind == 'u' && size == 4) return TokenType::kUint32;
  if (kind == 'i' && size == 4) return TokenType::kInt32;
  if (kind == 'i' && size == 8) return TokenType::kInt64;
  return std::nullopt;
}

TokenType checked_token_type(const py::array& array, const char* name) {
  const std::optional<TokenType> type = token_type(array);
  if (!type || array.ndim() != 1 || !(array.flags() & py::array::c_style)) {
    throw py::type_error(std::string(name) +
                         " must be a contiguous 1-D array of native uint8, uint16, uint32, int32 "
                         "or int64 tokens, got " +
                         std::string(py::str(array.dtype())) + " with " +
                         std::to_string(array.ndim()) + " dimensions");
  }
  return *type;
}

void gather_batch_checked(const std::vector<py::array>& segments,
                          const py::array_t<int64_t, py::array::c_style>& starts, py::array x,
                          py::array y) {
  if (segments.empty()) throw py::value_error("segments is empty: there is nothing to gather from");
  std::vector<Segment> raw;
  int64_t total = 0;
  const TokenType type = checked_token_type(segments[0], "segments[0]");
  for (const py::array& segment : segments) {
    if (checked_token_type(segment, "every segment") != type) {
      throw py::type_error("segments must have one dtype");
    }
    raw.push_back({segment.data(), segment.size()});
    total += segment.size();
  }
  const auto check_output = [&](const py::array& out, const char* name) {
    const bool shaped = out.ndim() == 2 && starts.ndim() == 1 && out.shape(0) == starts.shape(0);
    if (!shaped || !(out.flags() & py::array::c_style) || out.dtype().kind() != 'i' ||
        (out.itemsize() != 4 && out.itemsize() != 8)) {
      throw py::type_error(std::string(name) +
                           " must be a contiguous int32 or int64 array of shape (len(starts), T)");
    }
  };
  check_output(x, "x");
  check_output(y, "y");
  if (x.shape(1) != y.shape(1) || x.itemsize() != y.itemsize()) {
    throw py::type_error("x and y must have one shape and dtype");
  }
  const int64_t B = x.shape(0), T = x.shape(1);
  if (T < 1) throw py::value_error("the context length must be at least 1, got 0");
  const int64_t* start = starts.data();
  for (int64_t b = 0; b < B; ++b) {
    if (start[b] < 0 || start[b] > total - T - 1) {
      throw py::value_error("starts[" + std::to_string(b) + "] = " + std::to_string(start[b]) +
                            " is outside [0, " + std::to_string(total - T - 1) +
                            "]: " + std::to_string(total) + " tokens hold windows of " +
                            std::to_string(T) + " + 1 tokens only there");
    }
  }
  const OutputType output = x.itemsize() == 4 ? OutputType::kInt32 : OutputType::kInt64;
  void *x_data = x.mutable_data(), *y_data = y.mutable_data();  // throws where read-only
  int64_t lost;
  {
    py::gil_scoped_release release;
    lost = gather_batch(raw.data(), static_cast<int64_t>(raw.size()), type, start, B, T, output,
                        x_data, y_data);
  }
  if (lost >= 0) {
    throw py::value_error("the token at position " + std::to_string(lost) +
                          " does not fit int32; gather into int64");
  }
}

int64_t first_out_of_range_checked(const py::array& tokens, int64_t vocab_size) {
  const TokenType type = checked_token_type(tokens, "tokens");
  const void* data = tokens.data();
  const int64_t size = tokens.size();
  py::gil_scoped_release release;
  return first_out_of_range(data, size, type, vocab_size);
}

}  // namespace

void bind_gather_batch(py::module_& m) {
  m.def("gather_batch", &gather_batch_checked, py::arg("segments"), py::arg("starts"),
        py::arg("x").noconvert(), py::arg("y").noconvert());
  m.def("first_out_of_range", &first_out_of_range_checked, py::arg("tokens").noconvert(),
        py::arg("vocab_size"));
}

}  // namespace fastlm
