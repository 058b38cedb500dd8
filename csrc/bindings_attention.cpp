// Python's side of attention.h.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>

#include "attention.h"
#include "bindings.h"

namespace py = pybind11;

namespace fastlm {
namespace {

using Floats = py::array_t<float, py::array::c_style>;

// (batch, heads, rows, d) of `kind`, 16-bit floats as int16.
HeadRows head_rows(const py::array& array, const std::string& kind, int64_t B, int64_t heads,
                   int64_t T, int64_t d, const char* name) {
  const py::ssize_t size = kind == "float32" ? 4 : 2;
  const int64_t shape[] = {B, heads, T, d};
  bool fits = array.ndim() == 4 && array.itemsize() == size &&
              array.dtype().kind() == (size == 4 ? 'f' : 'i');
  for (int i = 0; fits && i < 4; ++i) fits = array.shape(i) == shape[i];
  for (int i = 0; fits && i < 4; ++i) fits = array.strides(i) % size == 0;
  if (!fits || (d > 1 && array.size() > 0 && array.strides(3) != size)) {
    throw py::type_error(std::string(name) + " must be a 4-D array of " + kind +
                         " that fits the others, with adjacent elements in its last dimension");
  }
  return {const_cast<void*>(array.data()), array.strides(0) / size, array.strides(1) / size,
          array.strides(2) / size};
}

Attention attention_of(const py::array& q, const py::array& k, const py::array& v,
                       const std::string& kind, float scale, const std::optional<Floats>& cos,
                       const std::optional<Floats>& sin) {
  if (q.ndim() != 4 || k.ndim() != 4) throw py::type_error("q and k must be 4-D arrays");
  Attention a{};
  a.B = q.shape(0), a.H = q.shape(1), a.Tq = q.shape(2), a.d = q.shape(3);
  a.H_kv = k.shape(1), a.Tk = k.shape(2);
  a.scale = scale;
  a.type = float_type(kind);
  if (a.H_kv < 1 || a.H % a.H_kv != 0 || a.Tq < 1 || a.Tq > a.Tk || a.d < 1 || a.d > kMostWidth) {
    throw py::value_error("heads, lengths or width are none that attention.h admits");
  }
  if (cos.has_value() != sin.has_value()) throw py::value_error("cos and sin go together");
  if (cos) {
    const int64_t angles = a.Tk * (a.d / 2);
    if (a.Tq != a.Tk || a.d % 2 != 0 || cos->size() != angles || sin->size() != angles) {
      throw py::value_error("cos and sin must be (T, d / 2), for as many queries as keys");
    }
    a.cos = cos->data(), a.sin = sin->data();
  }
  a.q = head_rows(q, kind, a.B, a.H, a.Tq, a.d, "q");
  a.k = head_rows(k, kind, a.B, a.H_kv, a.Tk, a.d, "k");
  a.v = head_rows(v, kind, a.B, a.H_kv, a.Tk, a.d, "v");
  return a;
}

AttentionStats* stats_of(const Attention& a, Floats& stats) {
  if (stats.size() != 2 * a.B * a.H * a.Tq) throw py::type_error("stats must be (B, H, Tq, 2)");
  return reinterpret_cast<AttentionStats*>(stats.mutable_data());
}

void forward(const py::array& q, const py::array& k, const py::array& v, const std::string& kind,
             float scale, const std::optional<Floats>& cos, const std::optional<Floats>& sin,
             py::array& out, Floats& stats) {
  const Attention a = attention_of(q, k, v, kind, scale, cos, sin);
  const HeadRows out_rows = head_rows(out, kind, a.B, a.H, a.Tq, a.d, "out");
  AttentionStats* const row_stats = stats_of(a, stats);
  py::gil_scoped_release release;
  attention_forward(a, out_rows, row_stats);
}

void backward(const py::array& grad_out, const py::array& q, const py::array& k, const py::array& v,
              const std::string& kind, float scale, const std::optional<Floats>& cos,
              const std::optional<Floats>& sin, const py::array& out, Floats& stats, py::array& dq,
              py::array& dk, py::array& dv) {
  const Attention a = attention_of(q, k, v, kind, scale, cos, sin);
  const HeadRows grad_rows = head_rows(grad_out, kind, a.B, a.H, a.Tq, a.d, "grad_out");
  const HeadRows out_rows = head_rows(out, kind, a.B, a.H, a.Tq, a.d, "out");
  const HeadRows dq_rows = head_rows(dq, kind, a.B, a.H, a.Tq, a.d, "dq");
  const HeadRows dk_rows = head_rows(dk, kind, a.B, a.H_kv, a.Tk, a.d, "dk");
  const HeadRows dv_rows = head_rows(dv, kind, a.B, a.H_kv, a.Tk, a.d, "dv");
  const AttentionStats* const row_stats = stats_of(a, stats);
  py::gil_scoped_release release;
  attention_backward(a, grad_rows, out_rows, row_stats, dq_rows, dk_rows, dv_rows);
}

}  // namespace

void bind_attention(py::module_& m) {
  m.def("causal_attention", &forward, py::arg("q").noconvert(), py::arg("k").noconvert(),
        py::arg("v").noconvert(), py::arg("kind"), py::arg("scale"), py::arg("cos").noconvert(),
        py::arg("sin").noconvert(), py::arg("out").noconvert(), py::arg("stats").noconvert());
  m.def("causal_attention_backward", &backward, py::arg("grad_out").noconvert(),
        py::arg("q").noconvert(), py::arg("k").noconvert(), py::arg("v").noconvert(),
        py::arg("kind"), py::arg("scale"), py::arg("cos").noconvert(), py::arg("sin").noconvert(),
        py::arg("out").noconvert(), py::arg("stats").noconvert(), py::arg("dq").noconvert(),
        py::arg("dk").noconvert(), py::arg("dv").noconvert());
}

}  // namespace fastlm
