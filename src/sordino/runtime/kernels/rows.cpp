// What many tokens go through beside linears and attention: norms, rotary embedding, SiLU, rotations, rows of a cache.
//
// C functions like those of dispatch.cpp; tokens are shared among threads.
#include "attention.h"
#include "products.h"

namespace sordino {

// Norms of rows [rows, n]. With `added`: of x + added, which goes to `sum`.
SORDINO_API int sordino_norm(const Norm* norm, const void* x, const void* added, void* sum, void* out, int type, int64_t rows,
                             int64_t n, int threads) {
  const Kernels& k = in_use();
  const int64_t bytes = n * width(type);
  over(rows, kTokens, threads, [&](int64_t begin, int64_t end) {
    const auto* from = static_cast<const char*>(x);
    if (added != nullptr) {
      const int64_t at = begin * bytes;
      k.pieces->add(from + at, static_cast<const char*>(added) + at, static_cast<Type>(type), (end - begin) * n,
                    static_cast<char*>(sum) + at);
      from = static_cast<const char*>(sum);
    }
    for (int64_t m = begin; m < end; ++m) {
      k.pieces->norm(from + m * bytes, *norm, static_cast<Type>(type), n, static_cast<char*>(out) + m * bytes);
    }
  });
  return 0;
}

// Queries or keys [texts, tokens, heads, size] -> [texts, heads, tokens, size], each head normed if the norm has a gain, then
// turned by its place; cos and sin are [texts or 1, tokens, size].
SORDINO_API int sordino_place(const Norm* norm, const void* x, const void* cos, const void* sin, int one_text, void* out, int type,
                              int64_t texts, int64_t tokens, int64_t heads, int64_t size, int threads) {
  if (size > kMaxSize) return -1;
  const Kernels& k = in_use();
  const int64_t bytes = size * width(type);
  over(texts * tokens, kTokens, threads, [&](int64_t begin, int64_t end) {
    alignas(64) char normed[kMaxSize * 4];
    for (int64_t i = begin; i < end; ++i) {
      const int64_t text = i / tokens, token = i % tokens, at = (one_text ? token : i) * bytes;
      for (int64_t h = 0; h < heads; ++h) {
        const char* from = static_cast<const char*>(x) + (i * heads + h) * bytes;
        if (norm->gain != nullptr) {
          k.pieces->norm(from, *norm, static_cast<Type>(type), size, normed);
          from = normed;
        }
        k.pieces->rope(from, static_cast<const char*>(cos) + at, static_cast<const char*>(sin) + at, static_cast<Type>(type), size,
                       static_cast<char*>(out) + ((text * heads + h) * tokens + token) * bytes);
      }
    }
  });
  return 0;
}

// silu(gate) * up of n entries; out may be gate.
SORDINO_API int sordino_glu(const void* gate, const void* up, void* out, int type, int64_t n, int threads) {
  const Kernels& k = in_use();
  over(n, kEntries, threads, [&](int64_t begin, int64_t end) {
    const int64_t at = begin * width(type);
    k.pieces->glu(static_cast<const char*>(gate) + at, static_cast<const char*>(up) + at, static_cast<Type>(type), end - begin,
                  static_cast<char*>(out) + at);
  });
  return 0;
}

// Rotates rows [rows, order << power]: out may be x.
SORDINO_API int sordino_turn(const Turn* turn, const void* x, void* out, int type, int64_t rows, int threads) {
  const Kernels& k = in_use();
  const int64_t n = turn->order << turn->power, bytes = n * width(type);
  over(rows, kTokens, threads, [&](int64_t begin, int64_t end) {
    thread_local Scratch memory;
    float* work = static_cast<float*>(memory.get(n * 4));
    for (int64_t m = begin; m < end; ++m) {
      char* to = static_cast<char*>(out) + m * bytes;
      if (out != x) std::memcpy(to, static_cast<const char*>(x) + m * bytes, static_cast<size_t>(bytes));
      k.pieces->turn(to, *turn, static_cast<Type>(type), work);
    }
  });
  return 0;
}

// Rows of a cache, `row_bytes` each, at places from … from + tokens of [pairs, room], pair p of key head p mod key_heads.

// Writes x [pairs, tokens, size], less `mean` [key heads, size] if there is one, and rotated first if `turn` has an order.
SORDINO_API int sordino_store(const Format* f, const Turn* turn, const void* mean, const void* x, int type, int64_t pairs, int64_t key_heads,
                              int64_t tokens, int64_t size, uint8_t* rows, int64_t room, int64_t from, int threads) {
  if (size > kMaxSize) return -1;
  const Kernels& k = in_use();
  const int64_t wide = width(type), bytes = row_bytes(*f, type, size), step = 64;
  const int64_t pieces = (tokens + step - 1) / step;
  parallel_for(pairs * pieces, threads, [&](int64_t i) {
    const int64_t pair = i / pieces;
    for (int64_t s = i % pieces * step; s < tokens && s < (i % pieces + 1) * step; ++s) {
      alignas(64) char one[kMaxSize * 4];
      float work[kMaxSize];
      std::memcpy(one, static_cast<const char*>(x) + (pair * tokens + s) * size * wide, static_cast<size_t>(size * wide));
      if (mean != nullptr) {
        take_off(one, static_cast<const char*>(mean) + pair % key_heads * size * wide, size, static_cast<Type>(type));
      }
      if (turn->order != 0) k.pieces->turn(one, *turn, static_cast<Type>(type), work);
      k.pieces->store(one, *f, pair % key_heads, static_cast<Type>(type), size, rows + (pair * room + from + s) * bytes);
    }
  });
  return 0;
}

// Reads the first `tokens` of them: out [pairs, tokens, size].
SORDINO_API int sordino_load(const Format* f, const uint8_t* rows, int64_t room, int64_t pairs, int64_t key_heads,
                             int64_t tokens, int64_t size, int type, void* out, int threads) {
  if (size > kMaxSize) return -1;
  const Kernels& k = in_use();
  const int64_t wide = width(type), bytes = row_bytes(*f, type, size), step = 64;
  const int64_t pieces = (tokens + step - 1) / step;
  parallel_for(pairs * pieces, threads, [&](int64_t i) {
    const int64_t pair = i / pieces, head = pair % key_heads;
    const Span span = span_of(*f, rows + pair * room * bytes, head, type, size);
    for (int64_t s = i % pieces * step; s < tokens && s < (i % pieces + 1) * step; ++s) {
      k.pieces->load(span, s, size, static_cast<Type>(type), static_cast<char*>(out) + (pair * tokens + s) * size * wide);
    }
  });
  return 0;
}

// Causal attention of the last `tokens` of the rows of a cache, for query [texts, heads, tokens, size], out [texts, tokens, heads,
// size]. Of the block only what tells of attention is read. `first` [texts]: the row where each text begins; null: 0.
SORDINO_API int sordino_attend(const Block* block, const void* query, const Held* held, const int64_t* first, int64_t texts,
                               int64_t tokens, void* out, int threads) {
  const Block& b = *block;
  if (!attends(b) || held->length > held->room || tokens > held->length) return -1;
  const Kernels& k = in_use();
  const int64_t wide = width(b.type), step = tokens_at_once(b, tokens), blocks = (tokens + step - 1) / step, before = held->length - tokens;
  parallel_for(texts * b.key_heads * blocks, threads, [&](int64_t i) {
    const int64_t pair = i / blocks, text = pair / b.key_heads, from = i % blocks * step;
    const auto queried = [&](int64_t head, int64_t token) {
      return static_cast<const char*>(query) + ((text * b.heads + head) * tokens + token) * b.size * wide;
    };
    const auto found = [&](int64_t head, int64_t token) {
      return static_cast<char*>(out) + ((text * tokens + token) * b.heads + head) * b.size * wide;
    };
    attend_tokens(k, b, *held, first_of(first, text), pair, from, tokens - from < step ? tokens - from : step, before, queried, found);
  });
  return 0;
}

}  // namespace sordino
