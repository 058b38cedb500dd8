#include "attention.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>
#include <type_traits>

#include "parallel.h"
#include "simd.h"
#ifdef FASTLM_EMULATED_TILES  // a build of the C++ tests
#include "../tests/csrc/emulated_tiles.h"
#endif

namespace fastlm {
namespace {

constexpr int kFma = 0, kPairs = 1, kTiles = 2;  // see attention_matmul.inc
constexpr float kLog2e = 1.44269502f;

// Rows that one task attends from, keys that one task computes the gradients of. So many tasks are
// enough for the cores; more would only pack the keys again.
constexpr int64_t kQueryChunk = 512, kKeyChunk = 256, kTasks = 32;
constexpr int64_t kMostParts = 8;  // of dq, one for each chunk of keys, in fp32

constexpr int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// Hands out pieces of a block of memory; of none, it counts.
struct Arena {
  std::byte* base;
  int64_t used = 0;

  template <class T>
  T* take(int64_t count) {
    T* const result = base ? reinterpret_cast<T*>(base + used) : nullptr;
    used += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return result;
  }
};

template <class T>
T* row_of(const HeadRows& rows, int64_t b, int64_t h, int64_t t) {
  return static_cast<T*>(rows.data) + b * rows.batch + h * rows.head + t * rows.row;
}

// The tiles' shapes, which a thread loads before it multiplies: all of 16 rows of 64 bytes.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// cos and sin of position t.
struct Angles {
  const float* cos;
  const float* sin;
};
Angles angles_of(const Attention& a, int64_t t) {
  if (!a.cos) return {nullptr, nullptr};
  return {a.cos + t * (a.d / 2), a.sin + t * (a.d / 2)};
}

#define FASTLM_UNIT 0
#define FASTLM_LOOPS "attention.inc"
#include "each_isa.inc"
#undef FASTLM_UNIT
#if FASTLM_X86
namespace avx512_bf16 {
#define FASTLM_SIMD Avx512Simd
#define FASTLM_TARGET FASTLM_TARGET_AVX512_BF16
#define FASTLM_UNIT 1
#include "attention.inc"
#undef FASTLM_UNIT
#undef FASTLM_TARGET
}  // namespace avx512_bf16
namespace amx {
#define FASTLM_TARGET FASTLM_TARGET_AMX
#define FASTLM_UNIT 2
#include "attention.inc"
#undef FASTLM_UNIT
#undef FASTLM_TARGET
#undef FASTLM_SIMD
}  // namespace amx
#endif

// As FASTLM_DISPATCH; of T = bf16 by the unit for it, if isa() has one.
#if FASTLM_X86
#define FASTLM_DISPATCH_UNIT(T, ...)                                                     \
  (std::is_same_v<T, Bfloat16> && isa() == Isa::kAmx          ? amx::__VA_ARGS__         \
   : std::is_same_v<T, Bfloat16> && isa() == Isa::kAvx512Bf16 ? avx512_bf16::__VA_ARGS__ \
                                                              : FASTLM_DISPATCH(__VA_ARGS__))
#else
#define FASTLM_DISPATCH_UNIT(T, ...) FASTLM_DISPATCH(__VA_ARGS__)
#endif

// Memory for as many tasks as run at a time.
class Scratch {
 public:
  Scratch(int tasks, int64_t bytes)
      : bytes_(round_up(bytes, 4096) + 4096),  // a page, in which the task's memory is aligned
        memory_(new std::byte[tasks * bytes_]),
        taken_(new std::atomic<bool>[tasks]()),
        tasks_(tasks) {}

  // Calls fn(arena).
  template <class Fn>
  void lend(const Fn& fn) const {
    int i = 0;
    while (taken_[i].exchange(true, std::memory_order_acquire)) i = (i + 1) % tasks_;
    const auto address = reinterpret_cast<uintptr_t>(memory_.get() + i * bytes_);
    fn(Arena{memory_.get() + i * bytes_ + (64 - address % 64) % 64});
    taken_[i].store(false, std::memory_order_release);
  }

 private:
  int64_t bytes_;
  std::unique_ptr<std::byte[]> memory_;
  std::unique_ptr<std::atomic<bool>[]> taken_;
  int tasks_;
};

// Calls fn(task) for each, on all threads.
template <class Fn>
void for_each_task(int64_t tasks, const Fn& fn) {
  const auto run = [](const void* opaque, int64_t task) {
    (*static_cast<const Fn*>(opaque))(task);
  };
  run_pieces(max_threads(), tasks, run, &fn);
}

template <class T>
void forward(const Attention& a, HeadRows out, AttentionStats* row_stats) {
  const int64_t chunks = (a.Tq + kQueryChunk - 1) / kQueryChunk;
  const Scratch scratch(max_threads(), FASTLM_DISPATCH_UNIT(T, forward_bytes(a.Tk, a.d)));
  for_each_task(a.B * a.H_kv * chunks, [&](int64_t task) {
    const int64_t chunk = chunks - 1 - task % chunks;  // the longest first
    const int64_t head = task / chunks, begin = chunk * kQueryChunk;
    scratch.lend([&](Arena arena) {
      FASTLM_DISPATCH_UNIT(
          T, attend<T>(a, head / a.H_kv, head % a.H_kv, begin, std::min(begin + kQueryChunk, a.Tq),
                       out, row_stats, arena));
    });
  });
}

template <class T>
void backward(const Attention& a, HeadRows grad_out, HeadRows out, const AttentionStats* row_stats,
              HeadRows dq, HeadRows dk, HeadRows dv) {
  const int64_t heads = a.B * a.H_kv;
  const int64_t most = std::min((kTasks + heads - 1) / heads, kMostParts);
  const int64_t chunks = std::min((a.Tk + kKeyChunk - 1) / kKeyChunk, most);
  const int64_t chunk = round_up((a.Tk + chunks - 1) / chunks, kKeyChunk);
  const int64_t rows = a.B * a.H * a.Tq;
  const std::unique_ptr<float[]> parts(chunks > 1 ? new float[chunks * rows * a.d] : nullptr);
  const Scratch scratch(max_threads(),
                        FASTLM_DISPATCH_UNIT(T, backward_bytes(std::min(chunk, a.Tk), a.d)));
  for_each_task(heads * chunks, [&](int64_t task) {
    const int64_t head = task / chunks, b = head / a.H_kv, begin = task % chunks * chunk;
    if (begin >= a.Tk) return;
    float* const partial =
        parts ? parts.get() + (task % chunks * a.B + b) * a.H * a.Tq * a.d : nullptr;
    scratch.lend([&](Arena arena) {
      FASTLM_DISPATCH_UNIT(
          T, attend_backward<T>(a, b, head % a.H_kv, begin, std::min(begin + chunk, a.Tk), grad_out,
                                out, row_stats, dq, dk, dv, partial, arena));
    });
  });
  if (parts) {
    parallel_for(rows, 64, [&](int64_t begin, int64_t end) {
      FASTLM_DISPATCH(sum_parts<T>(a, begin, end, chunks, chunk, parts.get(), dq));
    });
  }
}

}  // namespace

void attention_forward(const Attention& a, HeadRows out, AttentionStats* row_stats) {
  if (a.B * a.H == 0) return;
  with_matmul_type(a.type, [&](auto type) { forward<decltype(type)>(a, out, row_stats); });
}

void attention_backward(const Attention& a, HeadRows grad_out, HeadRows out,
                        const AttentionStats* row_stats, HeadRows dq, HeadRows dk, HeadRows dv) {
  if (a.B * a.H == 0) return;
  with_matmul_type(a.type, [&](auto type) {
    backward<decltype(type)>(a, grad_out, out, row_stats, dq, dk, dv);
  });
}

}  // namespace fastlm
