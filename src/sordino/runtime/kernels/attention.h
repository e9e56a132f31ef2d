// Attention over a prefix and rows of a cache, for one token of each text (block.cpp) and for many (rows.cpp).
//
// A query's sums are those of pieces of rows, counted from where its text begins, put together in their order: they are the same
// to the bit whether a text stands alone or in a padded batch, and whether its tokens come one by one or all at once.
#pragma once
#include <cmath>

#include "block.h"

namespace sordino {
namespace {

constexpr int64_t kChunk = 256;  // rows in a piece

inline bool attends(const Block& b) {
  return b.key_heads > 0 && b.heads % b.key_heads == 0 && b.heads <= kMaxHeads * b.key_heads && b.size <= kMaxSize;
}

// Pieces of so many rows; the first one is the prefix, if there is one.
inline int64_t pieces_of(const Block& b, int64_t rows) { return (b.prefix > 0) + (rows + kChunk - 1) / kChunk; }

// The row of a cache where a text begins.
inline int64_t first_of(const int64_t* first, int64_t text) { return first == nullptr ? 0 : first[text]; }

inline int64_t part_size(const Block& b) { return b.size + 2; }  // what Pieces::attend writes of a query

// What queries of one text and key head see.
struct Rows {
  const Block& b;
  const Held& held;
  int64_t pair;        // text * key heads + key head
  int64_t first, end;  // rows of the cache

  void attend(const Kernels& k, int64_t piece, const float* queries, int count, const int64_t* ends, float* part) const {
    const int64_t head = pair % b.key_heads;
    if (b.prefix > 0 && piece == 0) {
      const Format plain{nullptr, 0, 0, 0, 0};
      const int64_t at = head * b.prefix * b.size * width(b.type);
      const Span keys = span_of(plain, static_cast<const uint8_t*>(b.prefix_key) + at, head, b.type, b.size);
      const Span values = span_of(plain, static_cast<const uint8_t*>(b.prefix_value) + at, head, b.type, b.size);
      return k.pieces->attend(queries, count, b.size, keys, values, 0, b.prefix, nullptr, part);
    }
    const int64_t begin = first + (piece - (b.prefix > 0)) * kChunk, stop = begin + kChunk < end ? begin + kChunk : end;
    const Span keys = span_of(b.key, held.keys + pair * held.room * row_bytes(b.key, b.type, b.size), head, b.type, b.size);
    const Span values = span_of(b.value, held.values + pair * held.room * row_bytes(b.value, b.type, b.size), head, b.type, b.size);
    k.pieces->attend(queries, count, b.size, keys, values, begin, stop, ends, part);
  }
};

// Puts the pieces of one query together, each `stride` numbers behind the one before it; out [size] of the model's dtype.
inline void merge(const Block& b, const float* parts, int64_t pieces, int64_t stride, char* out) {
  float largest = -INFINITY, total = 0;
  for (int64_t p = 0; p < pieces; ++p) largest = parts[p * stride] > largest ? parts[p * stride] : largest;
  float sums[kMaxSize] = {};
  for (int64_t p = 0; largest != -INFINITY && p < pieces; ++p) {
    const float* part = parts + p * stride;
    const float weight = std::exp(part[0] - largest);
    total += weight * part[1];
    for (int64_t i = 0; i < b.size; ++i) sums[i] += weight * part[2 + i];
  }
  if (total == 0) total = 1;  // a query that sees nothing: zeros
  for (int64_t i = 0; i < b.size; ++i) write(out, static_cast<Type>(b.type), i, sums[i] / total);
}

}  // namespace
}  // namespace sordino
