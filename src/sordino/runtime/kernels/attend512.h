// Attention over rows of a cache with AVX-512, for heads whose size is a multiple of 64; others take pieces.h's own.
//
// Codes are multiplied as they are: q · (c - z) s = s (q · c - z Σq), and Σ w s (c - z) = Σ (w s) c - Σ (w s) z. Up to four query heads share
// what is decoded of a key head's row.
#include "block.h"

namespace sordino {
namespace {

constexpr int kQueries = 4;  // query heads at once

// 64 numbers of a row, from its entry `at` on: fp32 [4][16], codes without zero point and scale.
struct Reader {
  const Span& s;
  const Bytes unpack;
  __m512i spread[4];

  explicit Reader(const Span& span) : s(span), unpack(span.bits == 0 ? 8 : span.bits) {
    for (int k = 0; k < 4; ++k) {
      alignas(64) uint8_t at[64] = {};
      for (int i = 0; i < 16; ++i) at[4 * i] = static_cast<uint8_t>(16 * k + i);
      spread[k] = _mm512_load_si512(at);
    }
  }

  void operator()(const uint8_t* row, int64_t at, __m512 out[4]) const {
    if (s.bits == 0 && s.type == kFloat) {
      for (int k = 0; k < 4; ++k) out[k] = _mm512_loadu_ps(reinterpret_cast<const float*>(row) + at + 16 * k);
    } else if (s.bits == 0) {
      const uint16_t* half = reinterpret_cast<const uint16_t*>(row) + at;
      for (int k = 0; k < 4; ++k) out[k] = widen16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(half + 16 * k)));
    } else {
      const __m512i code = unpack(_mm512_maskz_loadu_epi8(first(8 * s.bits), row + at * s.bits / 8));
      for (int k = 0; k < 4; ++k) {
        out[k] = _mm512_cvtepi32_ps(_mm512_maskz_permutexvar_epi8(0x1111111111111111ull, spread[k], code));
      }
    }
  }

  // Scale and zero point of a row of n entries; 1 and 0 for plain numbers.
  void fixed(const uint8_t* row, int64_t n, float* scale, float* zero) const {
    *scale = 1, *zero = 0;
    if (s.bits != 0) unit_of(s, row, n, scale, zero);
  }
};

// Scores of some rows: scores[h][i], i < rows <= kTogether.
template <int H>
void scores_of(const float* query, int64_t n, const Reader& read, int64_t from, int64_t rows, float (*scores)[kTogether]) {
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
    float scale[4], zero[4];
    for (int r = 0; r < 4; ++r) {
      const uint8_t* row = read.s.data + (from + (i + r < rows ? i + r : rows - 1)) * read.s.stride;
      _mm_prefetch(reinterpret_cast<const char*>(row) + kAhead, _MM_HINT_T0);
      for (int h = 0; h < H; ++h) here[h][r] = _mm512_setzero_ps();
      for (int64_t at = 0; at < n; at += kBlock) {
        __m512 x[4];
        read(row, at, x);
        for (int h = 0; h < H; ++h)
          for (int k = 0; k < 4; ++k) {
            here[h][r] = _mm512_fmadd_ps(x[k], _mm512_loadu_ps(query + h * n + at + 16 * k), here[h][r]);
          }
      }
      read.fixed(row, n, &scale[r], &zero[r]);
    }
    const __m128 scales = _mm_loadu_ps(scale), zeros = _mm_loadu_ps(zero);
    for (int h = 0; h < H; ++h) {
      const __m128 found = totals(here[h][0], here[h][1], here[h][2], here[h][3]);
      _mm_storeu_ps(scores[h] + i, _mm_mul_ps(scales, _mm_sub_ps(found, _mm_mul_ps(zeros, _mm_set1_ps(sums[h])))));
    }
  }
}

// Adds weights[h][i] times rows of values to out[h], 64 entries from `at` on.
template <int H>
void add_values(const Reader& read, int64_t n, int64_t at, int64_t from, int64_t rows, const float (*weights)[kTogether],
                float* out) {
  __m512 sums[H][4];
  float zeros[H] = {};
  for (int h = 0; h < H; ++h)
    for (int k = 0; k < 4; ++k) sums[h][k] = _mm512_loadu_ps(out + h * (n + 2) + at + 16 * k);
  for (int64_t i = 0; i < rows; ++i) {
    const uint8_t* row = read.s.data + (from + i) * read.s.stride;
    _mm_prefetch(reinterpret_cast<const char*>(row) + kAhead, _MM_HINT_T0);
    __m512 x[4];
    read(row, at, x);
    float scale, zero;
    read.fixed(row, n, &scale, &zero);
    for (int h = 0; h < H; ++h) {
      const float weight = weights[h][i] * scale;
      zeros[h] += weight * zero;
      for (int k = 0; k < 4; ++k) sums[h][k] = _mm512_fmadd_ps(_mm512_set1_ps(weight), x[k], sums[h][k]);
    }
  }
  for (int h = 0; h < H; ++h)
    for (int k = 0; k < 4; ++k) {
      _mm512_storeu_ps(out + h * (n + 2) + at + 16 * k, _mm512_sub_ps(sums[h][k], _mm512_set1_ps(zeros[h])));
    }
}

template <int H>
void attend_some(const float* query, int64_t n, const Span& keys, const Span& values, int64_t begin, int64_t end, float* out) {
  const Reader key(keys), value(values);
  float scores[H][kTogether];
  begin_sums(H, n, out);
  for (int64_t from = begin; from < end; from += kTogether) {
    const int64_t some = end - from < kTogether ? end - from : kTogether;
    scores_of<H>(query, n, key, from, some, scores);
    for (int h = 0; h < H; ++h) renew(scores[h], some, n, out + h * (n + 2));
    for (int64_t at = 0; at < n; at += kBlock) add_values<H>(value, n, at, from, some, scores, out + 2);
  }
}

void attend512(const float* query, int heads, int64_t n, const Span& keys, const Span& values, int64_t begin, int64_t end,
               float* out) {
  if (n % kBlock != 0) return attend_to(query, heads, n, keys, values, begin, end, out);
  for (int h = 0; h < heads; h += kQueries) {
    const float* q = query + h * n;
    float* to = out + h * (n + 2);
    switch (heads - h) {
      case 1: attend_some<1>(q, n, keys, values, begin, end, to); break;
      case 2: attend_some<2>(q, n, keys, values, begin, end, to); break;
      case 3: attend_some<3>(q, n, keys, values, begin, end, to); break;
      default: attend_some<kQueries>(q, n, keys, values, begin, end, to);
    }
  }
}

}  // namespace
}  // namespace sordino
