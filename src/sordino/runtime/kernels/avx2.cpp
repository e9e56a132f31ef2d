// AVX2 with FMA and BMI2. `madd` multiplies codes as 16-bit numbers with input codes, or with digits of activations (digits256.h).
#include <immintrin.h>

#include <type_traits>

#include "digits256.h"
#include "products.h"

namespace sordino {
namespace {

// For `pdep`: the low b bits of every byte.
uint64_t spread(int bits) { return 0x0101010101010101ull * ((1u << bits) - 1); }

__m256 to_floats(uint64_t eight) { return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<long long>(eight)))); }

// Every group must begin on a unit of eight codes.
bool fits(const Linear& w) { return (w.group % 8 == 0 || w.group == w.inputs) && (w.additive == 0 || w.bits > 1); }

// ---- products ----

// The n bytes at p where 64 may be read.
inline const uint8_t* copied(const uint8_t* p, int64_t n, uint8_t (&copy)[64]) {
  std::memset(copy, 0, sizeof copy);
  std::memcpy(copy, p, static_cast<size_t>(n));
  return copy;
}

// Codes and digits of R rows of a weight, from byte `at` of the rows on, for M tokens, `stride` digits apart. `kWhole`: 64 bytes may be
// read behind each of the rows.
template <class W, int kDigits, int M, int R, bool kWhole>
void add_products(const W& unpack, const uint8_t* row, int64_t bytes, int64_t at, int64_t blocks, const int16_t* x, int64_t stride,
                  __m256i (&all)[R][M][kDigits]) {
  __m256i sums[R][M][kDigits];  // in registers
  std::memcpy(sums, all, sizeof sums);
  for (int64_t i = 0; i < blocks; ++i, at += unpack.size, x += kBlock * kDigits) {
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r) {
      const uint8_t* p = row + r * bytes + at;
      _mm_prefetch(reinterpret_cast<const char*>(p) + kAhead, _MM_HINT_T0);
      uint8_t copy[64];
      if (!kWhole) p = copied(p, bytes - at < unpack.size ? bytes - at : unpack.size, copy);
      unpack(p, [&](int s, __m256i code) {
#pragma GCC unroll 2
        for (int m = 0; m < M; ++m) {
#pragma GCC unroll 2
          for (int d = 0; d < kDigits; ++d) {
            const auto* v = reinterpret_cast<const __m256i*>(x + m * stride + (s * kDigits + d) * kLane);
            sums[r][m][d] = _mm256_add_epi32(sums[r][m][d], _mm256_madd_epi16(code, _mm256_load_si256(v)));
          }
        }
      });
    }
  }
  std::memcpy(all, sums, sizeof sums);
}

// What a group's sums of digits, least first, amount to.
template <int kDigits>
__m256 whole(const __m256i* digit) {
  const __m256 least = _mm256_cvtepi32_ps(digit[0]);
  if constexpr (kDigits == 1) return least;
  return _mm256_fmadd_ps(_mm256_cvtepi32_ps(digit[kDigits - 1]), _mm256_set1_ps(65536), least);
}

// The first n of eight lanes.
inline __m256i first(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n < 8 ? n : 8)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

// Scales of n groups, 8 at most, as numbers.
inline __m256 scales(const uint16_t* from, int64_t n) {
  uint16_t copy[8] = {};
  if (n < 8) {
    for (int64_t i = 0; i < n; ++i) copy[i] = from[i];
    from = copy;
  }
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}

// 2^(b-1) - zero of as many groups of row o from g on.
inline __m256 zeros(const Linear& w, int64_t o, int64_t g, __m256i some) {
  const int64_t bit = o * w.bits, groups = w.groups(), shift = bit % 32;
  const auto* zero = reinterpret_cast<const int*>(w.zero + bit / 32 * groups + g);
  __m256i z = _mm256_srl_epi32(_mm256_maskload_epi32(zero, some), _mm_cvtsi64_si128(shift));
  if (shift + w.bits > 32) {
    z = _mm256_or_si256(z, _mm256_sll_epi32(_mm256_maskload_epi32(zero + groups, some), _mm_cvtsi64_si128(32 - shift)));
  }
  z = _mm256_and_si256(z, _mm256_set1_epi32((1 << w.bits) - 1));
  return _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_set1_epi32(w.middle()), z));
}

// `kOne`: a group is one block.
template <class W, int kDigits, int M, int R, bool kWhole, bool kOne>
void product_tile(const W& unpack, const Linear& w, const Arranged& x, int64_t o, float (&y)[R][M]) {
  const int64_t groups = w.groups(), bytes = w.row_bytes(), blocks = kOne ? 1 : padded(w.group) / kBlock, stride = x.stride / 2;
  const int64_t of_group = w.group * w.bits / 8;
  const uint8_t* row = w.codes + o * bytes;
  const auto* part = static_cast<const int16_t*>(x.values);
  __m256 sums[R][M];
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) sums[r][m] = _mm256_setzero_ps();
  for (int64_t from = 0; from < groups; from += 8) {
    const int64_t some = groups - from < 8 ? groups - from : 8;
    const __m256i mask = first(some);
    alignas(32) float factor[R][M][8];
    for (int r = 0; r < R; ++r) {
      const __m256 scale = scales(w.scale + (o + r) * groups + from, some);
      const __m256 less = w.zero == nullptr ? scale : _mm256_mul_ps(scale, zeros(w, o + r, from, mask));
      for (int m = 0; m < M; ++m) {
        const int64_t at = m * groups + from;
        _mm256_store_ps(factor[r][m], _mm256_mul_ps(scale, _mm256_maskload_ps(x.units + at, mask)));
        if (w.zero != nullptr) sums[r][m] = _mm256_fmadd_ps(less, _mm256_maskload_ps(x.sums + at, mask), sums[r][m]);
      }
    }
    for (int64_t g = 0; g < some; ++g) {
      int64_t at = (from + g) * of_group;
      for (int64_t done = 0; done < blocks; done += kPart) {
        const int64_t now = kOne ? 1 : blocks - done < kPart ? blocks - done : kPart;
        __m256i digit[R][M][kDigits];
        for (int r = 0; r < R; ++r)
          for (int m = 0; m < M; ++m)
            for (int d = 0; d < kDigits; ++d) {
              digit[r][m][d] = _mm256_load_si256(reinterpret_cast<const __m256i*>(part + m * stride + d * kLane));
            }
        part += kLane * kDigits;
        add_products<W, kDigits, M, R, kWhole>(unpack, row, bytes, at, now, part, stride, digit);
        part += kBlock * kDigits * now, at += unpack.size * now;
        for (int r = 0; r < R; ++r)
          for (int m = 0; m < M; ++m) {
            sums[r][m] = _mm256_fmadd_ps(_mm256_set1_ps(factor[r][m][g]), whole<kDigits>(digit[r][m]), sums[r][m]);
          }
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) y[r][m] = total(sums[r][m]);
}

// A row of an additive grid: bit k of the codes, as 0 or 1, is multiplied, and sum_i ± x_i = 2 sum_i bit_i x_i - sum_i x_i.
template <class W, int kDigits, int M>
void additive_tile(const W& unpack, const Linear& w, const Arranged& x, int64_t o, float (&y)[1][M]) {
  const int64_t groups = w.groups(), bytes = w.row_bytes(), blocks = padded(w.group) / kBlock, stride = x.stride / 2;
  const auto* part = static_cast<const int16_t*>(x.values);
  const __m256i one = _mm256_set1_epi16(1);
  for (int m = 0; m < M; ++m) y[0][m] = 0;
  for (int64_t g = 0; g < groups; ++g) {
    __m256 sums[kMaxPlanes][M];
    for (auto& of_plane : sums)
      for (__m256& s : of_plane) s = _mm256_setzero_ps();
    int64_t at = g * w.group * w.bits / 8;
    for (int64_t i = 0; i < blocks; ++i, at += unpack.size, part += kBlock * kDigits) {
      if (i % kPart == 0) part += kLane * kDigits;  // what makes affine codes signed
      uint8_t copy[64];
      const uint8_t* p = copied(w.codes + o * bytes + at, bytes - at < unpack.size ? bytes - at : unpack.size, copy);
      __m256i code[4];
      unpack(p, [&](int s, __m256i c) { code[s] = c; });
      for (int k = 0; k < w.bits; ++k) {
        __m256i digit[M][kDigits];
        for (auto& of_token : digit)
          for (__m256i& d : of_token) d = _mm256_setzero_si256();
        for (int s = 0; s < 4; ++s) {
          const __m256i bit = _mm256_and_si256(_mm256_srl_epi16(code[s], _mm_cvtsi32_si128(k)), one);
          for (int m = 0; m < M; ++m)
            for (int d = 0; d < kDigits; ++d) {
              const auto* v = reinterpret_cast<const __m256i*>(part + m * stride + (s * kDigits + d) * kLane);
              digit[m][d] = _mm256_add_epi32(digit[m][d], _mm256_madd_epi16(bit, _mm256_load_si256(v)));
            }
        }
        for (int m = 0; m < M; ++m) sums[k][m] = _mm256_add_ps(sums[k][m], whole<kDigits>(digit[m]));
      }
    }
    for (int k = 0; k < w.bits; ++k) {
      const float scale = widen(w.scale[(o * groups + g) * w.bits + k]);
      for (int m = 0; m < M; ++m) {
        y[0][m] += scale * (2 * x.units[m * groups + g] * total(sums[k][m]) - x.sums[m * groups + g]);
      }
    }
  }
}

template <class W, int M, int R, bool kWhole>
void integer_tile(const W& unpack, const Linear& w, const int16_t* x, int64_t stride, int64_t o, int32_t (&y)[R][M]) {
  __m256i sums[R][M][1];
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) sums[r][m][0] = _mm256_setzero_si256();
  const int64_t bytes = w.row_bytes();
  add_products<W, 1, M, R, kWhole>(unpack, w.codes + o * bytes, bytes, 0, padded(w.inputs) / kBlock, x, stride, sums);
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) y[r][m] = total(sums[r][m][0]);
}

template <int n>
using Constant = std::integral_constant<int, n>;

// All outputs begin … end of `rows` tokens, two tokens side by side, or R outputs if there is one token: tile(first token, how many
// tokens and outputs, whether 64 bytes may be read behind them, output, where to).
template <int R, class Sum, class Tile>
void by_tiles(const Linear& w, int rows, int64_t begin, int64_t end, Sum* y, Tile tile) {
  const int64_t safe = w.whole_rows();
  for (int64_t o = begin; o < end;) {
    const auto run = [&](int m, auto tokens, auto outputs, auto is_whole) {
      Sum sums[outputs][tokens];
      tile(m, tokens, outputs, is_whole, o, sums);
      for (int r = 0; r < outputs; ++r)
        for (int k = 0; k < tokens; ++k) y[(o - begin + r) * rows + m + k] = sums[r][k];
    };
    const auto all = [&](auto is_whole) {
      int m = 0;
      for (; m + 2 <= rows; m += 2) run(m, Constant<2>{}, Constant<1>{}, is_whole);
      if (m < rows) run(m, Constant<1>{}, Constant<1>{}, is_whole);
      ++o;
    };
    if (rows == 1 && w.row_bytes() <= 2 * kShort && o + R <= end && o + R <= safe) run(0, Constant<1>{}, Constant<R>{}, std::true_type{}), o += R;
    else if (o < safe) all(std::true_type{});
    else all(std::false_type{});
  }
}

template <int kDigits>
void product_of(const Linear& w, const Arranged& x, int rows, int64_t begin, int64_t end, float* y) {
  const auto from = [&](int m) {
    const int64_t groups = w.groups();
    return Arranged{static_cast<char*>(x.values) + m * x.stride, x.sums + m * groups, x.units + m * groups, x.stride};
  };
  with_words(w.bits, [&](const auto& unpack) {
    using W = std::decay_t<decltype(unpack)>;
    if (w.additive != 0) {
      by_tiles<1>(w, rows, begin, end, y, [&](int m, auto tokens, auto, auto, int64_t o, auto& sums) {
        additive_tile<W, kDigits, tokens>(unpack, w, from(m), o, sums);
      });
    } else {
      by_tiles<2>(w, rows, begin, end, y, [&](int m, auto tokens, auto outputs, auto is_whole, int64_t o, auto& sums) {
        if (w.group <= kBlock) product_tile<W, kDigits, tokens, outputs, is_whole, true>(unpack, w, from(m), o, sums);
        else product_tile<W, kDigits, tokens, outputs, is_whole, false>(unpack, w, from(m), o, sums);
      });
    }
  });
}

void product(const Linear& w, const Arranged& x, Type type, int rows, int64_t begin, int64_t end, float* y) {
  if (digits_of(w, type) == 2) product_of<2>(w, x, rows, begin, end, y);
  else product_of<1>(w, x, rows, begin, end, y);
}

void integer(const Linear& w, const int8_t* x, int64_t stride, int rows, int64_t begin, int64_t end, int32_t* y) {
  thread_local Scratch memory;
  const int64_t n = padded(w.inputs);
  auto* placed = static_cast<int16_t*>(memory.get(rows * n * 2));
  for (int m = 0; m < rows; ++m)
    for (int64_t i = 0; i < n; i += kBlock) place(x + m * stride + i, w.bits, placed + m * n + i);
  with_words(w.bits, [&](const auto& unpack) {
    using W = std::decay_t<decltype(unpack)>;
    by_tiles<2>(w, rows, begin, end, y, [&](int m, auto tokens, auto outputs, auto is_whole, int64_t o, auto& sums) {
      integer_tile<W, tokens, outputs, is_whole>(unpack, w, placed + m * n, n, o, sums);
    });
  });
}

void values(const Linear& w, int64_t o, Type type, void* out) {
  if (!fits(w) || w.additive != 0) return kPortable.values(w, o, type, out);
  const int64_t groups = w.groups();
  const uint8_t* row = w.codes + o * w.row_bytes();
  const uint8_t* end = row + w.row_bytes();
  const uint64_t mask = spread(w.bits);
  for (int64_t g = 0; g < groups; ++g) {
    const __m256 zero = _mm256_set1_ps(static_cast<float>(zero_at(w, o, g)));
    const __m256 scale = _mm256_set1_ps(widen(w.scale[o * groups + g]));
    const uint8_t* p = row + g * w.group * w.bits / 8;
    for (int64_t i = 0; i < w.group; i += 8, p += w.bits) {
      const __m256 v = _mm256_mul_ps(_mm256_sub_ps(to_floats(_pdep_u64(unit(p, end), mask)), zero), scale);
      const int64_t n = w.group - i < 8 ? w.group - i : 8, at = g * w.group + i;
      if (n == 8 && type == kFloat) {
        _mm256_storeu_ps(static_cast<float*>(out) + at, v);
        continue;
      }
      float eight[8];
      _mm256_storeu_ps(eight, v);
      for (int64_t k = 0; k < n; ++k) write(out, type, at + k, eight[k]);
    }
  }
}

void centred(const Linear& w, int64_t o, int8_t* out) {
  const uint8_t* p = w.codes + o * w.row_bytes();
  const uint8_t* end = p + w.row_bytes();
  const uint64_t mask = spread(w.bits);
  const __m128i middle = _mm_set1_epi8(static_cast<char>(w.middle()));
  for (int64_t i = 0; i < w.inputs; i += 8, p += w.bits) {
    const __m128i code = _mm_cvtsi64_si128(static_cast<long long>(_pdep_u64(unit(p, end), mask)));
    const long long eight = _mm_cvtsi128_si64(_mm_sub_epi8(code, middle));
    std::memcpy(out + i, &eight, static_cast<size_t>(w.inputs - i < 8 ? w.inputs - i : 8));
  }
}

void unpack_row(const uint8_t* row, int64_t bytes, int bits, int64_t n, uint8_t* codes) {
  const uint8_t* end = row + bytes;
  const uint64_t mask = spread(bits);
  for (int64_t i = 0; i < n; i += 8, row += bits) {
    const uint64_t eight = _pdep_u64(unit(row, end), mask);
    std::memcpy(codes + i, &eight, 8);
  }
}

}  // namespace
}  // namespace sordino

#include "turn256.h"
#define SORDINO_FIRST_STEPS
#define SORDINO_MIX
#include "pieces.h"
#include "attend256.h"
#include "many256.h"
#include "training.h"

namespace sordino {

const Kernels kAvx2 = {"avx2", 5, fits, arrange, product, integer, values, centred, encode_token, &kPieces256, &kTraining, many256};

}  // namespace sordino
