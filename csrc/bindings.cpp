// The module fastlm._C. This file and bindings_<op>.cpp alone know Python: they check arguments,
// release the GIL and call the kernels. Signatures for type checkers: fastlm/_C.pyi.

#include "bindings.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <optional>
#include <string>

#include "isa.h"
#include "parallel.h"

namespace py = pybind11;
using namespace fastlm;

namespace {

Isa isa_of(const std::string& name) {
  for (Isa candidate : {Isa::kPortable, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16, Isa::kAmx}) {
    if (name == isa_name(candidate)) return candidate;
  }
  throw py::value_error("unknown instruction set '" + name +
                        "': portable, avx2, avx512, avx512_bf16 or amx");
}

void force_isa_checked(const std::optional<std::string>& name) {
  const Isa wanted = name ? isa_of(*name) : best_isa();
  if (!force_isa(wanted)) {
    throw py::value_error("this machine has no " + *name + ", only " + isa_name(best_isa()));
  }
}

}  // namespace

FloatType fastlm::float_type(const std::string& kind) {
  if (kind == "float32") return FloatType::kFloat32;
  if (kind == "bfloat16") return FloatType::kBfloat16;
  if (kind == "float16") return FloatType::kFloat16;
  throw py::type_error("'" + kind + "' is none of float32, bfloat16, float16");
}

PYBIND11_MODULE(_C, m) {
  m.attr("SOURCE_HASH") = FASTLM_SOURCE_HASH;
  m.attr("VERSION") = FASTLM_VERSION;
  m.attr("THREADS_ARE_OPENMPS") = threads_are_openmps();
  bind_attention(m);
  bind_gather_batch(m);
  bind_cross_entropy(m);
  bind_optimizer(m);
  m.def("max_threads", &max_threads);
  m.def("isa", [] { return isa_name(isa()); });
  m.def("force_isa", &force_isa_checked, py::arg("name"));
  m.def("cpu_features", [] {
    const CpuFeatures& has = cpu_features();
    return std::map<std::string, bool>{
        {"avx2", has.avx2},           {"avx512", has.avx512},     {"avx512_bf16", has.avx512_bf16},
        {"fast_bf16", has.fast_bf16}, {"amx_bf16", has.amx_bf16}, {"arm_bf16", has.arm_bf16}};
  });
}
