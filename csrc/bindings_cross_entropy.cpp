// Python's side of cross_entropy.h.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstddef>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bindings.h"
#include "cross_entropy.h"

namespace py = pybind11;

namespace fastlm {
namespace {

// The array's elements are `kind` (16-bit floats as int16), those of the last dimension adjacent.
void check_floats(const py::array& array, const std::string& kind, py::ssize_t dimensions,
                  const char* name) {
  const bool wide = kind == "float32";
  const bool typed =
      array.dtype().kind() == (wide ? 'f' : 'i') && array.itemsize() == (wide ? 4 : 2);
  const py::ssize_t last = array.ndim() - 1;
  if (!typed || array.ndim() != dimensions ||
      (array.size() > 0 && array.shape(last) > 1 && array.strides(last) != array.itemsize()) ||
      (dimensions == 2 && array.strides(0) % array.itemsize() != 0)) {
    throw py::type_error(std::string(name) + " must be a " + std::to_string(dimensions) +
                         "-D array of " + kind + " with adjacent elements in its last dimension");
  }
}

// What is written must not overlap itself.
Rows rows_of(py::array& array, const std::string& kind, const char* name, bool written) {
  check_floats(array, kind, 2, name);
  const int64_t stride = array.strides(0) / array.itemsize();
  if (written && array.shape(0) > 1 && stride < array.shape(1)) {
    throw py::value_error(std::string(name) + " has overlapping rows");
  }
  void* data = written ? array.mutable_data() : const_cast<void*>(array.data());
  return {data, stride};
}

template <class T>
T* floats(py::array_t<T, py::array::c_style>& array, py::ssize_t size, const char* name) {
  if (array.size() != size) {
    throw py::type_error(std::string(name) + " must hold " + std::to_string(size) + " elements");
  }
  return array.mutable_data();
}

using Floats = py::array_t<float, py::array::c_style>;
using Doubles = py::array_t<double, py::array::c_style>;
using Labels = py::array_t<int64_t, py::array::c_style>;

// (the first row with a label out of range or -1, how many labels are not ignore_index)
std::pair<int64_t, int64_t> checked_labels(const Labels& targets, int64_t V, int64_t ignore_index) {
  const LabelCheck found = check_labels(targets.data(), targets.size(), V, ignore_index);
  return {found.first_bad, found.count};
}

const int64_t* targets_of(const Labels& targets, int64_t N, int64_t V) {
  if (targets.size() != N || V < 1) throw py::type_error("targets must hold a label for each row");
  return targets.data();
}

// `numbers`: the fields after ignore_index, in their order. In fp32, so that 1 - s is exact in
// fp64.
CrossEntropyOptions options_of(int64_t ignore_index, const std::vector<float>& numbers) {
  CrossEntropyOptions options;
  options.ignore_index = ignore_index;
  auto* fields = reinterpret_cast<double*>(&options.ignore_index + 1);
  if (numbers.size() * sizeof(double) != sizeof(options) - sizeof(options.ignore_index)) {
    throw py::type_error("the options are not those of CrossEntropyOptions");
  }
  std::copy(numbers.begin(), numbers.end(), fields);
  return options;
}

void cross_entropy_losses_checked(py::array logits, const std::string& kind, const Labels& targets,
                                  int64_t ignore_index, const std::vector<float>& numbers,
                                  bool all_lse, Floats losses, Floats lse, Doubles stats,
                                  std::optional<py::array> gradient, float gradient_scale) {
  const FloatType type = float_type(kind);
  const Rows x = rows_of(logits, kind, "logits", false);
  const int64_t N = logits.shape(0), V = logits.shape(1);
  const int64_t* labels = targets_of(targets, N, V);  // check_labels has seen them
  Rows out{nullptr, 0};
  if (gradient) {
    out = rows_of(*gradient, kind, "gradient", true);
    if (gradient->shape(0) != N || gradient->shape(1) != V) {
      throw py::type_error("gradient must have the shape of logits");
    }
  }
  float *loss = floats(losses, N, "losses"), *sums = floats(lse, N, "lse");
  RowStats* row_stats = reinterpret_cast<RowStats*>(floats(stats, 2 * N, "stats"));
  const CrossEntropyOptions options = options_of(ignore_index, numbers);
  py::gil_scoped_release release;
  cross_entropy_losses(x, type, N, V, labels, options, all_lse, loss, sums, row_stats,
                       gradient ? &out : nullptr, gradient_scale);
}

void cross_entropy_gradients_checked(py::array logits, const std::string& kind,
                                     const Labels& targets, Doubles stats, int64_t ignore_index,
                                     const std::vector<float>& numbers, Floats grad_losses,
                                     std::optional<Floats> grad_lse, py::array gradient) {
  const FloatType type = float_type(kind);
  const Rows x = rows_of(logits, kind, "logits", false);
  const Rows out = rows_of(gradient, kind, "gradient", true);
  const int64_t N = logits.shape(0), V = logits.shape(1);
  const int64_t* labels = targets_of(targets, N, V);
  if (check_labels(labels, N, V, ignore_index).first_bad >= 0) {  // they may have changed since
    throw py::value_error("a label is out of range");
  }
  if (gradient.shape(0) != N || gradient.shape(1) != V) {
    throw py::type_error("gradient must have the shape of logits");
  }
  const bool one_for_all = grad_losses.ndim() == 0;
  const float* weights = floats(grad_losses, one_for_all ? 1 : N, "grad_losses");
  const float* lse_weights = grad_lse ? floats(*grad_lse, N, "grad_lse") : nullptr;
  const RowStats* row_stats = reinterpret_cast<RowStats*>(floats(stats, 2 * N, "stats"));
  const CrossEntropyOptions options = options_of(ignore_index, numbers);
  py::gil_scoped_release release;
  cross_entropy_gradients(x, type, N, V, labels, row_stats, options, weights, one_for_all ? 0 : 1,
                          lse_weights, out);
}

double ordered_sum_checked(const Floats& values) {
  return ordered_sum(values.data(), values.size());
}

void scale_in_place_checked(py::array x, const std::string& kind, float factor) {
  check_floats(x, kind, 1, "x");
  const FloatType type = float_type(kind);
  void* data = x.mutable_data();
  const int64_t n = x.size();
  py::gil_scoped_release release;
  scale_in_place(data, type, n, factor);
}

void accumulate_checked(py::array sum, const py::array& part, const std::string& kind, bool first) {
  const Rows into = rows_of(sum, "float32", "sum", true);
  check_floats(part, kind, 2, "part");
  const int64_t rows = part.shape(0), columns = part.shape(1);
  if (sum.shape(0) != rows || sum.shape(1) != columns || !(part.flags() & py::array::c_style)) {
    throw py::type_error("part must be contiguous and have the shape of sum");
  }
  const FloatType type = float_type(kind);
  const void* data = part.data();
  py::gil_scoped_release release;
  accumulate(static_cast<float*>(into.data), into.stride, data, type, rows, columns, first);
}

}  // namespace

void bind_cross_entropy(py::module_& m) {
  m.def("check_labels", &checked_labels, py::arg("targets").noconvert(), py::arg("vocab_size"),
        py::arg("ignore_index"));
  m.def("cross_entropy_losses", &cross_entropy_losses_checked, py::arg("logits"), py::arg("kind"),
        py::arg("targets").noconvert(), py::arg("ignore_index"), py::arg("numbers"),
        py::arg("all_lse"), py::arg("losses").noconvert(), py::arg("lse").noconvert(),
        py::arg("stats").noconvert(), py::arg("gradient"), py::arg("gradient_scale"));
  m.def("cross_entropy_gradients", &cross_entropy_gradients_checked, py::arg("logits"),
        py::arg("kind"), py::arg("targets").noconvert(), py::arg("stats").noconvert(),
        py::arg("ignore_index"), py::arg("numbers"), py::arg("grad_losses").noconvert(),
        py::arg("grad_lse").noconvert(), py::arg("gradient"));
  m.def("ordered_sum", &ordered_sum_checked, py::arg("values").noconvert());
  m.def("scale_in_place", &scale_in_place_checked, py::arg("x"), py::arg("kind"),
        py::arg("factor"));
  m.def("accumulate", &accumulate_checked, py::arg("sum"), py::arg("part"), py::arg("kind"),
        py::arg("first"));
}

}  // namespace fastlm
