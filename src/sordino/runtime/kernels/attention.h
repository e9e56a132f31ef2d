// Attention over a prefix and rows of a cache, for one token of each text (block.cpp) and for many (rows.cpp, prompt.cpp).
//
// A query's sums are those of pieces of rows, counted from where its text begins, put together in their order: they are the same
// to the bit whether a text stands alone or in a padded batch, and whether its tokens come one by one or all at once.
#pragma once
#include "block.h"
#include "products.h"

namespace sordino {
namespace {

inline bool attends(const Block& b) {
  return b.key_heads > 0 && b.heads % b.key_heads == 0 && b.heads <= kMaxHeads * b.key_heads && b.size <= kMaxSize;
}

inline int64_t chunks(int64_t rows) { return (rows + kChunk - 1) / kChunk; }

// Pieces of a prefix and of so many rows behind it.
inline int64_t pieces_of(const Block& b, int64_t rows) { return chunks(b.prefix) + chunks(rows); }

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
    const int64_t head = pair % b.key_heads, before = chunks(b.prefix);
    const auto some = [&](const Span& keys, const Span& values, int64_t from, int64_t to, const int64_t* seen) {
      k.pieces->attend(queries, count, b.size, b.scaling, keys, values, from, from + kChunk < to ? from + kChunk : to, seen, part);
    };
    if (piece < before) {
      const Format plain{nullptr, 0, 0, 0, 0};
      const int64_t at = head * b.prefix * b.size * width(b.type);
      const Span keys = span_of(plain, static_cast<const uint8_t*>(b.prefix_key) + at, head, b.type, b.size);
      const Span values = span_of(plain, static_cast<const uint8_t*>(b.prefix_value) + at, head, b.type, b.size);
      return some(keys, values, piece * kChunk, b.prefix, nullptr);
    }
    const Span keys = span_of(b.key, held.keys + pair * held.room * row_bytes(b.key, b.type, b.size), head, b.type, b.size);
    const Span values = span_of(b.value, held.values + pair * held.room * row_bytes(b.value, b.type, b.size), head, b.type, b.size);
    some(keys, values, first + (piece - before) * kChunk, end, ends);
  }
};

// Of a prompt, for one piece of work: every thread gets some.
inline int64_t tokens_at_once(const Block& b, int64_t tokens) {
  const int64_t group = b.heads / b.key_heads, least = kMaxHeads / group, most = kMaxQueries / group;
  return tokens / 8 < least ? least : tokens / 8 > most ? most : tokens / 8;
}

// Causal attention of tokens from … from + some of a text that begins in row `first`, and one key head; token 0 stands in row `before`.
// query(head, token) and out(head, token) say where what is wanted lies, T [size] each.
template <class Query, class Out>
void attend_tokens(const Kernels& k, const Block& b, const Held& held, int64_t first, int64_t pair, int64_t from, int64_t some,
                   int64_t before, Query query, Out out) {
  const Type type = static_cast<Type>(b.type);
  const int64_t group = b.heads / b.key_heads, count = some * group, end = before + from + some;
  const int64_t pieces = pieces_of(b, end > first ? end - first : 0), one = count * part_size(b);
  const auto head = [&](int64_t n) { return pair % b.key_heads * group + n % group; };
  const auto token = [&](int64_t n) { return from + n / group; };
  thread_local Scratch memory;
  float* queries = static_cast<float*>(memory.get(count * (b.size + pieces * part_size(b)) * 4));
  float* parts = queries + count * b.size;
  int64_t ends[kMaxQueries];
  for (int64_t n = 0; n < count; ++n) {
    const char* from_here = query(head(n), token(n));
    for (int64_t j = 0; j < b.size; ++j) queries[n * b.size + j] = read(from_here, type, j);
    ends[n] = before + token(n) + 1;
  }
  const Rows rows{b, held, pair, first, end};
  for (int64_t p = 0; p < pieces; ++p) rows.attend(k, p, queries, static_cast<int>(count), ends, parts + p * one);
  for (int64_t n = 0; n < count; ++n) k.pieces->merge(parts + n * part_size(b), pieces, one, type, b.size, out(head(n), token(n)));
}

}  // namespace
}  // namespace sordino
