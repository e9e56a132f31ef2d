// Packed codes with AVX2, 64 at once, as 16-bit numbers in four registers.
//
// Of two to four bits, four codes fit a lane of 16 bits: a shift and a mask give register s codes s, s + 4, s + 8 … (`kMixed`).
// Wider ones come in their order: a byte shuffle brings every code into a lane of its own, a multiplication shifts it to the top.
#pragma once
#include <immintrin.h>

#include "kernels.h"

namespace sordino {
namespace {

constexpr int kEight = 8;  // words of a register

// Eight rows of eight words, `stride` bytes apart, turned: word j of row i becomes word i of row j, `apart` bytes apart.
inline void turn_words(const void* rows, int64_t stride, void* to, int64_t apart) {
  const auto at = [&](int i) { return reinterpret_cast<const float*>(static_cast<const char*>(rows) + i * stride); };
  const auto put = [&](int i, __m256 v) { _mm256_storeu_ps(reinterpret_cast<float*>(static_cast<char*>(to) + i * apart), v); };
  __m256 r[8], t[8], u[8];
  for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(at(i));
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 2; ++i) {
    u[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
    u[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
    u[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
    u[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    put(i, _mm256_permute2f128_ps(u[i], u[4 + i], 0x20));
    put(4 + i, _mm256_permute2f128_ps(u[i], u[4 + i], 0x31));
  }
}

// `kBits`: 2, 3, 4, 8, or 0 for 5 to 7.
template <int kBits>
struct Words {
  static constexpr bool kMixed = kBits >= 2 && kBits <= 4;
  int bits;
  int64_t size;  // bytes of a block
  __m256i bytes, factors, mask;

  explicit Words(int bits) : bits(bits), size(8 * bits), mask(_mm256_set1_epi16(static_cast<int16_t>((1 << bits) - 1))) {
    alignas(32) uint8_t from[32];
    alignas(32) int16_t factor[16];
    for (int i = 0; i < 16; ++i) {
      const int field = kBits == 3 ? 12 : bits, left = kBits == 3 ? 4 : 16 - bits;
      const int bit = i % 8 * field, at = bit / 8 + (kBits == 0 ? i / 8 * bits : 0);
      from[2 * i] = static_cast<uint8_t>(at), from[2 * i + 1] = static_cast<uint8_t>(at + 1);
      factor[i] = static_cast<int16_t>(left - bit % 8 < 0 ? 0 : 1 << (left - bit % 8));
    }
    bytes = _mm256_load_si256(reinterpret_cast<const __m256i*>(from));
    factors = _mm256_load_si256(reinterpret_cast<const __m256i*>(factor));
  }

  static __m128i half(const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }

  // Lanes with four codes each.
  __m256i fours(const uint8_t* p) const {
    if constexpr (kBits == 4) return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    if constexpr (kBits == 2) return _mm256_cvtepu8_epi16(half(p));
    const __m256i both = _mm256_inserti128_si256(_mm256_castsi128_si256(half(p)), half(p + 12), 1);
    return _mm256_mullo_epi16(_mm256_shuffle_epi8(both, bytes), factors);
  }

  // use(s, register s) of the block at p, behind which 64 bytes may be read.
  template <class Use>
  void operator()(const uint8_t* p, Use use) const {
    if constexpr (kMixed) {
      const __m256i four = fours(p);
      constexpr int kFirst = kBits == 3 ? 4 : 0;
      use(0, _mm256_and_si256(_mm256_srli_epi16(four, kFirst), mask));
      use(1, _mm256_and_si256(_mm256_srli_epi16(four, kFirst + kBits), mask));
      use(2, _mm256_and_si256(_mm256_srli_epi16(four, kFirst + 2 * kBits), mask));
      use(3, _mm256_and_si256(_mm256_srli_epi16(four, kFirst + 3 * kBits), mask));
    } else {
#pragma GCC unroll 4
      for (int s = 0; s < 4; ++s) {
        if constexpr (kBits == 8) {
          use(s, _mm256_cvtepu8_epi16(half(p + 16 * s)));
        } else {
          const __m256i two = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(half(p + 2 * s * bits)), bytes);
          use(s, _mm256_srl_epi16(_mm256_mullo_epi16(two, factors), _mm_cvtsi32_si128(16 - bits)));
        }
      }
    }
  }
};

// Calls use(Words of the weight's bits).
template <class Use>
void with_words(int bits, Use use) {
  switch (bits) {
    case 2: return use(Words<2>(bits));
    case 3: return use(Words<3>(bits));
    case 4: return use(Words<4>(bits));
    case 8: return use(Words<8>(bits));
    default: return use(Words<0>(bits));
  }
}

inline bool mixed(int bits) { return bits <= 4; }

// 64 input codes as 16-bit numbers, as weight codes of `bits` bits come.
inline void place(const int8_t* x, int bits, int16_t* to) {
  const auto put = [&](int s, __m256i v) { _mm256_store_si256(reinterpret_cast<__m256i*>(to + 16 * s), v); };
  if (!mixed(bits)) {
    for (int s = 0; s < 4; ++s) put(s, _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + 16 * s))));
    return;
  }
  const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
  const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + 32));
  for (int s = 0; s < 4; ++s) {  // byte s of every word of 32 bits
    const __m128i up = _mm_cvtsi32_si128(24 - 8 * s);
    const __m256i a = _mm256_srai_epi32(_mm256_sll_epi32(low, up), 24), b = _mm256_srai_epi32(_mm256_sll_epi32(high, up), 24);
    put(s, _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8));
  }
}

}  // namespace
}  // namespace sordino
