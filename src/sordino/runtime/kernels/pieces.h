// Small steps of a decoder layer: plain loops that each unit's compiler vectorizes with its own flags. They round where
// torch's operations do, one after another, in the model's dtype. A unit includes this after it has defined
//   void unpack_row(const uint8_t* row, int64_t bytes, int bits, int64_t n, uint8_t* codes)
// which writes codes of a bit stream, one a byte; `codes` has room for a whole last block of 64.
#include <algorithm>
#include <cmath>

#include "block.h"

namespace sordino {
namespace {

// Says of the loop behind it that its steps do not look at each other's entries: an output may be an input, not a part of one.
#if defined(__GNUC__) && !defined(__clang__)
#define SORDINO_APART _Pragma("GCC ivdep")
#elif defined(__clang__)
#define SORDINO_APART _Pragma("clang loop vectorize(assume_safety)")
#else
#define SORDINO_APART
#endif

inline float get(const float* x, int64_t i) { return x[i]; }
inline float get(const uint16_t* x, int64_t i) { return widen(x[i]); }
inline void put(float* x, int64_t i, float v) { x[i] = v; }
inline void put(uint16_t* x, int64_t i, float v) { x[i] = narrow(v); }
inline float as(const float*, float v) { return v; }
inline float as(const uint16_t*, float v) { return widen(narrow(v)); }

inline float sum_of(const float* lanes) {
  float half[kLanes / 2], quarter[kLanes / 4];
  for (int k = 0; k < kLanes / 2; ++k) half[k] = lanes[k] + lanes[k + kLanes / 2];
  for (int k = 0; k < kLanes / 4; ++k) quarter[k] = half[k] + half[k + kLanes / 4];
  return (quarter[0] + quarter[2]) + (quarter[1] + quarter[3]);
}

template <class T>
void norm_of(const T* x, const Norm& norm, int64_t n, T* out) {
  const T *gain = static_cast<const T*>(norm.gain), *bias = static_cast<const T*>(norm.bias);
  float lanes[kLanes] = {}, rest = 0;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int k = 0; k < kLanes; ++k) lanes[k] += get(x, i + k) * get(x, i + k);
  for (; i < n; ++i) rest += get(x, i) * get(x, i);
  const float r = 1.0f / std::sqrt((sum_of(lanes) + rest) / static_cast<float>(n) + static_cast<float>(norm.eps));
  SORDINO_APART
  for (i = 0; i < n; ++i) put(out, i, get(gain, i) * as(out, get(x, i) * r));
  if (bias == nullptr) return;
  SORDINO_APART
  for (i = 0; i < n; ++i) put(out, i, get(out, i) + get(bias, i));
}

template <class T>
void rope_of(const T* x, const T* cos, const T* sin, int64_t n, T* out) {
  const int64_t half = n / 2;
  SORDINO_APART
  for (int64_t i = 0; i < half; ++i) {
    put(out, i, as(out, get(x, i) * get(cos, i)) + as(out, -get(x, i + half) * get(sin, i)));
  }
  SORDINO_APART
  for (int64_t i = half; i < n; ++i) {
    put(out, i, as(out, get(x, i) * get(cos, i)) + as(out, get(x, i - half) * get(sin, i)));
  }
}

#ifndef SORDINO_FIRST_STEPS
// The first steps of a butterfly: entries, `size` at a time, times the Sylvester matrix of the order that is returned.
inline int64_t first_steps(float* work, int64_t size, int64_t n) {
  if (size < 16) return 1;
  for (int64_t i = 0; i < n; i += 16) {
    for (int h = 1; h < 16; h *= 2) {
      for (int j = 0; j < 16; j += 2 * h) {
        for (int k = j; k < j + h; ++k) {
          const float a = work[i + k], b = work[i + k + h];
          work[i + k] = a + b, work[i + k + h] = a - b;
        }
      }
    }
  }
  return 16;
}
#endif

inline void butterfly(float* __restrict a, float* __restrict b, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const float x = a[i], y = b[i];
    a[i] = x + y, b[i] = x - y;
  }
}

#ifndef SORDINO_MIX
// Sixteen numbers at once: compilers map them to whatever registers a unit has.
typedef float Sixteen __attribute__((vector_size(64)));

// kEntries from `to` on (16 or 64) of row `of` of left^T times the rows of `work`, each `size` long.
template <int kEntries>
void mix(const Turn& turn, const float* work, int64_t size, int64_t of, int64_t to, float* out) {
  constexpr int kRegisters = kEntries / 16;
  Sixteen sums[kRegisters] = {};
  for (int64_t from = 0; from < turn.order; ++from) {
    const float factor = turn.left[from * turn.order + of], *row = work + from * size + to;
    for (int k = 0; k < kRegisters; ++k) {
      Sixteen v;
      std::memcpy(&v, row + 16 * k, 64);
      sums[k] += factor * v;
    }
  }
  std::memcpy(out, sums, sizeof sums);
}
#endif

template <class T>
void turn_of(T* x, const Turn& turn, float* work) {
  const int64_t size = int64_t{1} << turn.power, n = turn.order * size;
  for (int64_t i = 0; i < n; ++i) work[i] = get(x, i);
  for (int64_t h = first_steps(work, size, n); h < size; h *= 2) {
    for (int64_t i = 0; i < n; i += 2 * h) butterfly(work + i, work + i + h, h);
  }
  if (turn.order == 1) {
    for (int64_t i = 0; i < n; ++i) put(x, i, work[i] * turn.left[0]);
    return;
  }
  for (int64_t of = 0; of < turn.order; ++of) {
    int64_t t = 0;
    float sums[64];
    for (; t + 64 <= size; t += 64) {
      mix<64>(turn, work, size, of, t, sums);
      for (int64_t i = 0; i < 64; ++i) put(x, of * size + t + i, sums[i]);
    }
    for (; t + 16 <= size; t += 16) {
      mix<16>(turn, work, size, of, t, sums);
      for (int64_t i = 0; i < 16; ++i) put(x, of * size + t + i, sums[i]);
    }
    for (; t < size; ++t) {
      float sum = 0;
      for (int64_t from = 0; from < turn.order; ++from) sum += turn.left[from * turn.order + of] * work[from * size + t];
      put(x, of * size + t, sum);
    }
  }
}

// exp, to about an ulp: 2^k times a polynomial in the rest; arguments are brought into the range where result and steps are
// normal numbers. pieces512.h does the same operations.
constexpr float kLeast = -87.0f, kLargest = 88.0f, kLog2e = 1.44269504088896341f;
constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;  // ln 2 in two parts
constexpr float kPowers[] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};

inline float exponential(float x) {
  x = x < kLeast ? kLeast : x;
  x = x > kLargest ? kLargest : x;
  const float shifted = x * kLog2e + kMagic;
  const float k = shifted - kMagic;
  const float r = (x - k * kLn2High) - k * kLn2Low;
  float p = kPowers[0];
  for (int i = 1; i < 6; ++i) p = p * r + kPowers[i];
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
  SORDINO_APART
  for (int64_t i = 0; i < n; ++i) {
    const float g = get(gate, i);
    put(out, i, as(out, g / (1.0f + exponential(-g))) * get(up, i));
  }
}

template <class T>
void add_of(const T* a, const T* b, int64_t n, T* out) {
  SORDINO_APART
  for (int64_t i = 0; i < n; ++i) put(out, i, get(a, i) + get(b, i));
}

#ifndef SORDINO_PACK
// The low bits of eight codes, a byte each, one behind another.
inline uint64_t pack(const uint8_t* codes, int bits) {
  uint64_t word = 0;
  for (int k = 0; k < 8; ++k) word |= static_cast<uint64_t>(codes[k]) << (k * bits);
  return word;
}
#endif

inline float stored_scale(float s) { return widen(narrow(s < 1e-8f ? 1e-8f : s)); }

template <class T>
void extremes_of(const T* x, int64_t n, float* low, float* high) {
  float lows[kLanes] = {}, highs[kLanes] = {};  // side by side, for vectors
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int k = 0; k < kLanes; ++k) {
      const float v = get(x, i + k);
      lows[k] = v < lows[k] ? v : lows[k], highs[k] = v > highs[k] ? v : highs[k];
    }
  }
  *low = 0, *high = 0;
  for (; i < n; ++i) {
    const float v = get(x, i);
    *low = v < *low ? v : *low, *high = v > *high ? v : *high;
  }
  for (int k = 0; k < kLanes; ++k) *low = lows[k] < *low ? lows[k] : *low, *high = highs[k] > *high ? highs[k] : *high;
}

template <class T>
void store_row(const T* x, const Format& f, int64_t head, int64_t n, uint8_t* row) {
  if (f.bits == 0) {
    std::memcpy(row, x, static_cast<size_t>(n) * sizeof(T));
    return;
  }
  const float share = share_of(f, head), half = static_cast<float>(1 << (f.bits - 1)), top = static_cast<float>((1 << f.bits) - 1);
  float scale = share, zero = half, low = 0, high = 0;
  if (!f.fixed) {
    extremes_of(x, n, &low, &high);
    if (f.symmetric) {
      scale = stored_scale((-low > high ? -low : high) * share / (half - 1));
    } else {
      low *= share, high *= share;
      scale = stored_scale((high - low) / top);
      zero = (-low / scale + kMagic) - kMagic;
      zero = zero < top ? zero : top;
    }
  }
  uint8_t codes[kMaxSize + 8] = {};
  for (int64_t i = 0; i < n; ++i) {
    float v = get(x, i) / scale;
    v = v > -512.0f ? v : -512.0f;  // NaN too: any code will do
    v = v < 512.0f ? v : 512.0f;
    v = ((v + kMagic) - kMagic) + zero;
    v = v > 0 ? v : 0.0f, v = v < top ? v : top;
    codes[i] = static_cast<uint8_t>(static_cast<int32_t>(v));
  }
  const int64_t words = code_bytes(n, f.bits);
  std::memset(row, 0, static_cast<size_t>(words));
  for (int64_t i = 0; i < n; i += 8) {
    const uint64_t word = pack(codes + i, f.bits);
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
  unpack_row(row, code_bytes(n, s.bits), s.bits, n, codes);
  float scale, zero;
  unit_of(s, row, n, &scale, &zero);
  for (int64_t k = 0; k < n; ++k) out[k] = (static_cast<float>(codes[k]) - zero) * scale;
}

template <class T>
void load_as(const Span& s, int64_t i, int64_t n, T* out) {
  alignas(64) float numbers[kMaxSize];
  alignas(64) uint8_t codes[kMaxSize + kBlock];
  load_row(s, i, n, numbers, codes);
  for (int64_t k = 0; k < n; ++k) put(out, k, numbers[k]);
}

template <class T>
void rescale_to(const int32_t* sums, const Linear& w, int64_t begin, int64_t n, float scale, T* out) {
  const uint16_t* rows = w.scale + begin;
  if (w.bias == nullptr) {
    for (int64_t i = 0; i < n; ++i) put(out, i, static_cast<float>(sums[i]) * (scale * widen(rows[i])));
  } else {
    for (int64_t i = 0; i < n; ++i) {
      const float bias = read(w.bias, static_cast<Type>(w.bias_type), begin + i);
      put(out, i, static_cast<float>(sums[i]) * (scale * widen(rows[i])) + bias);
    }
  }
}

template <class T>
void finish_to(const float* sums, const Linear& w, int64_t begin, int64_t n, T* out) {
  if (w.bias == nullptr) {
    for (int64_t i = 0; i < n; ++i) put(out, i, sums[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) put(out, i, sums[i] + read(w.bias, static_cast<Type>(w.bias_type), begin + i));
  }
}

inline float dot(const float* a, const float* b, int64_t n) {
  float lanes[kLanes] = {}, rest = 0;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int k = 0; k < kLanes; ++k) lanes[k] += a[i + k] * b[i + k];
  for (; i < n; ++i) rest += a[i] * b[i];
  return sum_of(lanes) + rest;
}

inline void begin_sums(int heads, int64_t n, float* out) {
  for (int h = 0; h < heads; ++h) {
    float* mine = out + h * (n + 2);
    mine[0] = -INFINITY;
    for (int64_t k = 1; k < n + 2; ++k) mine[k] = 0;
  }
}

// Turns scores [kTogether] into weights, and brings what was summed before to their largest one: [largest, sum, n sums].
inline void renew(float* scores, int64_t rows, int64_t n, float* mine) {
  float most[kLanes], sums[kLanes] = {};
  for (int64_t i = rows; i < kTogether; ++i) scores[i] = -INFINITY;
  for (int k = 0; k < kLanes; ++k) most[k] = mine[0];
  for (int64_t i = 0; i < kTogether; i += kLanes)
    for (int k = 0; k < kLanes; ++k) most[k] = scores[i + k] > most[k] ? scores[i + k] : most[k];
  float largest = most[0];
  for (int k = 1; k < kLanes; ++k) largest = most[k] > largest ? most[k] : largest;
  for (int64_t i = 0; i < kTogether; ++i) scores[i] = exponential(scores[i] - largest);
  for (int64_t i = rows; i < kTogether; ++i) scores[i] = 0;
  for (int64_t i = 0; i < kTogether; i += kLanes)
    for (int k = 0; k < kLanes; ++k) sums[k] += scores[i + k];
  const float before = mine[0] == largest ? 1.0f : exponential(mine[0] - largest);
  mine[0] = largest, mine[1] = mine[1] * before + sum_of(sums);
  if (before != 1.0f)
    for (int64_t k = 0; k < n; ++k) mine[2 + k] *= before;
}

// The first row that none of the queries sees.
inline int64_t last_seen(const int64_t* ends, int count, int64_t end) {
  if (ends == nullptr) return end;
  int64_t most = ends[0];
  for (int h = 1; h < count; ++h) most = ends[h] > most ? ends[h] : most;
  return most < end ? most : end;
}

// renew() or its like for every query, of `rows` rows from `from` on; rows that a query does not see have no weight.
template <class Renew>
void renew_all(Renew renewing, float (*scores)[kTogether], int count, int64_t from, int64_t rows, const int64_t* ends, int64_t n,
               float* out) {
  for (int h = 0; h < count; ++h) {
    const int64_t left = ends == nullptr ? rows : ends[h] - from;
    if (left > 0) renewing(scores[h], left < rows ? left : rows, n, out + h * (n + 2));
    else std::fill_n(scores[h], rows, 0.0f);
  }
}

void attend_to(const float* query, int count, int64_t n, float scaling, const Span& keys, const Span& values, int64_t begin,
               int64_t end, const int64_t* ends, float* out) {
  alignas(64) float numbers[kMaxSize];
  alignas(64) uint8_t codes[kMaxSize + kBlock];
  float scores[kMaxQueries][kTogether];
  begin_sums(count, n, out);
  end = last_seen(ends, count, end);
  for (int64_t from = begin; from < end; from += kTogether) {
    const int64_t some = end - from < kTogether ? end - from : kTogether;
    for (int64_t i = 0; i < some; ++i) {
      load_row(keys, from + i, n, numbers, codes);
      for (int h = 0; h < count; ++h) scores[h][i] = scaling * dot(query + h * n, numbers, n);
    }
    renew_all(renew, scores, count, from, some, ends, n, out);
    for (int64_t i = 0; i < some; ++i) {
      load_row(values, from + i, n, numbers, codes);
      for (int h = 0; h < count; ++h) {
        float *mine = out + h * (n + 2) + 2, weight = scores[h][i];
        for (int64_t k = 0; k < n; ++k) mine[k] += weight * numbers[k];
      }
    }
  }
}

// Puts pieces of one query's sums together, each `stride` numbers behind the one before it.
template <class T>
void merge_to(const float* parts, int64_t pieces, int64_t stride, int64_t n, T* out) {
  float largest = -INFINITY, total = 0, sums[kMaxSize];
  for (int64_t p = 0; p < pieces; ++p) largest = parts[p * stride] > largest ? parts[p * stride] : largest;
  for (int64_t i = 0; i < n; ++i) sums[i] = 0;
  for (int64_t p = 0; largest != -INFINITY && p < pieces; ++p) {
    const float* part = parts + p * stride;
    if (part[0] == -INFINITY) continue;  // sees nothing there
    const float weight = std::exp(part[0] - largest);
    total += weight * part[1];
    for (int64_t i = 0; i < n; ++i) sums[i] += weight * part[2 + i];
  }
  if (total == 0) total = 1;  // a query that sees nothing: zeros
  for (int64_t i = 0; i < n; ++i) put(out, i, sums[i] / total);
}

// ---- for either dtype ----

template <class Body>
void either(Type type, Body body) {
  if (type == kFloat) body(float{});
  else body(uint16_t{});
}

void any_norm(const void* x, const Norm& norm, Type type, int64_t n, void* out) {
  either(type, [&](auto t) {
    using T = decltype(t);
    norm_of(static_cast<const T*>(x), norm, n, static_cast<T*>(out));
  });
}

void any_rope(const void* x, const void* cos, const void* sin, Type type, int64_t n, void* out) {
  either(type, [&](auto t) {
    using T = decltype(t);
    rope_of(static_cast<const T*>(x), static_cast<const T*>(cos), static_cast<const T*>(sin), n, static_cast<T*>(out));
  });
}

void any_turn(void* x, const Turn& turn, Type type, float* work) {
  either(type, [&](auto t) { turn_of(static_cast<decltype(t)*>(x), turn, work); });
}

void any_glu(const void* gate, const void* up, Type type, int64_t n, void* out) {
  either(type, [&](auto t) {
    using T = decltype(t);
    glu_of(static_cast<const T*>(gate), static_cast<const T*>(up), n, static_cast<T*>(out));
  });
}

void any_add(const void* a, const void* b, Type type, int64_t n, void* out) {
  either(type, [&](auto t) {
    using T = decltype(t);
    add_of(static_cast<const T*>(a), static_cast<const T*>(b), n, static_cast<T*>(out));
  });
}

void any_store(const void* x, const Format& f, int64_t head, Type type, int64_t n, uint8_t* row) {
  either(type, [&](auto t) { store_row(static_cast<const decltype(t)*>(x), f, head, n, row); });
}

void any_load(const Span& s, int64_t i, int64_t n, Type type, void* out) {
  either(type, [&](auto t) { load_as(s, i, n, static_cast<decltype(t)*>(out)); });
}

void any_extremes(const void* x, Type type, int64_t n, float* low, float* high) {
  either(type, [&](auto t) { extremes_of(static_cast<const decltype(t)*>(x), n, low, high); });
}

void any_rescale(const int32_t* sums, const Linear& w, int64_t begin, int64_t n, float scale, Type type, void* out) {
  either(type, [&](auto t) { rescale_to(sums, w, begin, n, scale, static_cast<decltype(t)*>(out)); });
}

void any_finish(const float* sums, const Linear& w, int64_t begin, int64_t n, Type type, void* out) {
  either(type, [&](auto t) { finish_to(sums, w, begin, n, static_cast<decltype(t)*>(out)); });
}

void any_merge(const float* parts, int64_t pieces, int64_t stride, Type type, int64_t n, void* out) {
  either(type, [&](auto t) { merge_to(parts, pieces, stride, n, static_cast<decltype(t)*>(out)); });
}

constexpr Pieces kPieces = {any_norm, any_rope, any_turn, any_glu, any_add, any_store, any_load, any_extremes, any_rescale, any_finish, attend_to, any_merge};

}  // namespace
}  // namespace sordino
