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

const int64_t* integers(const Integers& array, py::ssize_t size, const char* name) {
  if (array.size() != size) {
    throw py::type_error(std::string(name) + " must hold " + std::to_string(size) + " integers");
  }
  return array.data();
}

// The columns of kernels/collect.py's TensorTable. The addresses are the caller's word: it read
// them from tensors that it keeps.
TensorList list_of(const Integers& pointers, const Integers& numel, const Integers& types) {
  static_assert(sizeof(TensorPointers) == 6 * sizeof(int64_t));
  const py::ssize_t n = numel.size();
  const auto* rows = reinterpret_cast<const TensorPointers*>(integers(pointers, 6 * n, "pointers"));
  const TensorList tensors{rows, numel.data(), integers(types, 2 * n, "types"), n};
  for (py::ssize_t row = 0; row < n; ++row) {
    const FloatType param = tensors.param_type(row), grad = tensors.grad_type(row);
    const bool known = types.data()[2 * row] >= 0 && param <= FloatType::kSplit &&
                       types.data()[2 * row + 1] >= 0 && grad < FloatType::kSplit;
    if (!known) throw py::value_error("row " + std::to_string(row) + " has an unknown type");
  }
  return tensors;
}

void check_indices(const int64_t* values, py::ssize_t n, py::ssize_t end, const char* name) {
  for (py::ssize_t i = 0; i < n; ++i) {
    if (values[i] < 0 || values[i] >= end) {
      throw py::value_error(std::string(name) + " must lie in [0, " + std::to_string(end) + ")");
    }
  }
}

int64_t sum_squares_checked(const Integers& pointers, const Integers& numel, const Integers& types,
                            const Integers& classes, Doubles sums) {
  const TensorList tensors = list_of(pointers, numel, types);
  const int64_t* into = integers(classes, tensors.n, "classes");
  check_indices(into, tensors.n, sums.size(), "classes");
  double* result = sums.mutable_data();
  py::gil_scoped_release release;
  return sum_squares(tensors, into, result);
}

void scale_gradients_checked(const Integers& pointers, const Integers& numel, const Integers& types,
                             double factor) {
  const TensorList tensors = list_of(pointers, numel, types);
  py::gil_scoped_release release;
  scale_gradients(tensors, factor);
}

void adamw_checked(const Integers& pointers, const Integers& numel, const Integers& types,
                   const Integers& groups, const Doubles& options, double factor) {
  static_assert(sizeof(AdamWOptions) == 5 * sizeof(double));
  const TensorList tensors = list_of(pointers, numel, types);
  for (int64_t row = 0; row < tensors.n; ++row) {
    const bool wide = tensors.param_type(row) == FloatType::kFloat64;
    if (wide != (tensors.grad_type(row) == FloatType::kFloat64)) {
      throw py::value_error("float64 gradients go with float64 parameters, and no others do");
    }
  }
  if (options.ndim() != 2 || options.shape(1) != 5) {
    throw py::type_error("options must have the shape (groups, 5)");
  }
  const int64_t* group = integers(groups, tensors.n, "groups");
  check_indices(group, tensors.n, options.shape(0), "groups");
  const auto* rows = reinterpret_cast<const AdamWOptions*>(options.data());
  py::gil_scoped_release release;
  adamw(tensors, group, rows, factor);
}

// Reads the table of one step where nothing is unusual: what fastlm.kernels.collect.collect_step
// does in Python.
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

  // False, with nothing to be used, if there is something for collect_step to do or to refuse.
  bool read(const py::list& groups) {
    for (py::ssize_t group = 0; group < PyList_GET_SIZE(groups.ptr()); ++group) {
      PyObject* params = PyDict_GetItemString(PyList_GET_ITEM(groups.ptr(), group), "params");
      if (!params || !PyList_Check(params)) return false;
      for (py::ssize_t i = 0; i < PyList_GET_SIZE(params); ++i) {
        // Getting a gradient may run the garbage collector, so the list may change.
        const auto param = py::reinterpret_borrow<py::object>(PyList_GET_ITEM(params, i));
        const py::object grad = grad_of(param.ptr());
        if (grad.is_none()) continue;
        PyObject* const entry = state_of(param.ptr());
        if (!entry || !PyDict_Check(entry)) return false;
        columns_[kParam].append(param), columns_[kGrad].append(grad);
        for (int column = kMean; column < kColumns; ++column) {
          PyObject* const value = PyDict_GetItemWithError(entry, keys_[column].ptr());
          columns_[column].append(value ? py::handle(value) : py::none());
        }
        groups_.push_back(group), indices_.push_back(i);
      }
    }
    n_ = static_cast<py::ssize_t>(groups_.size());
    rows_.resize(n_), pointers_.resize(kColumns * n_), numel_.resize(n_), types_.resize(2 * n_);
    // Column by column: tensors made one after the other lie so in memory, most often.
    for (int column = 0; column < kColumns; ++column) {
      for (py::ssize_t row = 0; row < n_; ++row) {
        if (!read_tensor(row, column)) {
          PyErr_Clear();  // torch's, of a tensor without memory
          return false;
        }
      }
    }
    return n_ > 0;
  }

  py::tuple table() const {
    py::list held;
    for (const py::list& column : columns_) held.append(column);
    return py::make_tuple(Integers({n_, py::ssize_t{kColumns}}, pointers_.data()),
                          Integers(n_, numel_.data()),
                          Integers({n_, py::ssize_t{2}}, types_.data()),
                          Integers(n_, groups_.data()), Integers(n_, indices_.data()), held);
  }

 private:
  enum Column { kParam, kGrad, kMean, kSquare, kRest, kStep, kColumns };
  struct Row {
    int32_t ndim;
    size_t shape;  // where it starts in shapes_
  };

  // Writes the address into the table. False if the tensor is of another class, device, type or
  // shape than the row's parameter demands, or not in C's order.
  bool read_tensor(py::ssize_t row, int column) {
    PyObject* const tensor = PyList_GET_ITEM(columns_[column].ptr(), row);
    FloatType& param_type = reinterpret_cast<FloatType&>(types_[2 * row]);
    if (column == kRest) {
      if (!split_ || param_type != FloatType::kBfloat16) return true;
      param_type = FloatType::kSplit;
    }
    const PyTypeObject* const type = Py_TYPE(tensor);
    const bool plain =
        type == as_type(tensor_class_) || (column == kParam && type == as_type(parameter_class_));
    DLTensor t;
    if (!plain || view_(tensor, &t) != 0) return false;
    int64_t numel = 1;
    for (int i = t.ndim; i-- > 0; numel *= t.shape[i]) {
      if (t.strides && t.shape[i] != 1 && t.strides[i] != numel) return false;
    }
    const FloatType own = float_type(t);
    if (column == kParam) {
      if (row == 0) device_type_ = t.device_type, device_id_ = t.device_id;
      rows_[row] = {t.ndim, shapes_.size()};
      shapes_.insert(shapes_.end(), t.shape, t.shape + t.ndim);
      numel_[row] = numel;
      param_type = own;
    } else if (column == kStep) {
      if (own != FloatType::kFloat32 || numel != 1) return false;
    } else if (t.ndim != rows_[row].ndim ||
               !std::equal(t.shape, t.shape + t.ndim, shapes_.begin() + rows_[row].shape)) {
      return false;
    }
    const bool wide = param_type == FloatType::kFloat64;
    if (column == kParam || column == kGrad) {
      if (own == FloatType::kSplit || (own == FloatType::kFloat64) != wide) return false;
      types_[2 * row + column] = static_cast<int64_t>(own);
    } else if (column == kRest) {
      if (t.type_code != 0 || t.type_bits != 16) return false;
    } else if (column != kStep && own != (wide ? FloatType::kFloat64 : FloatType::kFloat32)) {
      return false;
    }
    pointers_[kColumns * row + column] = t.address();
    return t.device_type == device_type_ && t.device_id == device_id_ &&
           (numel == 0 || t.address());
  }

  // param.grad, by torch's own getter if the attribute is a plain one.
  py::object grad_of(PyObject* param) const {
    PyObject* const value = getter_ && PyObject_TypeCheck(param, as_type(tensor_class_))
                                ? getter_->get(param, getter_->closure)
                                : PyObject_GetAttrString(param, "grad");
    if (!value) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(value);
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

  // kSplit for what is no floating-point type of a table.
  static FloatType float_type(const DLTensor& t) {
    if (t.type_code == 4 && t.type_bits == 16) return FloatType::kBfloat16;
    if (t.type_code == 2 && t.type_bits == 32) return FloatType::kFloat32;
    if (t.type_code == 2 && t.type_bits == 16) return FloatType::kFloat16;
    if (t.type_code == 2 && t.type_bits == 64) return FloatType::kFloat64;
    return FloatType::kSplit;
  }
  static PyTypeObject* as_type(py::handle type) {
    return reinterpret_cast<PyTypeObject*>(type.ptr());
  }

  py::handle tensor_class_, parameter_class_;
  py::dict state_;
  bool split_;
  int (*view_)(void*, DLTensor*);
  py::object grad_ = tensor_class_.attr("grad");
  PyGetSetDef* getter_ = Py_TYPE(grad_.ptr()) == &PyGetSetDescr_Type
                             ? reinterpret_cast<PyGetSetDescrObject*>(grad_.ptr())->d_getset
                             : nullptr;
  const py::str keys_[kColumns] = {"", "", "exp_avg", "exp_avg_sq", "remainder", "step"};
  Py_ssize_t position_ = 0;
  PyObject *next_param_ = nullptr, *next_entry_ = nullptr;
  py::list columns_[kColumns];
  py::ssize_t n_ = 0;
  int32_t device_type_ = 0, device_id_ = 0;
  std::vector<Row> rows_;
  std::vector<int64_t> shapes_, pointers_, numel_, types_, groups_, indices_;
};

// (pointers, numel, types, groups, indices in groups, the tensors column by column, to be held as
// long as the pointers are used); None if the table has to be built by collect_step.
py::object read_table(py::handle tensor_class, py::handle parameter_class, const py::list& groups,
                      const py::dict& state, bool split) {
  TableReader reader(tensor_class, parameter_class, state, split);
  return reader.read(groups) ? py::object(reader.table()) : py::none();
}

}  // namespace

void bind_optimizer(py::module_& m) {
  m.def("sum_squares", &sum_squares_checked, py::arg("pointers").noconvert(),
        py::arg("numel").noconvert(), py::arg("types").noconvert(), py::arg("classes").noconvert(),
        py::arg("sums").noconvert());
  m.def("scale_gradients", &scale_gradients_checked, py::arg("pointers").noconvert(),
        py::arg("numel").noconvert(), py::arg("types").noconvert(), py::arg("factor"));
  m.def("adamw", &adamw_checked, py::arg("pointers").noconvert(), py::arg("numel").noconvert(),
        py::arg("types").noconvert(), py::arg("groups").noconvert(), py::arg("options").noconvert(),
        py::arg("factor"));
  m.def("read_table", &read_table, py::arg("tensor_class"), py::arg("parameter_class"),
        py::arg("param_groups"), py::arg("state"), py::arg("split"));
}

}  // namespace fastlm
