// Tests of csrc/gather_batch.h and csrc/isa.h; runs those of the other files, too.
//
//   csrc_test                        every test; prints "N passed, 0 failed", exit 1 otherwise
//   csrc_test overrun|overread|misaligned|race
//                                    a deliberate error inside the kernel, which the sanitizer that
//                                    this binary is built with must stop (tests/ops/test_csrc.py)

#include "gather_batch.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <limits>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#include "isa.h"
#include "parallel.h"
#include "testing.h"

namespace fastlm {
// NAME_test.cpp
void test_adamw();
void test_attention();
void test_clip_grad_norm();
void test_cross_entropy();
void test_parallel();
}  // namespace fastlm
using namespace fastlm;

namespace {

template <class Token, class Output>
void test_gather() {
  const int64_t largest = static_cast<int64_t>(
      std::min<uint64_t>(static_cast<uint64_t>(std::numeric_limits<Token>::max()),
                         static_cast<uint64_t>(std::numeric_limits<Output>::max())));
  // One segment; empty ones at either end and in a row; windows that cross 2, 3 and many segments.
  const std::vector<std::vector<int64_t>> layouts = {{300},           {0, 300},
                                                     {300, 0},        {0, 0, 150, 0, 0, 150, 0},
                                                     {1, 298, 1},     {299, 1},
                                                     {100, 100, 100}, {64, 64, 64, 64, 44},
                                                     {7, 0, 250, 43}, std::vector<int64_t>(300, 1)};
  // A window of one token; one less and one more than vector widths; all but one of the tokens.
  for (size_t layout = 0; layout < layouts.size(); ++layout) {
    const int64_t misalign = static_cast<int64_t>(layout) % 2;
    const Dataset<Token> data(layouts[layout], misalign, largest, std::is_signed_v<Token>);
    for (int64_t T : {1, 2, 7, 8, 9, 15, 17, 31, 33, 64, 65, 130, 299}) {
      const int64_t last = data.size() - T - 1;
      std::vector<int64_t> many = {0, last};
      while (many.size() < 7) many.push_back(random_below(last + 1));
      for (const std::vector<int64_t>& starts : {std::vector<int64_t>{}, {0}, {last}, many}) {
        for (Isa isa : supported_isas()) {
          force_isa(isa);
          const Batch<Output> batch = gathered<Output>(data, starts, T);
          check(batch.lost == -1 && is_right(batch, data, starts, T),
                std::string("gather_batch ") + name_of<Token> + " -> int" +
                    std::to_string(8 * sizeof(Output)) + " layout " + std::to_string(layout) +
                    " T " + std::to_string(T) + " B " + std::to_string(starts.size()) + " " +
                    isa_name(isa));
        }
      }
    }
  }
  force_isa(best_isa());
}

// Rows enough for several parts (a part is 16 K tokens), and the same for any number of threads.
void test_gather_threads() {
  const Dataset<uint16_t> data({5000, 0, 3000, 4000}, 0, 65535, false);
  const int64_t T = 1024;
  std::vector<int64_t> starts = {0, data.size() - T - 1};
  while (starts.size() < 101) starts.push_back(random_below(data.size() - T));
  for (int threads : {1, 2, 3, 7}) {
    use_threads(threads);
    const Batch<int64_t> batch = gathered<int64_t>(data, starts, T);
    check(batch.lost == -1 && is_right(batch, data, starts, T),
          "gather_batch with " + std::to_string(threads) + " threads");
  }
  use_threads(4);
}

// The position of a token that does not fit int32.
template <class Token>
void test_narrowing(std::vector<Token> too_large, std::vector<Token> just_fits) {
  const int64_t T = 40, first = 100, second = 180;
  for (Isa isa : supported_isas()) {
    force_isa(isa);
    const std::string what = std::string("narrowing ") + name_of<Token> + " " + isa_name(isa);
    // The windows are [100, 140] and [180, 220]; a segment ends at 120 and at 200.
    const std::vector<int64_t> starts = {second, first};
    for (Token token : too_large) {
      // The window's first token (in x only), both sides of a segment's end, its last (in y only).
      for (int64_t position : {first, first + 1, int64_t{119}, int64_t{120}, first + T - 1,
                               first + T, second, second + T}) {
        Dataset<Token> data({120, 80, 100}, 0, 1000, false);
        data.set(position, token);
        check_equal(gathered<int32_t>(data, starts, T).lost, position, what);
        const Batch<int64_t> wide = gathered<int64_t>(data, starts, T);
        check(wide.lost == -1 && is_right(wide, data, starts, T), what + ", wide output");
        // Of two, in one window and in two, the lower position.
        data.set(second + T - 1, token);
        check_equal(gathered<int32_t>(data, starts, T).lost, std::min(position, second + T - 1),
                    what + ", two of them");
      }
      Dataset<Token> data({120, 80, 100}, 0, 1000, false);
      for (int64_t position : {first - 1, first + T + 1, second - 1, second + T + 1}) {
        data.set(position, token);  // in no window
      }
      check_equal(gathered<int32_t>(data, starts, T).lost, -1, what + ", outside every window");
    }
    Dataset<Token> data({120, 80, 100}, 0, 1000, false);
    for (size_t i = 0; i < just_fits.size(); ++i) data.set(first + 3 * i, just_fits[i]);
    const Batch<int32_t> batch = gathered<int32_t>(data, starts, T);
    check(batch.lost == -1 && is_right(batch, data, starts, T), what + ", tokens that just fit");
  }
  force_isa(best_isa());
}

template <class Token>
int64_t first_out(const std::vector<Token>& tokens, int64_t vocab_size) {
  return first_out_of_range(tokens.data(), static_cast<int64_t>(tokens.size()),
                            token_type_of<Token>, vocab_size);
}

template <class Token>
void test_first_out_of_range() {
  const int64_t vocab_size = 100, block = 1 << 16;
  std::vector<Token> wrong = {100, 101, std::numeric_limits<Token>::max()};
  if constexpr (std::is_signed_v<Token>) {
    wrong.push_back(-1);
    wrong.push_back(std::numeric_limits<Token>::min());
  }
  // Empty, one token, one less and more than a block, and blocks enough for several threads.
  for (int64_t size : {int64_t{0}, int64_t{1}, block - 1, block, block + 1, 9 * block + 5}) {
    std::vector<Token> tokens(size);
    for (int64_t i = 0; i < size; ++i) tokens[i] = static_cast<Token>(i % vocab_size);
    std::vector<int64_t> positions = {0,         1,         block - 1, block,
                                      block + 1, 8 * block, size - 2,  size - 1};
    for (Isa isa : supported_isas()) {
      force_isa(isa);
      const std::string what = std::string("first_out_of_range ") + name_of<Token> + " of " +
                               std::to_string(size) + " " + isa_name(isa);
      check_equal(first_out(tokens, vocab_size), -1, what);
      for (size_t i = 0; i < positions.size(); ++i) {
        const int64_t position = positions[i];
        if (position < 0 || position >= size) continue;
        const Token right = tokens[position], last = tokens[size - 1];
        tokens[position] = wrong[i % wrong.size()];
        check_equal(first_out(tokens, vocab_size), position, what);
        tokens[size - 1] = wrong[0];  // a second one, later
        check_equal(first_out(tokens, vocab_size), position, what + ", two of them");
        tokens[size - 1] = last;
        tokens[position] = right;
      }
    }
  }
  for (Isa isa : supported_isas()) {
    force_isa(isa);
    const std::string what =
        std::string("first_out_of_range ") + name_of<Token> + " " + isa_name(isa);
    for (Token token : wrong) {
      const std::vector<Token> tokens = {3, 99, token, 0};
      check_equal(first_out(tokens, vocab_size), 2, what + ", every wrong token");
    }
    // The type's largest token is in a vocabulary one larger, whatever the type.
    const Token largest = std::numeric_limits<Token>::max();
    const std::vector<Token> tokens = {0, static_cast<Token>(largest - 1), largest};
    const int64_t huge = std::numeric_limits<int64_t>::max();
    const bool widest = sizeof(Token) == 8;  // largest + 1 is no int64
    check_equal(first_out(tokens, huge), widest ? 2 : -1, what + ", huge vocabulary");
    check_equal(first_out(tokens, static_cast<int64_t>(largest)), 2, what + ", largest token");
    if (!widest) {
      check_equal(first_out(tokens, static_cast<int64_t>(largest) + 1), -1, what + ", all in");
    }
    check_equal(first_out(tokens, 0), 0, what + ", vocabulary of 0");
    check_equal(first_out(tokens, 1), 1, what + ", vocabulary of 1");
    check_equal(first_out(tokens, -1), 0, what + ", negative vocabulary");
    check_equal(first_out(std::vector<Token>{}, 0), -1, what + ", nothing in nothing");
    if constexpr (std::is_signed_v<Token>) {
      const std::vector<Token> negative = {0, std::numeric_limits<Token>::min()};
      check_equal(first_out(negative, huge), 1, what + ", negative in a huge vocabulary");
    }
  }
  force_isa(best_isa());
}

// Callers with threads of their own, as a prefetching thread beside the main one.
void test_concurrent_callers() {
  const Dataset<uint16_t> data({40000, 40000}, 0, 999, false);
  std::vector<int> wrong(2);
  const auto caller = [&](int id) {
    std::vector<int64_t> starts;
    for (int64_t b = 0; b < 64; ++b) starts.push_back((b * 1237 + id * 31) % 79000);
    for (int round = 0; round < 10; ++round) {
      wrong[id] += !is_right(gathered<int64_t>(data, starts, 512), data, starts, 512);
      wrong[id] += first_out(data.all, 1000) != -1;
    }
  };
  std::thread first(caller, 0), second(caller, 1);
  first.join();
  second.join();
  check_equal(wrong[0] + wrong[1], 0, "concurrent callers");
}

void test_isa() {
  check(isa() == best_isa(), "the best is used unless another is forced");
  for (Isa wanted : {Isa::kPortable, Isa::kAvx2, Isa::kAvx512}) {
    const Isa before = isa();
    const bool forced = force_isa(wanted);
    check(forced == (wanted <= best_isa()), std::string("force_isa ") + isa_name(wanted));
    check(isa() == (forced ? wanted : before), std::string("isa after ") + isa_name(wanted));
    Isa elsewhere = best_isa();
    std::thread([&] { elsewhere = isa(); }).join();
    check(elsewhere == isa(), "a forced instruction set holds in every thread");
  }
  force_isa(best_isa());
  const CpuFeatures& has = cpu_features();
  check(has.avx2 == (best_isa() >= Isa::kAvx2), "avx2");
  check(has.avx512 == (best_isa() >= Isa::kAvx512), "avx512");
  check(has.avx2 || !has.avx512, "avx512 without avx2");
  check(has.avx512 || !has.avx512_bf16, "avx512_bf16 without avx512");
  check(!std::strcmp(isa_name(Isa::kPortable), "portable") &&
            !std::strcmp(isa_name(Isa::kAvx2), "avx2") &&
            !std::strcmp(isa_name(Isa::kAvx512), "avx512"),
        "isa_name");
}

// The deliberate errors. Each is committed by the kernel, so it also shows that the kernel, not
// only this file, is built with the sanitizer.
int commit(const std::string& error) {
  const int64_t T = 100, start = 0;
  std::vector<uint16_t> tokens(T + 1, 5);
  Segment segment{tokens.data(), T + 1};
  std::vector<int64_t> x(T), y(T);
  const auto gather = [&](std::vector<int64_t>& into) {
    gather_batch(&segment, 1, TokenType::kUint16, &start, 1, T, OutputType::kInt64, into.data(),
                 y.data());
  };
  if (error == "overrun") {
    std::vector<int64_t> short_x(T - 1);
    gather(short_x);
  } else if (error == "overread") {
    std::vector<uint16_t> short_tokens(T, 5);
    segment.tokens = short_tokens.data();
    gather(x);
  } else if (error == "misaligned") {
    std::vector<char> bytes(2 * T + 3);
    segment.tokens = bytes.data() + 1;
    gather(x);
  } else if (error == "race") {
    std::thread first([&] { gather(x); }), second([&] { gather(x); });
    first.join();
    second.join();
  } else {
    std::fprintf(stderr, "unknown argument %s\n", error.c_str());
    return 2;
  }
  std::printf("%s: nothing stopped it\n", error.c_str());
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1) return commit(argv[1]);
  test_isa();
  test_parallel();
  test_adamw();
  test_attention();
  test_clip_grad_norm();
  test_cross_entropy();
  test_gather<uint8_t, int32_t>();
  test_gather<uint8_t, int64_t>();
  test_gather<uint16_t, int32_t>();
  test_gather<uint16_t, int64_t>();
  test_gather<uint32_t, int32_t>();
  test_gather<uint32_t, int64_t>();
  test_gather<int32_t, int32_t>();
  test_gather<int32_t, int64_t>();
  test_gather<int64_t, int32_t>();
  test_gather<int64_t, int64_t>();
  test_gather_threads();
  test_narrowing<uint32_t>({0x80000000u, 0xffffffffu}, {0x7fffffffu, 0});
  test_narrowing<int64_t>({int64_t{1} << 31, int64_t{1} << 32, int64_t{1} << 62,
                           -(int64_t{1} << 31) - 1, std::numeric_limits<int64_t>::min()},
                          {(int64_t{1} << 31) - 1, -1, -100, -(int64_t{1} << 31)});
  test_first_out_of_range<uint8_t>();
  test_first_out_of_range<uint16_t>();
  test_first_out_of_range<uint32_t>();
  test_first_out_of_range<int32_t>();
  test_first_out_of_range<int64_t>();
  test_concurrent_callers();
  std::printf("%d threads%s, best instruction set %s\n", max_threads(),
              threads_are_openmps() ? " (OpenMP's)" : "", isa_name(best_isa()));
  std::printf("%lld passed, %lld failed\n", static_cast<long long>(passed),
              static_cast<long long>(failed));
  return failed ? 1 : 0;
}
