// What one call for a token (block.cpp) and one for many (prompt.cpp) have in common.
#pragma once
#include "attention.h"
#include "products.h"

namespace sordino {
namespace {

// Memory of one call, handed out piece by piece; a first pass without memory adds up what is needed.
struct Arena {
  char* data;
  int64_t used = 0;

  char* take(int64_t bytes) {
    char* here = data == nullptr ? nullptr : data + used;
    used += padded(bytes);
    return here;
  }
};

// Whether input codes are multiplied with weight codes: both have one scale a row.
inline bool whole(const Linear& w, const Rounding& r) {
  return r.bits != 0 && w.additive == 0 && w.group == w.inputs && w.zero == nullptr && !r.uneven && (r.fixed || r.group == w.inputs);
}

// What Kernels::encode wants: the share of a token's largest entry that is one step of its codes; 0 with a static scale.
inline float step_of(const Rounding& r) {
  const double high = static_cast<double>((1 << (r.bits - 1)) - 1);
  return r.fixed ? 0 : static_cast<float>(static_cast<double>(r.scale[0]) / high);
}

// Norm, rotary embedding and R3 of all heads of one token, in place; `work` has room for a head of fp32 numbers.
inline void place(const Kernels& k, const Block& b, char* x, int64_t heads, Where of, const char* cos, const char* sin, char* work) {
  const Type type = static_cast<Type>(b.type);
  const int64_t one = b.size * width(type);
  for (int64_t h = 0; h < heads; ++h, x += one) {
    if (b.norm[of].gain != nullptr) k.pieces->norm(x, b.norm[of], type, b.size, x);
    k.pieces->rope(x, cos, sin, type, b.size, work);
    std::memcpy(x, work, static_cast<size_t>(one));
    if (of == kOfKey && b.key_mean != nullptr) take_off(x, static_cast<const char*>(b.key_mean) + h * one, b.size, type);
    if (b.keys.order != 0) k.pieces->turn(x, b.keys, type, reinterpret_cast<float*>(work));
  }
}

// Writes keys or values of one text's token, all heads, to row `at` of the cache.
inline void store(const Kernels& k, const Block& b, const char* x, const Format& f, uint8_t* data, int64_t room, int64_t text, int64_t at) {
  const Type type = static_cast<Type>(b.type);
  const int64_t bytes = row_bytes(f, type, b.size);
  for (int64_t h = 0; h < b.key_heads; ++h) {
    uint8_t* row = data + ((text * b.key_heads + h) * room + at) * bytes;
    k.pieces->store(x + h * b.size * width(type), f, h, type, b.size, row);
  }
}

}  // namespace
}  // namespace sordino
