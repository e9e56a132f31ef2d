// Small steps of a decoder layer with AVX-512, where compilers make less of pieces.h. The operations are the same, one by one, but
// that numbers below 2^-126 become zero when they are rounded to bf16.
#include "block.h"

namespace sordino {
namespace {

// exponential() of pieces.h.
__m512 exponential(__m512 x) {
  const auto all = [](float v) { return _mm512_set1_ps(v); };
  x = _mm512_min_ps(all(kLargest), _mm512_max_ps(all(kLeast), x));  // NaN stays: the second operand is taken then
  const __m512 shifted = _mm512_add_ps(_mm512_mul_ps(x, all(kLog2e)), all(kMagic));
  const __m512 k = _mm512_sub_ps(shifted, all(kMagic));
  const __m512 r = _mm512_sub_ps(_mm512_sub_ps(x, _mm512_mul_ps(k, all(kLn2High))), _mm512_mul_ps(k, all(kLn2Low)));
  __m512 p = all(kPowers[0]);
  for (int i = 1; i < 6; ++i) p = _mm512_add_ps(_mm512_mul_ps(p, r), all(kPowers[i]));
  p = _mm512_add_ps(_mm512_add_ps(_mm512_mul_ps(p, _mm512_mul_ps(r, r)), r), all(1.0f));
  const __m512i power = _mm512_add_epi32(_mm512_slli_epi32(_mm512_castps_si512(shifted), 23), _mm512_set1_epi32(0x3f800000));
  return _mm512_mul_ps(p, _mm512_castsi512_ps(power));
}

void put16(uint16_t* out, int64_t n, __m512 v) {
  _mm256_mask_storeu_epi16(out, static_cast<__mmask16>(first(n)), (__m256i)_mm512_cvtneps_pbh(v));
}

__m512 rounded16(__m512 v) { return widen16((__m256i)_mm512_cvtneps_pbh(v)); }

void glu512(const void* gate, const void* up, Type type, int64_t n, void* out) {
  if (type == kFloat) return any_glu(gate, up, type, n, out);
  const auto *g = static_cast<const uint16_t*>(gate), *u = static_cast<const uint16_t*>(up);
  for (int64_t i = 0; i < n; i += 16) {
    const __m512 x = load16(g + i, n - i);
    const __m512 below = _mm512_add_ps(_mm512_set1_ps(1), exponential(_mm512_sub_ps(_mm512_setzero_ps(), x)));
    put16(static_cast<uint16_t*>(out) + i, n - i, _mm512_mul_ps(rounded16(_mm512_div_ps(x, below)), load16(u + i, n - i)));
  }
}

constexpr Pieces kPieces512 = [] {
  Pieces pieces = kPieces;
  pieces.attend = attend512;
  pieces.glu = glu512;
  return pieces;
}();

}  // namespace
}  // namespace sordino
