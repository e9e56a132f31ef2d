// Attention over rows of a cache in half precision, by products of bf16 that are summed in fp32, for heads whose size is a multiple of 64.
//
// Sixteen queries lie side by side, one a lane, so that their softmax needs no sum across a register. Codes less their zero point are exact
// in bf16, and are multiplied as they are: q · (c - z) s = s (q · (c - z)), and Σ w s (c - z) with w s rounded to bf16 once.
// A query's sums go over the rows in their order, whatever lies beside it.
// `Products` multiplies: matrix tiles (amx.cpp) or dot products of pairs (below).
#pragma once
#include <cmath>
#include <initializer_list>

#include "products.h"
#include "reader512.h"

namespace sordino {
namespace {

constexpr int kSide = 16;                       // queries side by side
constexpr int64_t kPairs = kSide * 2 * kSide;  // numbers of a tile: 16 rows of 16 pairs

// 2^r for |r| <= 1/2, to 2e-7; from a weighted fit of ours, less the constant term, 1.
constexpr float kExp2[] = {1.32765e-3f, 9.67554e-3f, 5.550713e-2f, 2.402212e-1f, 6.9314697e-1f};

constexpr float kOctaves = 1.44269504088896341f, kOctave = 0.693147180559945f;  // of e; ln 2

// 2^x for x <= 0, and 0 below 2^-80: what the scales make of less is no normal number, and slow. NaN stays.
__m512 exp2_of(__m512 x) {
  const __mmask16 counts = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-80), _CMP_NLT_UQ);
  const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), r = _mm512_sub_ps(x, whole);
  __m512 p = _mm512_set1_ps(kExp2[0]);
  for (int i = 1; i < 5; ++i) p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(kExp2[i]));
  return _mm512_maskz_scalef_ps(counts, _mm512_fmadd_ps(p, r, _mm512_set1_ps(1)), whole);
}

// Memory for kChunk rows and 16 queries at a time.
struct Desk {
  uint16_t *keys, *values, *plain, *query, *weights;  // keys [rows, n]; values [rows / 2, n, 2]; query [n / 2, 16, 2]; weights [rows / 32, 16, 32]
  float *scores, *sums, *key_scale, *value_scale;  // scores [rows, 16]; sums [16, n]
};

Desk desk_of(int64_t n) {
  thread_local Scratch memory;
  const int64_t matrix = kChunk * n * 2, all = 3 * matrix + kSide * n * 6 + kChunk * (kSide * 6 + 8);
  char* at = static_cast<char*>(memory.get(all));
  const auto take = [&](int64_t bytes) { return at += bytes, at - bytes; };
  Desk d;
  for (uint16_t** m : {&d.keys, &d.values, &d.plain}) *m = reinterpret_cast<uint16_t*>(take(matrix));
  d.query = reinterpret_cast<uint16_t*>(take(kSide * n * 2));
  d.weights = reinterpret_cast<uint16_t*>(take(kChunk * kSide * 2));
  d.sums = reinterpret_cast<float*>(take(kSide * n * 4));
  d.scores = reinterpret_cast<float*>(take(kChunk * kSide * 4));
  for (float** v : {&d.key_scale, &d.value_scale}) *v = reinterpret_cast<float*>(take(kChunk * 4));
  return d;
}

void put32(uint16_t* to, __m512 low, __m512 high) { _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(high, low)); }

// `rows` rows from `begin` on as bf16 [room, n], zero behind them, and their scales.
void gather(Reader& reader, int64_t begin, int64_t rows, int64_t room, uint16_t* to, float* scale) {
  const int64_t n = reader.n;
  for (int64_t from = 0; from < rows; from += kTogether) {
    const int64_t some = rows - from < kTogether ? rows - from : kTogether;
    reader.begin(begin + from, some);
    std::memcpy(scale + from, reader.scale, static_cast<size_t>(some) * 4);
    for (int64_t i = 0; i < some; ++i) {
      const __m512 zero = _mm512_set1_ps(reader.zero[i]);
      for (int64_t at = 0; at < n; at += kBlock) {
        __m512 x[4];
        reader.numbers(i, at, x);
        for (__m512& v : x) v = _mm512_sub_ps(v, zero);
        uint16_t* row = to + (from + i) * n + at;
        put32(row, x[0], x[1]);
        put32(row + 32, x[2], x[3]);
      }
    }
  }
  std::memset(to + rows * n, 0, static_cast<size_t>((room - rows) * n) * 2);
  for (int64_t i = rows; i < room; ++i) scale[i] = 0;
}

// Every second entry of the result from a, the others from b.
struct Zip {
  __m512i low, high;
  __m512i halves;  // from the first and the second half of one register

  Zip() {
    alignas(64) uint16_t at[3][32];
    for (int i = 0; i < 32; ++i) {
      at[0][i] = static_cast<uint16_t>(i / 2 + i % 2 * 32);
      at[1][i] = static_cast<uint16_t>(16 + i / 2 + i % 2 * 32);
      at[2][i] = static_cast<uint16_t>(i / 2 + i % 2 * 16);
    }
    low = _mm512_load_si512(at[0]), high = _mm512_load_si512(at[1]), halves = _mm512_load_si512(at[2]);
  }
};

// Rows [rows, n] as pairs of rows [rows / 2, n, 2].
void pair_up(const Zip& zip, const uint16_t* from, int64_t rows, int64_t n, uint16_t* to) {
  for (int64_t r = 0; r < rows; r += 2)
    for (int64_t i = 0; i < n; i += 32) {
      const __m512i a = _mm512_loadu_si512(from + r * n + i), b = _mm512_loadu_si512(from + (r + 1) * n + i);
      _mm512_storeu_si512(to + r * n + 2 * i, _mm512_permutex2var_epi16(a, zip.low, b));
      _mm512_storeu_si512(to + r * n + 2 * i + 32, _mm512_permutex2var_epi16(a, zip.high, b));
    }
}

// Up to 16 queries [count, n] as [n / 2, 16, 2]; the others are zero.
void stand_up(const float* query, int count, int64_t n, uint16_t* to) {
  alignas(64) uint16_t rows[kSide][2 * kSide];
  for (int64_t i = 0; i < n; i += 32) {
    for (int h = 0; h < kSide; ++h) {
      const float* from = query + h * n + i;
      if (h < count) put32(rows[h], _mm512_loadu_ps(from), _mm512_loadu_ps(from + 16));
      else _mm512_store_si512(rows[h], _mm512_setzero_si512());
    }
    transpose(reinterpret_cast<const int8_t*>(rows), 64, reinterpret_cast<int8_t*>(to + i * kSide));
  }
}

template <class Products>
struct Half {
  const Products products{};
  const Desk d;
  const int64_t n;
  const Zip zip{};

  // Up to 16 queries, of which query h sees limit[h] of `rows` rows, and all of them see `whole` rows.
  void attend(const float* query, int count, const int32_t* limit, int64_t whole, int64_t rows, float* out) const {
    stand_up(query, count, n, d.query);
    const __m512i seen = _mm512_loadu_si512(limit);
    const __m512 nothing = _mm512_set1_ps(-INFINITY);
    const int64_t blocks = (rows + 31) / 32;
    Products::scores(d.keys, 2 * blocks, n, d.query, d.scores);
    __m512 odd_most = nothing, most = nothing;  // two, so that one need not wait for the other
    const auto keep = [&](int64_t i, bool all, __m512& largest) {
      __m512 x = _mm512_mul_ps(_mm512_loadu_ps(d.scores + i * kSide), _mm512_set1_ps(d.key_scale[i]));
      if (!all) x = _mm512_mask_mov_ps(nothing, _mm512_cmpgt_epi32_mask(seen, _mm512_set1_epi32(static_cast<int>(i))), x);
      largest = _mm512_max_ps(x, largest);
      _mm512_storeu_ps(d.scores + i * kSide, x);
    };
    int64_t i = 0;
    for (; i + 2 <= whole; i += 2) keep(i, true, most), keep(i + 1, true, odd_most);
    for (; i < blocks * 32; i += 2) keep(i, false, most), keep(i + 1, false, odd_most);
    most = _mm512_max_ps(most, odd_most);
    const __m512 base = _mm512_mask_mov_ps(most, _mm512_cmpeq_ps_mask(most, nothing), _mm512_setzero_ps());
    __m512 sum = _mm512_setzero_ps();
    alignas(64) uint16_t pairs[kPairs];
    for (i = 0; i < blocks * 32; i += 2) {
      __m512 weight[2], scaled[2];
      for (int k = 0; k < 2; ++k) {
        weight[k] = exp2_of(_mm512_sub_ps(_mm512_loadu_ps(d.scores + (i + k) * kSide), base));
        scaled[k] = _mm512_mul_ps(weight[k], _mm512_set1_ps(d.value_scale[i + k]));
      }
      sum = _mm512_add_ps(sum, _mm512_add_ps(weight[0], weight[1]));
      const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(scaled[1], scaled[0]);
      const __m512i pair = _mm512_permutexvar_epi16(zip.halves, both);
      _mm512_store_si512(pairs + i % 32 * kSide, pair);
      if (i % 32 == 30) transpose(reinterpret_cast<const int8_t*>(pairs), 64, reinterpret_cast<int8_t*>(d.weights + i / 32 * kPairs));
    }
    Products::weigh(d.weights, blocks, n, d.values, count, d.sums);
    alignas(64) float largest[kSide], total[kSide];
    _mm512_store_ps(largest, _mm512_mul_ps(most, _mm512_set1_ps(kOctave)));
    _mm512_store_ps(total, sum);
    for (int h = 0; h < count; ++h) {
      float* mine = out + h * (n + 2);
      mine[0] = largest[h], mine[1] = total[h];
      std::memcpy(mine + 2, d.sums + h * n, static_cast<size_t>(n) * 4);
    }
  }
};

// How many of the rows begin … end every query sees; returns the most.
int64_t rows_seen(const int64_t* ends, int count, int64_t begin, int64_t end, int64_t* sees) {
  int64_t most = 0;
  for (int h = 0; h < count; ++h) {
    sees[h] = (ends == nullptr || ends[h] > end ? end : ends[h]) - begin;
    if (sees[h] < 0) sees[h] = 0;
    most = sees[h] > most ? sees[h] : most;
  }
  return most;
}

template <class Products>
void attend_half(const float* query, int count, int64_t n, float scaling, const Span& keys, const Span& values, int64_t begin,
                 int64_t end, const int64_t* ends, float* out) {
  int64_t sees[kMaxQueries];
  const int64_t rows = rows_seen(ends, count, begin, end, sees);
  const int64_t room = (rows + 31) / 32 * 32;
  const Half<Products> half{{}, desk_of(n), n};
  const Desk& d = half.d;
  Reader key(keys, n, scaling * kOctaves), value(values, n, 1);  // so that 2^score is exp(score)
  gather(key, begin, rows, room, d.keys, d.key_scale);
  gather(value, begin, rows, room, d.plain, d.value_scale);
  pair_up(half.zip, d.plain, room, n, d.values);
  for (int h = 0; h < count; h += kSide) {
    const int some = count - h < kSide ? count - h : kSide;
    alignas(64) int32_t limit[kSide] = {};
    int64_t least = rows, most = 0;
    for (int i = 0; i < some; ++i) {
      const int64_t mine = sees[h + i];
      limit[i] = static_cast<int32_t>(mine), least = mine < least ? mine : least, most = mine > most ? mine : most;
    }
    half.attend(query + h * n, some, limit, least, most, out + h * (n + 2));
  }
}

// Products by dot products of pairs.
struct Dots {
  // Rows of keys [16 blocks, n] and 16 queries: to [16 blocks, 16].
  static void scores(const uint16_t* keys, int64_t blocks, int64_t n, const uint16_t* query, float* to) {
    for (int64_t r = 0; r < blocks * kSide; r += 8) {
      __m512 sums[8];
      for (int k = 0; k < 8; ++k) sums[k] = _mm512_setzero_ps();
      for (int64_t i = 0; i < n; i += 2) {
        const __m512bh q = (__m512bh)_mm512_loadu_si512(query + i * kSide);
        for (int k = 0; k < 8; ++k) sums[k] = _mm512_dpbf16_ps(sums[k], (__m512bh)all(keys + (r + k) * n + i), q);
      }
      for (int k = 0; k < 8; ++k) _mm512_storeu_ps(to + (r + k) * kSide, sums[k]);
    }
  }

  // Weights [blocks, 16, 32] of rows of values [16 blocks, n, 2]: to [16, n], for `count` queries.
  static void weigh(const uint16_t* weights, int64_t blocks, int64_t n, const uint16_t* values, int count, float* to) {
    for (int64_t at = 0; at < n; at += 4 * kSide)
      for (int h = 0; h < count; h += 4) {
        __m512 sums[4][4];
        for (auto& of_query : sums)
          for (__m512& s : of_query) s = _mm512_setzero_ps();
        for (int64_t p = 0; p < blocks * kSide; ++p) {
          __m512bh x[4];
          for (int k = 0; k < 4; ++k) x[k] = (__m512bh)_mm512_loadu_si512(values + 2 * (p * n + at + k * kSide));
          for (int q = 0; q < 4; ++q) {
            const __m512bh weight = (__m512bh)all(weights + p / kSide * kPairs + ((h + q) * kSide + p % kSide) * 2);
            for (int k = 0; k < 4; ++k) sums[q][k] = _mm512_dpbf16_ps(sums[q][k], weight, x[k]);
          }
        }
        for (int q = 0; q < 4; ++q)
          for (int k = 0; k < 4; ++k) _mm512_storeu_ps(to + (h + q) * n + at + k * kSide, sums[q][k]);
      }
  }

  // A pair of numbers for all lanes.
  static __m512i all(const uint16_t* pair) {
    int both;
    std::memcpy(&both, pair, 4);
    return _mm512_set1_epi32(both);
  }
};

}  // namespace
}  // namespace sordino
