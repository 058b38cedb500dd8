// The only file that knows threads.
// defines: max_threads, parallel_for, parallel_backend
//
// OpenMP where it was found: torch's wheels carry a libgomp of the plain name, so the loops share
// torch's pool and `torch.set_num_threads` governs them. Else std::thread, started per loop.
#pragma once

#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace fastlm {

// True in a child made by fork(): the pool's threads do not exist there and libgomp would wait for
// them for ever, so loops run serially.
inline bool& in_forked_child() {
  static bool forked = false;
  return forked;
}

#if defined(__unix__) || defined(__APPLE__)
inline const int fork_handler = pthread_atfork(nullptr, nullptr, [] { in_forked_child() = true; });
#endif

inline const char* parallel_backend() {
#ifdef _OPENMP
  return "openmp";
#else
  return "std::thread";
#endif
}

inline int max_threads() {
  if (in_forked_child()) return 1;
#ifdef _OPENMP
  return omp_in_parallel() ? 1 : omp_get_max_threads();
#else
  return std::max(1u, std::thread::hardware_concurrency());
#endif
}

// Calls fn(begin, end) over a partition of [0, n) into contiguous parts, one a thread, each of at
// least `grain` items (so a small n stays on the calling thread). fn must not throw, and must not
// let its result depend on the partition: that is what keeps results independent of the threads.
template <class Fn>
void parallel_for(int64_t n, int64_t grain, const Fn& fn) {
  if (n <= 0) return;
  const int64_t parts = std::min<int64_t>(max_threads(), n / grain);
  if (parts <= 1) {
    fn(int64_t{0}, n);
    return;
  }
  const int64_t size = n / parts, larger = n % parts;  // the first `larger` parts hold one more
  const auto begin_of = [=](int64_t part) { return part * size + std::min(part, larger); };
#ifdef _OPENMP
#pragma omp parallel for num_threads(static_cast<int>(parts)) schedule(static, 1)
  for (int64_t part = 0; part < parts; ++part) fn(begin_of(part), begin_of(part + 1));
#else
  std::vector<std::thread> threads;
  threads.reserve(parts - 1);
  for (int64_t part = 1; part < parts; ++part) {
    threads.emplace_back([&, part] { fn(begin_of(part), begin_of(part + 1)); });
  }
  fn(begin_of(0), begin_of(1));
  for (std::thread& thread : threads) thread.join();
#endif
}

}  // namespace fastlm
