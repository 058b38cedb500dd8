#include "parallel.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif
#ifdef __linux__
#include <sched.h>
#endif

namespace fastlm {
namespace {

// How long a thread looks for what it waits for before it sleeps: waking it takes as long. Not
// longer, for torch's threads want the cores, too.
constexpr std::chrono::microseconds kPatience{50};

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#else
  std::this_thread::yield();
#endif
}

// OMP_PROC_BIND ties each of OpenMP's threads to a core, the program's first one among them, and a
// thread started by that one would inherit its core.
void use_all_cores() {
#if defined(_OPENMP) && defined(__linux__)
  if (omp_get_proc_bind() == omp_proc_bind_false) return;
  cpu_set_t cores;
  CPU_ZERO(&cores);
  for (int place = 0; place < omp_get_num_places(); ++place) {
    std::vector<int> ids(omp_get_place_num_procs(place));
    omp_get_place_proc_ids(place, ids.data());
    for (int id : ids) CPU_SET(id, &cores);
  }
  sched_setaffinity(0, sizeof(cores), &cores);
#endif
}

// Waits until ready(): looks for kPatience, then sleeps. `sleepers` tells the other side that
// someone has to be woken.
template <class Ready>
void wait(std::mutex& mutex, std::condition_variable& condition, std::atomic<int>& sleepers,
          const Ready& ready) {
  const auto deadline = std::chrono::steady_clock::now() + kPatience;
  do {
    for (int i = 0; i < 32; ++i) {
      if (ready()) return;
      pause();
    }
  } while (std::chrono::steady_clock::now() < deadline);
  std::unique_lock<std::mutex> lock(mutex);
  ++sleepers;
  condition.wait(lock, ready);
  --sleepers;
}

// One loop at a time. `claim_` holds the loop's number and how many pieces are left, so that a
// thread which is late finds nothing to take. It reads what the loop consists of, then claims a
// piece; the claim fails if the loop has changed meanwhile, for that needs all pieces claimed and
// done.
class Pool {
 public:
  // False, with nothing done, while another loop runs.
  bool run(int threads, int64_t pieces, void (*run)(const void*, int64_t), const void* context) {
    if (busy_.exchange(true, std::memory_order_acquire)) return false;
    run_.store(run, std::memory_order_relaxed);
    context_.store(context, std::memory_order_relaxed);
    pieces_.store(pieces, std::memory_order_relaxed);
    helpers_.store(threads - 1, std::memory_order_relaxed);
    done_.store(0, std::memory_order_relaxed);
    const uint64_t loop = (claim_.load(std::memory_order_relaxed) >> kPieceBits) + 1;
    claim_.store(loop << kPieceBits | static_cast<uint64_t>(pieces));  // begins
    while (workers_ < threads - 1 && start_worker(workers_)) ++workers_;
    if (sleeping_workers_.load() > 0) {
      {
        std::lock_guard<std::mutex> lock(mutex_);
      }
      work_.notify_all();
    }
    take_pieces(loop);
    wait(mutex_, finished_, sleeping_callers_, [&] { return done_.load() == pieces; });
    busy_.store(false, std::memory_order_release);
    return true;
  }

 private:
  static constexpr int kPieceBits = 32;

  // Takes pieces of the loop while there are any.
  void take_pieces(uint64_t loop) {
    uint64_t claim = claim_.load();
    while (claim >> kPieceBits == loop && left(claim) > 0) {
      const auto run = run_.load(std::memory_order_relaxed);
      const void* context = context_.load(std::memory_order_relaxed);
      const int64_t pieces = pieces_.load(std::memory_order_relaxed);
      if (!claim_.compare_exchange_weak(claim, claim - 1)) continue;
      run(context, pieces - left(claim));
      if (done_.fetch_add(1) + 1 == pieces && sleeping_callers_.load() > 0) {
        {
          std::lock_guard<std::mutex> lock(mutex_);
        }
        finished_.notify_one();
      }
      claim = claim_.load();
    }
  }

  static int64_t left(uint64_t claim) { return static_cast<uint32_t>(claim); }

  // False where the system allows no more threads: the loop does with those that there are.
  bool start_worker(int number) {
    try {
      std::thread([this, number] { work(number); }).detach();
      return true;
    } catch (const std::system_error&) {
      return false;
    }
  }

  void work(int number) {
    use_all_cores();
    for (uint64_t seen = 0;;) {
      wait(mutex_, work_, sleeping_workers_, [&] { return claim_.load() >> kPieceBits != seen; });
      seen = claim_.load() >> kPieceBits;
      if (number < helpers_.load(std::memory_order_relaxed)) take_pieces(seen);
    }
  }

  std::atomic<bool> busy_{false};
  std::atomic<void (*)(const void*, int64_t)> run_{nullptr};
  std::atomic<const void*> context_{nullptr};
  std::atomic<int64_t> pieces_{0};
  std::atomic<int> helpers_{0};  // workers that may take part
  std::atomic<uint64_t> claim_{0};
  std::atomic<int64_t> done_{0};
  int workers_ = 0;  // belongs to the caller that holds busy_

  std::mutex mutex_;
  std::condition_variable work_, finished_;
  std::atomic<int> sleeping_workers_{0}, sleeping_callers_{0};
};

// Never destroyed: its threads sleep until the process ends. A child made by fork() has none of
// them and gets a pool of its own.
std::atomic<Pool*> current_pool{nullptr};

bool forked = false;  // into this process

#if defined(__unix__) || defined(__APPLE__)
const int fork_handler = pthread_atfork(nullptr, nullptr, [] {
  current_pool = nullptr;
  forked = true;
});
#endif

Pool& pool() {
  Pool* found = current_pool.load();
  if (!found) {
    Pool* made = new Pool;
    if (current_pool.compare_exchange_strong(found, made)) return *made;
    delete made;
  }
  return *found;
}

#ifdef _OPENMP
using Clock = std::chrono::steady_clock;

// OpenMP's threads, of the thread that loads this (Python's main thread). They come first: after an
// operation of torch they spin for some milliseconds, take up a loop within a microsecond, and
// would share the cores with threads of our own. But their region ends only when each of them has
// run. So the time that the first one waits for the others is watched: if it is long, something
// else occupies their cores, and the pool gets the loops of the next while.
class Team {
 public:
  bool run(int threads, int64_t pieces, void (*run)(const void*, int64_t), const void* context) {
    // A second thread's team would be one more that spins; a forked child's would hang.
    if (forked || std::this_thread::get_id() != owner_ || Clock::now() < rests_until_) return false;
    // Adjoining pieces for a thread, as far as it gets: two that write to one area in turn take a
    // sixth longer, for what one fetches ahead the other one has. Then what others have left.
    std::vector<Share> shares(threads);
    for (int k = 0; k < threads; ++k) shares[k].next = k * pieces / threads;
    Clock::time_point ready;
#pragma omp parallel num_threads(threads)
    {
      const int own = omp_get_thread_num();
      for (int k = 0; k < threads; ++k) {
        const int from = (own + k) % threads;
        const int64_t end = (from + 1) * pieces / threads;
        std::atomic<int64_t>& next = shares[from].next;
        for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < end;) run(context, i);
      }
      if (own == 0) ready = Clock::now();
    }
    const Clock::time_point end = Clock::now();
    if (end - ready > kLate) rests_until_ = end + kRest;
    return true;
  }

 private:
  struct alignas(64) Share {
    std::atomic<int64_t> next;
  };
  static constexpr std::chrono::microseconds kLate{500};  // several pieces
  static constexpr std::chrono::milliseconds kRest{200};  // one late time slice in it costs 2 %
  const std::thread::id owner_ = std::this_thread::get_id();
  Clock::time_point rests_until_{};
};

Team team;
#endif

}  // namespace

bool threads_are_openmps() {
#ifdef _OPENMP
  return true;
#else
  return false;
#endif
}

int max_threads() {
#ifdef _OPENMP
  return omp_in_parallel() ? 1 : omp_get_max_threads();
#else
  return std::max(1u, std::thread::hardware_concurrency());
#endif
}

void run_pieces(int threads, int64_t pieces, void (*run)(const void* context, int64_t piece),
                const void* context) {
  if (threads <= 1 || pieces <= 1) {
    for (int64_t piece = 0; piece < pieces; ++piece) run(context, piece);
    return;
  }
  // An exception must not leave a thread of a team, nor a loop that others still work for.
  struct Guarded {
    void (*run)(const void* context, int64_t piece);
    const void* context;
    mutable std::atomic<bool> failed{false};
    mutable std::exception_ptr error;
  };
  const Guarded guarded{run, context};
  const auto run_guarded = [](const void* opaque, int64_t piece) {
    const Guarded& g = *static_cast<const Guarded*>(opaque);
    if (g.failed.load(std::memory_order_relaxed)) return;
    try {
      g.run(g.context, piece);
    } catch (...) {
      if (!g.failed.exchange(true)) g.error = std::current_exception();
    }
  };
  bool done = false;
#ifdef _OPENMP
  done = team.run(threads, pieces, run_guarded, &guarded);
#endif
  done = done || pool().run(threads, pieces, run_guarded, &guarded);
  for (int64_t piece = 0; !done && piece < pieces; ++piece) run_guarded(&guarded, piece);
  if (guarded.error) std::rethrow_exception(guarded.error);
}

}  // namespace fastlm
