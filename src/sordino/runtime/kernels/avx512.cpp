// AVX-512 with VBMI, VNNI and BF16 (Zen 4, Sapphire Rapids and later).
//
// Products with floating activations: a group's activations are written as integers times a unit, a power of two that the
// largest of them decides, and the integers as a few digits of 8 bits; `dpbusd` multiplies codes and digits exactly.
// With two digits the largest is 2^13 to 2^14 units, so a bf16 number down to a 64th of it is exact, and no other is off by
// more than half a unit. Groups of more than 128, whose entries differ more, take a digit more, fp32 takes four.
// Accumulators begin with -2^(b-1) times the digits' sums, which makes codes signed. A zero point other than 2^(b-1) is made
// up for once a group: sum_i x_i (c_i - z) = sum_i x_i (c_i - mid) + (mid - z) sum_i x_i.
#include <immintrin.h>

#include <cmath>
#include <type_traits>

#include "block.h"
#include "codes512.h"
#include "kernels.h"

namespace sordino {
namespace {

template <int n>
using Constant = std::integral_constant<int, n>;

bool fits(const Linear& w) { return w.group % 8 == 0 || w.group == w.inputs; }

// ---- activations: of every group a register for each digit, where its accumulator begins, then blocks of digits ----

__m512 load16(const float* x, int64_t n) { return _mm512_maskz_loadu_ps(static_cast<__mmask16>(first(n)), x); }

__m512 load16(const uint16_t* x, int64_t n) { return widen16(_mm256_maskz_loadu_epi16(static_cast<__mmask16>(first(n)), x)); }

// The power of two that is `fraction` binary places below the largest of n numbers; NaN if one of them is not finite.
template <class T>
float unit_below(const T* x, int64_t n, int fraction) {
  __m512i peak = _mm512_setzero_si512();
  for (int64_t i = 0; i < n; i += 16) {
    peak = _mm512_max_epi32(peak, _mm512_and_si512(_mm512_castps_si512(load16(x + i, n - i)), _mm512_set1_epi32(0x7fffffff)));
  }
  const int exponent = _mm512_reduce_max_epi32(peak) >> 23, least = fraction + 1;
  return exponent == 255 ? NAN : std::ldexp(1.0f, (exponent < least ? least : exponent) - fraction - 127);
}

template <int kDigits, class T>
void arrange_group(const T* x, int64_t n, int middle, char* to, float* unit, float* sum) {
  *unit = unit_below(x, n, 8 * kDigits - 3);
  const __m512 inverse = _mm512_set1_ps(1 / *unit);
  const __m512i mid = _mm512_set1_epi8(static_cast<char>(middle)), zero = _mm512_setzero_si512();
  __m512i sums[kDigits];
  for (int d = 0; d < kDigits; ++d) sums[d] = zero;
  __m512 total = _mm512_setzero_ps();
  char* digits = to + 64 * kDigits;
  for (int64_t i = 0; i < n; i += kBlock, digits += 64 * kDigits) {
    for (int64_t k = 0; k < kBlock; k += 16) {
      const int64_t from = i + k < n ? i + k : 0;
      __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(load16(x + from, n - i - k), inverse));
      total = _mm512_add_ps(total, _mm512_cvtepi32_ps(whole));
      for (int d = 0; d < kDigits; ++d) {  // the least one first
        _mm_store_si128(reinterpret_cast<__m128i*>(digits + 64 * d + k), _mm512_cvtepi32_epi8(whole));
        whole = _mm512_srai_epi32(_mm512_add_epi32(whole, _mm512_set1_epi32(128)), 8);
      }
    }
    for (int d = 0; d < kDigits; ++d) sums[d] = _mm512_dpbusd_epi32(sums[d], mid, _mm512_load_si512(digits + 64 * d));
  }
  for (int d = 0; d < kDigits; ++d) _mm512_store_si512(to + 64 * d, _mm512_sub_epi32(zero, sums[d]));
  *sum = _mm512_reduce_add_ps(total) * *unit;
}

template <int kDigits, class T>
void arrange_rows(const Linear& w, const T* x, int64_t rows, const Arranged& to) {
  const int64_t groups = w.groups(), step = kDigits * (64 + padded(w.group));
  for (int64_t m = 0; m < rows; ++m) {
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t at = m * groups + g;
      char* here = static_cast<char*>(to.values) + m * to.stride + g * step;
      arrange_group<kDigits>(x + at * w.group, w.group, w.middle(), here, to.units + at, to.sums + at);
    }
  }
}

void arrange(const Linear& w, const void* x, Type type, int64_t rows, const Arranged& to) {
  const auto* half = static_cast<const uint16_t*>(x);
  if (type == kFloat) arrange_rows<4>(w, static_cast<const float*>(x), rows, to);
  else if (w.group > 2 * kBlock) arrange_rows<3>(w, half, rows, to);
  else arrange_rows<2>(w, half, rows, to);
}

// ---- products ----

// 2^(b-1) - zero of up to 16 groups from g on.
inline __m512 zeros(const Linear& w, int64_t o, int64_t g, __mmask16 some) {
  const int64_t bit = o * w.bits, groups = w.groups(), shift = bit % 32;
  const uint32_t* zero = w.zero + bit / 32 * groups + g;
  __m512i z = _mm512_srl_epi32(_mm512_maskz_loadu_epi32(some, zero), _mm_cvtsi64_si128(shift));
  if (shift + w.bits > 32) {
    const __m512i next = _mm512_maskz_loadu_epi32(some, zero + groups);
    z = _mm512_or_si512(z, _mm512_sll_epi32(next, _mm_cvtsi64_si128(32 - shift)));
  }
  z = _mm512_and_si512(z, _mm512_set1_epi32((1 << w.bits) - 1));
  return _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_set1_epi32(w.middle()), z));
}

// Sums of four registers.
__m128 totals(__m512 a, __m512 b, __m512 c, __m512 d) {
  const auto quarter = [](__m512 v) {
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  };
  __m128 w = quarter(a), x = quarter(b), y = quarter(c), z = quarter(d);
  _MM_TRANSPOSE4_PS(w, x, y, z);
  return _mm_add_ps(_mm_add_ps(w, x), _mm_add_ps(y, z));
}

__m128i totals(__m512i a, __m512i b, __m512i c, __m512i d) {
  const auto quarter = [](__m512i v) {
    const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(v), _mm512_extracti64x4_epi64(v, 1));
    return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  };
  const __m128i w = quarter(a), x = quarter(b), y = quarter(c), z = quarter(d);
  const __m128i low = _mm_add_epi32(_mm_unpacklo_epi32(w, x), _mm_unpackhi_epi32(w, x));  // w0+w2 x0+x2 w1+w3 x1+x3
  const __m128i high = _mm_add_epi32(_mm_unpacklo_epi32(y, z), _mm_unpackhi_epi32(y, z));
  return _mm_add_epi32(_mm_unpacklo_epi64(low, high), _mm_unpackhi_epi64(low, high));
}

// What the accumulators of a group's digits, least first, amount to. Two of two blocks have room for each other in 32 bits.
template <int kDigits>
__m512 whole(const __m512i* digit) {
  if constexpr (kDigits == 2) return _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(digit[1], 8), digit[0]));
  __m512 sum = _mm512_cvtepi32_ps(digit[kDigits - 1]);
  for (int d = kDigits - 2; d >= 0; --d) sum = _mm512_fmadd_ps(sum, _mm512_set1_ps(256), _mm512_cvtepi32_ps(digit[d]));
  return sum;
}

// Sums of R rows of the weight for M tokens, still spread over a register: [R, M]. `kBlocks`: of a group, 0 for any number; `kLoad`: Bytes::at.
template <int kBlocks, int kDigits, int M, int R, int kLoad>
void product_rows(const Linear& w, const Arranged& x, const Bytes& unpack, int64_t o, __m512* out) {
  constexpr int kSplit = kBlocks == 0 && R * M == 1 ? 2 : 1;  // of a long group, so that products do not wait for each other
  const int64_t groups = w.groups(), bytes = w.row_bytes();
  const int64_t blocks = kBlocks > 0 ? kBlocks : padded(w.group) / kBlock;
  const char* part = static_cast<const char*>(x.values);
  const uint8_t* row = w.codes + o * bytes;
  const int64_t ahead = w.bits > 4 ? light_ahead : kAhead;
  __m512 sums[R][M];  // of its own, not in `out`: the compiler could not keep that in registers
  for (auto& of_row : sums)
    for (__m512& s : of_row) s = _mm512_setzero_ps();
  for (int64_t from = 0; from < groups; from += 16) {
    const int64_t some = groups - from < 16 ? groups - from : 16;
    const __mmask16 mask = static_cast<__mmask16>(first(some));
    alignas(64) float scale[R][M][16];
    for (int r = 0; r < R; ++r) {
      const __m512 mine = widen16(_mm256_maskz_loadu_epi16(mask, w.scale + (o + r) * groups + from));
      for (int m = 0; m < M; ++m) {
        _mm512_store_ps(scale[r][m], _mm512_mul_ps(mine, _mm512_maskz_loadu_ps(mask, x.units + m * groups + from)));
      }
      if (w.zero == nullptr) continue;
      const __m512 shift = _mm512_mul_ps(mine, zeros(w, o + r, from, mask));
      for (int m = 0; m < M; ++m) {
        sums[r][m] = _mm512_fmadd_ps(shift, _mm512_maskz_loadu_ps(mask, x.sums + m * groups + from), sums[r][m]);
      }
    }
    for (int64_t g = 0; g < some; ++g) {
      int64_t at = (from + g) * w.group * w.bits / 8;
      __m512i digit[kSplit][R][M][kDigits];
      for (int r = 0; r < R; ++r)
        for (int m = 0; m < M; ++m)
          for (int d = 0; d < kDigits; ++d) {
            digit[0][r][m][d] = _mm512_load_si512(part + m * x.stride + 64 * d);
            for (int u = 1; u < kSplit; ++u) digit[u][r][m][d] = _mm512_setzero_si512();
          }
      part += 64 * kDigits;
      const auto block = [&](__m512i (&to)[R][M][kDigits]) {
        for (int r = 0; r < R; ++r) {
          const uint8_t* p = row + r * bytes + at;
          _mm_prefetch(reinterpret_cast<const char*>(p) + ahead, _MM_HINT_T0);
          const __m512i code = unpack.at<kLoad>(p, bytes - at);
          for (int m = 0; m < M; ++m)
            for (int d = 0; d < kDigits; ++d) {
              to[r][m][d] = _mm512_dpbusd_epi32(to[r][m][d], code, _mm512_load_si512(part + m * x.stride + 64 * d));
            }
        }
        at += unpack.size, part += 64 * kDigits;
      };
      int64_t i = 0;
      for (; i + kSplit <= blocks; i += kSplit)
        for (auto& to : digit) block(to);
      for (; i < blocks; ++i) block(digit[0]);
      for (int r = 0; r < R; ++r)
        for (int m = 0; m < M; ++m) {
          for (int d = 0; d < kDigits; ++d)
            for (int u = 1; u < kSplit; ++u) digit[0][r][m][d] = _mm512_add_epi32(digit[0][r][m][d], digit[u][r][m][d]);
          sums[r][m] = _mm512_fmadd_ps(_mm512_set1_ps(scale[r][m][g]), whole<kDigits>(digit[0][r][m]), sums[r][m]);
        }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) out[r * M + m] = sums[r][m];
}

// What the entries of a register add up to.
float total(__m512 a) { return _mm512_reduce_add_ps(a); }
int32_t total(__m512i a) { return _mm512_reduce_add_epi32(a); }
void put(float* y, __m128 v) { _mm_storeu_ps(y, v); }
void put(int32_t* y, __m128i v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(y), v); }

// All outputs begin … end for `rows` tokens, by some(M tokens, R rows, kLoad, output, sums). Long rows one after another, since memory
// likes one stream of reads better than several; short ones side by side. What four sums amount to is found at once.
template <class Register, class Sum, class Some>
void by_rows(const Linear& w, int rows, int64_t begin, int64_t end, Sum* y, Some some) {
  const auto run = [&](auto tokens, auto load) {
    constexpr int M = tokens, R = M == 3 ? 1 : 4 / M;
    const int64_t safe = w.whole_rows() < end ? w.whole_rows() : end;
    int64_t o = begin;
    for (; o + R <= safe; o += R, y += R * M) {
      Register sums[R * M];
      if (w.row_bytes() < kShort) some(tokens, Constant<R>{}, load, o, sums);
      else
        for (int r = 0; r < R; ++r) some(tokens, Constant<1>{}, load, o + r, sums + r * M);
      if constexpr (R * M == 4) put(y, totals(sums[0], sums[1], sums[2], sums[3]));
      else
        for (int m = 0; m < M; ++m) y[m] = total(sums[m]);
    }
    for (; o < end; ++o, y += M) {
      Register sums[M];
      some(tokens, Constant<1>{}, Constant<0>{}, o, sums);
      for (int m = 0; m < M; ++m) y[m] = total(sums[m]);
    }
  };
  const auto of = [&](auto tokens) {
    switch (load_of(w.bits)) {
      case 16: return run(tokens, Constant<16>{});
      case 32: return run(tokens, Constant<32>{});
      default: return run(tokens, Constant<64>{});
    }
  };
  switch (rows) {
    case 1: return of(Constant<1>{});
    case 2: return of(Constant<2>{});
    case 3: return of(Constant<3>{});
    default: return of(Constant<4>{});
  }
}

template <int kBlocks, int kDigits>
void product_of(const Linear& w, const Arranged& x, int rows, int64_t begin, int64_t end, float* y) {
  const Bytes unpack(w.bits);
  by_rows<__m512>(w, rows, begin, end, y, [&](auto m, auto r, auto load, int64_t o, __m512* sums) {
    product_rows<kBlocks, kDigits, m, r, load>(w, x, unpack, o, sums);
  });
}

// One row of an additive grid for M tokens. Bit k of the codes, as 0 or 1, is multiplied: sum_i ± x_i = 2 sum_i bit_i x_i - sum_i x_i.
template <int kPlanes, int kDigits, int M>
void additive_row(const Linear& w, const Arranged& x, const Bytes& unpack, int64_t o, float* y) {
  const int64_t groups = w.groups(), bytes = w.row_bytes(), blocks = padded(w.group) / kBlock;
  const char* part = static_cast<const char*>(x.values);
  const uint8_t* row = w.codes + o * bytes;
  const __m512i one = _mm512_set1_epi8(1);
  __m512 sums[M];
  float less[M] = {};
  for (int m = 0; m < M; ++m) sums[m] = _mm512_setzero_ps();
  for (int64_t g = 0; g < groups; ++g) {
    __m512i digit[kPlanes][M][kDigits];
    for (auto& of_plane : digit)
      for (auto& of_token : of_plane)
        for (__m512i& d : of_token) d = _mm512_setzero_si512();
    part += 64 * kDigits;  // what makes affine codes signed
    int64_t at = g * w.group * w.bits / 8;
    for (int64_t i = 0; i < blocks; ++i, at += unpack.size, part += 64 * kDigits) {
      _mm_prefetch(reinterpret_cast<const char*>(row + at) + kAhead, _MM_HINT_T0);
      const __m512i code = unpack.at(row + at, bytes - at);
      for (int k = 0; k < kPlanes; ++k) {
        const __m512i bit = _mm512_and_si512(_mm512_srli_epi16(code, static_cast<unsigned>(k)), one);
        for (int m = 0; m < M; ++m)
          for (int d = 0; d < kDigits; ++d) {
            digit[k][m][d] = _mm512_dpbusd_epi32(digit[k][m][d], bit, _mm512_load_si512(part + m * x.stride + 64 * d));
          }
      }
    }
    for (int k = 0; k < kPlanes; ++k) {
      const float scale = widen(w.scale[(o * groups + g) * kPlanes + k]);
      for (int m = 0; m < M; ++m) {
        const __m512 factor = _mm512_set1_ps(2 * scale * x.units[m * groups + g]);
        sums[m] = _mm512_fmadd_ps(factor, whole<kDigits>(digit[k][m]), sums[m]);
        less[m] += scale * x.sums[m * groups + g];
      }
    }
  }
  for (int m = 0; m < M; ++m) y[m] = _mm512_reduce_add_ps(sums[m]) - less[m];
}

template <int kPlanes, int kDigits>
void additive_of(const Linear& w, const Arranged& x, int rows, int64_t begin, int64_t end, float* y) {
  const Bytes unpack(w.bits);
  for (int64_t o = begin; o < end; ++o, y += rows) {
    switch (rows) {
      case 1: additive_row<kPlanes, kDigits, 1>(w, x, unpack, o, y); break;
      case 2: additive_row<kPlanes, kDigits, 2>(w, x, unpack, o, y); break;
      case 3: additive_row<kPlanes, kDigits, 3>(w, x, unpack, o, y); break;
      default: additive_row<kPlanes, kDigits, 4>(w, x, unpack, o, y);
    }
  }
}

template <int kPlanes>
void additive_product(const Linear& w, const Arranged& x, Type type, int rows, int64_t begin, int64_t end, float* y) {
  const auto run = type == kFloat            ? additive_of<kPlanes, 4>
                   : w.group > 2 * kBlock ? additive_of<kPlanes, 3>
                                          : additive_of<kPlanes, 2>;
  run(w, x, rows, begin, end, y);
}

void product(const Linear& w, const Arranged& x, Type type, int rows, int64_t begin, int64_t end, float* y) {
  if (w.additive != 0) {
    const auto some = w.bits == 1   ? additive_product<1>
                      : w.bits == 2 ? additive_product<2>
                      : w.bits == 3 ? additive_product<3>
                                    : additive_product<4>;
    return some(w, x, type, rows, begin, end, y);
  }
  const auto run = type == kFloat          ? product_of<0, 4>
                   : w.group <= kBlock     ? product_of<1, 2>
                   : w.group <= 2 * kBlock ? product_of<2, 2>
                                           : product_of<0, 3>;
  run(w, x, rows, begin, end, y);
}

// As product_rows of one row, of integers.
template <int M, int kLoad>
void integer_row(const Linear& w, const int8_t* x, int64_t stride, const Bytes& unpack, int64_t o, __m512i* sums) {
  constexpr int kSplit = M == 1 ? 4 : 1;
  const int64_t bytes = w.row_bytes();
  const uint8_t* row = w.codes + o * bytes;
  __m512i part[kSplit][M];
  for (auto& of_split : part)
    for (__m512i& s : of_split) s = _mm512_setzero_si512();
  int64_t i = 0, at = 0;
  const auto block = [&](__m512i (&to)[M]) {
    _mm_prefetch(reinterpret_cast<const char*>(row + at) + light_ahead, _MM_HINT_T0);
    const __m512i code = unpack.at<kLoad>(row + at, bytes - at);
    for (int m = 0; m < M; ++m) to[m] = _mm512_dpbusd_epi32(to[m], code, _mm512_loadu_si512(x + m * stride + i));
    i += kBlock, at += unpack.size;
  };
  while (i + kBlock * (kSplit - 1) < w.inputs)
    for (auto& to : part) block(to);
  while (i < w.inputs) block(part[0]);
  for (int m = 0; m < M; ++m) {
    sums[m] = part[0][m];
    for (int u = 1; u < kSplit; ++u) sums[m] = _mm512_add_epi32(sums[m], part[u][m]);
  }
}

void integer(const Linear& w, const int8_t* x, int64_t stride, int rows, int64_t begin, int64_t end, int32_t* y) {
  const Bytes unpack(w.bits);
  by_rows<__m512i>(w, rows, begin, end, y, [&](auto m, auto r, auto load, int64_t o, __m512i* sums) {
    for (int i = 0; i < r; ++i) integer_row<m, load>(w, x, stride, unpack, o + i, sums + i * m);
  });
}

// ---- unpacked weights, for many rows of activations ----

void values(const Linear& w, int64_t o, Type type, void* out) {
  if (!fits(w)) return kPortable.values(w, o, type, out);
  const Bytes unpack(w.bits);
  const int64_t groups = w.groups(), bytes = w.row_bytes();
  const uint8_t* row = w.codes + o * bytes;
  for (int64_t g = 0; g < groups; ++g) {
    const __m512i zero = _mm512_set1_epi32(w.additive != 0 ? 0 : zero_at(w, o, g));
    const __m512 scale = _mm512_set1_ps(w.additive != 0 ? 0 : widen(w.scale[o * groups + g]));
    alignas(64) float levels[1 << kMaxPlanes] = {};
    if (w.additive != 0) levels_of(w, o, g, levels);
    const __m512 table = _mm512_load_ps(levels);
    int64_t at = g * w.group * w.bits / 8;
    for (int64_t i = 0; i < w.group; i += kBlock, at += unpack.size) {
      alignas(64) uint8_t code[kBlock];
      _mm512_store_si512(code, unpack.at(row + at, bytes - at));
      for (int64_t k = 0; k < kBlock && i + k < w.group; k += 16) {
        const __m512i c = _mm512_cvtepu8_epi32(_mm_load_si128(reinterpret_cast<const __m128i*>(code + k)));
        const __m512 v = w.additive != 0 ? _mm512_permutexvar_ps(c, table)
                                         : _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(c, zero)), scale);
        const __mmask16 some = static_cast<__mmask16>(first(w.group - i - k));
        const int64_t to = g * w.group + i + k;
        if (type == kFloat) _mm512_mask_storeu_ps(static_cast<float*>(out) + to, some, v);
        else _mm256_mask_storeu_epi16(static_cast<uint16_t*>(out) + to, some, (__m256i)_mm512_cvtneps_pbh(v));
      }
    }
  }
}

void centred(const Linear& w, int64_t o, int8_t* out) {
  const Bytes unpack(w.bits);
  const int64_t bytes = w.row_bytes();
  const uint8_t* row = w.codes + o * bytes;
  const __m512i middle = _mm512_set1_epi8(static_cast<char>(w.middle()));
  for (int64_t i = 0, at = 0; i < w.inputs; i += kBlock, at += unpack.size) {
    _mm512_mask_storeu_epi8(out + i, first(w.inputs - i), _mm512_sub_epi8(unpack.at(row + at, bytes - at), middle));
  }
}

void unpack_row(const uint8_t* row, int64_t bytes, int bits, int64_t n, uint8_t* codes) {
  const Bytes unpack(bits);
  for (int64_t i = 0, at = 0; i < n; i += kBlock, at += unpack.size) {
    _mm512_storeu_si512(codes + i, unpack.at(row + at, bytes - at));
  }
}

// In a register: an entry and its partner at distance h become their sum and difference.
__m512 step(__m512 v, __m512i partner, __mmask16 second) {
  const __m512 other = _mm512_permutexvar_ps(partner, v);
  return _mm512_mask_sub_ps(_mm512_add_ps(other, v), second, other, v);
}

__m512i partners(int h) {
  alignas(64) int32_t at[16];
  for (int i = 0; i < 16; ++i) at[i] = i ^ h;
  return _mm512_load_si512(at);
}

// As many registers of a row as kRegisters, in which all steps are done that stay among them.
template <int kRegisters>
void steps_of(float* work, int64_t n, const __m512i (&partner)[4]) {
  constexpr __mmask16 second[] = {0xaaaa, 0xcccc, 0xf0f0, 0xff00};
  for (int64_t i = 0; i < n; i += 16 * kRegisters) {
    __m512 v[kRegisters];
    for (int k = 0; k < kRegisters; ++k) {
      v[k] = _mm512_loadu_ps(work + i + 16 * k);
      for (int s = 0; s < 4; ++s) v[k] = step(v[k], partner[s], second[s]);
    }
    for (int h = 1; h < kRegisters; h *= 2) {
      for (int k = 0; k < kRegisters; ++k) {
        if ((k & h) != 0) continue;
        const __m512 a = v[k], b = v[k + h];
        v[k] = _mm512_add_ps(a, b), v[k + h] = _mm512_sub_ps(a, b);
      }
    }
    for (int k = 0; k < kRegisters; ++k) _mm512_storeu_ps(work + i + 16 * k, v[k]);
  }
}

int64_t first_steps(float* work, int64_t size, int64_t n) {
  const __m512i partner[] = {partners(1), partners(2), partners(4), partners(8)};
  if (size < 16) return 1;
  if (size >= 128) return steps_of<8>(work, n, partner), 128;
  if (size == 64) return steps_of<4>(work, n, partner), 64;
  return steps_of<1>(work, n, partner), 16;
}

uint64_t pack(const uint8_t* codes, int bits) {
  uint64_t word;
  std::memcpy(&word, codes, 8);
  return _pext_u64(word, 0x0101010101010101ull * ((1u << bits) - 1));
}

template <int kEntries>
void mix(const Turn& turn, const float* work, int64_t size, int64_t of, int64_t to, float* out) {
  constexpr int kRegisters = kEntries / 16;
  __m512 sums[kRegisters];
  for (__m512& s : sums) s = _mm512_setzero_ps();
  for (int64_t from = 0; from < turn.order; ++from) {
    const __m512 factor = _mm512_set1_ps(turn.left[from * turn.order + of]);
    for (int k = 0; k < kRegisters; ++k) sums[k] = _mm512_fmadd_ps(factor, _mm512_loadu_ps(work + from * size + to + 16 * k), sums[k]);
  }
  for (int k = 0; k < kRegisters; ++k) _mm512_storeu_ps(out + 16 * k, sums[k]);
}

}  // namespace
}  // namespace sordino

#define SORDINO_FIRST_STEPS
#define SORDINO_MIX
#define SORDINO_PACK
#include "pieces.h"
#include "training.h"
#include "attend512.h"
#include "many512.h"
#include "pieces512.h"
#include "training512.h"

namespace sordino {

const Kernels kAvx512 = {"avx512", 8, fits, arrange, product, integer, values, centred, encode_token, &kPieces512, &kTraining512, many512};

}  // namespace sordino
