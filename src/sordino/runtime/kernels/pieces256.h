// Small steps of a decoder layer with AVX2, where compilers make less of pieces.h. The operations are the same, one by one.
#pragma once
#include "codes256.h"
#include "products.h"

namespace sordino {
namespace {

// exponential() of pieces.h.
inline __m256 exponential(__m256 x) {
  const auto all = [](float v) { return _mm256_set1_ps(v); };
  x = _mm256_min_ps(all(kLargest), _mm256_max_ps(all(kLeast), x));  // NaN stays: the second operand is taken then
  const __m256 shifted = _mm256_add_ps(_mm256_mul_ps(x, all(kLog2e)), all(kMagic));
  const __m256 k = _mm256_sub_ps(shifted, all(kMagic));
  const __m256 r = _mm256_sub_ps(_mm256_sub_ps(x, _mm256_mul_ps(k, all(kLn2High))), _mm256_mul_ps(k, all(kLn2Low)));
  __m256 p = all(kPowers[0]);
  for (int i = 1; i < 6; ++i) p = _mm256_add_ps(_mm256_mul_ps(p, r), all(kPowers[i]));
  p = _mm256_add_ps(_mm256_add_ps(_mm256_mul_ps(p, _mm256_mul_ps(r, r)), r), all(1.0f));
  const __m256i power = _mm256_add_epi32(_mm256_slli_epi32(_mm256_castps_si256(shifted), 23), _mm256_set1_epi32(0x3f800000));
  return _mm256_mul_ps(p, _mm256_castsi256_ps(power));
}

inline __m256 silu(__m256 x) {
  const __m256 below = _mm256_add_ps(_mm256_set1_ps(1), exponential(_mm256_sub_ps(_mm256_setzero_ps(), x)));
  return _mm256_div_ps(x, below);
}

void glu256(const void* gate, const void* up, Type type, int64_t n, void* out) {
  if (type != kFloat) {  // by way of fp32, some at a time
    alignas(32) float g[kBlock], u[kBlock];
    for (int64_t i = 0; i < n; i += kBlock) {
      const int64_t some = n - i < kBlock ? n - i : kBlock;
      for (int64_t k = 0; k < some; ++k) g[k] = read(gate, type, i + k), u[k] = read(up, type, i + k);
      for (int64_t k = some; k < kBlock; ++k) g[k] = 0;
      for (int64_t k = 0; k < kBlock; k += kEight) _mm256_store_ps(g + k, silu(_mm256_load_ps(g + k)));
      for (int64_t k = 0; k < some; ++k) write(out, type, i + k, widen(narrow(g[k])) * u[k]);
    }
    return;
  }
  const auto *g = static_cast<const float*>(gate), *u = static_cast<const float*>(up);
  auto* to = static_cast<float*>(out);
  int64_t i = 0;
  for (; i + kEight <= n; i += kEight) {
    _mm256_storeu_ps(to + i, _mm256_mul_ps(silu(_mm256_loadu_ps(g + i)), _mm256_loadu_ps(u + i)));
  }
  if (i < n) glu_of(g + i, u + i, n - i, to + i);
}

// renew() of pieces.h, sums in another order.
void renew256(float* scores, int64_t rows, int64_t n, float* mine) {
  for (int64_t i = rows; i < kTogether; ++i) scores[i] = -INFINITY;
  __m256 most = _mm256_set1_ps(mine[0]), sums = _mm256_setzero_ps();
  for (int64_t i = 0; i < kTogether; i += kEight) most = _mm256_max_ps(_mm256_loadu_ps(scores + i), most);
  alignas(32) float lanes[kEight];
  _mm256_store_ps(lanes, most);
  const float largest = *std::max_element(lanes, lanes + kEight);
  for (int64_t i = 0; i < kTogether; i += kEight) {
    const __m256 weight = exponential(_mm256_sub_ps(_mm256_loadu_ps(scores + i), _mm256_set1_ps(largest)));
    _mm256_storeu_ps(scores + i, weight);
  }
  for (int64_t i = rows; i < kTogether; ++i) scores[i] = 0;
  for (int64_t i = 0; i < kTogether; i += kEight) sums = _mm256_add_ps(sums, _mm256_loadu_ps(scores + i));
  const float before = mine[0] == largest ? 1.0f : exponential(mine[0] - largest);
  mine[0] = largest, mine[1] = mine[1] * before + total(sums);
  if (before != 1.0f)
    for (int64_t k = 0; k < n; ++k) mine[2 + k] *= before;
}

// 16 integer products of a token, less `middle`, scaled, into a row of the output; `scale` of the outputs.
inline void put_sixteen(const int32_t* sums, int32_t middle, float token, const float* scale, const float* bias, Type type, void* out) {
  alignas(32) float found[16];
  for (int k = 0; k < 16; k += kEight) {
    const __m256i less = _mm256_sub_epi32(_mm256_load_si256(reinterpret_cast<const __m256i*>(sums + k)), _mm256_set1_epi32(middle));
    const __m256 by = _mm256_mul_ps(_mm256_set1_ps(token), _mm256_load_ps(scale + k));
    __m256 v = _mm256_mul_ps(_mm256_cvtepi32_ps(less), by);
    if (bias != nullptr) v = _mm256_add_ps(v, _mm256_load_ps(bias + k));
    _mm256_store_ps(found + k, v);
  }
  if (type == kFloat) std::memcpy(out, found, sizeof found);
  else for (int k = 0; k < 16; ++k) write(out, kBfloat, k, found[k]);
}

}  // namespace
}  // namespace sordino
