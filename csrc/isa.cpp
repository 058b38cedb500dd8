#include "isa.h"

#include <atomic>

#if FASTLM_X86
#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace fastlm {
namespace {

#if FASTLM_X86
// The tiles' 8 KB of registers are each process's to ask Linux for (5.16 and later).
bool may_use_tiles() {
#ifdef __linux__
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

CpuFeatures detect() {
  CpuFeatures found;
#if FASTLM_X86
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx)) return found;
  const bool osxsave = ecx & (1u << 27), fma = ecx & (1u << 12), f16c = ecx & (1u << 29);
  if (!osxsave) return found;
  // XCR0: the register state the operating system saves. A CPU flag alone is not enough.
  unsigned xcr0_low, xcr0_high;
  __asm__("xgetbv" : "=a"(xcr0_low), "=d"(xcr0_high) : "c"(0));
  const bool ymm = (xcr0_low & 0x6) == 0x6;
  const bool zmm = ymm && (xcr0_low & 0xe0) == 0xe0;
  const bool tiles = (xcr0_low & 0x60000) == 0x60000;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return found;
  const unsigned subleaves = eax;
  const bool bmi2 = ebx & (1u << 8);
  found.avx2 = ymm && fma && f16c && bmi2 && (ebx & (1u << 5));
  const unsigned avx512 = (1u << 16) | (1u << 17) | (1u << 30) | (1u << 31);  // F, DQ, BW, VL
  found.avx512 = found.avx2 && zmm && (ebx & avx512) == avx512;
  found.amx_bf16 = tiles && (edx & (1u << 22));
  if (subleaves >= 1 && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx)) {
    found.avx512_bf16 = found.avx512 && (eax & (1u << 5));
  }
  found.amx_bf16 = found.amx_bf16 && found.avx512_bf16 && may_use_tiles();
  unsigned intel_ebx;
  __get_cpuid(0, &eax, &intel_ebx, &ecx, &edx);
  found.fast_bf16 = found.avx512_bf16 && intel_ebx != 0x756e6547;  // "Genu"
#elif defined(__aarch64__) && defined(__linux__)
  found.arm_bf16 = getauxval(AT_HWCAP2) & (1ul << 14);  // HWCAP2_BF16
#endif
  return found;
}

std::atomic<int> forced{-1};

}  // namespace

const CpuFeatures& cpu_features() {
  static const CpuFeatures found = detect();
  return found;
}

bool has_isa(Isa isa) {
  const CpuFeatures& has = cpu_features();
  switch (isa) {
    case Isa::kPortable: return true;
    case Isa::kAvx2: return has.avx2;
    case Isa::kAvx512: return has.avx512;
    case Isa::kAvx512Bf16: return has.avx512_bf16;
#ifdef FASTLM_EMULATED_TILES  // a build of the C++ tests
    case Isa::kAmx: return has.avx512_bf16;
#else
    case Isa::kAmx: return has.amx_bf16;
#endif
  }
  return false;
}

Isa best_isa() {
  const CpuFeatures& has = cpu_features();
  if (has.amx_bf16) return Isa::kAmx;
  if (has.fast_bf16) return Isa::kAvx512Bf16;
  return has.avx512 ? Isa::kAvx512 : has.avx2 ? Isa::kAvx2 : Isa::kPortable;
}

Isa isa() {
  const int wanted = forced.load(std::memory_order_relaxed);
  return wanted < 0 ? best_isa() : static_cast<Isa>(wanted);
}

bool force_isa(Isa wanted) {
  if (!has_isa(wanted)) return false;
  forced.store(static_cast<int>(wanted), std::memory_order_relaxed);
  return true;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kPortable: return "portable";
    case Isa::kAvx2: return "avx2";
    case Isa::kAvx512: return "avx512";
    case Isa::kAvx512Bf16: return "avx512_bf16";
    case Isa::kAmx: return "amx";
  }
  return "";
}

}  // namespace fastlm
