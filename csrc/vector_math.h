// Loops over floats with the CPU's vector instructions. Such a loop is plain C++ under `#pragma omp simd`
// (-fopenmp-simd); the library is built for a generic CPU, so vectorised() selects AVX2 at run time.
#pragma once

#include <bit>
#include <cstdint>

#if defined(__x86_64__) && defined(__GNUC__)
#define MUSE_FAST_AVX2
#endif

namespace muse_fast {

#ifdef MUSE_FAST_AVX2
template <typename Function>
[[gnu::target("avx2,fma"), gnu::flatten]] void run_with_avx2(const Function& function) {
  function();
}
#endif

// Calls the function, with all its callees inlined and compiled a second time for CPUs with AVX2.
template <typename Function>
[[gnu::flatten]] void vectorised(const Function& function) {
#ifdef MUSE_FAST_AVX2
  static const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (has_avx2) return run_with_avx2(function);
#endif
  function();
}

// e^x for x up to 88, within 2 units in the last place; 0 where e^x is below the smallest normal float.
inline float exp(float x) {
  constexpr float kLog2E = 1.44269504f;
  constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;  // 9 bits of ln 2, so that n * high is exact
  constexpr float kRound = 0x1.8p23f;  // adding it to a small float puts the nearest integer in the lowest bits
  constexpr float kSmallest = -87.3365f;
  const float shifted = x * kLog2E + kRound;
  const float n = shifted - kRound;
  const float r = x - n * kLn2High - n * kLn2Low;  // in [-ln 2 / 2, ln 2 / 2]
  // (e^r - 1 - r) / r^2, interpolated at Chebyshev nodes: the relative error of e^r is at most 1.1e-8.
  const float tail = 0.5f + r * (0.166665763f + r * (0.0416665561f + r * (0.00836320315f + r * 0.00139262131f)));
  const float two_to_n = std::bit_cast<float>((std::bit_cast<uint32_t>(shifted) << 23) + (127u << 23));
  return x < kSmallest ? 0.0f : (1.0f + (r + r * r * tail)) * two_to_n;
}

}  // namespace muse_fast
