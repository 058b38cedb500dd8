// Loops over several threads: with parallel.cpp the only files that know threads.
// defines: max_threads, parallel_for, run_pieces, threads_are_openmps
//
// Cuts a loop into pieces; every thread that runs takes the next one, the calling thread included.
// OpenMP's threads take pieces if they are prompt (torch's operations keep them awake), else
// threads of our own: an OpenMP region ends when every thread of its team has run, so beside a busy
// process it waits for one that the system does not schedule.
#pragma once

#include <algorithm>
#include <cstdint>

namespace fastlm {

// True: OpenMP tells the number of threads, so torch.set_num_threads and OMP_NUM_THREADS set it.
// False in a build without OpenMP: it is the machine's.
bool threads_are_openmps();

// How many threads a loop may use, asked anew by each. 1 inside an OpenMP region.
int max_threads();

// Calls run(context, i) once for each i in [0, pieces), on at most `threads` threads, the calling
// one among them. A loop inside a piece, or in a second thread meanwhile, runs on its caller alone.
// Throws what a piece has thrown, of several one, when none runs any longer; the rest may be left.
void run_pieces(int threads, int64_t pieces, void (*run)(const void* context, int64_t piece),
                const void* context);

// Calls fn(begin, end) over a partition of [0, n) into contiguous pieces of about `grain` items,
// which should take about 50 us: then work of less than 200 us stays on the calling thread, and a
// thread that loses its core holds up little. The result must not depend on the partition: so
// results do not depend on the number of threads.
template <class Fn>
void parallel_for(int64_t n, int64_t grain, const Fn& fn) {
  constexpr int64_t kLeast = 4, kMost = 1 << 20;  // pieces that are worth waking a thread
  const int64_t pieces = std::min(n / std::max<int64_t>(grain, 1), kMost);
  const int threads = pieces < kLeast ? 1 : max_threads();
  if (threads == 1) {
    if (n > 0) fn(int64_t{0}, n);
    return;
  }
  struct Context {
    const Fn& fn;
    int64_t size, larger;  // the first `larger` pieces hold one item more
  };
  const Context context{fn, n / pieces, n % pieces};
  const auto run = [](const void* opaque, int64_t piece) {
    const Context& c = *static_cast<const Context*>(opaque);
    const int64_t begin = piece * c.size + std::min(piece, c.larger);
    c.fn(begin, begin + c.size + (piece < c.larger));
  };
  run_pieces(threads, pieces, run, &context);
}

}  // namespace fastlm
