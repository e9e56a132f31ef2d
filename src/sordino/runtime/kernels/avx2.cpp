// AVX2 with FMA and BMI2: `pdep` spreads eight codes of any width over eight bytes at once.
#include <immintrin.h>

#include "kernels.h"

namespace sordino {
namespace {

// For `pdep`: the low b bits of every byte.
uint64_t spread(int bits) { return 0x0101010101010101ull * ((1u << bits) - 1); }

__m256 to_floats(uint64_t eight) { return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<long long>(eight)))); }

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

// Every group must begin on a unit of eight codes.
bool fits(const Linear& w) { return w.additive == 0 && (w.group % 8 == 0 || w.group == w.inputs); }

// fp32, every group padded with zeros to whole blocks.
void arrange(const Linear& w, const void* x, Type type, int64_t rows, const Arranged& to) {
  const int64_t groups = w.groups(), step = padded(w.group);
  for (int64_t m = 0; m < rows; ++m) {
    float* row = reinterpret_cast<float*>(static_cast<char*>(to.values) + m * to.stride);
    for (int64_t g = 0; g < groups; ++g) {
      float* part = row + g * step;
      const int64_t from = m * w.inputs + g * w.group;
      if (type == kFloat) std::memcpy(part, static_cast<const float*>(x) + from, w.group * 4);
      else for (int64_t i = 0; i < w.group; ++i) part[i] = widen(static_cast<const uint16_t*>(x)[from + i]);
      for (int64_t i = w.group; i < step; ++i) part[i] = 0;
    }
  }
}

// Past the end of a group or row come codes that are not its own, up to a whole step of 32: their activations are zero.
template <int M>
void product_rows(const Linear& w, const Arranged& x, int64_t begin, int64_t end, float* y) {
  constexpr int kSums = M == 1 ? 4 : M == 2 ? 2 : 1;  // independent sums of a row, as many as registers allow
  const int64_t groups = w.groups(), step = padded(w.group), bytes = w.row_bytes(), stride = x.stride / 4;
  const uint8_t* stop = w.codes + w.outputs * bytes;
  const uint64_t mask = spread(w.bits);
  for (int64_t o = begin; o < end; ++o) {
    __m256 sums[M];
    for (int m = 0; m < M; ++m) sums[m] = _mm256_setzero_ps();
    for (int64_t g = 0; g < groups; ++g) {
      const uint8_t* p = w.codes + o * bytes + g * w.group * w.bits / 8;
      const __m256 zero = _mm256_set1_ps(static_cast<float>(zero_at(w, o, g)));
      const __m256 scale = _mm256_set1_ps(widen(w.scale[o * groups + g]));
      const float* part = static_cast<const float*>(x.values) + g * step;
      __m256 here[M][kSums];
      for (int m = 0; m < M; ++m)
        for (int k = 0; k < kSums; ++k) here[m][k] = _mm256_setzero_ps();
      for (int64_t i = 0; i < w.group; i += 32, p += 4 * w.bits) {
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) {
          const __m256 code = _mm256_sub_ps(to_floats(_pdep_u64(unit(p + k * w.bits, stop), mask)), zero);
#pragma GCC unroll 4
          for (int m = 0; m < M; ++m) {
            const __m256 xs = _mm256_loadu_ps(part + m * stride + i + 8 * k);
            here[m][k % kSums] = _mm256_fmadd_ps(code, xs, here[m][k % kSums]);
          }
        }
      }
      for (int m = 0; m < M; ++m) {
        __m256 sum = here[m][0];
        for (int k = 1; k < kSums; ++k) sum = _mm256_add_ps(sum, here[m][k]);
        sums[m] = _mm256_fmadd_ps(scale, sum, sums[m]);
      }
    }
    for (int m = 0; m < M; ++m) y[(o - begin) * M + m] = total(sums[m]);
  }
}

void product(const Linear& w, const Arranged& x, Type, int rows, int64_t begin, int64_t end, float* y) {
  switch (rows) {
    case 1: return product_rows<1>(w, x, begin, end, y);
    case 2: return product_rows<2>(w, x, begin, end, y);
    case 3: return product_rows<3>(w, x, begin, end, y);
    default: return product_rows<4>(w, x, begin, end, y);
  }
}

// Products of 32 unsigned weight codes and 32 signed input codes, summed to eight int32.
template <bool kWide>
__m256i multiply(__m256i code, __m256i x) {
  if (!kWide) return _mm256_madd_epi16(_mm256_maddubs_epi16(code, x), _mm256_set1_epi16(1));
  // A pair of 8-bit products may exceed the 16 bits that maddubs has for it.
  const __m256i low = _mm256_madd_epi16(_mm256_cvtepu8_epi16(_mm256_castsi256_si128(code)),
                                        _mm256_cvtepi8_epi16(_mm256_castsi256_si128(x)));
  const __m256i high = _mm256_madd_epi16(_mm256_cvtepu8_epi16(_mm256_extracti128_si256(code, 1)),
                                         _mm256_cvtepi8_epi16(_mm256_extracti128_si256(x, 1)));
  return _mm256_add_epi32(low, high);
}

template <int M, bool kWide>
void integer_rows(const Linear& w, const int8_t* x, int64_t stride, int64_t begin, int64_t end, int32_t* y) {
  const int64_t bytes = w.row_bytes();
  const uint8_t* stop = w.codes + w.outputs * bytes;
  const uint64_t mask = spread(w.bits);
  for (int64_t o = begin; o < end; ++o) {
    const uint8_t* p = w.codes + o * bytes;
    __m256i sums[M];
    for (int m = 0; m < M; ++m) sums[m] = _mm256_setzero_si256();
    for (int64_t i = 0; i < w.inputs; i += 32, p += 4 * w.bits) {
      const auto eight = [&](int k) { return static_cast<long long>(_pdep_u64(unit(p + k * w.bits, stop), mask)); };
      const __m256i code = _mm256_set_epi64x(eight(3), eight(2), eight(1), eight(0));
      for (int m = 0; m < M; ++m) {
        const __m256i xs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + m * stride + i));
        sums[m] = _mm256_add_epi32(sums[m], multiply<kWide>(code, xs));
      }
    }
    for (int m = 0; m < M; ++m) y[(o - begin) * M + m] = total(sums[m]);
  }
}

template <bool kWide>
void integer_any(const Linear& w, const int8_t* x, int64_t stride, int rows, int64_t begin, int64_t end, int32_t* y) {
  switch (rows) {
    case 1: return integer_rows<1, kWide>(w, x, stride, begin, end, y);
    case 2: return integer_rows<2, kWide>(w, x, stride, begin, end, y);
    case 3: return integer_rows<3, kWide>(w, x, stride, begin, end, y);
    default: return integer_rows<4, kWide>(w, x, stride, begin, end, y);
  }
}

void integer(const Linear& w, const int8_t* x, int64_t stride, int rows, int64_t begin, int64_t end, int32_t* y) {
  if (w.bits == 8) integer_any<true>(w, x, stride, rows, begin, end, y);
  else integer_any<false>(w, x, stride, rows, begin, end, y);
}

void values(const Linear& w, int64_t o, Type type, void* out) {
  if (!fits(w)) return kPortable.values(w, o, type, out);
  const int64_t groups = w.groups();
  const uint8_t* row = w.codes + o * w.row_bytes();
  const uint8_t* end = row + w.row_bytes();
  const uint64_t mask = spread(w.bits);
  for (int64_t g = 0; g < groups; ++g) {
    const __m256 zero = _mm256_set1_ps(static_cast<float>(zero_at(w, o, g)));
    const __m256 scale = _mm256_set1_ps(widen(w.scale[o * groups + g]));
    const uint8_t* p = row + g * w.group * w.bits / 8;
    for (int64_t i = 0; i < w.group; i += 8, p += w.bits) {
      float eight[8];
      _mm256_storeu_ps(eight, _mm256_mul_ps(_mm256_sub_ps(to_floats(_pdep_u64(unit(p, end), mask)), zero), scale));
      const int64_t n = w.group - i < 8 ? w.group - i : 8;
      for (int64_t k = 0; k < n; ++k) write(out, type, g * w.group + i + k, eight[k]);
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

#include "pieces.h"
#include "many256.h"
#include "training.h"

namespace sordino {

const Kernels kAvx2 = {"avx2", 4, fits, arrange, product, integer, values, centred, encode_token, &kPieces, &kTraining, many};

}  // namespace sordino
