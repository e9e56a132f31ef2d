// Small steps of a decoder layer: plain loops that each unit's compiler vectorizes with its own flags. They round where
// torch's operations do, one after another, in the model's dtype. A unit includes this after it has defined
//   void unpack_row(const uint8_t* row, int64_t bytes, int bits, int64_t n, uint8_t* codes)
// which writes codes of a bit stream, one a byte; `codes` has room for a whole last block of 64.
#include <cmath>

#include "block.h"

namespace sordino {
namespace {

constexpr int kSide = 16;         // partial sums side by side
constexpr int64_t kTogether = 64;  // rows of the cache whose scores are made before their values are read
constexpr int64_t kMaxSize = 512;  // of a head

inline float get(const float* x, int64_t i) { return x[i]; }
inline float get(const uint16_t* x, int64_t i) { return widen(x[i]); }
inline void put(float* x, int64_t i, float v) { x[i] = v; }
inline void put(uint16_t* x, int64_t i, float v) { x[i] = narrow(v); }
inline float as(const float*, float v) { return v; }
inline float as(const uint16_t*, float v) { return widen(narrow(v)); }

inline float sum_of(const float* lanes) {
  float half[kSide / 2], quarter[kSide / 4];
  for (int k = 0; k < kSide / 2; ++k) half[k] = lanes[k] + lanes[k + kSide / 2];
  for (int k = 0; k < kSide / 4; ++k) quarter[k] = half[k] + half[k + kSide / 4];
  return (quarter[0] + quarter[2]) + (quarter[1] + quarter[3]);
}

template <class T>
void norm_of(const T* x, const Norm& norm, int64_t n, T* out) {
  const T *gain = static_cast<const T*>(norm.gain), *bias = static_cast<const T*>(norm.bias);
  float lanes[kSide] = {}, rest = 0;
  int64_t i = 0;
  for (; i + kSide <= n; i += kSide)
    for (int k = 0; k < kSide; ++k) lanes[k] += get(x, i + k) * get(x, i + k);
  for (; i < n; ++i) rest += get(x, i) * get(x, i);
  const float r = 1.0f / std::sqrt((sum_of(lanes) + rest) / static_cast<float>(n) + static_cast<float>(norm.eps));
  for (i = 0; i < n; ++i) put(out, i, get(gain, i) * as(out, get(x, i) * r));
  if (bias != nullptr)
    for (i = 0; i < n; ++i) put(out, i, get(out, i) + get(bias, i));
}

template <class T>
void rope_of(const T* x, const T* cos, const T* sin, int64_t n, T* out) {
  const int64_t half = n / 2;
  for (int64_t i = 0; i < half; ++i) {
    put(out, i, as(out, get(x, i) * get(cos, i)) + as(out, -get(x, i + half) * get(sin, i)));
  }
  for (int64_t i = half; i < n; ++i) {
    put(out, i, as(out, get(x, i) * get(cos, i)) + as(out, get(x, i - half) * get(sin, i)));
  }
}

template <class T>
void turn_of(T* x, const Turn& turn, float* work) {
  const int64_t size = int64_t{1} << turn.power, n = turn.order * size;
  for (int64_t i = 0; i < n; ++i) work[i] = get(x, i);
  for (int64_t h = 1; h < size; h *= 2) {
    for (int64_t i = 0; i < n; i += 2 * h) {
      for (int64_t j = i; j < i + h; ++j) {
        const float a = work[j], b = work[j + h];
        work[j] = a + b, work[j + h] = a - b;
      }
    }
  }
  for (int64_t to = 0; to < turn.order; ++to) {
    for (int64_t t = 0; t < size; t += kTogether) {
      const int64_t some = size - t < kTogether ? size - t : kTogether;
      float sums[kTogether] = {};
      for (int64_t from = 0; from < turn.order; ++from) {
        const float factor = turn.left[from * turn.order + to], *row = work + from * size + t;
        for (int64_t i = 0; i < some; ++i) sums[i] += factor * row[i];
      }
      for (int64_t i = 0; i < some; ++i) put(x, to * size + t + i, sums[i]);
    }
  }
}

// exp, to about an ulp; arguments are brought into the range where result and steps are normal numbers.
inline float exponential(float x) {
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
  const float shifted = x * 1.44269504088896341f + kMagic;
  const float k = shifted - kMagic;
  const float r = (x - k * 0.693359375f) - k * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  uint32_t bits;
  std::memcpy(&bits, &shifted, 4);
  bits = (bits << 23) + 0x3f800000u;
  float power;
  std::memcpy(&power, &bits, 4);
  return p * power;
}

template <class T>
void glu_of(const T* gate, const T* up, int64_t n, T* out) {
  for (int64_t i = 0; i < n; ++i) {
    const float g = get(gate, i);
    put(out, i, as(out, g / (1.0f + exponential(-g))) * get(up, i));
  }
}

template <class T>
void add_of(const T* a, const T* b, int64_t n, T* out) {
  for (int64_t i = 0; i < n; ++i) put(out, i, get(a, i) + get(b, i));
}

inline float stored_scale(float s) { return widen(narrow(s < 1e-8f ? 1e-8f : s)); }

template <class T>
void store_row(const T* x, const Format& f, int64_t head, int64_t n, uint8_t* row) {
  if (f.bits == 0) {
    std::memcpy(row, x, static_cast<size_t>(n) * sizeof(T));
    return;
  }
  constexpr float kMagic = 12582912.0f;
  const float share = f.of(head), half = static_cast<float>(1 << (f.bits - 1)), top = static_cast<float>((1 << f.bits) - 1);
  float scale = share, zero = half, low = 0, high = 0;
  if (!f.fixed) {
    for (int64_t i = 0; i < n; ++i) {
      const float v = get(x, i);
      low = v < low ? v : low, high = v > high ? v : high;
    }
    if (f.symmetric) {
      scale = stored_scale((-low > high ? -low : high) * share / (half - 1));
    } else {
      low *= share, high *= share;
      scale = stored_scale((high - low) / top);
      zero = (-low / scale + kMagic) - kMagic;
      zero = zero < top ? zero : top;
    }
  }
  const int64_t words = (n * f.bits + 31) / 32 * 4;
  std::memset(row, 0, static_cast<size_t>(words));
  for (int64_t i = 0; i < n; i += 8) {
    uint64_t word = 0;
    for (int64_t k = 0; k < 8 && i + k < n; ++k) {
      float v = get(x, i + k) / scale;
      v = v > -512.0f ? v : -512.0f;  // NaN too: any code will do, the scale says NaN
      v = v < 512.0f ? v : 512.0f;
      v = ((v + kMagic) - kMagic) + zero;
      v = v > 0 ? v : 0.0f, v = v < top ? v : top;
      word |= static_cast<uint64_t>(v) << (k * f.bits);
    }
    const int64_t at = i / 8 * f.bits, left = words - at;
    std::memcpy(row + at, &word, static_cast<size_t>(left < f.bits ? left : f.bits));
  }
  if (f.fixed) return;
  const uint16_t kept = narrow(scale);
  std::memcpy(row + words, &kept, 2);
  if (!f.symmetric) row[words + 2] = static_cast<uint8_t>(zero);
}

// A row of a cache as fp32 numbers.
inline void load_row(const Span& s, int64_t i, int64_t n, float* out, uint8_t* codes) {
  const uint8_t* row = s.data + i * s.stride;
  if (s.bits == 0) {
    if (s.type == kFloat) {
      std::memcpy(out, row, static_cast<size_t>(n) * 4);
    } else {
      const uint16_t* half = reinterpret_cast<const uint16_t*>(row);
      for (int64_t k = 0; k < n; ++k) out[k] = widen(half[k]);
    }
    return;
  }
  const int64_t words = (n * s.bits + 31) / 32 * 4;
  unpack_row(row, words, s.bits, n, codes);
  float scale = s.share, zero = static_cast<float>(1 << (s.bits - 1));
  if (!s.fixed) {
    uint16_t kept;
    std::memcpy(&kept, row + words, 2);
    scale = widen(kept);
    if (!s.symmetric) zero = static_cast<float>(row[words + 2]);
  }
  for (int64_t k = 0; k < n; ++k) out[k] = (static_cast<float>(codes[k]) - zero) * scale;
}

inline float dot(const float* a, const float* b, int64_t n) {
  float lanes[kSide] = {}, rest = 0;
  int64_t i = 0;
  for (; i + kSide <= n; i += kSide)
    for (int k = 0; k < kSide; ++k) lanes[k] += a[i + k] * b[i + k];
  for (; i < n; ++i) rest += a[i] * b[i];
  return sum_of(lanes) + rest;
}

void attend_to(const float* query, int heads, int64_t n, const Span& keys, const Span& values, int64_t begin, int64_t end,
               float* out) {
  alignas(64) float numbers[kMaxSize];
  alignas(64) uint8_t codes[kMaxSize + kBlock];
  float scores[kMaxHeads][kTogether];
  for (int h = 0; h < heads; ++h) {
    float* mine = out + h * (n + 2);
    mine[0] = -INFINITY, mine[1] = 0;
    for (int64_t k = 0; k < n; ++k) mine[2 + k] = 0;
  }
  for (int64_t from = begin; from < end; from += kTogether) {
    const int64_t some = end - from < kTogether ? end - from : kTogether;
    for (int64_t i = 0; i < some; ++i) {
      load_row(keys, from + i, n, numbers, codes);
      for (int h = 0; h < heads; ++h) scores[h][i] = dot(query + h * n, numbers, n);
    }
    for (int h = 0; h < heads; ++h) {
      float *mine = out + h * (n + 2), largest = mine[0], sum = 0;
      for (int64_t i = 0; i < some; ++i) largest = scores[h][i] > largest ? scores[h][i] : largest;
      const float before = mine[0] == largest ? 1.0f : exponential(mine[0] - largest);
      for (int64_t i = 0; i < some; ++i) scores[h][i] = exponential(scores[h][i] - largest);
      for (int64_t i = 0; i < some; ++i) sum += scores[h][i];
      mine[0] = largest, mine[1] = mine[1] * before + sum;
      if (before != 1.0f)
        for (int64_t k = 0; k < n; ++k) mine[2 + k] *= before;
    }
    for (int64_t i = 0; i < some; ++i) {
      load_row(values, from + i, n, numbers, codes);
      for (int h = 0; h < heads; ++h) {
        float *mine = out + h * (n + 2) + 2, weight = scores[h][i];
        for (int64_t k = 0; k < n; ++k) mine[k] += weight * numbers[k];
      }
    }
  }
}

// ---- for either dtype ----

#define SORDINO_EITHER(call_float, call_half) \
  if (type == kFloat) call_float;             \
  else call_half

using F = float;
using H = uint16_t;

void any_norm(const void* x, const Norm& norm, Type type, int64_t n, void* out) {
  SORDINO_EITHER(norm_of(static_cast<const F*>(x), norm, n, static_cast<F*>(out)),
                 norm_of(static_cast<const H*>(x), norm, n, static_cast<H*>(out)));
}

void any_rope(const void* x, const void* cos, const void* sin, Type type, int64_t n, void* out) {
  SORDINO_EITHER(
      rope_of(static_cast<const F*>(x), static_cast<const F*>(cos), static_cast<const F*>(sin), n, static_cast<F*>(out)),
      rope_of(static_cast<const H*>(x), static_cast<const H*>(cos), static_cast<const H*>(sin), n, static_cast<H*>(out)));
}

void any_turn(void* x, const Turn& turn, Type type, float* work) {
  SORDINO_EITHER(turn_of(static_cast<F*>(x), turn, work), turn_of(static_cast<H*>(x), turn, work));
}

void any_glu(const void* gate, const void* up, Type type, int64_t n, void* out) {
  SORDINO_EITHER(glu_of(static_cast<const F*>(gate), static_cast<const F*>(up), n, static_cast<F*>(out)),
                 glu_of(static_cast<const H*>(gate), static_cast<const H*>(up), n, static_cast<H*>(out)));
}

void any_add(const void* a, const void* b, Type type, int64_t n, void* out) {
  SORDINO_EITHER(add_of(static_cast<const F*>(a), static_cast<const F*>(b), n, static_cast<F*>(out)),
                 add_of(static_cast<const H*>(a), static_cast<const H*>(b), n, static_cast<H*>(out)));
}

void any_store(const void* x, const Format& f, int64_t head, Type type, int64_t n, uint8_t* row) {
  SORDINO_EITHER(store_row(static_cast<const F*>(x), f, head, n, row), store_row(static_cast<const H*>(x), f, head, n, row));
}

const Pieces kPieces = {any_norm, any_rope, any_turn, any_glu, any_add, any_store, attend_to};

}  // namespace
}  // namespace sordino
