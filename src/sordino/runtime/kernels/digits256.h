// Activations for AVX2: integers times a unit, a power of two that the largest of a group decides, and the integers as one or two
// digits of 16 bits. One keeps 14 binary places below the largest of a short group of bf16 numbers, two keep 29 or 30.
//
// Of every part of a group there is a register for each digit, where its sums begin: -2^(b-1) times the digits' own, which makes codes
// signed. Then come blocks of digits, in the order of codes256.h.
#pragma once
#include <cmath>

#include "codes256.h"

namespace sordino {
namespace {

float total(__m256 v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

int32_t total(__m256i v) {
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}

constexpr int64_t kPart = 32;  // blocks whose products with codes of any width 32 bits hold
constexpr int64_t kLane = 16;  // digits of a register

inline int digits_of(const Linear& w, Type type) { return type == kFloat || w.group > 2 * kBlock ? 2 : 1; }

// The power of two of which the largest of n numbers is 2^14 to 2^15 for one digit, 2^30 to 2^31 less 2^16 for two, half as many if it
// is near the end of that; NaN if one of them is not finite.
template <int kDigits, class T>
float unit_below(const T* x, int64_t n) {
  constexpr int kFraction = 16 * kDigits - 2;
  constexpr uint32_t kNear = kDigits == 1 ? 0 : 1 << 16;  // that the high digit of the largest may not exceed 16 bits
  uint32_t peak = 0;
  for (int64_t i = 0; i < n; ++i) {
    uint32_t u;
    if constexpr (sizeof(T) == 4) std::memcpy(&u, x + i, 4);
    else u = static_cast<uint32_t>(x[i]) << 16;
    u &= 0x7fffffffu;
    peak = u > peak ? u : peak;
  }
  if (peak >> 23 == 255) return NAN;
  const int exponent = static_cast<int>((peak + kNear) >> 23), least = kFraction + 1;
  return std::ldexp(1.0f, (exponent < least ? least : exponent) - kFraction - 127);
}

// Up to 64 numbers as whole units, in their order, zeros behind them; returns their sum.
template <class T>
float whole_units(const T* x, int64_t n, float inverse, int32_t* to) {
  alignas(32) float numbers[kBlock] = {};
  for (int64_t i = 0; i < n; ++i) numbers[i] = read(x, sizeof(T) == 4 ? kFloat : kBfloat, i) * inverse;
  __m256 sum = _mm256_setzero_ps();
  for (int i = 0; i < kBlock; i += 8) {
    const __m256i some = _mm256_cvtps_epi32(_mm256_load_ps(numbers + i));
    _mm256_store_si256(reinterpret_cast<__m256i*>(to + i), some);
    sum = _mm256_add_ps(sum, _mm256_cvtepi32_ps(some));
  }
  return total(sum);
}

template <int kDigits, class T>
void arrange_group(const Linear& w, const T* x, int16_t* to, float* unit, float* sum) {
  *unit = unit_below<kDigits>(x, w.group);
  const float inverse = 1 / *unit;
  const __m256i middle = _mm256_set1_epi16(static_cast<int16_t>(w.middle()));
  const int64_t blocks = padded(w.group) / kBlock;
  float all = 0;
  for (int64_t first = 0; first < blocks; first += kPart) {
    __m256i begin[kDigits];
    for (__m256i& b : begin) b = _mm256_setzero_si256();
    int16_t* digits = to + kLane * kDigits;
    for (int64_t i = first; i < first + kPart && i < blocks; ++i, digits += kBlock * kDigits) {
      alignas(32) int32_t units[kBlock];
      const int64_t left = w.group - i * kBlock;
      all += whole_units(x + i * kBlock, left < kBlock ? left : kBlock, inverse, units);
      for (int k = 0; k < kBlock; ++k) {
        const int64_t at = mixed(w.bits) ? k % 4 * kLane * kDigits + k / 4 : k / kLane * kLane * kDigits + k % kLane;
        digits[at] = static_cast<int16_t>(units[k]);  // the least one first
        if (kDigits == 2) digits[at + kLane] = static_cast<int16_t>((static_cast<int64_t>(units[k]) + 0x8000) >> 16);
      }
      for (int s = 0; s < 4; ++s) {
        for (int d = 0; d < kDigits; ++d) {
          const __m256i v = _mm256_load_si256(reinterpret_cast<const __m256i*>(digits + (s * kDigits + d) * kLane));
          begin[d] = _mm256_sub_epi32(begin[d], _mm256_madd_epi16(v, middle));
        }
      }
    }
    for (int d = 0; d < kDigits; ++d) _mm256_store_si256(reinterpret_cast<__m256i*>(to + d * kLane), begin[d]);
    to = digits;
  }
  *sum = all * *unit;
}

// Numbers of a group's digits.
inline int64_t arranged_group(const Linear& w, int digits) {
  const int64_t blocks = padded(w.group) / kBlock;
  return digits * (kBlock * blocks + kLane * ((blocks + kPart - 1) / kPart));
}

void arrange(const Linear& w, const void* x, Type type, int64_t rows, const Arranged& to) {
  const int64_t groups = w.groups(), digits = digits_of(w, type), step = arranged_group(w, static_cast<int>(digits));
  for (int64_t m = 0; m < rows; ++m) {
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t at = m * groups + g, from = at * w.group;
      int16_t* here = reinterpret_cast<int16_t*>(static_cast<char*>(to.values) + m * to.stride) + g * step;
      const auto* half = static_cast<const uint16_t*>(x) + from;
      if (type == kFloat) arrange_group<2>(w, static_cast<const float*>(x) + from, here, to.units + at, to.sums + at);
      else if (digits == 2) arrange_group<2>(w, half, here, to.units + at, to.sums + at);
      else arrange_group<1>(w, half, here, to.units + at, to.sums + at);
    }
  }
}

}  // namespace
}  // namespace sordino
