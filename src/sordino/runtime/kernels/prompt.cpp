// Many tokens through decoder layers in one call, where all linears multiply codes with codes.
//
// Some hundred tokens at a time go through all layers, so that what is between two products stays in the caches and little memory is
// needed. Whatever happens to a token alone between two products is one pass: residual sum, norm and rounding; gated activation, R4 and
// rounding; head norms, rotary embedding, R3 and the cache's new rows. Every intermediate is rounded to the model's dtype as in block.cpp.
#include <algorithm>
#include <chrono>
#include <initializer_list>
#include <vector>

#include "steps.h"

namespace sordino {
namespace {

constexpr int64_t kAtOnce = 1024;      // tokens at most
constexpr int64_t kLongest = 1 << 16;  // inputs whose products with 8 bits fit 32 bits when they are summed

// Tokens from … from + some of a text.
struct Part {
  int64_t text, from, some;
};

// Tokens begin … end of all texts, counted one text after another.
struct Piece {
  const Kernels& k;
  const Prompt& s;
  int64_t begin, end;
  std::vector<Part> parts;  // of attention

  int64_t rows() const { return end - begin; }
  int64_t text(int64_t row) const { return (begin + row) / s.tokens; }
  int64_t token(int64_t row) const { return (begin + row) % s.tokens; }

  void cut(const Block& b) {
    for (int64_t row = 0; row < rows();) {
      const int64_t left = std::min(s.tokens - token(row), rows() - row), step = tokens_at_once(b, left);
      for (int64_t i = 0; i < left; i += step) parts.push_back({text(row), token(row) + i, std::min(step, left - i)});
      row += left;
    }
  }
};

// Codes of a linear's input, of all rows.
struct Rounded {
  int8_t* codes;
  float* scale;  // one of every token, or the static one
};

struct Layer {
  const Block& b;
  const Held& held;
  const Piece& p;
  char* stream;       // T [rows, hidden], what the layers add to
  const char* added;  // what the layer before has still to add; null: nothing
  const Type type;
  const int64_t wide;

  int threads() const { return p.s.all.threads; }
  const Linear& linear(int which) const { return b.linear[which]; }

  // One token's numbers T [inputs of the linear], rounded.
  void encode(int which, const char* x, int64_t row, const Rounded& to) const {
    const Rounding& how = b.rounding[which];
    const int64_t n = linear(which).inputs;
    float scale = how.scale[0];
    p.k.encode(x, type, n, how.bits, step_of(how), &scale, to.codes + row * n);
    if (!how.fixed || row == 0) to.scale[how.fixed ? 0 : row] = scale;
  }

  // Residual sum, norm, rounding.
  void enter(Where where, int which, const char* more, const Rounded& to) const {
    const int64_t hidden = linear(which).inputs, bytes = hidden * wide;
    over(p.rows(), kTokens, threads(), [&](int64_t begin, int64_t end) {
      thread_local Scratch memory;
      char* normed = static_cast<char*>(memory.get(bytes));
      for (int64_t m = begin; m < end; ++m) {
        char* x = stream + m * bytes;
        if (more != nullptr) p.k.pieces->add(x, more + m * bytes, type, hidden, x);
        p.k.pieces->norm(x, b.norm[where], type, hidden, normed);
        encode(which, normed, m, to);
      }
    });
  }

  // Linears of one input, `which` and those behind it.
  void multiply(int which, const Rounded& x, std::initializer_list<char*> outs) const {
    Product products[kLinears];
    int n = 0;
    for (char* out : outs) products[n] = {&linear(which + n), out}, ++n;
    const auto started = std::chrono::steady_clock::now();
    p.k.many(products, n, x.codes, x.scale, b.rounding[which].fixed != 0, type, p.rows(), threads());
    *p.s.products += std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count();
  }

  // Head norms, rotary embedding, R3; the cache gets its rows.
  void place_all(char* query, char* key, const char* value) const {
    const int64_t queries = linear(kQuery).outputs * wide, keys = linear(kKey).outputs * wide;
    over(p.rows(), kTokens, threads(), [&](int64_t begin, int64_t end) {
      alignas(64) char work[kMaxSize * 4];
      for (int64_t m = begin; m < end; ++m) {
        const int64_t at = (p.s.all.one_place ? p.token(m) : p.begin + m) * b.size * wide, row = held.length + p.token(m);
        const char *cos = static_cast<const char*>(p.s.all.cos) + at, *sin = static_cast<const char*>(p.s.all.sin) + at;
        place(p.k, b, query + m * queries, b.heads, kOfQuery, cos, sin, work);
        place(p.k, b, key + m * keys, b.key_heads, kOfKey, cos, sin, work);
        store(p.k, b, key + m * keys, b.key, held.keys, held.room, p.text(m), row);
        store(p.k, b, value + m * keys, b.value, held.values, held.room, p.text(m), row);
      }
    });
  }

  // Attention of all tokens, those that see most first, and its output rounded.
  void attend(const char* query, char* seen, const Rounded& to) const {
    const int64_t n = static_cast<int64_t>(p.parts.size()), queries = linear(kQuery).outputs * wide;
    parallel_for(n * b.key_heads, threads(), [&](int64_t i) {
      const Part& part = p.parts[static_cast<size_t>(n - 1 - i / b.key_heads)];
      const int64_t pair = part.text * b.key_heads + i % b.key_heads, before = part.text * p.s.tokens - p.begin;
      const auto at = [&](int64_t head, int64_t token) { return (before + token) * queries + head * b.size * wide; };
      attend_tokens(
          p.k, b, held, first_of(p.s.all.first, part.text), pair, part.from, part.some, held.length,
          [&](int64_t head, int64_t token) { return query + at(head, token); },
          [&](int64_t head, int64_t token) { return seen + at(head, token); });
    });
    over(p.rows(), kTokens, threads(), [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; ++m) encode(kOutput, seen + m * queries, m, to);
    });
  }

  // Gated activation, R4, rounding.
  void gated(char* gate, const char* up, const Rounded& to) const {
    const int64_t n = linear(kDown).inputs;
    over(p.rows(), kTokens, threads(), [&](int64_t begin, int64_t end) {
      thread_local Scratch memory;
      float* work = static_cast<float*>(memory.get(n * 4));
      for (int64_t m = begin; m < end; ++m) {
        char* x = gate + m * n * wide;
        p.k.pieces->glu(x, up + m * n * wide, type, n, x);
        if (b.down.order != 0) p.k.pieces->turn(x, b.down, type, work);
        encode(kDown, x, m, to);
      }
    });
  }

  // With no memory in the arena: only counts. Returns what is still to be added.
  const char* run(Arena& arena) const {
    const int64_t rows = p.rows(), hidden = linear(kQuery).inputs, middle = linear(kDown).inputs;
    const int64_t queries = linear(kQuery).outputs, keys = linear(kKey).outputs, longest = std::max({hidden, queries, middle});
    char* more = arena.take(rows * hidden * wide);
    char *query = arena.take(rows * queries * wide), *key = arena.take(rows * keys * wide), *value = arena.take(rows * keys * wide);
    char *gate = arena.take(rows * std::max(queries, middle) * wide), *up = arena.take(rows * middle * wide);
    const Rounded x{reinterpret_cast<int8_t*>(arena.take(rows * longest)), reinterpret_cast<float*>(arena.take(rows * 4))};
    if (arena.data == nullptr) return nullptr;
    char* seen = gate;  // they are not needed at the same time
    enter(kBefore, kQuery, added, x);
    multiply(kQuery, x, {query, key, value});
    place_all(query, key, value);
    attend(query, seen, x);
    multiply(kOutput, x, {more});
    enter(kBetween, kGate, more, x);
    multiply(kGate, x, {gate, up});
    gated(gate, up, x);
    multiply(kDown, x, {more});
    return more;
  }
};

bool alike(const Rounding& a, const Rounding& b) { return a.bits == b.bits && a.fixed == b.fixed && a.scale[0] == b.scale[0]; }

bool suits(const Kernels& k, const Block& b) {
  if (k.many == nullptr || !attends(b)) return false;
  for (int i = 0; i < kLinears; ++i)
    if (!whole(b.linear[i], b.rounding[i]) || b.linear[i].inputs > kLongest) return false;
  const Rounding* r = b.rounding;
  return alike(r[kQuery], r[kKey]) && alike(r[kQuery], r[kValue]) && alike(r[kGate], r[kUp]);
}

bool takes(const Kernels& k, const Block& b, const Held& held, const Prompt& s) {
  if (!suits(k, b) || s.all.texts < 1 || s.tokens < 1 || held.length + s.tokens > held.room) return false;
  for (int64_t m = 0; m < s.all.texts; ++m)
    if (first_of(s.all.first, m) < 0) return false;
  return true;
}

}  // namespace

int suits_prompt(const Kernels& k, const Block* blocks, int n) {
  for (int i = 0; i < n; ++i)
    if (!suits(k, blocks[i])) return -1;
  return 0;
}

int prompt(const Kernels& k, const Block* blocks, const Held* held, int n, const Prompt& s) {
  for (int i = 0; i < n; ++i)
    if (!takes(k, blocks[i], held[i], s)) return -1;
  const Type type = static_cast<Type>(blocks[0].type);
  const int64_t hidden = blocks[0].linear[kQuery].inputs, wide = width(type), all = s.all.texts * s.tokens;
  const int64_t pieces = (all + kAtOnce - 1) / kAtOnce, step = (all + pieces - 1) / pieces;
  Scratch memory;
  together(s.all.threads, [&] {
    for (int64_t from = 0; from < all; from += step) {
      Piece piece{k, s, from, std::min(from + step, all), {}};
      piece.cut(blocks[0]);
      char* stream = static_cast<char*>(s.all.out) + from * hidden * wide;
      std::memcpy(stream, static_cast<const char*>(s.all.x) + from * hidden * wide, static_cast<size_t>(piece.rows() * hidden * wide));
      const char* added = nullptr;
      const auto layer = [&](int i) { return Layer{blocks[i], held[i], piece, stream, added, type, wide}; };
      int64_t most = 0;
      for (int i = 0; i < n; ++i) {
        Arena count{nullptr};
        layer(i).run(count);
        most = std::max(most, count.used);
      }
      char* data = static_cast<char*>(memory.get(most));
      for (int i = 0; i < n; ++i) {
        Arena arena{data};
        added = layer(i).run(arena);
      }
      k.pieces->add(stream, added, type, piece.rows() * hidden, stream);
    }
  });
  return 0;
}

}  // namespace sordino
