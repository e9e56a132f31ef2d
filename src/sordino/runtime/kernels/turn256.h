// Steps of fast Hadamard transforms with AVX2, for turn_of in pieces.h.
#pragma once
#include <immintrin.h>

#include "block.h"

namespace sordino {
namespace {

// In a register: an entry and its partner become their sum and difference; `second` is -1 where the difference stands.
inline __m256 step(__m256 v, __m256 partner, __m256 second) { return _mm256_fmadd_ps(v, second, partner); }

// As many registers of a row as kRegisters, in which all steps are done that stay among them.
template <int kRegisters>
void steps_of(float* work, int64_t n) {
  const __m256 one = _mm256_setr_ps(1, -1, 1, -1, 1, -1, 1, -1), two = _mm256_setr_ps(1, 1, -1, -1, 1, 1, -1, -1);
  const __m256 four = _mm256_setr_ps(1, 1, 1, 1, -1, -1, -1, -1);
  for (int64_t i = 0; i < n; i += 8 * kRegisters) {
    __m256 v[kRegisters];
    for (int k = 0; k < kRegisters; ++k) {
      v[k] = _mm256_loadu_ps(work + i + 8 * k);
      v[k] = step(v[k], _mm256_permute_ps(v[k], 0xb1), one);
      v[k] = step(v[k], _mm256_permute_ps(v[k], 0x4e), two);
      v[k] = step(v[k], _mm256_permute2f128_ps(v[k], v[k], 1), four);
    }
    for (int h = 1; h < kRegisters; h *= 2) {
      for (int k = 0; k < kRegisters; ++k) {
        if ((k & h) != 0) continue;
        const __m256 a = v[k], b = v[k + h];
        v[k] = _mm256_add_ps(a, b), v[k + h] = _mm256_sub_ps(a, b);
      }
    }
    for (int k = 0; k < kRegisters; ++k) _mm256_storeu_ps(work + i + 8 * k, v[k]);
  }
}

inline int64_t first_steps(float* work, int64_t size, int64_t n) {
  if (size >= 64) return steps_of<8>(work, n), 64;
  if (size == 32) return steps_of<4>(work, n), 32;
  if (size == 16) return steps_of<2>(work, n), 16;
  return 1;
}

// kEntries from `to` on (16 or 64) of row `of` of left^T times the rows of `work`, each `size` long.
template <int kEntries>
void mix(const Turn& turn, const float* work, int64_t size, int64_t of, int64_t to, float* out) {
  constexpr int kRegisters = kEntries / 8;
  __m256 sums[kRegisters];
  for (__m256& s : sums) s = _mm256_setzero_ps();
  for (int64_t from = 0; from < turn.order; ++from) {
    const __m256 factor = _mm256_set1_ps(turn.left[from * turn.order + of]);
    for (int k = 0; k < kRegisters; ++k) sums[k] = _mm256_fmadd_ps(factor, _mm256_loadu_ps(work + from * size + to + 8 * k), sums[k]);
  }
  for (int k = 0; k < kRegisters; ++k) _mm256_storeu_ps(out + 8 * k, sums[k]);
}

}  // namespace
}  // namespace sordino
