// Attention of a few queries, as in decoding, over rows of a cache in half precision: to the bit what attend_half.h makes of them with
// its dot products of pairs, but with rows where that has queries, since most of sixteen places would be empty.
//
// Scores: sixteen rows lie side by side, one a lane. Values: entries lie side by side. Codes of up to 4 bits become numbers of bf16, less
// their zero point, by a look into a table, straight from the stored bits.
#pragma once
#include <type_traits>

#include "attend_half.h"

namespace sordino {
namespace {

constexpr int kFew = 8;    // queries that are faster so
constexpr int kPass = 4;   // of them that values are decoded for at once: 4 registers each
constexpr int kLift = 16;  // middle of the table of numbers

// body(n) with n as a constant, 1 <= n <= kMost.
template <int kMost, class Body>
void with_count(int n, Body body) {
  if constexpr (kMost > 1) {
    if (n < kMost) return with_count<kMost - 1>(n, body);
  }
  body(std::integral_constant<int, kMost>{});
}

// body(number of queries, first one) for up to kMost of them at once, as even as can be.
template <int kMost, class Body>
void over_queries(int count, Body body) {
  for (int left = count, passes = (count + kMost - 1) / kMost; left > 0; --passes) {
    const int now = (left + passes - 1) / passes, h = count - left;
    with_count<kMost>(now, [&](auto some) { body(some, h); });
    left -= now;
  }
}

// What rows of a piece are multiplied with, and what is taken off their codes, as kLift less the zero point.
struct Units {
  alignas(64) float scale[kChunk];
  alignas(64) uint8_t lift[kChunk];

  Units(const Span& s, int64_t n, const uint8_t* data, int64_t rows, float times) {
    for (int64_t i = 0; i < rows; ++i) {
      float one = 1, zero = 0;
      if (s.bits != 0) unit_of(s, data + i * s.stride, n, &one, &zero);
      scale[i] = one * times, lift[i] = static_cast<uint8_t>(kLift - static_cast<int>(zero));
    }
    const int64_t room = (rows + kSide - 1) / kSide * kSide;
    for (int64_t i = rows; i < room; ++i) scale[i] = 0, lift[i] = kLift;
  }
};

// Asks for 64 numbers of bf16 that come later.
inline void ahead(const uint8_t* p) {
  _mm_prefetch(reinterpret_cast<const char*>(p) + kAhead, _MM_HINT_T0);
  _mm_prefetch(reinterpret_cast<const char*>(p) + kAhead + kBlock, _MM_HINT_T0);
}

// Rows of bf16.
struct Numbers {
  const uint8_t* data;
  int64_t stride, rows;
  const Zip zip{};

  // use(p, entries at + 2p and at + 2p + 1 of rows i … i + 16), p < 32; behind the last row, any.
  template <class Use>
  void pairs(int64_t i, int64_t at, Use use) const {
    alignas(64) uint8_t some[kSide][2 * kBlock];
    const uint8_t* from = data + i * stride + 2 * at;
    int64_t step = stride;
    for (int64_t r = 0; r < kSide; ++r) ahead(from + r * stride);
    if (rows - i < kSide) {
      for (int64_t r = 0; r < kSide; ++r) std::memcpy(some[r], from + (i + r < rows ? r : 0) * stride, sizeof some[r]);
      from = some[0], step = sizeof some[0];
    }
    alignas(64) int8_t tile[kSide * kBlock];
    for (int half = 0; half < 2; ++half) {
      transpose(reinterpret_cast<const int8_t*>(from) + half * kBlock, step, tile);
      for (int p = 0; p < kSide; ++p) use(half * kSide + p, _mm512_load_si512(tile + p * kBlock));
    }
  }

  // Entries at … at + 64 of rows i and i + 1, in turns; behind the last row, zero.
  void two(int64_t i, int64_t at, __m512i out[4]) const {
    const uint8_t* from = data + i * stride + 2 * at;
    const __mmask64 there = i + 1 < rows ? ~0ull : 0;
    ahead(from), ahead(from + stride);
    for (int half = 0; half < 2; ++half, from += kBlock) {
      const __m512i a = _mm512_loadu_si512(from), b = _mm512_maskz_loadu_epi8(there, there ? from + stride : from);
      out[2 * half] = _mm512_permutex2var_epi16(a, zip.low, b);
      out[2 * half + 1] = _mm512_permutex2var_epi16(a, zip.high, b);
    }
  }
};

// Rows of codes of up to 4 bits.
struct Codes {
  const uint8_t* data;
  int64_t stride, rows;
  const uint8_t* lift;  // Units'
  int bits;
  __mmask32 block;  // bytes of 64 codes
  Bytes unpack;
  __m512i units, fields[4], mask, mix[4], table;

  Codes(const Span& s, const uint8_t* first_row, int64_t n, const uint8_t* lifts)
      : data(first_row), stride(s.stride), rows(n), lift(lifts), bits(s.bits), block(static_cast<__mmask32>(first(8 * bits))), unpack(bits) {
    alignas(64) uint8_t at[64], from[4][64], together[4][64];
    alignas(64) uint16_t numbers[2 * kLift];
    for (int i = 0; i < 64; ++i) {
      at[i] = static_cast<uint8_t>(i / 32 * 32 + (i % 32 / 4 * bits + i % 4) % 32);  // a unit of eight codes in 32 bits
      for (int m = 0; m < 4; ++m) {
        from[m][i] = static_cast<uint8_t>(i / 4 % 2 * 32 + (2 * m + i / 2 % 2) * bits);  // its codes 2m and 2m + 1 in 16 bits each
        together[m][i] = static_cast<uint8_t>(i / 2 % 2 * 64 + 16 * m + i / 4);
      }
    }
    for (int i = 0; i < 2 * kLift; ++i) numbers[i] = narrow(static_cast<float>(i - kLift));
    units = _mm512_load_si512(at), table = _mm512_load_si512(numbers);
    for (int m = 0; m < 4; ++m) fields[m] = _mm512_load_si512(from[m]), mix[m] = _mm512_load_si512(together[m]);
    mask = _mm512_set1_epi16(static_cast<int16_t>((1 << bits) - 1));
  }

  __m256i bytes(int64_t i, int64_t at) const {
    const uint8_t* row = data + (i < rows ? i : rows - 1) * stride;
    _mm_prefetch(reinterpret_cast<const char*>(row) + kAhead, _MM_HINT_T0);
    return _mm256_maskz_loadu_epi8(block, row + at * bits / 8);
  }

  // Blocks of rows i and j, a unit a lane of 32 bits.
  __m512i both(int64_t i, int64_t j, int64_t at) const {
    return _mm512_permutexvar_epi8(units, _mm512_inserti64x4(_mm512_castsi256_si512(bytes(i, at)), bytes(j, at), 1));
  }

  // Unit c (first) and c + 4 (second) of every row: of rows i, i + 4; i + 1, i + 5; …
  void columns(int64_t i, int64_t at, __m512i out[4]) const {
    __m512i row[4];
    for (int k = 0; k < 4; ++k) row[k] = both(i + k, i + k + 4, at);
    const __m512i low = _mm512_unpacklo_epi32(row[0], row[1]), high = _mm512_unpackhi_epi32(row[0], row[1]);
    const __m512i low2 = _mm512_unpacklo_epi32(row[2], row[3]), high2 = _mm512_unpackhi_epi32(row[2], row[3]);
    out[0] = _mm512_unpacklo_epi64(low, low2), out[1] = _mm512_unpackhi_epi64(low, low2);
    out[2] = _mm512_unpacklo_epi64(high, high2), out[3] = _mm512_unpackhi_epi64(high, high2);
  }

  template <class Use>
  void pairs(int64_t i, int64_t at, Use use) const {
    __m512i left[4], right[4];
    columns(i, at, left);
    columns(i + 8, at, right);
    const __m512i lifted = _mm512_cvtepu8_epi32(_mm_load_si128(reinterpret_cast<const __m128i*>(lift + i)));
    const __m512i both_lifted = _mm512_or_si512(lifted, _mm512_slli_epi32(lifted, 16));
    for (int unit = 0; unit < 8; ++unit) {
      const __m512i codes = unit < 4 ? _mm512_shuffle_i32x4(left[unit], right[unit], 0x88)
                                     : _mm512_shuffle_i32x4(left[unit - 4], right[unit - 4], 0xdd);
      for (int m = 0; m < 4; ++m) {
        const __m512i pair = _mm512_and_si512(_mm512_multishift_epi64_epi8(fields[m], codes), mask);
        use(4 * unit + m, _mm512_permutexvar_epi16(_mm512_add_epi16(pair, both_lifted), table));
      }
    }
  }

  // Codes of a row's block as bytes, lifted.
  __m512i lifted_codes(int64_t i, int64_t at) const {
    const __m512i codes = unpack(_mm512_castsi256_si512(bytes(i, at)));
    return _mm512_add_epi8(codes, _mm512_set1_epi8(static_cast<char>(lift[i])));
  }

  void two(int64_t i, int64_t at, __m512i out[4]) const {
    const __m512i a = lifted_codes(i, at), b = i + 1 < rows ? lifted_codes(i + 1, at) : _mm512_set1_epi8(kLift);
    for (int k = 0; k < 4; ++k) out[k] = _mm512_permutexvar_epi16(_mm512_permutex2var_epi8(a, mix[k], b), table);
  }
};

// body(rows begin … begin + rows of a cache as Codes or Numbers).
template <class Body>
void with_rows(const Span& s, int64_t begin, int64_t rows, int64_t n, const Units& units, Body body) {
  const uint8_t* data = s.data + begin * s.stride;
  if (s.bits == 0) return body(Numbers{data, s.stride, rows});
  if (s.bits <= 4) return body(Codes(s, data, rows, units.lift));
  const Desk d = desk_of(n);
  Reader reader(s, n, 1);
  gather(reader, begin, rows, rows, d.plain, d.key_scale);
  body(Numbers{reinterpret_cast<const uint8_t*>(d.plain), 2 * n, rows});
}

// Scores [kQ][kChunk] of queries [kQ, n] and rows.
template <int kQ, class Source>
void scores_of_few(const Source& keys, const uint16_t* query, int64_t n, const float* scale, float (*scores)[kChunk]) {
  for (int64_t i = 0; i < keys.rows; i += kSide) {
    __m512 sums[kQ];
    for (__m512& s : sums) s = _mm512_setzero_ps();
    for (int64_t at = 0; at < n; at += kBlock) {
      keys.pairs(i, at, [&](int p, __m512i pair) {
        for (int h = 0; h < kQ; ++h) sums[h] = _mm512_dpbf16_ps(sums[h], (__m512bh)pair, (__m512bh)Dots::all(query + h * n + at + 2 * p));
      });
    }
    for (int h = 0; h < kQ; ++h) _mm512_store_ps(scores[h] + i, _mm512_mul_ps(sums[h], _mm512_load_ps(scale + i)));
  }
}

// Scores of one query, which sees so many of the rows, become weights; out gets the largest score and the weights' sum. Both arrays
// have room for an even number of rows.
void weights_of(float* scores, int64_t sees, int64_t rows, const float* scale, uint16_t* weights, float* out) {
  const __m512 nothing = _mm512_set1_ps(-INFINITY);
  __m512 most = nothing;
  for (int64_t i = 0; i < rows; i += kSide) {
    const __m512 x = _mm512_mask_mov_ps(nothing, static_cast<__mmask16>(first(sees - i)), _mm512_load_ps(scores + i));
    _mm512_store_ps(scores + i, x);
    most = _mm512_max_ps(x, most);
  }
  const float largest = _mm512_reduce_max_ps(most);
  const __m512 base = _mm512_set1_ps(largest == -INFINITY ? 0.0f : largest);
  for (int64_t i = 0; i < rows; i += kSide) {
    const __m512 weight = exp2_of(_mm512_sub_ps(_mm512_load_ps(scores + i), base));
    _mm512_store_ps(scores + i, weight);
    const __m512 scaled = _mm512_mul_ps(weight, _mm512_load_ps(scale + i));
    _mm256_store_si256(reinterpret_cast<__m256i*>(weights + i), (__m256i)_mm512_cvtneps_pbh(scaled));
  }
  float sum = 0;
  for (int64_t i = 0; i < rows; i += 2) sum += scores[i] + scores[i + 1];
  out[0] = largest * kOctave, out[1] = sum;
}

// Adds up weights times rows: out [kQ, n + 2].
template <int kQ, class Source>
void weigh_few(const Source& values, const uint16_t (*weights)[kChunk], int64_t n, float* out) {
  for (int64_t at = 0; at < n; at += kBlock) {
    __m512 sums[kQ][4];
    for (auto& of_query : sums)
      for (__m512& s : of_query) s = _mm512_setzero_ps();
    for (int64_t i = 0; i < values.rows; i += 2) {
      __m512i x[4];
      values.two(i, at, x);
      for (int h = 0; h < kQ; ++h) {
        const __m512bh weight = (__m512bh)Dots::all(weights[h] + i);
        for (int k = 0; k < 4; ++k) sums[h][k] = _mm512_dpbf16_ps(sums[h][k], weight, (__m512bh)x[k]);
      }
    }
    for (int h = 0; h < kQ; ++h)
      for (int k = 0; k < 4; ++k) _mm512_storeu_ps(out + h * (n + 2) + at + 16 * k, sums[h][k]);
  }
}

// As attend_half(), for count <= kFew.
void attend_few(const float* query, int count, int64_t n, float scaling, const Span& keys, const Span& values, int64_t begin,
                int64_t end, const int64_t* ends, float* out) {
  int64_t sees[kFew];
  const int64_t rows = rows_seen(ends, count, begin, end, sees);
  alignas(64) uint16_t half[kFew * kMaxSize], weights[kFew][kChunk];
  alignas(64) float scores[kFew][kChunk];
  for (int64_t i = 0; i < count * n; i += 32) put32(half + i, _mm512_loadu_ps(query + i), _mm512_loadu_ps(query + i + 16));
  const Units key(keys, n, keys.data + begin * keys.stride, rows, scaling * kOctaves);  // so that 2^score is exp(score)
  const Units value(values, n, values.data + begin * values.stride, rows, 1);
  with_rows(keys, begin, rows, n, key, [&](const auto& source) {
    with_count<kFew>(count, [&](auto q) { scores_of_few<q()>(source, half, n, key.scale, scores); });
  });
  for (int h = 0; h < count; ++h) weights_of(scores[h], sees[h], rows, value.scale, weights[h], out + h * (n + 2));
  with_rows(values, begin, rows, n, value, [&](const auto& source) {
    over_queries<kPass>(count, [&](auto q, int h) { weigh_few<q()>(source, weights + h, n, out + h * (n + 2) + 2); });
  });
}

}  // namespace
}  // namespace sordino
