// Small steps of a decoder layer with AVX-512, where compilers make less of pieces.h. The operations are the same, one by one, but
// that numbers below 2^-126 become zero when they are rounded to bf16.
#include "block.h"

namespace sordino {
namespace {

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
