// Rows of a cache as numbers with AVX-512, 64 entries at a time.
#pragma once
#include "block.h"
#include "codes512.h"

namespace sordino {
namespace {

// Rows of one key head: codes without zero point and scale, and those, which are 0 and 1 for plain numbers. Scales are `times` theirs.
struct Reader {
  const Span& s;
  const int64_t n;  // entries of a row
  const float times;
  const Bytes unpack;
  __m512i spread[4];
  int64_t from = 0;
  float scale[kTogether], zero[kTogether];

  Reader(const Span& span, int64_t size, float factor) : s(span), n(size), times(factor), unpack(span.bits == 0 ? 8 : span.bits) {
    for (int k = 0; k < 4; ++k) {
      alignas(64) uint8_t at[64] = {};
      for (int i = 0; i < 16; ++i) at[4 * i] = static_cast<uint8_t>(16 * k + i);
      spread[k] = _mm512_load_si512(at);
    }
  }

  // Rows are counted from `row` on; the next `rows` of them have their units looked up.
  void begin(int64_t row, int64_t rows) {
    from = row;
    for (int64_t i = 0; i < rows; ++i) {
      scale[i] = 1, zero[i] = 0;
      if (s.bits != 0) unit_of(s, data(i), n, &scale[i], &zero[i]);
      scale[i] *= times;
    }
  }

  const uint8_t* data(int64_t i) const { return s.data + (from + i) * s.stride; }

  // Entries at … at + 64 of row i: fp32 [4][16].
  void numbers(int64_t i, int64_t at, __m512 out[4]) const {
    const uint8_t* row = data(i);
    _mm_prefetch(reinterpret_cast<const char*>(row) + kAhead, _MM_HINT_T0);
    if (s.bits == 0 && s.type == kFloat) {
      for (int k = 0; k < 4; ++k) out[k] = _mm512_loadu_ps(reinterpret_cast<const float*>(row) + at + 16 * k);
    } else if (s.bits == 0) {
      const uint16_t* half = reinterpret_cast<const uint16_t*>(row) + at;
      for (int k = 0; k < 4; ++k) out[k] = widen16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(half + 16 * k)));
    } else {
      const __m512i code = unpack(_mm512_maskz_loadu_epi8(first(8 * s.bits), row + at * s.bits / 8));
      for (int k = 0; k < 4; ++k) {
        out[k] = _mm512_cvtepi32_ps(_mm512_maskz_permutexvar_epi8(0x1111111111111111ull, spread[k], code));
      }
    }
  }
};

}  // namespace
}  // namespace sordino
