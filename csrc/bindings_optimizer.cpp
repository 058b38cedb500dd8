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

// kernels/tensor_table.py's columns. The addresses are the caller's word: it read them from tensors
// that it keeps.
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

// What a tensor's memory has to be for a table to hold.
struct Place {
  static constexpr int kDims = 4;  // tensors of more are not watched

  int64_t address;
  int64_t shape[kDims] = {}, strides[kDims] = {};
  int32_t device_type, device_id, ndim;
  uint8_t type_code, type_bits;

  Place() = default;
  explicit Place(const DLTensor& t)
      : address(t.address()),
        device_type(t.device_type),
        device_id(t.device_id),
        ndim(t.ndim),
        type_code(t.type_code),
        type_bits(t.type_bits) {
    for (int i = 0; i < std::min(ndim, kDims); ++i) {
      shape[i] = t.shape[i];
      strides[i] = t.strides ? t.strides[i] : -1;
    }
  }
  // The same but for the address.
  bool same_kind(const Place& o) const {
    return device_type == o.device_type && device_id == o.device_id && ndim == o.ndim &&
           ndim <= kDims && type_code == o.type_code && type_bits == o.type_bits &&
           std::equal(shape, shape + kDims, o.shape) &&
           std::equal(strides, strides + kDims, o.strides);
  }
};

// Finds out whether a table still describes the optimizer's parameters, gradients and state, and
// writes the gradients' new addresses into it: fastlm.kernels.table_watch.TableWatch, whose checks
// take several milliseconds for 2,000 tensors. For torch.Tensor and torch.nn.Parameter themselves.
class TableWatch {
 public:
  // tensor_type: torch.Tensor. param_groups, state: the optimizer's. rows: for each parameter,
  // group by group, its row in `pointers`, or -1 where it has no gradient.
  TableWatch(py::handle tensor_type, py::list param_groups, py::dict state, const Integers& rows,
             Integers pointers)
      : tensor_type_(py::reinterpret_borrow<py::object>(tensor_type)),
        param_groups_(std::move(param_groups)),
        state_(std::move(state)),
        pointers_(std::move(pointers)) {
    const py::capsule capsule = tensor_type.attr("__dlpack_c_exchange_api__");
    const auto* exchange = capsule.get_pointer<DLExchange>();
    if (exchange->major != 1 || !exchange->view) {
      throw py::type_error("torch has another version of DLPack's interface");
    }
    view_ = exchange->view;
    py::ssize_t i = 0;
    for (py::handle group : param_groups_) {
      for (py::handle param : py::list(group["params"])) {
        if (i >= rows.size()) throw py::value_error("rows is too short");
        const int64_t row = rows.at(i++);
        params_.push_back({py::reinterpret_borrow<py::object>(param), row, {}, {}});
        if (row < 0) continue;
        if (6 * row >= pointers_.size()) throw py::value_error("rows exceeds pointers");
        params_.back().own = Place(viewed(param.ptr()));
        params_.back().grad = Place(viewed(grad_of(param.ptr()).ptr()));
      }
    }
    for (auto [param, values] : state_) {
      State entry{py::reinterpret_borrow<py::object>(param),
                  py::reinterpret_borrow<py::object>(values),
                  {}};
      for (int k = 0; k < kKeys; ++k) {
        PyObject* value = PyDict_GetItem(values.ptr(), keys_[k].ptr());
        if (!value) continue;
        entry.values[k] = {py::reinterpret_borrow<py::object>(value), Place(viewed(value))};
      }
      states_.push_back(std::move(entry));
    }
  }

  // For Python's garbage collector: all that is held.
  int traverse(visitproc visit, void* arg) const {
    for (const Param& param : params_) Py_VISIT(param.object.ptr());
    for (const State& state : states_) {
      Py_VISIT(state.param.ptr());
      Py_VISIT(state.entry.ptr());
      for (const Value& value : state.values) Py_VISIT(value.object.ptr());
    }
    Py_VISIT(param_groups_.ptr());
    Py_VISIT(state_.ptr());
    return 0;
  }
  void clear() {
    params_.clear(), states_.clear();
    param_groups_ = py::list(), state_ = py::dict();
  }

  // "same", "moved" (gradients have new addresses, which `pointers` now holds), or "stale": the
  // table has to be built anew.
  const char* refresh() {
    bool moved = false;
    return params_hold(moved) && states_hold() ? (moved ? "moved" : "same") : "stale";
  }

 private:
  static constexpr int kKeys = 4;
  struct Param {
    py::object object;
    int64_t row;
    Place own, grad;  // as far as there is a gradient
  };
  struct Value {
    py::object object;  // none where the state lacks the key
    Place place;
  };
  struct State {
    py::object param, entry;
    Value values[kKeys];
  };

  DLTensor viewed(PyObject* tensor) const {
    DLTensor result;
    if (view_(tensor, &result) != 0) throw py::error_already_set();
    return result;
  }

  // param.grad, by torch's own getter where the attribute is a plain one.
  py::object grad_of(PyObject* param) const {
    PyObject* value = grad_getter_ ? grad_getter_->get(param, grad_getter_->closure)
                                   : PyObject_GetAttrString(param, "grad");
    if (!value) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(value);
  }

  bool params_hold(bool& moved) {
    int64_t* pointers = pointers_.mutable_data();
    size_t i = 0;
    for (py::handle group : param_groups_) {
      PyObject* list = PyDict_GetItemString(group.ptr(), "params");
      if (!list || !PyList_Check(list)) return false;
      for (py::ssize_t k = 0; k < PyList_GET_SIZE(list); ++k, ++i) {
        if (i == params_.size() || PyList_GET_ITEM(list, k) != params_[i].object.ptr())
          return false;
        const Param& param = params_[i];
        const py::object grad = grad_of(param.object.ptr());
        if (param.row < 0) {
          if (!grad.is_none()) return false;
          continue;
        }
        if (Py_TYPE(grad.ptr()) != reinterpret_cast<PyTypeObject*>(tensor_type_.ptr())) {
          return false;
        }
        const Place own(viewed(param.object.ptr()));
        const Place now(viewed(grad.ptr()));
        if (own.address != param.own.address || !own.same_kind(param.own) ||
            !now.same_kind(param.grad)) {
          return false;
        }
        int64_t& address = pointers[6 * param.row + 1];  // after the parameter's
        moved |= now.address != address;
        address = now.address;
      }
    }
    return i == params_.size();
  }

  bool states_hold() const {
    PyObject *param, *entry;
    Py_ssize_t position = 0;
    for (const State& state : states_) {
      if (!PyDict_Next(state_.ptr(), &position, &param, &entry) || param != state.param.ptr() ||
          entry != state.entry.ptr()) {
        return false;
      }
      for (int k = 0; k < kKeys; ++k) {
        const Value& value = state.values[k];
        if (value.object && PyDict_GetItem(entry, keys_[k].ptr()) != value.object.ptr()) {
          return false;
        }
      }
    }
    if (PyDict_Next(state_.ptr(), &position, &param, &entry)) return false;
    // Key by key: tensors made one after the other lie so in memory, most often.
    for (int k = 0; k < kKeys; ++k) {
      for (const State& state : states_) {
        const Value& value = state.values[k];
        if (!value.object) continue;
        const Place now(viewed(value.object.ptr()));
        if (now.address != value.place.address || !now.same_kind(value.place)) return false;
      }
    }
    return true;
  }

  py::object tensor_type_;
  py::list param_groups_;
  py::dict state_;
  Integers pointers_;
  int (*view_)(void*, DLTensor*);
  py::object grad_attribute_ = tensor_type_.attr("grad");
  PyGetSetDef* grad_getter_ =
      Py_TYPE(grad_attribute_.ptr()) == &PyGetSetDescr_Type
          ? reinterpret_cast<PyGetSetDescrObject*>(grad_attribute_.ptr())->d_getset
          : nullptr;
  const py::str keys_[kKeys] = {"exp_avg", "exp_avg_sq", "step", "remainder"};
  std::vector<Param> params_;
  std::vector<State> states_;
};

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
  const auto collected = py::custom_type_setup([](PyHeapTypeObject* heap_type) {
    PyTypeObject* type = &heap_type->ht_type;
    type->tp_flags |= Py_TPFLAGS_HAVE_GC;
    type->tp_traverse = [](PyObject* self, visitproc visit, void* arg) {
      Py_VISIT(Py_TYPE(self));
      if (!py::detail::is_holder_constructed(self)) return 0;
      return py::cast<const TableWatch&>(py::handle(self)).traverse(visit, arg);
    };
    type->tp_clear = [](PyObject* self) {
      if (py::detail::is_holder_constructed(self)) {
        py::cast<TableWatch&>(py::handle(self)).clear();
      }
      return 0;
    };
  });
  py::class_<TableWatch>(m, "TableWatch", collected)
      .def(py::init<py::handle, py::list, py::dict, const Integers&, Integers>(),
           py::arg("tensor_type"), py::arg("param_groups"), py::arg("state"),
           py::arg("rows").noconvert(), py::arg("pointers").noconvert())
      .def("refresh", &TableWatch::refresh);
}

}  // namespace fastlm
