// Vectors of floats, as wide as the instruction set has them, and bfloat16.
//
// Legend: V floats in a vector.

#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int V = 16, PANEL = 4;  // 6 x 4 sums, 4 weights and 1 input fill 29 of 32 registers
#elif defined(__AVX__)
constexpr int V = 8, PANEL = 2;  // 6 x 2 + 2 + 1 of 16
#elif defined(__aarch64__)
constexpr int V = 4, PANEL = 4;  // 29 of 32
#else
constexpr int V = 4, PANEL = 2;  // 15 of 16
#endif

typedef float vec __attribute__((vector_size(4 * V), aligned(4), may_alias));

struct bfloat16 {
    uint16_t bits;
};

// Keeps the compiler from loading the value again for each of its uses.
inline void in_register([[maybe_unused]] vec& x) {
#if defined(__x86_64__)
    asm("" : "+v"(x));
#elif defined(__aarch64__)
    asm("" : "+w"(x));
#endif
}

inline vec splat(float x) { return x - vec{}; }  // x + vec{} would not be x where that is -0: an addition, each time
inline vec load(const float* p) { return *reinterpret_cast<const vec*>(p); }
inline void store(float* p, vec x) { *reinterpret_cast<vec*>(p) = x; }
#if defined(__AVX512F__)
inline vec maximum(vec low, vec x) { return (vec)_mm512_max_ps((__m512)low, (__m512)x); }  // x where x is NaN
#else
inline vec maximum(vec low, vec x) { return x < low ? low : x; }
#endif

#if defined(__AVX512F__)
inline vec minimum(vec high, vec x) { return (vec)_mm512_min_ps((__m512)high, (__m512)x); }  // x where x is NaN
#else
inline vec minimum(vec high, vec x) { return x > high ? high : x; }
#endif

#if defined(__AVX512BF16__)
inline vec load(const bfloat16* p) {
    __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
}
inline void store(bfloat16* p, vec x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh((__m512)x));
}
#endif

}  // namespace
