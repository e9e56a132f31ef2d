// Integer products of many rows with AVX2. Sixteen outputs of a weight are laid out so that one register holds eight of them, a
// word of 32 bits each: four codes of 8 bits, or two of 16. The same word of a token's codes is broadcast beside it.
//
// `maddubs` sums pairs of 8-bit products in 16 bits. As many of its results as 16 bits surely hold are summed there before they are
// widened to 32: eight for weights of 4 bits and inputs of 8, all for inputs of 4. Weights of 8 bits would overflow at once
// and are multiplied as 16-bit numbers.
#pragma once
#include <algorithm>

#include "pieces256.h"

namespace sordino {
namespace {

constexpr int kFour = 4;              // tokens side by side
constexpr int kPair = 2 * kEight;     // outputs side by side
constexpr int64_t kDeep = 384;        // words of an output before the next tokens' turn: 16 outputs stay in the first-level cache
constexpr int64_t kManyTokens = 512;  // tokens before the next outputs' turn

// Codes of a row as words: of 8 bits, or of 16.
template <bool kWide>
void as_words(const uint8_t* codes, int64_t n, char* words) {
  if (!kWide) std::memcpy(words, codes, static_cast<size_t>(n));
  else for (int64_t i = 0; i < n; ++i) reinterpret_cast<int16_t*>(words)[i] = codes[i];
}

// Outputs o … o + 15 (those that are there) as [words, 16]; `plain` has room for eight rows of words and one of codes.
template <bool kWide>
void lay_out(const Linear& w, int64_t o, int64_t words, int32_t* to, char* plain) {
  const int64_t stride = 4 * words;
  uint8_t* codes = reinterpret_cast<uint8_t*>(plain + kEight * stride);
  for (int half = 0; half < 2; ++half) {
    for (int r = 0; r < kEight; ++r) {
      const int64_t at = o + half * kEight + r, n = at < w.outputs ? w.inputs : 0;
      char* row = plain + r * stride;
      std::memset(row, 0, static_cast<size_t>(stride));
      if (n == 0) continue;
      unpack_row(w.codes + at * w.row_bytes(), w.row_bytes(), w.bits, n, codes);
      as_words<kWide>(codes, n, row);
    }
    for (int64_t i = 0; i < words; i += kEight) turn_words(plain + 4 * i, stride, to + i * kPair + half * kEight, 4 * kPair);
  }
}

// Codes [rows, inputs] of one block of four tokens (those that are there) as [words, 4], zero where there are none; sums[m] of each.
// Returns the largest magnitude.
template <bool kWide>
int cut(const int8_t* x, int64_t rows, int64_t inputs, int64_t words, int32_t* to, int32_t* sums) {
  constexpr int64_t kCodes = kWide ? 2 : 4;
  std::memset(to, 0, static_cast<size_t>(words * kFour) * 4);
  int low = 0, high = 0;
  for (int64_t m = 0; m < kFour; ++m) {
    const int8_t* row = x + m * inputs;
    int32_t sum = 0;
    const int64_t n = m < rows ? inputs : 0;
    for (int64_t i = 0; i < n; ++i) {
      sum += row[i];
      low = std::min<int>(low, row[i]), high = std::max<int>(high, row[i]);
    }
    sums[m] = sum;
    int64_t i = 0;
    for (; !kWide && i + kCodes <= n; i += kCodes) std::memcpy(to + i / kCodes * kFour + m, row + i, 4);
    for (; i < n; ++i) {
      char* word = reinterpret_cast<char*>(to + i / kCodes * kFour + m);
      if (kWide) reinterpret_cast<int16_t*>(word)[i % kCodes] = row[i];
      else word[i % kCodes] = static_cast<char>(row[i]);
    }
  }
  return std::max(-low, high);
}

// Nothing is moved across a sum that has been added to: GCC would make many products first, for which there are too few registers.
inline void in_order(__m256i& sum) {
#ifdef __GNUC__
  __asm__ volatile("" : "+x"(sum));
#endif
}

// Adds the products of four tokens and sixteen outputs, `words` long, to sums [4, 16]; 16 bits hold `safe` of their words.
template <bool kWide>
void multiply(const int32_t* x, const int32_t* w, int64_t words, int64_t safe, int32_t* sums) {
  for (int64_t from = 0; from < words; from += safe) {
    const int64_t to = from + safe < words ? from + safe : words;
    __m256i here[kFour][2];
    for (int m = 0; m < kFour; ++m) here[m][0] = here[m][1] = _mm256_setzero_si256();
    for (int64_t i = from; i < to; ++i) {
      const __m256i low = _mm256_load_si256(reinterpret_cast<const __m256i*>(w + i * kPair));
      const __m256i high = _mm256_load_si256(reinterpret_cast<const __m256i*>(w + i * kPair + kEight));
#pragma GCC unroll 4
      for (int m = 0; m < kFour; ++m) {
        const __m256i four = _mm256_set1_epi32(x[i * kFour + m]);
        if (kWide) {
          here[m][0] = _mm256_add_epi32(here[m][0], _mm256_madd_epi16(low, four));
          here[m][1] = _mm256_add_epi32(here[m][1], _mm256_madd_epi16(high, four));
        } else {
          here[m][0] = _mm256_add_epi16(here[m][0], _mm256_maddubs_epi16(low, four));
          here[m][1] = _mm256_add_epi16(here[m][1], _mm256_maddubs_epi16(high, four));
        }
        in_order(here[m][0]);
        in_order(here[m][1]);
      }
    }
    for (int m = 0; m < kFour; ++m) {
      for (int half = 0; half < 2; ++half) {
        __m256i* sum = reinterpret_cast<__m256i*>(sums + m * kPair + half * kEight);
        const __m256i more = kWide ? here[m][half] : _mm256_madd_epi16(here[m][half], _mm256_set1_epi16(1));
        _mm256_store_si256(sum, _mm256_add_epi32(_mm256_load_si256(sum), more));
      }
    }
  }
}

// How many sums of two products of an unsigned code of `bits` bits and an input code no larger than `most` 16 bits hold.
inline int64_t safe_words(int bits, int most) { return most == 0 ? 32767 : 32767 / (2 * ((1 << bits) - 1) * most); }

template <bool kWide>
void many_rows(const Linear& w, const int8_t* x, const float* scale, bool one_scale, Type type, int64_t rows, char* out, int threads) {
  constexpr int64_t kCodes = kWide ? 2 : 4;
  const int64_t words = ((w.inputs + kCodes - 1) / kCodes + kEight - 1) / kEight * kEight;
  const int64_t blocks = (rows + kFour - 1) / kFour, strips = (w.outputs + kPair - 1) / kPair;
  thread_local Scratch all;
  int32_t* cuts = static_cast<int32_t*>(all.get(blocks * (kFour * (words + 1) + 1) * 4));
  int32_t *of_rows = cuts + blocks * kFour * words, *peaks = of_rows + blocks * kFour;
  over(blocks, kTokens / kFour, threads, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) {
      const int64_t m = b * kFour;
      peaks[b] = cut<kWide>(x + m * w.inputs, rows - m, w.inputs, words, cuts + m * words, of_rows + m);
    }
  });
  const int64_t safe = kWide ? words : safe_words(w.bits, *std::max_element(peaks, peaks + blocks));
  parallel_for(strips, threads, [&](int64_t strip) {
    thread_local Scratch memory;
    int32_t* laid = static_cast<int32_t*>(memory.get(words * kPair * 4 + kFour * kPair * 4 * blocks + kEight * words * 4 + w.inputs + kBlock));
    int32_t* sums = laid + words * kPair;
    const int64_t o = strip * kPair, some = std::min<int64_t>(w.outputs - o, kPair);
    lay_out<kWide>(w, o, words, laid, reinterpret_cast<char*>(sums + blocks * kFour * kPair));
    std::memset(sums, 0, static_cast<size_t>(blocks * kFour * kPair) * 4);
    for (int64_t from = 0; from < words; from += kDeep) {
      const int64_t deep = std::min(kDeep, words - from);
      for (int64_t b = 0; b < blocks; ++b) {
        multiply<kWide>(cuts + b * kFour * words + from * kFour, laid + from * kPair, deep, safe, sums + b * kFour * kPair);
      }
    }
    alignas(32) float scales[kPair] = {}, bias[kPair] = {};
    for (int64_t k = 0; k < some; ++k) scales[k] = widen(w.scale[o + k]), bias[k] = bias_at(w, o + k);
    const float* biased = w.bias == nullptr ? nullptr : bias;
    char last[4 * kPair];  // where fewer outputs are left
    for (int64_t m = 0; m < rows; ++m) {
      char* to = out + (m * w.outputs + o) * width(type);
      put_sixteen(sums + m * kPair, w.middle() * of_rows[m], scale[one_scale ? 0 : m], scales, biased, type, some == kPair ? to : last);
      if (some < kPair) std::memcpy(to, last, static_cast<size_t>(some * width(type)));
    }
  });
}

void many_of(const Linear& w, const int8_t* x, const float* scale, bool one_scale, Type type, int64_t rows, void* out, int threads) {
  for (int64_t m = 0; m < rows; m += kManyTokens) {
    const int64_t some = std::min(kManyTokens, rows - m);
    char* to = static_cast<char*>(out) + m * w.outputs * width(type);
    const float* scales = scale + (one_scale ? 0 : m);
    if (w.bits == 8) many_rows<true>(w, x + m * w.inputs, scales, one_scale, type, some, to, threads);
    else many_rows<false>(w, x + m * w.inputs, scales, one_scale, type, some, to, threads);
  }
}

void many256(const Product* products, int n, const int8_t* x, const float* scale, bool one_scale, Type type, int64_t rows, int threads) {
  for (int i = 0; i < n; ++i) many_of(*products[i].w, x, scale, one_scale, type, rows, products[i].out, threads);
}

}  // namespace
}  // namespace sordino
