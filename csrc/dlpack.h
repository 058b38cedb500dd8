// The part of DLPack's C interface (version 1, github.com/dmlc/dlpack) that tells where an array
// lies. The capsule `type(tensor).__dlpack_c_exchange_api__` points to it.
// defines: DLTensor, DLExchange
#pragma once

#include <cstdint>

namespace fastlm {

struct DLTensor {
  void* data;
  int32_t device_type;
  int32_t device_id;
  int32_t ndim;
  uint8_t type_code;  // 0 integer, 2 floating point, 4 bfloat16
  uint8_t type_bits;
  uint16_t type_lanes;
  int64_t* shape;
  int64_t* strides;  // in elements; may be null: contiguous
  uint64_t byte_offset;

  int64_t address() const {
    return static_cast<int64_t>(reinterpret_cast<uintptr_t>(data) + byte_offset);
  }
};

struct DLExchange {
  uint32_t major, minor;  // version
  DLExchange* previous;
  void* unused[3];  // for tensors that change hands
  // Fills in a view of a Python object. Returns 0, or -1 with a Python exception set. May be null.
  int (*view)(void* object, DLTensor* out);
  void* stream;
};

}  // namespace fastlm
