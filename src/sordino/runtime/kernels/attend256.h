// Attention over rows of a cache with AVX2, for heads whose size is a multiple of 32; others take pieces.h's own.
//
// Rows are decoded once for all queries. For scores they stand as columns, so that eight of them are multiplied at once and no sum goes
// across a register. Every sum is made in one order, whatever is beside it.
#pragma once
#include "pieces256.h"

namespace sordino {
namespace {

constexpr int kSide = 3;    // queries side by side
constexpr int kWidth = 4;  // registers side by side

// sums[h][k] += x[h][i] times register k of row i, of `count` rows, `apart` numbers apart.
template <int H>
void add_rows(const float* x, int64_t stride, const float* rows, int64_t apart, int64_t count, float* out, int64_t out_stride) {
  __m256 sums[H][kWidth];
  for (int h = 0; h < H; ++h)
    for (int k = 0; k < kWidth; ++k) sums[h][k] = _mm256_loadu_ps(out + h * out_stride + kEight * k);
  for (int64_t i = 0; i < count; ++i) {
    __m256 row[kWidth];
    for (int k = 0; k < kWidth; ++k) row[k] = _mm256_loadu_ps(rows + i * apart + kEight * k);
    for (int h = 0; h < H; ++h) {
      const __m256 factor = _mm256_set1_ps(x[h * stride + i]);
      for (int k = 0; k < kWidth; ++k) sums[h][k] = _mm256_fmadd_ps(factor, row[k], sums[h][k]);
    }
  }
  for (int h = 0; h < H; ++h)
    for (int k = 0; k < kWidth; ++k) _mm256_storeu_ps(out + h * out_stride + kEight * k, sums[h][k]);
}

// The same for any number of queries and `n` numbers of a row, a multiple of 32.
void add_all(int queries, const float* x, int64_t stride, const float* rows, int64_t apart, int64_t count, int64_t n, float* out,
             int64_t out_stride) {
  for (int h = 0; h < queries; h += kSide) {
    for (int64_t at = 0; at < n; at += kWidth * kEight) {
      const float* from = x + h * stride;
      float* to = out + h * out_stride + at;
      switch (queries - h) {
        case 1: add_rows<1>(from, stride, rows + at, apart, count, to, out_stride); break;
        case 2: add_rows<2>(from, stride, rows + at, apart, count, to, out_stride); break;
        default: add_rows<kSide>(from, stride, rows + at, apart, count, to, out_stride);
      }
    }
  }
}

void attend256(const float* query, int count, int64_t n, float scaling, const Span& keys, const Span& values, int64_t begin,
               int64_t end, const int64_t* ends, float* out) {
  if (n % (kWidth * kEight) != 0) return attend_to(query, count, n, scaling, keys, values, begin, end, ends, out);
  static_assert(kTogether % (kWidth * kEight) == 0);
  thread_local Scratch memory;
  float* rows = static_cast<float*>(memory.get(2 * kTogether * n * 4));  // [kTogether, n]
  float* columns = rows + kTogether * n;                                 // [n, kTogether]
  alignas(64) uint8_t codes[kMaxSize + kBlock];
  alignas(32) float scores[kMaxQueries][kTogether];
  const auto load = [&](const Span& span, int64_t from, int64_t some) {
    for (int64_t i = 0; i < some; ++i) load_row(span, from + i, n, rows + i * n, codes);
  };
  begin_sums(count, n, out);
  end = last_seen(ends, count, end);
  for (int64_t from = begin; from < end; from += kTogether) {
    const int64_t some = end - from < kTogether ? end - from : kTogether;
    const int64_t whole = (some + kWidth * kEight - 1) / (kWidth * kEight) * kWidth * kEight;
    load(keys, from, some);
    std::memset(rows + some * n, 0, static_cast<size_t>((whole - some) * n) * 4);
    for (int64_t i = 0; i < whole; i += kEight)
      for (int64_t k = 0; k < n; k += kEight) turn_words(rows + i * n + k, 4 * n, columns + k * kTogether + i, 4 * kTogether);
    for (int h = 0; h < count; ++h) std::memset(scores[h], 0, sizeof scores[h]);
    add_all(count, query, n, columns, kTogether, n, whole, scores[0], kTogether);
    for (int h = 0; h < count; ++h)
      for (int64_t i = 0; i < kTogether; ++i) scores[h][i] *= scaling;
    renew_all(renew256, scores, count, from, some, ends, n, out);
    load(values, from, some);
    add_all(count, scores[0], kTogether, rows, n, some, n, out + 2, n + 2);
  }
}

constexpr Pieces kPieces256 = [] {
  Pieces pieces = kPieces;
  pieces.attend = attend256;
  pieces.glu = glu256;
  return pieces;
}();

}  // namespace
}  // namespace sordino
