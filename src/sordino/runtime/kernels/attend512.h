// Attention over rows of a cache with AVX-512 in fp32, for heads whose size is a multiple of 64 (bf16: attend_half.h); others take pieces.h's own.
//
// Codes are multiplied as they are: q · (c - z) s = s (q · c - z Σq), and Σ w s (c - z) = Σ (w s) c - Σ (w s) z. Up to six queries share what
// is decoded of a key head's row.
#include "attend_few.h"
#include "block.h"
#include "reader512.h"

namespace sordino {
namespace {

// exponential() of pieces.h.
__m512 exponential(__m512 x) {
  const auto all = [](float v) { return _mm512_set1_ps(v); };
  x = _mm512_min_ps(all(kLargest), _mm512_max_ps(all(kLeast), x));  // NaN stays: the second operand is taken then
  const __m512 shifted = _mm512_add_ps(_mm512_mul_ps(x, all(kLog2e)), all(kMagic));
  const __m512 k = _mm512_sub_ps(shifted, all(kMagic));
  const __m512 r = _mm512_sub_ps(_mm512_sub_ps(x, _mm512_mul_ps(k, all(kLn2High))), _mm512_mul_ps(k, all(kLn2Low)));
  __m512 p = all(kPowers[0]);
  for (int i = 1; i < 6; ++i) p = _mm512_add_ps(_mm512_mul_ps(p, r), all(kPowers[i]));
  p = _mm512_add_ps(_mm512_add_ps(_mm512_mul_ps(p, _mm512_mul_ps(r, r)), r), all(1.0f));
  const __m512i power = _mm512_add_epi32(_mm512_slli_epi32(_mm512_castps_si512(shifted), 23), _mm512_set1_epi32(0x3f800000));
  return _mm512_mul_ps(p, _mm512_castsi512_ps(power));
}

// renew() of pieces.h.
void renew512(float* scores, int64_t rows, int64_t n, float* mine) {
  static_assert(kTogether % 16 == 0);
  __m512 most = _mm512_set1_ps(mine[0]), sums = _mm512_setzero_ps();
  for (int64_t i = 0; i < rows; i += 16) {
    const __m512 x = _mm512_mask_loadu_ps(_mm512_set1_ps(-INFINITY), static_cast<__mmask16>(first(rows - i)), scores + i);
    most = _mm512_max_ps(x, most);
  }
  const float largest = _mm512_reduce_max_ps(most);
  for (int64_t i = 0; i < kTogether; i += 16) {
    const __mmask16 seen = static_cast<__mmask16>(first(rows - i));
    const __m512 x = _mm512_maskz_loadu_ps(seen, scores + i);
    const __m512 weight = _mm512_maskz_mov_ps(seen, exponential(_mm512_sub_ps(x, _mm512_set1_ps(largest))));
    _mm512_storeu_ps(scores + i, weight);
    sums = _mm512_add_ps(sums, weight);
  }
  const float before = mine[0] == largest ? 1.0f : exponential(mine[0] - largest);
  mine[0] = largest, mine[1] = mine[1] * before + _mm512_reduce_add_ps(sums);
  if (before == 1.0f) return;
  for (int64_t k = 0; k < n; k += 16) {  // n is a multiple of 64 here
    _mm512_storeu_ps(mine + 2 + k, _mm512_mul_ps(_mm512_loadu_ps(mine + 2 + k), _mm512_set1_ps(before)));
  }
}

constexpr int kQueries = 6;  // at once: 4 registers each

// Scores of some rows: scores[h][i], i < rows <= kTogether.
template <int H>
void scores_of(const float* query, int64_t n, const Reader& keys, int64_t rows, float (*scores)[kTogether]) {
  __m512 total[H];
  for (int h = 0; h < H; ++h) {
    total[h] = _mm512_setzero_ps();
    for (int64_t k = 0; k < n; k += 16) total[h] = _mm512_add_ps(total[h], _mm512_loadu_ps(query + h * n + k));
  }
  float sums[H];
  for (int h = 0; h < H; ++h) sums[h] = _mm512_reduce_add_ps(total[h]);
  // Four rows at a time; behind the last one it is read again.
  for (int64_t i = 0; i < rows; i += 4) {
    __m512 here[H][4];
    for (int r = 0; r < 4; ++r) {
      const int64_t row = i + r < rows ? i + r : rows - 1;
      for (int h = 0; h < H; ++h) here[h][r] = _mm512_setzero_ps();
      for (int64_t at = 0; at < n; at += kBlock) {
        __m512 x[4];
        keys.numbers(row, at, x);
        for (int h = 0; h < H; ++h)
          for (int k = 0; k < 4; ++k) {
            here[h][r] = _mm512_fmadd_ps(x[k], _mm512_loadu_ps(query + h * n + at + 16 * k), here[h][r]);
          }
      }
    }
    const __m128 scales = _mm_loadu_ps(keys.scale + i), zeros = _mm_loadu_ps(keys.zero + i);
    for (int h = 0; h < H; ++h) {
      const __m128 found = totals(here[h][0], here[h][1], here[h][2], here[h][3]);
      _mm_storeu_ps(scores[h] + i, _mm_mul_ps(scales, _mm_sub_ps(found, _mm_mul_ps(zeros, _mm_set1_ps(sums[h])))));
    }
  }
}

// Weights [kTogether] of rows times their scales; returns the sum of those times the rows' zero points.
float scale_weights(const Reader& values, int64_t rows, float* weights) {
  __m512 sum = _mm512_setzero_ps();
  for (int64_t i = 0; i < rows; i += 16) {
    const __mmask16 there = static_cast<__mmask16>(first(rows - i));
    const __m512 scaled = _mm512_maskz_mul_ps(there, _mm512_loadu_ps(weights + i), _mm512_loadu_ps(values.scale + i));
    _mm512_storeu_ps(weights + i, scaled);
    sum = _mm512_add_ps(sum, _mm512_maskz_mul_ps(there, scaled, _mm512_loadu_ps(values.zero + i)));
  }
  return _mm512_reduce_add_ps(sum);
}

// Adds weights[h][i] times rows of values, less zeros[h], to out[h], 64 entries from `at` on.
template <int H>
void add_values(const Reader& values, int64_t n, int64_t at, int64_t rows, const float (*weights)[kTogether], const float* zeros,
                float* out) {
  __m512 sums[H][4];
  for (int h = 0; h < H; ++h)
    for (int k = 0; k < 4; ++k) sums[h][k] = _mm512_loadu_ps(out + h * (n + 2) + at + 16 * k);
  for (int64_t i = 0; i < rows; ++i) {
    __m512 x[4];
    values.numbers(i, at, x);
    for (int h = 0; h < H; ++h)
      for (int k = 0; k < 4; ++k) sums[h][k] = _mm512_fmadd_ps(_mm512_set1_ps(weights[h][i]), x[k], sums[h][k]);
  }
  for (int h = 0; h < H; ++h)
    for (int k = 0; k < 4; ++k) {
      _mm512_storeu_ps(out + h * (n + 2) + at + 16 * k, _mm512_sub_ps(sums[h][k], _mm512_set1_ps(zeros[h])));
    }
}

void attend512(const float* query, int count, int64_t n, float scaling, const Span& keys, const Span& values, int64_t begin,
               int64_t end, const int64_t* ends, float* out) {
  if (n % kBlock != 0) return attend_to(query, count, n, scaling, keys, values, begin, end, ends, out);
  if (keys.type == kBfloat && count <= kFew) return attend_few(query, count, n, scaling, keys, values, begin, end, ends, out);
  if (keys.type == kBfloat) return attend_half<Dots>(query, count, n, scaling, keys, values, begin, end, ends, out);
  Reader key(keys, n, scaling), value(values, n, 1);
  float scores[kMaxQueries][kTogether], zeros[kMaxQueries];
  begin_sums(count, n, out);
  end = last_seen(ends, count, end);
  for (int64_t from = begin; from < end; from += kTogether) {
    const int64_t some = end - from < kTogether ? end - from : kTogether;
    key.begin(from, some);
    over_queries<kQueries>(count, [&](auto now, int h) { scores_of<now()>(query + h * n, n, key, some, scores + h); });
    renew_all(renew512, scores, count, from, some, ends, n, out);
    value.begin(from, some);
    for (int h = 0; h < count; ++h) zeros[h] = scale_weights(value, some, scores[h]);
    for (int64_t at = 0; at < n; at += kBlock) {
      over_queries<kQueries>(count, [&](auto now, int h) { add_values<now()>(value, n, at, some, scores + h, zeros + h, out + h * (n + 2) + 2); });
    }
  }
}

}  // namespace
}  // namespace sordino
