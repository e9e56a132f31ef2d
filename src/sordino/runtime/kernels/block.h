// A decoder layer of the RMSNorm/GQA/RoPE/SwiGLU family as one call (block.cpp) sees it. Mirrored in library.py.
#pragma once
#include "kernels.h"

namespace sordino {

enum Which { kQuery, kKey, kValue, kOutput, kGate, kUp, kDown, kLinears };
enum Where { kBefore, kBetween, kOfQuery, kOfKey, kNorms };  // norms: before attention, before the MLP, of heads

constexpr int kMaxHeads = 16;      // query heads that share a key head
constexpr int kMaxQueries = 192;   // that Pieces::attend takes at once
constexpr int64_t kChunk = 256;    // rows of a cache that it takes at once
constexpr int64_t kTogether = 64;  // rows whose scores are made before their values are read
constexpr int64_t kMaxSize = 512;  // of a head

struct Norm {
  const void* gain;  // [n] of the model's dtype; null: there is none
  const void* bias;  // [n], or null
  double eps;
};

// How a linear's input is rounded.
struct Rounding {
  const float* scale;  // static: [1]; else the share of the extremes that codes reach, one for each group of channels
  int64_t group;       // channels that share a dynamic scale
  int32_t bits;        // 0: not rounded
  int32_t fixed;       // static
  int32_t uneven;      // dynamic, with a zero point
};

// kron(left, Sylvester matrix of order 2^power), left scaled so that the whole is orthonormal.
struct Turn {
  const float* left;  // [order, order]
  int64_t order;      // 0: no rotation
  int64_t power;
};

// How a cache stores rows of keys or values: numerics/kv.py.
struct Format {
  const void* share;  // [key heads] of share_type: static scales, or shares of extremes
  int32_t bits;       // 0: as numbers of the model's dtype
  int32_t symmetric, fixed, share_type;
};

struct Block {
  Linear linear[kLinears];
  Rounding rounding[kLinears];
  Norm norm[kNorms];
  Turn keys, down;
  Format key, value;
  const void *prefix_key, *prefix_value;  // [key heads, prefix, size] of the model's dtype
  const void* key_mean;  // [key heads, size], what is taken off keys before they are turned; null: nothing
  int64_t prefix, heads, key_heads, size;
  float scaling;
  int32_t type;
};

// Rows of one key head.
struct Span {
  const uint8_t* data;
  int64_t stride;  // bytes
  int32_t bits;    // 0: numbers of `type`
  int32_t type, symmetric, fixed;
  float share;  // the scale, if fixed
};

namespace {

inline float share_of(const Format& f, int64_t head) { return read(f.share, static_cast<Type>(f.share_type), head); }

inline int64_t row_bytes(const Format& f, int32_t type, int64_t n) {
  if (f.bits == 0) return n * width(type);
  return code_bytes(n, f.bits) + (f.fixed ? 0 : 2 + (f.symmetric ? 0 : 1));
}

// The rows of key head `head` that begin at `data`.
inline Span span_of(const Format& f, const uint8_t* data, int64_t head, int32_t type, int64_t n) {
  return {data, row_bytes(f, type, n), f.bits, type, f.symmetric, f.fixed, f.bits == 0 ? 0 : share_of(f, head)};
}

// Scale and zero point of a row of n codes.
inline void unit_of(const Span& s, const uint8_t* row, int64_t n, float* scale, float* zero) {
  *scale = s.share, *zero = static_cast<float>(1 << (s.bits - 1));
  if (s.fixed) return;
  const uint8_t* behind = row + code_bytes(n, s.bits);
  uint16_t kept;
  std::memcpy(&kept, behind, 2);
  *scale = widen(kept);
  if (!s.symmetric) *zero = static_cast<float>(behind[2]);
}

}  // namespace

// Where one layer's cache is: [texts, key heads, room, row_bytes] each, `length` rows of every text filled.
struct Held {
  uint8_t *keys, *values;
  int64_t length, room;
};

// One token of each text.
struct Token {
  const void* x;          // [texts, hidden]
  void* out;              // likewise
  const void *cos, *sin;  // [texts, size], or [1, size] if `one_place`
  const int64_t* first;   // [texts], the rows of the cache where texts begin; null: all at 0
  int64_t texts;
  int32_t one_place, threads;
};

// Takes a token through `n` layers; -1 for shapes it does not take, and then nothing is written.
int decode(const Kernels&, const Block* blocks, const Held* held, int n, const Token&);

// Many tokens of each text, which follow those that the cache holds: x, out [texts, tokens, hidden], cos, sin [texts or 1, tokens, size].
struct Prompt {
  Token all;
  int64_t tokens;
  double* products;  // seconds in products of linears are added here
};

// What decode() does, of a prompt, for layers whose linears multiply codes with codes.
int prompt(const Kernels&, const Block* blocks, const Held* held, int n, const Prompt&);

// 0 if it takes such layers, else -1.
int suits_prompt(const Kernels&, const Block* blocks, int n);

}  // namespace sordino
