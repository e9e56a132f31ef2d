// Integer products of many rows with AVX-512 (VNNI). Outputs of a weight are laid out so that a register holds sixteen of them, four
// codes each; `dpbusd` multiplies it and four codes of a token, broadcast. Six tokens and 64 outputs at a time are 24 registers of
// sums, which begin with -2^(b-1) times the token's sum, since weight codes are read as stored, and are scaled where they end.
//
// A panel of 64 outputs is laid out once for all rows, some panels at a time that stay in the caches; then panels and pieces of rows are shared
// among threads, so that weights with few outputs keep all of them busy.
#pragma once
#include <algorithm>

#include "many_outputs512.h"

namespace sordino {
namespace {

constexpr int kSix = 6, kStrips = 4;            // tokens, and registers of outputs, side by side
constexpr int64_t kPanel = kStrips * kStrip;    // outputs
constexpr int64_t kHeld = 768 << 10;            // bytes of weights laid out at once, if that is a panel for each of kHelpers threads
constexpr int kHelpers = 16;
constexpr int64_t kShares = 8;                  // pieces of work for a thread, where rows are enough
constexpr int64_t kFewest = 16 * kSix;           // rows of a piece

// Tokens' codes; rows of `stride` bytes, of which a word of four codes may be read wherever one begins.
struct Tokens {
  const int8_t* data;
  int64_t stride;
  const int32_t* sums;  // of every token's codes

  const int8_t* row(int64_t m) const { return data + m * stride; }
};

int32_t sum_of(const int8_t* codes, int64_t n) {
  __m512i sum = _mm512_setzero_si512();
  for (int64_t i = 0; i < n; i += kBlock) {
    sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), _mm512_maskz_loadu_epi8(first(n - i), codes + i));
  }
  return _mm512_reduce_add_epi32(sum);
}

// Products of tokens m … m + 5 and a panel, `quads` words of four inputs long. Past the last row it is taken again.
void multiply(const Tokens& x, int64_t m, int64_t rows, const int8_t* panel, int64_t quads, int middle, __m512i (&out)[kSix][kStrips]) {
  const int8_t* row[kSix];
  __m512i sums[kSix][kStrips];
#pragma GCC unroll 6
  for (int r = 0; r < kSix; ++r) {
    const int64_t at = std::min(m + r, rows - 1);
    row[r] = x.row(at);
#pragma GCC unroll 4
    for (int s = 0; s < kStrips; ++s) sums[r][s] = _mm512_set1_epi32(-middle * x.sums[at]);
  }
  for (int64_t q = 0; q < quads; ++q, panel += kStrips * kBlock) {
    __m512i w[kStrips];
#pragma GCC unroll 4
    for (int s = 0; s < kStrips; ++s) w[s] = _mm512_load_si512(panel + s * kBlock);
#pragma GCC unroll 6
    for (int r = 0; r < kSix; ++r) {
      int32_t four;
      std::memcpy(&four, row[r] + 4 * q, 4);
      const __m512i codes = _mm512_set1_epi32(four);
#pragma GCC unroll 4
      for (int s = 0; s < kStrips; ++s) sums[r][s] = _mm512_dpbusd_epi32(sums[r][s], w[s], codes);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kSix; ++r)
#pragma GCC unroll 4
    for (int s = 0; s < kStrips; ++s) out[r][s] = sums[r][s];
}

inline int64_t panels_of(const Linear& w) { return (w.outputs + kPanel - 1) / kPanel; }

// A panel of one of several products, counted through; `o` is its first output.
struct Panel {
  const Product* product;
  int64_t o;

  Panel(const Product* some, int64_t i) : product(some) {
    for (; i >= panels_of(*product->w); ++product) i -= panels_of(*product->w);
    o = i * kPanel;
  }
};

void many512(const Product* products, int n, const int8_t* x, const float* scale, bool one_scale, Type type, int64_t rows, int threads) {
  const int64_t inputs = products->w->inputs, quads = (inputs + 3) / 4, tall = padded(inputs) / 4 * kStrips * kBlock;
  int64_t panels = 0;
  for (int i = 0; i < n; ++i) panels += panels_of(*products[i].w);
  const int64_t held = std::min(panels, std::max<int64_t>(kHeld / tall, std::min(threads, kHelpers)));
  const bool whole = inputs % 4 == 0;  // else the last word of the last row ends behind it
  thread_local Scratch memory;
  char* data = static_cast<char*>(memory.get(held * (tall + sizeof(Scaled<kStrips>)) + (whole ? 0 : rows * 4 * quads) + rows * 4));
  int8_t* laid = reinterpret_cast<int8_t*>(data);
  Scaled<kStrips>* scaled = reinterpret_cast<Scaled<kStrips>*>(laid + held * tall);
  int32_t* sums = reinterpret_cast<int32_t*>(scaled + held);
  int8_t* copy = reinterpret_cast<int8_t*>(sums + rows);
  const Tokens codes{whole ? x : copy, 4 * quads, sums};
  together(threads, [&] {
    over(rows, kTokens, threads, [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; ++m) {
        sums[m] = sum_of(x + m * inputs, inputs);
        if (!whole) std::memcpy(copy + m * 4 * quads, x + m * inputs, static_cast<size_t>(inputs));
      }
    });
    for (int64_t from = 0; from < panels; from += held) {
      const int64_t some = std::min(held, panels - from);
      parallel_for(some, threads, [&](int64_t i) {
        const Panel panel(products, from + i);
        for (int s = 0; s < kStrips; ++s) {
          const int64_t o = panel.o + s * kStrip;
          lay_out<false>(*panel.product->w, o, laid + i * tall + s * kBlock, kStrips * kBlock, kStrip * kStrips * kBlock);
          scaled[i].set(*panel.product->w, o, s);
        }
      });
      // Every thread has rows of its own: on a Zen 5 a few percent faster than outputs side by side.
      const int64_t wanted = std::max<int64_t>((kShares * threads + some - 1) / some, threads);
      const int64_t pieces = std::min(wanted, std::max<int64_t>(rows / kFewest, threads));
      const int64_t step = ((rows + pieces - 1) / pieces + kSix - 1) / kSix * kSix, parts = (rows + step - 1) / step;
      parallel_for(some * parts, threads, [&](int64_t task) {
        const int64_t i = task / parts, begin = task % parts * step, end = std::min(begin + step, rows);
        const Panel panel(products, from + i);
        const Linear& w = *panel.product->w;
        for (int64_t m = begin; m < end; m += kSix) {
          __m512i found[kSix][kStrips];
          multiply(codes, m, rows, laid + i * tall, quads, w.middle(), found);
          for (int64_t r = 0; r < kSix && m + r < end; ++r) {
            const float token = scale[one_scale ? 0 : m + r];
            char* to = static_cast<char*>(panel.product->out) + (m + r) * w.outputs * width(type);
            for (int s = 0; s < kStrips; ++s) scaled[i].put(found[r][s], s, token, type, panel.o, w.outputs, to);
          }
        }
      });
    }
  });
}

}  // namespace
}  // namespace sordino
