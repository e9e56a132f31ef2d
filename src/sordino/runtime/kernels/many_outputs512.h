// What integer products of many rows share, by AVX-512 and by matrix tiles: outputs laid out, and sums scaled.
#pragma once
#include "codes512.h"
#include "products.h"

namespace sordino {
namespace {

constexpr int kStrip = 16;  // outputs side by side

// Outputs o … o + 15 (zero where there are none) as words of four codes, for every four inputs [16, 4]; `step` bytes from one four to the
// next, `next` from one block of inputs to the next, the last of which is padded. Codes are as stored, or less 2^(b-1) (kCentred). The
// outputs behind them are asked for ahead.
template <bool kCentred>
void lay_out(const Linear& w, int64_t o, int8_t* to, int64_t step, int64_t next) {
  const int64_t bytes = w.row_bytes(), there = w.outputs - o;
  const Bytes unpack(w.bits);
  const __m512i less = _mm512_set1_epi8(static_cast<char>(kCentred ? w.middle() : 0));
  for (int64_t i = 0, at = 0; i < w.inputs; i += kBlock, at += unpack.size, to += next) {
    const __mmask64 some = first(w.inputs - i);
    __m512i row[kStrip];
    for (int64_t r = 0; r < kStrip; ++r) {
      row[r] = _mm512_setzero_si512();
      if (r >= there) continue;
      const uint8_t* codes = w.codes + (o + r) * bytes + at;
      _mm_prefetch(reinterpret_cast<const char*>(codes + kStrip * bytes), _MM_HINT_T0);
      row[r] = _mm512_maskz_sub_epi8(some, unpack.at(codes, bytes - at), less);
    }
    transpose(row, to, step);
  }
}

// Scales and biases of outputs side by side.
template <int kStrips>
struct Scaled {
  alignas(64) float scale[kStrips * kStrip], bias[kStrips * kStrip];

  // Of strip s, whose outputs begin with o.
  void set(const Linear& w, int64_t o, int s) {
    for (int64_t i = 0; i < kStrip; ++i) {
      const bool there = o + i < w.outputs;
      scale[s * kStrip + i] = there ? widen(w.scale[o + i]) : 0;
      bias[s * kStrip + i] = there ? bias_at(w, o + i) : 0;
    }
  }

  // Sums of strip s and a token whose scale is `token`, into its row of the output; the first strip begins with output o.
  void put(__m512i sums, int s, float token, Type type, int64_t o, int64_t outputs, void* row) const {
    const int64_t at = o + s * kStrip;
    const __mmask16 some = static_cast<__mmask16>(first(outputs - at));
    __m512 v = _mm512_mul_ps(_mm512_cvtepi32_ps(sums), _mm512_mul_ps(_mm512_set1_ps(token), _mm512_load_ps(scale + s * kStrip)));
    v = _mm512_add_ps(v, _mm512_load_ps(bias + s * kStrip));
    if (type == kFloat) _mm512_mask_storeu_ps(static_cast<float*>(row) + at, some, v);
    else _mm256_mask_storeu_epi16(static_cast<uint16_t*>(row) + at, some, (__m256i)_mm512_cvtneps_pbh(v));
  }
};

}  // namespace
}  // namespace sordino
