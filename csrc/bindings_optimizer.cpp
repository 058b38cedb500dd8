// Python's side of the optimizer's kernels, as bindings.cpp is of the others.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "adamw.h"
#include "bindings.h"
#include "clip_grad_norm.h"
#include "dlpack.h"

namespace py = pybind11;

namespace fastlm {
namespace {

using Integers = py::array_t<int64_t, py::array::c_style>;
using Doubles = py::array_t<double, py::array::c_style>;

constexpr py::ssize_t kFields = sizeof(TensorRow) / sizeof(int64_t);

// kernels/collect.py's TensorTable.rows. The addresses are the caller's word: it read them from
// tensors that it holds.
TensorList list_of(const Integers& table, int64_t groups = INT64_MAX) {
  if (table.ndim() != 2 || table.shape(1) != kFields) {
    throw py::type_error("rows must have the shape (n, " + std::to_string(kFields) + ")");
  }
  const TensorList tensors{reinterpret_cast<const TensorRow*>(table.data()), table.shape(0)};
  const auto in = [](auto value, auto end) { return value >= decltype(value){} && value < end; };
  for (int64_t i = 0; i < tensors.n; ++i) {
    const TensorRow& row = tensors[i];
    const bool wide = row.param_type == FloatType::kFloat64;
    if (!in(row.param_type, FloatType(5)) || !in(row.grad_type, FloatType::kSplit) ||
        wide != (row.grad_type == FloatType::kFloat64) || !in(row.group, groups)) {
      throw py::value_error("row " + std::to_string(i) + " has an impossible type or group");
    }
  }
  return tensors;
}

std::pair<double, int64_t> sum_squares_checked(const Integers& table) {
  const TensorList tensors = list_of(table);
  py::gil_scoped_release release;
  const SquareSum result = sum_squares(tensors);
  return {result.sum, result.bad};
}

void scale_gradients_checked(const Integers& table, double factor) {
  const TensorList tensors = list_of(table);
  py::gil_scoped_release release;
  scale_gradients(tensors, factor);
}

void adamw_checked(const Integers& table, const Doubles& options, double factor) {
  static_assert(sizeof(AdamWOptions) == 5 * sizeof(double));
  if (options.ndim() != 2 || options.shape(1) != 5) {
    throw py::type_error("options must have the shape (groups, 5)");
  }
  const TensorList tensors = list_of(table, options.shape(0));
  const auto* of_groups = reinterpret_cast<const AdamWOptions*>(options.data());
  py::gil_scoped_release release;
  adamw(tensors, of_groups, factor);
}

// Reads the table of one step if nothing is unusual: what kernels/collect.py's collect_step does in
// Python.
class TableReader {
 public:
  // tensor_class, parameter_class: torch.Tensor and torch.nn.Parameter. state: the optimizer's.
  TableReader(py::handle tensor_class, py::handle parameter_class, const py::dict& state,
              bool split)
      : tensor_class_(tensor_class),
        parameter_class_(parameter_class),
        state_(state),
        split_(split) {
    const py::capsule capsule = tensor_class.attr("__dlpack_c_exchange_api__");
    const auto* exchange = capsule.get_pointer<DLExchange>();
    if (exchange->major != 1 || !exchange->view) {
      throw py::type_error("torch has another version of DLPack's interface");
    }
    view_ = exchange->view;
  }

  // (rows, the tensors column by column, to be held as long as the addresses are used); None if
  // there is something for collect_step to do or to refuse.
  py::object read(const py::list& groups) {
    if (!find(groups) || rows_.empty()) return py::none();
    const auto n = static_cast<py::ssize_t>(rows_.size());
    // Column by column: tensors made one after the other lie so in memory, most often.
    for (int column = kParam; column < kColumns; ++column) {
      for (py::ssize_t row = 0; row < n; ++row) {
        if (!read_tensor(row, column)) return py::none();
      }
    }
    py::list held;
    for (const py::list& column : columns_) held.append(column);
    return py::make_tuple(Integers({n, kFields}, reinterpret_cast<const int64_t*>(rows_.data())),
                          held);
  }

 private:
  // TensorRow's first fields.
  enum Column { kParam, kGrad, kMean, kSquare, kRest, kStep, kColumns };

  // Fills the columns with the tensors of every parameter that has a gradient. False if one has no
  // state yet, or a gradient is a view that stands for the negative of its memory, which DLPack's
  // interface does not tell: autograd makes such ones of complex numbers.
  bool find(const py::list& groups) {
    for (size_t group = 0; group < groups.size(); ++group) {
      const py::list params = groups[group]["params"];
      for (size_t i = 0; i < params.size(); ++i) {
        const py::object param = params[i];
        const py::object grad = py::getattr(param, grad_);
        if (grad.is_none()) continue;
        const auto negative =
            py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(grad.ptr(), is_neg_.ptr()));
        if (!negative) throw py::error_already_set();
        PyObject* const entry = state_of(param.ptr());
        if (negative.ptr() == Py_True || !entry || !PyDict_Check(entry)) return false;
        columns_[kParam].append(param), columns_[kGrad].append(grad);
        for (int column = kMean; column < kColumns; ++column) {
          PyObject* const value = PyDict_GetItemWithError(entry, keys_[column].ptr());
          columns_[column].append(value ? py::handle(value) : py::none());
        }
        rows_.push_back({});
        rows_.back().group = static_cast<int64_t>(group);
        rows_.back().index = static_cast<int64_t>(i);
      }
    }
    return true;
  }

  // Its state, borrowed; null if it has none. Parameters most often come in the state's order, and
  // the hash of a tensor is a function in Python.
  PyObject* state_of(PyObject* param) {
    if (!next_param_ && !PyDict_Next(state_.ptr(), &position_, &next_param_, &next_entry_)) {
      next_param_ = nullptr;
    }
    if (next_param_ == param) {
      next_param_ = nullptr;
      return next_entry_;
    }
    return PyDict_GetItemWithError(state_.ptr(), param);
  }

  // Completes the row by the tensor. False if that is of another class, device, type or shape than
  // the row's parameter demands, or not in C's order.
  bool read_tensor(size_t i, int column) {
    TensorRow& row = rows_[i];
    if (column == kRest) {
      if (!split_ || row.param_type != FloatType::kBfloat16) return true;
      row.param_type = FloatType::kSplit;
    }
    PyObject* const tensor = PyList_GET_ITEM(columns_[column].ptr(), i);
    const py::handle type = py::type::handle_of(tensor);
    if (!type.is(tensor_class_) && !(column == kParam && type.is(parameter_class_))) return false;
    DLTensor t;
    if (view_(tensor, &t) != 0) {
      PyErr_Clear();  // torch's, of a tensor without memory
      return false;
    }
    if (column == kParam) params_.push_back(t);
    const DLTensor& param = params_[i];
    int64_t numel = 1;
    for (int k = t.ndim; k-- > 0; numel *= t.shape[k]) {
      if (t.strides && t.shape[k] != 1 && t.strides[k] != numel) return false;
    }
    const bool right_shape =
        column == kStep
            ? numel == 1
            : t.ndim == param.ndim && std::equal(t.shape, t.shape + t.ndim, param.shape);
    (&row.param)[column] = t.address();
    if (column == kParam) row.numel = numel, row.param_type = float_type(t);
    if (column == kGrad) row.grad_type = float_type(t);
    return right_shape && (numel == 0 || t.address()) && has_type(t, column, row) &&
           t.device_type == params_[0].device_type && t.device_id == params_[0].device_id;
  }

  static bool has_type(const DLTensor& t, int column, const TensorRow& row) {
    const bool wide = row.param_type == FloatType::kFloat64;
    const FloatType own = float_type(t);
    switch (column) {
      case kParam: return own != FloatType::kSplit;
      case kGrad: return own != FloatType::kSplit && (own == FloatType::kFloat64) == wide;
      case kRest: return t.type_code == 0 && t.type_bits == 16;
      case kStep: return own == FloatType::kFloat32;
      default: return own == (wide ? FloatType::kFloat64 : FloatType::kFloat32);
    }
  }

  // The string that programs use, too: a dict finds it without comparing letters.
  static py::object interned(const char* text) {
    return py::reinterpret_steal<py::object>(PyUnicode_InternFromString(text));
  }

  // kSplit for what is no floating-point type of a table.
  static FloatType float_type(const DLTensor& t) {
    if (t.type_code == 4 && t.type_bits == 16) return FloatType::kBfloat16;
    if (t.type_code == 2 && t.type_bits == 32) return FloatType::kFloat32;
    if (t.type_code == 2 && t.type_bits == 16) return FloatType::kFloat16;
    if (t.type_code == 2 && t.type_bits == 64) return FloatType::kFloat64;
    return FloatType::kSplit;
  }

  py::handle tensor_class_, parameter_class_;
  py::dict state_;
  bool split_;
  int (*view_)(void*, DLTensor*);
  const py::object grad_ = interned("grad"), is_neg_ = interned("is_neg");
  const py::object keys_[kColumns] = {
      {}, {}, interned("exp_avg"), interned("exp_avg_sq"), interned("remainder"), interned("step")};
  Py_ssize_t position_ = 0;
  PyObject *next_param_ = nullptr, *next_entry_ = nullptr;
  py::list columns_[kColumns];
  std::vector<TensorRow> rows_;
  std::vector<DLTensor> params_;  // their shapes lie in the tensors, which columns_ hold
};

py::object read_table(py::handle tensor_class, py::handle parameter_class, const py::list& groups,
                      const py::dict& state, bool split) {
  return TableReader(tensor_class, parameter_class, state, split).read(groups);
}

}  // namespace

void bind_optimizer(py::module_& m) {
  m.def("sum_squares", &sum_squares_checked, py::arg("rows").noconvert());
  m.def("scale_gradients", &scale_gradients_checked, py::arg("rows").noconvert(),
        py::arg("factor"));
  m.def("adamw", &adamw_checked, py::arg("rows").noconvert(), py::arg("options").noconvert(),
        py::arg("factor"));
  m.def("read_table", &read_table, py::arg("tensor_class"), py::arg("parameter_class"),
        py::arg("param_groups"), py::arg("state"), py::arg("split"));
}

}  // namespace fastlm
