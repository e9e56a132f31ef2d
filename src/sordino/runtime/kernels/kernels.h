// What the translation units share. One unit per instruction set fills a table of functions (`Kernels`); dispatch.cpp
// chooses a table and offers the C functions that Python calls.
//
// Legend: O outputs, I inputs, G groups, g = I/G, b bits of a code, M rows of activations (tokens).
// A weight is w[o, i] = (code[o, i] - zero[o, i/g]) * scale[o, i/g], or, on an additive grid, the sum over k of ± scale[o, i/g, k], plus
// where bit k of the code is set. Its codes stay as the checkpoint stores them: a
// little-endian bit stream along the inputs, each row padded to 32-bit words. Eight codes fill b whole bytes, so every
// unit of eight begins on a byte, whatever b is; that is what the vector code builds on.
#pragma once
#include <cstdint>
#include <cstring>

namespace sordino {

enum Type : int32_t { kFloat = 0, kBfloat = 1 };

// Mirrored field by field in library.py.
struct Linear {
  const uint8_t* codes;    // [O, row_bytes]
  const uint16_t* scale;   // bf16 [O, G], or [O, G, b]
  const uint32_t* zero;    // [ceil(O*b/32), G], bit stream along the outputs; null: every zero is 2^(b-1)
  const void* bias;        // [O] of bias_type, or null
  int64_t outputs, inputs, group;
  int32_t bits, bias_type, additive;

  int64_t groups() const { return inputs / group; }
  int64_t row_bytes() const { return (inputs * bits + 31) / 32 * 4; }
  int middle() const { return 1 << (bits - 1); }
  // Rows behind whose codes 64 bytes may be read.
  int64_t whole_rows() const { return outputs - 1 - 64 / (row_bytes() > 0 ? row_bytes() : 1); }
};

constexpr int kMaxRows = 4;      // of activations that one pass over the weights serves
constexpr int kLanes = 16;       // partial sums side by side, so that a compiler may use vectors without reordering a sum
constexpr int kMaxPlanes = 4;    // bits of an additive code
constexpr int64_t kBlock = 64;   // inputs that a vector unit handles at once; activations are padded to it

constexpr int64_t kShort = 512;  // bytes of a weight's row: several of them still are one place in memory
constexpr int kAhead = 4096;     // bytes that are asked for ahead: the processor's own prefetching ends at every page
extern int64_t light_ahead;      // the same with AVX-512 where there is little to do but to wait for memory (dispatch.cpp)

inline int64_t padded(int64_t n) { return (n + kBlock - 1) / kBlock * kBlock; }

// A weight, and where its products T [rows, outputs] go.
struct Product {
  const Linear* w;
  void* out;
};

// Activations as an instruction set wants them, written by its `arrange`.
struct Arranged {
  void* values;    // for M rows, `stride` bytes each, 64-byte aligned; padding is zero
  float* sums;     // [M, G]: of every group's activations
  float* units;    // [M, G]: what integers that activations were written as count in, where they were
  int64_t stride;  // bytes
};

// Small steps of a decoder layer beside its linears (pieces.h), for one token each. `T` stands for `type`.
struct Span;
struct Norm;
struct Turn;
struct Format;
struct Pieces {
  void (*norm)(const void* x, const Norm&, Type, int64_t n, void* out);
  void (*rope)(const void* x, const void* cos, const void* sin, Type, int64_t n, void* out);
  void (*turn)(void* x, const Turn&, Type, float* work);  // work: as many floats as x has entries
  void (*glu)(const void* gate, const void* up, Type, int64_t n, void* out);
  void (*add)(const void* a, const void* b, Type, int64_t n, void* out);
  void (*store)(const void* x, const Format&, int64_t head, Type, int64_t n, uint8_t* row);
  void (*load)(const Span&, int64_t row, int64_t n, Type, void* out);
  void (*extremes)(const void* x, Type, int64_t n, float* low, float* high);  // of the entries and zero
  // Integer products of rows begin … begin + n of a weight, scaled, with its bias.
  void (*rescale)(const int32_t* sums, const Linear&, int64_t begin, int64_t n, float scale, Type, void* out);
  // The same of products that are numbers already.
  void (*finish)(const float* sums, const Linear&, int64_t begin, int64_t n, Type, void* out);
  // Softmax attention over rows begin … end (kChunk at most) of one key head: for `count` queries of the model's dtype, widened, [count,
  // n], out [count, n + 2] is the largest score (`scaling` times the product), the sum of exp(score - largest), and the sum of
  // exp(score - largest) times values. Query h does not see rows from ends[h] on, if there are `ends`; what it gets does not
  // depend on the queries beside it.
  void (*attend)(const float* query, int count, int64_t n, float scaling, const Span& keys, const Span& values, int64_t begin,
                 int64_t end, const int64_t* ends, float* out);
  // Puts what it wrote of one query's pieces together, each `stride` numbers behind the one before it: T [n].
  void (*merge)(const float* parts, int64_t pieces, int64_t stride, Type, int64_t n, void* out);
};

// Small steps of training one, forward and backward (training.h): of a group of weights, a token, entries, or a row of scores.
struct Training {
  void (*grid)(const float* latent, uint8_t* codes, float scale, float zero, int bits, Type, int64_t n, void* out);
  void (*grid_back)(const void* grad, Type, const uint8_t* codes, float scale, float zero, int64_t n, float* to_latent, float* to_scale);
  void (*keep_near)(float* latent, float zero, int bits, float edge, int64_t n);
  void (*norm_back)(const void* x, const void* grad, const Norm&, Type, int64_t n, void* out, float* to_gain);
  void (*glu_back)(const void* gate, const void* up, const void* grad, Type, int64_t n, void* to_gate, void* to_up);
  void (*round)(const void* x, float scale, float low, float high, Type, int64_t n, void* out);
  float (*round_back)(const void* x, const void* grad, float scale, float low, float high, Type, int64_t n, void* to_x);
  void (*weigh)(float* scores, float scaling, int64_t seen, int64_t n, uint16_t* out);
  void (*weigh_back)(const uint16_t* grad, const uint16_t* weights, float inner, float scaling, int64_t seen, int64_t n, uint16_t* out);
};

struct Kernels {
  const char* name;
  int64_t bytes_per_input;  // of an arranged activation; times padded groups it is Arranged::stride
  // Whether product and integer can take a weight's groups (portable takes all).
  bool (*fits)(const Linear&);
  void (*arrange)(const Linear&, const void* x, Type, int64_t rows, const Arranged&);
  // y[(o - begin) * rows + m] = sum_i x[m, i] w[o, i], for begin <= o < end and rows <= kMaxRows.
  void (*product)(const Linear&, const Arranged&, Type, int rows, int64_t begin, int64_t end, float* y);
  // The same of input codes int8 [rows, stride] and weight codes as stored (unsigned), exact.
  void (*integer)(const Linear&, const int8_t* x, int64_t stride, int rows, int64_t begin, int64_t end, int32_t* y);
  // Row o's weights: fp32 or bf16 [I], rounded once.
  void (*values)(const Linear&, int64_t o, Type, void* out);
  // Row o's codes less 2^(b-1): int8 [I].
  void (*centred)(const Linear&, int64_t o, int8_t* out);
  // Codes of one token: int8 [n]; *scale is read, or, if `share` > 0, made: share * largest entry. Returns the codes' sum.
  int32_t (*encode)(const void* x, Type, int64_t n, int bits, float share, float* scale, int8_t* codes);
  const Pieces* pieces;
  const Training* training;
  // Products of input codes x int8 [rows, inputs] and weight codes less 2^(b-1), scaled: many rows, `n` weights of one input, one scale a
  // row of each, symmetric. Null: torch's is used.
  void (*many)(const Product*, int n, const int8_t* x, const float* scale, bool one_scale, Type, int64_t rows, int threads);
};

extern const Kernels kPortable;
#ifdef SORDINO_AVX2
extern const Kernels kAvx2;
#endif
#ifdef SORDINO_AVX512
extern const Kernels kAvx512;
#endif
#ifdef SORDINO_AMX
bool allowed_tiles();     // asks the system for the registers
const Kernels& tiled();  // AVX-512 with them
#endif

// Calls body(context, i) for 0 <= i < n on up to `threads` threads, the caller's among them; returns when all are done.
void parallel(int64_t n, int threads, void (*body)(void*, int64_t), void* context);

template <class Body>
void parallel_for(int64_t n, int threads, Body body) {
  parallel(n, threads, [](void* c, int64_t i) { (*static_cast<Body*>(c))(i); }, &body);
}

// Calls body(context) once, which may call parallel() many times, with `threads` at most: threads stay awake in between.
void with_crew(int threads, void (*body)(void*), void* context);

template <class Body>
void together(int threads, Body body) {
  with_crew(threads, [](void* c) { (*static_cast<Body*>(c))(); }, &body);
}

namespace {  // small helpers: a copy in every unit, compiled with that unit's flags, never merged across units

inline float widen(uint16_t h) {
  const uint32_t bits = static_cast<uint32_t>(h) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

inline uint16_t narrow(float f) {  // to nearest, ties to even; NaN stays NaN
  uint32_t u;
  std::memcpy(&u, &f, 4);
  if ((u & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((u >> 16) | 0x40);
  return static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

inline int64_t width(int32_t type) { return type == kFloat ? 4 : 2; }  // bytes of a number

inline int64_t code_bytes(int64_t n, int bits) { return (n * bits + 31) / 32 * 4; }  // of n codes, padded to 32-bit words

constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to nearest even, and leaves the integer in the low bits

inline float read(const void* x, Type type, int64_t i) {
  return type == kFloat ? static_cast<const float*>(x)[i] : widen(static_cast<const uint16_t*>(x)[i]);
}

inline void write(void* out, Type type, int64_t i, float value) {
  if (type == kFloat) static_cast<float*>(out)[i] = value;
  else static_cast<uint16_t*>(out)[i] = narrow(value);
}

// Eight codes as the low 8*b bits of a word; never reads at or past `end`.
inline uint64_t unit(const uint8_t* p, const uint8_t* end) {
  uint64_t word = 0;
  if (p + 8 <= end) std::memcpy(&word, p, 8);
  else if (p < end) std::memcpy(&word, p, static_cast<size_t>(end - p));
  return word;  // little-endian machines only, as the checkpoint's own layout
}

inline int zero_at(const Linear& w, int64_t o, int64_t group) {
  if (w.zero == nullptr) return w.middle();
  const int64_t bit = o * w.bits, word = bit / 32, shift = bit % 32, groups = w.groups();
  uint64_t both = w.zero[word * groups + group];
  if (shift + w.bits > 32) both |= static_cast<uint64_t>(w.zero[(word + 1) * groups + group]) << 32;
  return static_cast<int>((both >> shift) & ((1u << w.bits) - 1));
}

// The values of an additive group's codes: [2^b], summed in the order of numerics/additive.py.
inline void levels_of(const Linear& w, int64_t o, int64_t g, float* out) {
  const uint16_t* scale = w.scale + (o * w.groups() + g) * w.bits;
  for (int code = 0; code < 1 << w.bits; ++code) {
    out[code] = 0;
    for (int k = 0; k < w.bits; ++k) out[code] += code >> k & 1 ? widen(scale[k]) : -widen(scale[k]);
  }
}

// Shared by all instruction sets: plain loops that each unit's compiler vectorizes. The operations and their order are
// those of numerics/inputs.py, so that codes are bit-equal to torch's.
inline int32_t encode_token(const void* x, Type type, int64_t n, int bits, float share, float* scale, int8_t* codes) {
  const float high = static_cast<float>((1 << (bits - 1)) - 1), low = -high - 1;
  const float* wide = static_cast<const float*>(x);
  const uint16_t* half = static_cast<const uint16_t*>(x);
  if (share > 0) {
    uint32_t peak = 0;  // magnitudes of floats order as their bits do, and an integer maximum vectorizes
    if (type == kFloat) {
      for (int64_t i = 0; i < n; ++i) {
        uint32_t u;
        std::memcpy(&u, wide + i, 4);
        u &= 0x7fffffffu;
        peak = u > peak ? u : peak;
      }
    } else {
      for (int64_t i = 0; i < n; ++i) {
        const uint32_t u = static_cast<uint32_t>(half[i] & 0x7fff) << 16;
        peak = u > peak ? u : peak;
      }
    }
    float largest;
    std::memcpy(&largest, &peak, 4);
    const float s = largest * share;
    *scale = s < 1e-8f ? 1e-8f : s;
  }
  const float s = *scale;
  int32_t sum = 0;
  auto code = [&](float v) {
    v /= s;
    v = v > low ? v : low;  // NaN becomes `low`: any code will do, the scale is NaN too
    v = v < high ? v : high;
    return static_cast<int32_t>((v + kMagic) - kMagic);
  };
  if (type == kFloat) {
    for (int64_t i = 0; i < n; ++i) { const int32_t c = code(wide[i]); codes[i] = static_cast<int8_t>(c); sum += c; }
  } else {
    for (int64_t i = 0; i < n; ++i) { const int32_t c = code(widen(half[i])); codes[i] = static_cast<int8_t>(c); sum += c; }
  }
  return sum;
}

}  // namespace
}  // namespace sordino
