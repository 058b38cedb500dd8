// Which instruction set the kernels use: detected once, forceable in tests.
// defines: Isa, CpuFeatures, cpu_features, isa, best_isa, has_isa, force_isa, isa_name,
//          FASTLM_TARGET_AVX2, FASTLM_TARGET_AVX512, FASTLM_TARGET_AVX512_BF16, FASTLM_INLINE
//
// How kernels are built for them: each_isa.inc.
#pragma once

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define FASTLM_X86 1
#define FASTLM_TARGET_AVX2 __attribute__((target("avx2,fma,f16c,bmi2")))
#define FASTLM_TARGET_AVX512 \
  __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,bmi2")))
#define FASTLM_TARGET_AVX512_BF16 \
  __attribute__((target("avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,bmi2")))
#define FASTLM_TARGET_AMX                                                            \
  __attribute__((                                                                    \
      target("amx-tile,amx-bf16,avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2," \
             "fma,f16c,bmi2")))
#else
#define FASTLM_X86 0
#endif
#ifdef FASTLM_CALLS  // functions stay calls: sanitizers' additions are then compiled once
#define FASTLM_INLINE inline
#else
#define FASTLM_INLINE inline __attribute__((always_inline))
#endif

namespace fastlm {

// Each has all of the one before. The last two differ in the matrix units alone: kernels that
// multiply no matrices run as kAvx512.
enum class Isa { kPortable, kAvx2, kAvx512, kAvx512Bf16, kAmx };

// Features that the processor has and the operating system lets us use.
struct CpuFeatures {
  bool avx2 = false;
  bool avx512 = false;       // F, BW, VL, DQ
  bool avx512_bf16 = false;  // bf16 dot products
  bool fast_bf16 = false;    // and they are faster than fp32's, which Intel's are not
  bool amx_bf16 = false;     // bf16 tiles
  bool arm_bf16 = false;     // aarch64 bf16 matrix multiply
};

const CpuFeatures& cpu_features();

// The instruction set the kernels run with: the forced one, else the best supported.
Isa isa();

// Forces `wanted` from now on in every thread. Returns false, changing nothing, if the machine
// lacks it.
bool force_isa(Isa wanted);

// The fastest the machine has.
Isa best_isa();

bool has_isa(Isa isa);

const char* isa_name(Isa isa);

}  // namespace fastlm
