// Tests of csrc/parallel.h.

#include "parallel.h"

#include <signal.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "testing.h"

namespace fastlm {
namespace {

// Pieces of one item on `threads` threads, whatever the machine has.
template <class Fn>
void for_each_of(int64_t n, int threads, const Fn& fn) {
  const auto run = [](const void* context, int64_t i) { (*static_cast<const Fn*>(context))(i); };
  run_pieces(threads, n, run, &fn);
}

// Long enough for a second thread to wake up and take a piece, too.
void work_a_while() {
  const auto end = std::chrono::steady_clock::now() + std::chrono::microseconds(300);
  while (std::chrono::steady_clock::now() < end) std::this_thread::yield();
}

void test_parallel_for() {
  for (int threads : {1, 2, 3, 4, 8}) {
    use_threads(threads);
    for (int64_t n = 0; n <= 70; ++n) {
      for (int64_t grain : {0, 1, 2, 3, 7, 16, 100}) {
        std::vector<int> visits(n), sizes(n);  // not atomic: pieces that overlap are a race as well
        parallel_for(n, grain, [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i) ++visits[i];
          if (begin < end) sizes[begin] = static_cast<int>(end - begin);
        });
        const std::string what = "parallel_for n " + std::to_string(n) + " grain " +
                                 std::to_string(grain) + " threads " + std::to_string(threads);
        check(std::count(visits.begin(), visits.end(), 1) == n, what + ", each index once");
        const int64_t least = std::max<int64_t>(grain, 1);
        const int64_t pieces = n - std::count(sizes.begin(), sizes.end(), 0);
        const int64_t cut = max_threads() > 1 && n / least >= 4 ? n / least : n > 0;
        check_equal(pieces, cut, what + ", pieces");
        for (int size : sizes) {
          if (size) check(pieces == 1 || size >= least, what + ", smallest piece");
        }
      }
    }
  }
}

// Every thread that may take part does, and no other.
void test_number_of_threads() {
  for (int threads : {4, 2, 1, 3}) {
    std::mutex mutex;
    std::set<std::thread::id> seen;
    for (int round = 0; round < 50 && static_cast<int>(seen.size()) < threads; ++round) {
      for_each_of(100, threads, [&](int64_t) {
        work_a_while();
        std::lock_guard<std::mutex> lock(mutex);
        seen.insert(std::this_thread::get_id());
      });
    }
    check_equal(static_cast<int64_t>(seen.size()), threads, "threads that took pieces");
    check(seen.count(std::this_thread::get_id()) == 1, "the calling thread takes pieces");
#ifdef _OPENMP
    use_threads(threads);
    check_equal(max_threads(), threads, "max_threads");
#endif
  }
  use_threads(4);
}

// Loops in quick succession, each over a vector of its own: what a late thread must not touch.
void test_many_loops() {
  int64_t wrong = 0;
  for (int loop = 0; loop < 5000; ++loop) {
    std::vector<int64_t> visits(4 + loop % 5);
    for_each_of(static_cast<int64_t>(visits.size()), 4, [&](int64_t i) { visits[i] += i + 1; });
    for (size_t i = 0; i < visits.size(); ++i) wrong += visits[i] != static_cast<int64_t>(i) + 1;
  }
  check_equal(wrong, 0, "many short loops");
}

// A second loop begins and ends while a piece of the first one runs: in another thread, and inside.
void test_loops_at_the_same_time() {
  std::atomic<int64_t> outer{0}, inner{0};
  const auto loop = [&] {
    parallel_for(40, 1, [&](int64_t begin, int64_t end) { inner += end - begin; });
  };
  parallel_for(8, 1, [&](int64_t begin, int64_t end) {
    outer += end - begin;
    std::thread(loop).join();
    loop();
  });
  check_equal(outer, 8, "the outer loop");
  check_equal(inner, 8 * 2 * 40, "loops beside and inside it");
}

#if defined(__linux__) && !defined(__SANITIZE_THREAD__) && !defined(_OPENMP)
std::atomic<bool> held{false};
std::atomic<int> holding{0};

// Threads that are not scheduled, as beside a busy process: each sits in a signal handler. A loop
// has to end without them. (OpenMP's own would be waited for, once in a while.)
void test_threads_that_do_not_run() {
  for_each_of(100, 4, [](int64_t) { work_a_while(); });  // the workers exist
  struct sigaction action{};
  action.sa_handler = [](int) {
    ++holding;
    while (held) usleep(1000);
    --holding;
  };
  sigaction(SIGUSR1, &action, nullptr);
  held = true;
  int workers = 0;
  for (const auto& entry : std::filesystem::directory_iterator("/proc/self/task")) {
    const int id = std::stoi(entry.path().filename().string());
    if (id == getpid()) continue;
    check(syscall(SYS_tgkill, getpid(), id, SIGUSR1) == 0, "tgkill");
    ++workers;
  }
  for (int i = 0; i < 5000 && holding < workers; ++i) usleep(1000);
  check(workers >= 1 && holding == workers, "every worker is held");
  int64_t done = 0;  // not atomic: this thread is the only one
  for (int loop = 0; loop < 100; ++loop) {
    for_each_of(100, 4, [&](int64_t) { ++done; });
  }
  check_equal(done, 100 * 100, "loops while no worker runs");
  held = false;
  while (holding) usleep(1000);
  test_number_of_threads();  // they take part again
}
#else
void test_threads_that_do_not_run() {}
#endif

void test_a_piece_that_throws() {
  for (int threads : {1, 2, 4}) {
    use_threads(threads);
    for (int64_t bad : {0, 7, 19}) {
      const std::string what =
          "piece " + std::to_string(bad) + " throws, " + std::to_string(threads) + " threads";
      std::string caught;
      try {
        for_each_of(20, threads, [&](int64_t piece) {
          work_a_while();
          if (piece == bad) throw std::runtime_error("piece " + std::to_string(piece));
        });
      } catch (const std::runtime_error& error) {
        caught = error.what();
      }
      check(caught == "piece " + std::to_string(bad), what);
      std::atomic<int> ran{0};
      for_each_of(20, threads, [&](int64_t) { ++ran; });
      check_equal(ran, 20, "a loop after that: " + what);
    }
  }
}

// The pool's threads do not exist in the child: it has to start its own, and the parent keeps its.
void test_fork() {
  use_threads(4);
  std::atomic<int64_t> sum{0};
  const auto count = [&](int64_t begin, int64_t end) { sum += end - begin; };
  parallel_for(1000, 1, count);
  std::fflush(nullptr);
  const pid_t child = fork();
  if (child == 0) {
    alarm(20);  // a child that hangs is killed, and seen as such below
    parallel_for(1000, 1, count);
    check_equal(sum, 2000, "a loop in a forked child");
    test_number_of_threads();
    _exit(failed ? 1 : 0);
  }
  int status = 0;
  waitpid(child, &status, 0);
  check(WIFEXITED(status) && WEXITSTATUS(status) == 0,
        "a forked child: " + std::string(WIFSIGNALED(status) ? "it hung" : "wrong result"));
  parallel_for(1000, 1, count);
  check_equal(sum, 2000, "a loop after fork()");
}

}  // namespace

void test_parallel() {
  test_parallel_for();
  test_number_of_threads();
  test_many_loops();
  test_loops_at_the_same_time();
  test_threads_that_do_not_run();
  test_a_piece_that_throws();
  // qemu-user 7 aborts in the forked child of a program with threads.
  if (!std::getenv("FASTLM_NO_FORK")) test_fork();
}

}  // namespace fastlm
