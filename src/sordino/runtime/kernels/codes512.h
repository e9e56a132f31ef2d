// Packed codes with AVX-512.
//
// Eight codes of b bits fill b bytes. One byte permutation puts the units of a block of 64 codes into eight 64-bit words,
// one multishift takes the fields out of every word: the same few instructions for every width, read straight from the
// stored bit stream.
#pragma once
#include <immintrin.h>

#include "kernels.h"

namespace sordino {
namespace {

// Control bytes of the unpacking: where the bytes of a unit of eight codes are, and where its fields begin.
__m512i unit_bytes(int bits) {
  alignas(64) uint8_t at[64];
  for (int i = 0; i < 64; ++i) at[i] = static_cast<uint8_t>(i / 8 * bits + i % 8);
  return _mm512_load_si512(at);
}

__m512i fields(int bits) {
  alignas(64) uint8_t shift[64];
  for (int i = 0; i < 64; ++i) shift[i] = static_cast<uint8_t>(i % 8 * bits);
  return _mm512_load_si512(shift);
}

__mmask64 first(int64_t n) { return n >= 64 ? ~0ull : n <= 0 ? 0 : _bzhi_u64(~0ull, static_cast<unsigned>(n)); }

__m512 widen16(__m256i half) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16)); }

// The least register that holds a block, in bytes: a wider load reaches into the next cache line and costs a second read.
constexpr int load_of(int bits) { return bits <= 2 ? 16 : bits <= 4 ? 32 : 64; }

// Codes of a block as bytes, in their order.
struct Bytes {
  __m512i bytes, all, mask;
  int64_t size;  // bytes of a block

  explicit Bytes(int bits)
      : bytes(unit_bytes(bits)), all(fields(bits)), mask(_mm512_set1_epi8(static_cast<char>((1 << bits) - 1))), size(8 * bits) {}

  __m512i operator()(__m512i block) const {
    return _mm512_and_si512(_mm512_multishift_epi64_epi8(all, _mm512_permutexvar_epi8(bytes, block)), mask);
  }

  // Of the block at p, where `left` bytes of the row remain. `kLoad` (load_of): so many may be read, whatever remains; 0: only the row's.
  template <int kLoad = 0>
  __m512i at(const uint8_t* p, int64_t left) const {
    if constexpr (kLoad == 16) return (*this)(_mm512_castsi128_si512(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
    if constexpr (kLoad == 32) return (*this)(_mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
    if constexpr (kLoad == 64) return (*this)(_mm512_loadu_si512(p));
    return (*this)(_mm512_maskz_loadu_epi8(first(left < size ? left : size), p));
  }
};

// 16 rows of 16 quads of bytes to 16 x 16 quads, rows of which are `step` apart.
inline void transpose(__m512i (&row)[16], int8_t* to, int64_t step) {
  constexpr int kTile = 16;
  __m512i pair[kTile];
  for (int i = 0; i < kTile; i += 2) {
    pair[i] = _mm512_unpacklo_epi32(row[i], row[i + 1]);
    pair[i + 1] = _mm512_unpackhi_epi32(row[i], row[i + 1]);
  }
  for (int i = 0; i < kTile; i += 4) {  // row[i + k]: column 4j + k of rows i … i + 3, in lane j
    row[i] = _mm512_unpacklo_epi64(pair[i], pair[i + 2]);
    row[i + 1] = _mm512_unpackhi_epi64(pair[i], pair[i + 2]);
    row[i + 2] = _mm512_unpacklo_epi64(pair[i + 1], pair[i + 3]);
    row[i + 3] = _mm512_unpackhi_epi64(pair[i + 1], pair[i + 3]);
  }
  for (int k = 0; k < 4; ++k) {
    const __m512i even = _mm512_shuffle_i32x4(row[k], row[k + 4], 0x88), odd = _mm512_shuffle_i32x4(row[k], row[k + 4], 0xdd);
    const __m512i last_even = _mm512_shuffle_i32x4(row[k + 8], row[k + 12], 0x88);
    const __m512i last_odd = _mm512_shuffle_i32x4(row[k + 8], row[k + 12], 0xdd);
    _mm512_storeu_si512(to + k * step, _mm512_shuffle_i32x4(even, last_even, 0x88));
    _mm512_storeu_si512(to + (k + 4) * step, _mm512_shuffle_i32x4(odd, last_odd, 0x88));
    _mm512_storeu_si512(to + (k + 8) * step, _mm512_shuffle_i32x4(even, last_even, 0xdd));
    _mm512_storeu_si512(to + (k + 12) * step, _mm512_shuffle_i32x4(odd, last_odd, 0xdd));
  }
}

// The same of rows `stride` apart, to contiguous ones.
void transpose(const int8_t* from, int64_t stride, int8_t* to) {
  __m512i row[16];
  for (int i = 0; i < 16; ++i) row[i] = _mm512_loadu_si512(from + i * stride);
  transpose(row, to, kBlock);
}

}  // namespace
}  // namespace sordino
