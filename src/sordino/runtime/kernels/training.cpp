// What training a decoder layer does beside matrix products, for all tokens or weights at once (training.py).
//
// C functions like those of dispatch.cpp. What is summed is summed in an order that threads do not change.
#include "block.h"
#include "products.h"

namespace sordino {
namespace {

int64_t at_once(int64_t row) { return row >= kEntries ? 1 : kEntries / row; }

template <class T>
T* at(T* x, int64_t i) {
  return x == nullptr ? nullptr : x + i;
}

}  // namespace

// Values [groups, group] of positions fp32 on their grids, whose codes are written, or, without positions, of codes.
SORDINO_API int sordino_grid(const float* latent, uint8_t* codes, const float* scale, const float* zero, int bits, int64_t groups,
                             int64_t group, int type, void* out, int threads) {
  const Training& t = *in_use().training;
  over(groups, at_once(group), threads, [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) {
      t.grid(at(latent, g * group), codes + g * group, scale[g], zero[g], bits, static_cast<Type>(type), group,
             static_cast<char*>(out) + g * group * width(type));
    }
  });
  return 0;
}

// Gradients fp32 of positions [groups, group] and scales [groups], those that are asked for, from those of values.
SORDINO_API int sordino_grid_back(const void* grad, int type, const uint8_t* codes, const float* scale, const float* zero,
                                  int64_t groups, int64_t group, float* to_latent, float* to_scale, int threads) {
  const Training& t = *in_use().training;
  over(groups, at_once(group), threads, [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) {
      t.grid_back(static_cast<const char*>(grad) + g * group * width(type), static_cast<Type>(type), codes + g * group, scale[g],
                  zero[g], group, at(to_latent, g * group), at(to_scale, g));
    }
  });
  return 0;
}

// Brings positions [groups, group] to within `edge` of a code.
SORDINO_API int sordino_keep_near(float* latent, const float* zero, int bits, float edge, int64_t groups, int64_t group, int threads) {
  const Training& t = *in_use().training;
  over(groups, at_once(group), threads, [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) t.keep_near(latent + g * group, zero[g], bits, edge, group);
  });
  return 0;
}

// Gradients of a norm's rows [rows, n], and, if asked for, of its gain: sums over every `some` rows, [ceil(rows / some), n].
SORDINO_API int sordino_norm_back(const Norm* norm, const void* x, const void* grad, int type, int64_t rows, int64_t n, void* out,
                                  float* to_gain, int64_t some, int threads) {
  const Training& t = *in_use().training;
  const int64_t bytes = n * width(type);
  over(rows, some, threads, [&](int64_t begin, int64_t end) {
    float* sums = at(to_gain, begin / some * n);
    if (sums != nullptr) std::memset(sums, 0, static_cast<size_t>(n) * 4);
    for (int64_t m = begin; m < end; ++m) {
      t.norm_back(static_cast<const char*>(x) + m * bytes, static_cast<const char*>(grad) + m * bytes, *norm, static_cast<Type>(type), n,
                  static_cast<char*>(out) + m * bytes, sums);
    }
  });
  return 0;
}

// Gradients of gate and up [n] from those of silu(gate) * up.
SORDINO_API int sordino_glu_back(const void* gate, const void* up, const void* grad, int type, int64_t n, void* to_gate, void* to_up,
                                 int threads) {
  const Training& t = *in_use().training;
  over(n, kEntries, threads, [&](int64_t begin, int64_t end) {
    const int64_t from = begin * width(type);
    t.glu_back(static_cast<const char*>(gate) + from, static_cast<const char*>(up) + from, static_cast<const char*>(grad) + from,
               static_cast<Type>(type), end - begin, static_cast<char*>(to_gate) + from, static_cast<char*>(to_up) + from);
  });
  return 0;
}

// Rounds rows [rows, n]; scale, low and high are one for all, or one a row if `apart`.
SORDINO_API int sordino_round(const void* x, const float* scale, const float* low, const float* high, int apart, int type, int64_t rows,
                              int64_t n, void* out, int threads) {
  const Training& t = *in_use().training;
  const int64_t bytes = n * width(type);
  over(rows, at_once(n), threads, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      const int64_t k = apart ? m : 0;
      t.round(static_cast<const char*>(x) + m * bytes, scale[k], low[k], high[k], static_cast<Type>(type), n,
              static_cast<char*>(out) + m * bytes);
    }
  });
  return 0;
}

// Gradients of x, and what every row pulls at its scale, fp32 [rows].
SORDINO_API int sordino_round_back(const void* x, const void* grad, const float* scale, const float* low, const float* high, int apart,
                                   int type, int64_t rows, int64_t n, void* to_x, float* pulls, int threads) {
  const Training& t = *in_use().training;
  const int64_t bytes = n * width(type);
  over(rows, at_once(n), threads, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      const int64_t k = apart ? m : 0;
      pulls[m] = t.round_back(static_cast<const char*>(x) + m * bytes, static_cast<const char*>(grad) + m * bytes, scale[k], low[k],
                              high[k], static_cast<Type>(type), n, static_cast<char*>(to_x) + m * bytes);
    }
  });
  return 0;
}

// Causal softmax of scores fp32 [heads, rows, keys], which are overwritten: row r sees the first `first + r` keys. bf16 out.
SORDINO_API int sordino_weigh(float* scores, int64_t heads, int64_t rows, int64_t keys, int64_t first, float scaling, uint16_t* out,
                              int threads) {
  const Training& t = *in_use().training;
  over(heads * rows, kTokens, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t sees = first + i % rows, seen = sees < keys ? sees : keys;
      t.weigh(scores + i * keys, scaling, seen, keys, out + i * keys);
    }
  });
  return 0;
}

// Gradients bf16 of its scores: of those of its weights less `inner` [heads, rows], which is what all weights of a row share.
SORDINO_API int sordino_weigh_back(const uint16_t* grad, const uint16_t* weights, const float* inner, int64_t heads, int64_t rows,
                                   int64_t keys, int64_t first, float scaling, uint16_t* out, int threads) {
  const Training& t = *in_use().training;
  over(heads * rows, kTokens, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t sees = first + i % rows, seen = sees < keys ? sees : keys;
      t.weigh_back(grad + i * keys, weights + i * keys, inner[i], scaling, seen, keys, out + i * keys);
    }
  });
  return 0;
}

}  // namespace sordino
