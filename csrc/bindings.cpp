// With bindings_optimizer.cpp the only files that know Python: check arguments, release the GIL,
// call the kernels. Signatures for type checkers: fastlm/_C.pyi.

#include "bindings.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "cross_entropy.h"
#include "gather_batch.h"
#include "isa.h"
#include "parallel.h"

namespace py = pybind11;
using namespace fastlm;

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

LogitType logit_type(const std::string& kind) {
  if (kind == "float32") return LogitType::kFloat32;
  if (kind == "bfloat16") return LogitType::kBfloat16;
  if (kind == "float16") return LogitType::kFloat16;
  throw py::type_error("'" + kind + "' is none of float32, bfloat16, float16");
}

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
std::pair<int64_t, int64_t> check_labels(const Labels& targets, int64_t V, int64_t ignore_index) {
  const int64_t* labels = targets.data();
  const int64_t N = targets.size();
  py::gil_scoped_release release;
  return {first_bad_label(labels, N, V, ignore_index), count_labels(labels, N, ignore_index)};
}

const int64_t* checked_targets(const Labels& targets, int64_t N, int64_t V, int64_t ignore_index) {
  if (targets.size() != N || V < 1) throw py::type_error("targets must hold a label for each row");
  if (first_bad_label(targets.data(), N, V, ignore_index) >= 0) {
    throw py::value_error("a label is out of range");
  }
  return targets.data();
}

void cross_entropy_losses_checked(py::array logits, const std::string& kind, const Labels& targets,
                                  int64_t ignore_index, float label_smoothing, float softcap,
                                  float z_loss, bool all_lse, Floats losses, Floats lse,
                                  Doubles stats, std::optional<py::array> gradient,
                                  float gradient_scale) {
  const LogitType type = logit_type(kind);
  const Rows x = rows_of(logits, kind, "logits", false);
  const int64_t N = logits.shape(0), V = logits.shape(1);
  const int64_t* labels = checked_targets(targets, N, V, ignore_index);
  Rows out{nullptr, 0};
  if (gradient) {
    out = rows_of(*gradient, kind, "gradient", true);
    if (gradient->shape(0) != N || gradient->shape(1) != V) {
      throw py::type_error("gradient must have the shape of logits");
    }
  }
  float *loss = floats(losses, N, "losses"), *sums = floats(lse, N, "lse");
  RowStats* row_stats = reinterpret_cast<RowStats*>(floats(stats, 2 * N, "stats"));
  const CrossEntropyOptions options{ignore_index, label_smoothing, softcap, z_loss};
  py::gil_scoped_release release;
  cross_entropy_losses(x, type, N, V, labels, options, all_lse, loss, sums, row_stats,
                       gradient ? &out : nullptr, gradient_scale);
}

void cross_entropy_gradients_checked(py::array logits, const std::string& kind,
                                     const Labels& targets, Doubles stats, int64_t ignore_index,
                                     float label_smoothing, float softcap, float z_loss,
                                     Floats grad_losses, std::optional<Floats> grad_lse,
                                     py::array gradient) {
  const LogitType type = logit_type(kind);
  const Rows x = rows_of(logits, kind, "logits", false);
  const Rows out = rows_of(gradient, kind, "gradient", true);
  const int64_t N = logits.shape(0), V = logits.shape(1);
  const int64_t* labels = checked_targets(targets, N, V, ignore_index);
  if (gradient.shape(0) != N || gradient.shape(1) != V) {
    throw py::type_error("gradient must have the shape of logits");
  }
  const bool one_for_all = grad_losses.ndim() == 0;
  const float* weights = floats(grad_losses, one_for_all ? 1 : N, "grad_losses");
  const float* lse_weights = grad_lse ? floats(*grad_lse, N, "grad_lse") : nullptr;
  const RowStats* row_stats = reinterpret_cast<RowStats*>(floats(stats, 2 * N, "stats"));
  const CrossEntropyOptions options{ignore_index, label_smoothing, softcap, z_loss};
  py::gil_scoped_release release;
  cross_entropy_gradients(x, type, N, V, labels, row_stats, options, weights, one_for_all ? 0 : 1,
                          lse_weights, out);
}

double ordered_sum_checked(const Floats& values) {
  return ordered_sum(values.data(), values.size());
}

void scale_in_place_checked(py::array x, const std::string& kind, float factor) {
  check_floats(x, kind, 1, "x");
  const LogitType type = logit_type(kind);
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
  const LogitType type = logit_type(kind);
  const void* data = part.data();
  py::gil_scoped_release release;
  accumulate(static_cast<float*>(into.data), into.stride, data, type, rows, columns, first);
}

Isa isa_of(const std::string& name) {
  for (Isa candidate : {Isa::kPortable, Isa::kAvx2, Isa::kAvx512}) {
    if (name == isa_name(candidate)) return candidate;
  }
  throw py::value_error("unknown instruction set '" + name + "': portable, avx2 or avx512");
}

void force_isa_checked(const std::optional<std::string>& name) {
  const Isa wanted = name ? isa_of(*name) : best_isa();
  if (!force_isa(wanted)) {
    throw py::value_error("this machine has no " + *name + ", only " + isa_name(best_isa()));
  }
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.attr("SOURCE_HASH") = FASTLM_SOURCE_HASH;
  m.attr("VERSION") = FASTLM_VERSION;
  m.attr("PARALLEL_BACKEND") = parallel_backend();
  m.def("gather_batch", &gather_batch_checked, py::arg("segments"), py::arg("starts"),
        py::arg("x").noconvert(), py::arg("y").noconvert());
  m.def("first_out_of_range", &first_out_of_range_checked, py::arg("tokens").noconvert(),
        py::arg("vocab_size"));
  m.def("check_labels", &check_labels, py::arg("targets").noconvert(), py::arg("vocab_size"),
        py::arg("ignore_index"));
  m.def("cross_entropy_losses", &cross_entropy_losses_checked, py::arg("logits"), py::arg("kind"),
        py::arg("targets").noconvert(), py::arg("ignore_index"), py::arg("label_smoothing"),
        py::arg("softcap"), py::arg("z_loss"), py::arg("all_lse"), py::arg("losses").noconvert(),
        py::arg("lse").noconvert(), py::arg("stats").noconvert(), py::arg("gradient"),
        py::arg("gradient_scale"));
  m.def("cross_entropy_gradients", &cross_entropy_gradients_checked, py::arg("logits"),
        py::arg("kind"), py::arg("targets").noconvert(), py::arg("stats").noconvert(),
        py::arg("ignore_index"), py::arg("label_smoothing"), py::arg("softcap"), py::arg("z_loss"),
        py::arg("grad_losses").noconvert(), py::arg("grad_lse").noconvert(), py::arg("gradient"));
  m.def("ordered_sum", &ordered_sum_checked, py::arg("values").noconvert());
  m.def("scale_in_place", &scale_in_place_checked, py::arg("x"), py::arg("kind"),
        py::arg("factor"));
  m.def("accumulate", &accumulate_checked, py::arg("sum"), py::arg("part"), py::arg("kind"),
        py::arg("first"));
  bind_optimizer(m);
  m.def("max_threads", &max_threads);
  m.def("isa", [] { return isa_name(isa()); });
  m.def("force_isa", &force_isa_checked, py::arg("name"));
  m.def("cpu_features", [] {
    const CpuFeatures& has = cpu_features();
    return std::map<std::string, bool>{{"avx2", has.avx2},
                                       {"avx512", has.avx512},
                                       {"avx512_bf16", has.avx512_bf16},
                                       {"amx_bf16", has.amx_bf16},
                                       {"arm_bf16", has.arm_bf16}};
  });
}
