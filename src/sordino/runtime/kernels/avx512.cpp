// AVX-512 with VBMI, VNNI and BF16 (Zen 4, Sapphire Rapids and later).
//
// Eight codes of b bits fill b bytes. One byte permutation puts the units of a block of 64 codes into eight 64-bit words,
// one multishift takes the fields out of every word: the same few instructions for every width, read straight from the
// stored bit stream.
//
// Products with floating activations: fields become bf16 numbers (code - 2^(b-1), exact) by a table in a register, and
// `dpbf16` multiplies them with bf16 activations exactly, summing in fp32. An fp32 activation is split into three bf16
// numbers whose sum it is exactly (3 x 8 bits of significand), so the same instruction serves it. A zero point other than
// 2^(b-1) is made up for once a group: sum_i x_i (c_i - z) = sum_i x_i (c_i - mid) + (mid - z) sum_i x_i.
#include <immintrin.h>

#include "kernels.h"

namespace sordino {
namespace {

constexpr int kHalf = kBlock / 2;  // bf16 numbers in a register
constexpr int kAhead = 4096;       // bytes: the processor's own prefetching ends at every page

bool fits(const Linear& w) { return w.group % 8 == 0 || w.group == w.inputs; }

// Control bytes of the unpacking; `pair` 0 or 1: even or odd codes as 16-bit words (junk above the field), -1: all, as bytes.
__m512i unit_bytes(int bits) {
  alignas(64) uint8_t at[64];
  for (int i = 0; i < 64; ++i) at[i] = static_cast<uint8_t>(i / 8 * bits + i % 8);
  return _mm512_load_si512(at);
}

__m512i fields(int bits, int pair) {
  alignas(64) uint8_t shift[64];
  for (int i = 0; i < 64; ++i) {
    const int k = i % 8;
    shift[i] = static_cast<uint8_t>(pair < 0 ? k * bits : (k / 2 * 2 + pair) * bits + k % 2 * 8);
  }
  return _mm512_load_si512(shift);
}

__mmask64 first(int64_t n) { return n >= 64 ? ~0ull : n <= 0 ? 0 : _bzhi_u64(~0ull, static_cast<unsigned>(n)); }

__m512 widen16(__m256i half) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16)); }

// Sums of the first and second half of 32 bf16 numbers.
__m512 widen32(__m512i x) {
  return _mm512_add_ps(widen16(_mm512_castsi512_si256(x)), widen16(_mm512_extracti64x4_epi64(x, 1)));
}

// bf16 numbers factor * ((index mod 2^bits) - middle) for index = from … from + 31: junk above a field changes nothing.
__m512i table(int bits, int from, int middle, int factor) {
  alignas(64) uint16_t entries[kHalf];
  for (int i = 0; i < kHalf; ++i) {
    entries[i] = narrow(static_cast<float>(factor * (((from + i) & ((1 << bits) - 1)) - middle)));
  }
  return _mm512_load_si512(entries);
}

// ---- activations: blocks of 32 even and 32 odd ones, once for each of the pieces ----

__m512i indices(int odd) {
  alignas(64) uint16_t at[kHalf];
  for (int i = 0; i < kHalf; ++i) at[i] = static_cast<uint16_t>(2 * i + odd);
  return _mm512_load_si512(at);
}

float arrange_bfloat(const uint16_t* x, int64_t n, uint16_t* to, __m512i even, __m512i odd) {
  __m512 sum = _mm512_setzero_ps();
  for (int64_t i = 0; i < n; i += kBlock, to += kBlock) {
    const __m512i low = _mm512_maskz_loadu_epi16(static_cast<__mmask32>(first(n - i)), x + i);
    const __m512i high = _mm512_maskz_loadu_epi16(static_cast<__mmask32>(first(n - i - kHalf)), x + i + kHalf);
    _mm512_store_si512(to, _mm512_permutex2var_epi16(low, even, high));
    _mm512_store_si512(to + kHalf, _mm512_permutex2var_epi16(low, odd, high));
    sum = _mm512_add_ps(sum, _mm512_add_ps(widen32(low), widen32(high)));
  }
  return _mm512_reduce_add_ps(sum);
}

float arrange_float(const float* x, int64_t n, uint16_t* to, __m512i even, __m512i odd) {
  const __m512i top = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  __m512 sum = _mm512_setzero_ps();
  for (int64_t i = 0; i < n; i += kBlock) {
    __m512 rest[4];
    for (int k = 0; k < 4; ++k) {
      rest[k] = _mm512_maskz_loadu_ps(static_cast<__mmask16>(first(n - i - 16 * k)), x + i + 16 * k);
      sum = _mm512_add_ps(sum, rest[k]);
    }
    for (int piece = 0; piece < 3; ++piece, to += kBlock) {
      __m256i half[4];
      for (int k = 0; k < 4; ++k) {
        // Cut off, not rounded: what remains is exact, and no finite number becomes infinite.
        const __m512i cut = _mm512_and_si512(_mm512_castps_si512(rest[k]), top);
        rest[k] = _mm512_sub_ps(rest[k], _mm512_castsi512_ps(cut));
        half[k] = _mm512_cvtepi32_epi16(_mm512_srli_epi32(cut, 16));
      }
      const __m512i low = _mm512_inserti64x4(_mm512_castsi256_si512(half[0]), half[1], 1);
      const __m512i high = _mm512_inserti64x4(_mm512_castsi256_si512(half[2]), half[3], 1);
      _mm512_store_si512(to, _mm512_permutex2var_epi16(low, even, high));
      _mm512_store_si512(to + kHalf, _mm512_permutex2var_epi16(low, odd, high));
    }
  }
  return _mm512_reduce_add_ps(sum);
}

void arrange(const Linear& w, const void* x, Type type, int64_t rows, const Arranged& to) {
  const int64_t groups = w.groups(), step = padded(w.group) * (type == kFloat ? 3 : 1);
  const __m512i even = indices(0), odd = indices(1);
  for (int64_t m = 0; m < rows; ++m) {
    uint16_t* row = reinterpret_cast<uint16_t*>(static_cast<char*>(to.values) + m * to.stride);
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t from = m * w.inputs + g * w.group;
      to.sums[m * groups + g] =
          type == kFloat ? arrange_float(static_cast<const float*>(x) + from, w.group, row + g * step, even, odd)
                         : arrange_bfloat(static_cast<const uint16_t*>(x) + from, w.group, row + g * step, even, odd);
    }
  }
}

// ---- products ----

enum Width { kUpTo5, kSix, kEight };

// Turns a block of stored codes into bf16 numbers: `n` registers of 32, of even and odd codes in turn.
template <Width kWidth>
struct Decoder {
  static constexpr int n = kWidth == kEight ? 4 : 2;
  __m512i bytes, even, odd, low, high;

  explicit Decoder(int bits) {
    bytes = unit_bytes(bits), even = fields(bits, 0), odd = fields(bits, 1);
    // 8 bits are two digits: c - 128 = 16 (high - 8) + low.
    if (kWidth == kEight) low = table(4, 0, 0, 1), high = table(4, 0, 8, 16);
    else low = table(bits, 0, 1 << (bits - 1), 1), high = table(bits, kHalf, 1 << (bits - 1), 1);
  }

  void operator()(__m512i block, __m512i out[n]) const {
    if (kWidth == kEight) {
      out[0] = _mm512_permutexvar_epi16(block, low);
      out[1] = _mm512_permutexvar_epi16(_mm512_srli_epi16(block, 8), low);
      out[n - 2] = _mm512_permutexvar_epi16(_mm512_srli_epi16(block, 4), high);
      out[n - 1] = _mm512_permutexvar_epi16(_mm512_srli_epi16(block, 12), high);
      return;
    }
    block = _mm512_permutexvar_epi8(bytes, block);
    const __m512i e = _mm512_multishift_epi64_epi8(even, block), o = _mm512_multishift_epi64_epi8(odd, block);
    out[0] = kWidth == kSix ? _mm512_permutex2var_epi16(low, e, high) : _mm512_permutexvar_epi16(e, low);
    out[1] = kWidth == kSix ? _mm512_permutex2var_epi16(low, o, high) : _mm512_permutexvar_epi16(o, low);
  }
};

// (2^(b-1) - zero) * scale of up to 16 groups from g on.
__m512 shifts(const Linear& w, int64_t o, int64_t g, __mmask16 some) {
  const int64_t bit = o * w.bits, groups = w.groups(), shift = bit % 32;
  const uint32_t* zero = w.zero + bit / 32 * groups + g;
  __m512i z = _mm512_srl_epi32(_mm512_maskz_loadu_epi32(some, zero), _mm_cvtsi64_si128(shift));
  if (shift + w.bits > 32) {
    const __m512i next = _mm512_maskz_loadu_epi32(some, zero + groups);
    z = _mm512_or_si512(z, _mm512_sll_epi32(next, _mm_cvtsi64_si128(32 - shift)));
  }
  z = _mm512_and_si512(z, _mm512_set1_epi32((1 << w.bits) - 1));
  const __m512 off = _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_set1_epi32(w.middle()), z));
  return _mm512_mul_ps(off, widen16(_mm256_maskz_loadu_epi16(some, w.scale + o * groups + g)));
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

// R rows of the weight side by side: their activations are loaded once, and no sum waits for another. `kWhole`: a register's width may
// be read behind each of them.
template <Width kWidth, int kPieces, int M, int R, bool kWhole>
void product_tile(const Linear& w, const Arranged& x, const Decoder<kWidth>& decode, int64_t o, float* y) {
  const int64_t groups = w.groups(), bytes = w.row_bytes(), step = padded(w.group) * kPieces, block_bytes = 8 * w.bits;
  const int64_t stride = x.stride / 2;
  const uint16_t* part = static_cast<const uint16_t*>(x.values);
  const uint8_t* row = w.codes + o * bytes;
  __m512 sums[R][M];
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) sums[r][m] = _mm512_setzero_ps();
  for (int64_t from = 0; from < groups; from += 16) {
    const int64_t some = groups - from < 16 ? groups - from : 16;
    const __mmask16 mask = static_cast<__mmask16>(first(some));
    alignas(64) float scale[R][16];
    for (int r = 0; r < R; ++r) {
      _mm512_store_ps(scale[r], widen16(_mm256_maskz_loadu_epi16(mask, w.scale + (o + r) * groups + from)));
    }
    for (int64_t g = 0; g < some; ++g) {
      const uint16_t* xs = part + (from + g) * step;
      int64_t at = (from + g) * w.group * w.bits / 8;
      __m512 here[R][M][2];
      for (int r = 0; r < R; ++r)
        for (int m = 0; m < M; ++m) here[r][m][0] = here[r][m][1] = _mm512_setzero_ps();
      for (int64_t i = 0; i < w.group; i += kBlock, at += block_bytes, xs += kPieces * kBlock) {
        for (int r = 0; r < R; ++r) {
          const uint8_t* p = row + r * bytes + at;
          const int64_t left = bytes - at;
          _mm_prefetch(reinterpret_cast<const char*>(p) + kAhead, _MM_HINT_T0);
          const __m512i block =
              kWhole ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi8(first(left < block_bytes ? left : block_bytes), p);
          __m512i code[Decoder<kWidth>::n];
          decode(block, code);
          for (int m = 0; m < M; ++m) {
            for (int piece = 0; piece < kPieces; ++piece) {
              for (int k = 0; k < Decoder<kWidth>::n; ++k) {
                const __m512i v = _mm512_load_si512(xs + m * stride + piece * kBlock + k % 2 * kHalf);
                here[r][m][k % 2] = _mm512_dpbf16_ps(here[r][m][k % 2], (__m512bh)code[k], (__m512bh)v);
              }
            }
          }
        }
      }
      for (int r = 0; r < R; ++r) {
        const __m512 s = _mm512_set1_ps(scale[r][g]);
        for (int m = 0; m < M; ++m) sums[r][m] = _mm512_fmadd_ps(s, _mm512_add_ps(here[r][m][0], here[r][m][1]), sums[r][m]);
      }
    }
    for (int r = 0; w.zero != nullptr && r < R; ++r) {
      const __m512 shift = shifts(w, o + r, from, mask);
      for (int m = 0; m < M; ++m) {
        sums[r][m] = _mm512_fmadd_ps(shift, _mm512_maskz_loadu_ps(mask, x.sums + m * groups + from), sums[r][m]);
      }
    }
  }
  if constexpr (R * M % 4 == 0) {
    const __m512* all = &sums[0][0];
    for (int i = 0; i < R * M; i += 4) _mm_storeu_ps(y + i, totals(all[i], all[i + 1], all[i + 2], all[i + 3]));
  } else {
    for (int r = 0; r < R; ++r)
      for (int m = 0; m < M; ++m) y[r * M + m] = _mm512_reduce_add_ps(sums[r][m]);
  }
}

template <Width kWidth, int kPieces, int M>
void product_rows(const Linear& w, const Arranged& x, int64_t begin, int64_t end, float* y) {
  constexpr int R = M == 1 ? 4 : M == 2 ? 2 : 1;
  const Decoder<kWidth> decode(w.bits);
  int64_t o = begin;
  // The last rows of the matrix have less than a register's width behind them.
  const int64_t safe = w.outputs - 1 - 64 / (w.row_bytes() > 0 ? w.row_bytes() : 1);
  for (; o + R <= end && o + R <= safe; o += R) product_tile<kWidth, kPieces, M, R, true>(w, x, decode, o, y + (o - begin) * M);
  for (; o < end; ++o) product_tile<kWidth, kPieces, M, 1, false>(w, x, decode, o, y + (o - begin) * M);
}

template <Width kWidth, int kPieces>
void product_any(const Linear& w, const Arranged& x, int rows, int64_t begin, int64_t end, float* y) {
  switch (rows) {
    case 1: return product_rows<kWidth, kPieces, 1>(w, x, begin, end, y);
    case 2: return product_rows<kWidth, kPieces, 2>(w, x, begin, end, y);
    case 3: return product_rows<kWidth, kPieces, 3>(w, x, begin, end, y);
    default: return product_rows<kWidth, kPieces, 4>(w, x, begin, end, y);
  }
}

void product(const Linear& w, const Arranged& x, Type type, int rows, int64_t begin, int64_t end, float* y) {
  const auto run = type == kFloat ? (w.bits == 8   ? product_any<kEight, 3>
                                     : w.bits == 6 ? product_any<kSix, 3>
                                                   : product_any<kUpTo5, 3>)
                                  : (w.bits == 8   ? product_any<kEight, 1>
                                     : w.bits == 6 ? product_any<kSix, 1>
                                                   : product_any<kUpTo5, 1>);
  run(w, x, rows, begin, end, y);
}

// Codes of a block as bytes, in their order.
struct Bytes {
  __m512i bytes, all, mask;
  bool plain;

  explicit Bytes(int bits)
      : bytes(unit_bytes(bits)), all(fields(bits, -1)), mask(_mm512_set1_epi8(static_cast<char>((1 << bits) - 1))), plain(bits == 8) {}

  __m512i operator()(__m512i block) const {
    if (plain) return block;
    return _mm512_and_si512(_mm512_multishift_epi64_epi8(all, _mm512_permutexvar_epi8(bytes, block)), mask);
  }
};

template <int M>
void integer_rows(const Linear& w, const int8_t* x, int64_t stride, int64_t begin, int64_t end, int32_t* y) {
  const Bytes unpack(w.bits);
  const int64_t bytes = w.row_bytes(), block_bytes = 8 * w.bits;
  for (int64_t o = begin; o < end; ++o) {
    const uint8_t* row = w.codes + o * bytes;
    __m512i sums[M];
    for (int m = 0; m < M; ++m) sums[m] = _mm512_setzero_si512();
    for (int64_t i = 0, at = 0; i < w.inputs; i += kBlock, at += block_bytes) {
      const int64_t left = bytes - at;
      const __m512i code = unpack(_mm512_maskz_loadu_epi8(first(left < block_bytes ? left : block_bytes), row + at));
      for (int m = 0; m < M; ++m) sums[m] = _mm512_dpbusd_epi32(sums[m], code, _mm512_loadu_si512(x + m * stride + i));
    }
    for (int m = 0; m < M; ++m) y[(o - begin) * M + m] = _mm512_reduce_add_epi32(sums[m]);
  }
}

void integer(const Linear& w, const int8_t* x, int64_t stride, int rows, int64_t begin, int64_t end, int32_t* y) {
  switch (rows) {
    case 1: return integer_rows<1>(w, x, stride, begin, end, y);
    case 2: return integer_rows<2>(w, x, stride, begin, end, y);
    case 3: return integer_rows<3>(w, x, stride, begin, end, y);
    default: return integer_rows<4>(w, x, stride, begin, end, y);
  }
}

// ---- unpacked weights, for many rows of activations ----

void values(const Linear& w, int64_t o, Type type, void* out) {
  if (!fits(w)) return kPortable.values(w, o, type, out);
  const Bytes unpack(w.bits);
  const int64_t groups = w.groups(), bytes = w.row_bytes(), block_bytes = 8 * w.bits;
  const uint8_t* row = w.codes + o * bytes;
  for (int64_t g = 0; g < groups; ++g) {
    const __m512i zero = _mm512_set1_epi32(zero_at(w, o, g));
    const __m512 scale = _mm512_set1_ps(widen(w.scale[o * groups + g]));
    int64_t at = g * w.group * w.bits / 8;
    for (int64_t i = 0; i < w.group; i += kBlock, at += block_bytes) {
      const int64_t left = bytes - at;
      alignas(64) uint8_t code[kBlock];
      _mm512_store_si512(code, unpack(_mm512_maskz_loadu_epi8(first(left < block_bytes ? left : block_bytes), row + at)));
      for (int64_t k = 0; k < kBlock && i + k < w.group; k += 16) {
        const __m512i c = _mm512_cvtepu8_epi32(_mm_load_si128(reinterpret_cast<const __m128i*>(code + k)));
        const __m512 v = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(c, zero)), scale);
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
  const int64_t bytes = w.row_bytes(), block_bytes = 8 * w.bits;
  const uint8_t* row = w.codes + o * bytes;
  const __m512i middle = _mm512_set1_epi8(static_cast<char>(w.middle()));
  for (int64_t i = 0, at = 0; i < w.inputs; i += kBlock, at += block_bytes) {
    const int64_t left = bytes - at;
    const __m512i code = unpack(_mm512_maskz_loadu_epi8(first(left < block_bytes ? left : block_bytes), row + at));
    _mm512_mask_storeu_epi8(out + i, first(w.inputs - i), _mm512_sub_epi8(code, middle));
  }
}

void unpack_row(const uint8_t* row, int64_t bytes, int bits, int64_t n, uint8_t* codes) {
  const Bytes unpack(bits);
  const int64_t block_bytes = 8 * bits;
  for (int64_t i = 0, at = 0; i < n; i += kBlock, at += block_bytes) {
    const int64_t left = bytes - at;
    const __m512i code = unpack(_mm512_maskz_loadu_epi8(first(left < block_bytes ? left : block_bytes), row + at));
    _mm512_storeu_si512(codes + i, code);
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

void sixteen(float* work, int64_t n) {
  const __m512i one = partners(1), two = partners(2), four = partners(4), eight = partners(8);
  for (int64_t i = 0; i < n; i += 16) {
    __m512 v = _mm512_loadu_ps(work + i);
    v = step(v, one, 0xaaaa);
    v = step(v, two, 0xcccc);
    v = step(v, four, 0xf0f0);
    v = step(v, eight, 0xff00);
    _mm512_storeu_ps(work + i, v);
  }
}

}  // namespace
}  // namespace sordino

#define SORDINO_SIXTEEN
#include "pieces.h"
#include "attend512.h"

namespace sordino {

const Kernels kAvx512 = {"avx512", 6, fits, arrange, product, integer, values, centred, encode_token, &kPieces512, nullptr};

}  // namespace sordino
