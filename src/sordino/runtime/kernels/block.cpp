// One token through decoder layers: norms, linears, rotary embedding, cache and attention in one call.
//
// Every intermediate is rounded to the model's dtype where torch's operations round it; what is summed is summed in fp32.
#include "steps.h"

namespace sordino {
namespace {

// The input of one linear as its kernel wants it.
struct Ready {
  const Linear* w;
  const Rounding* rounding;
  Arranged arranged;
  char* rounded;  // T [rows, inputs]: codes times scales, where groups of weights keep codes from being multiplied
  int8_t* codes;  // [rows, stride]: or codes that are
  int64_t stride;
  float scale[kMaxRows];
  int32_t sums[kMaxRows];
  bool integer;
};

struct Call {
  const Kernels& k;
  const Block& b;
  const Held& held;
  const Token& s;
  const Type type;
  const int64_t wide;  // bytes of a number

  const Linear& linear(int which) const { return b.linear[which]; }
  const Kernels& kernels(const Linear& w) const { return k.fits(w) ? k : kPortable; }

  Ready reserve(Arena& arena, int which) const {
    const Linear& w = linear(which);
    Ready r{&w, &b.rounding[which], {}, nullptr, nullptr, 0, {}, {}, whole(w, b.rounding[which])};
    r.stride = padded(w.inputs);
    if (r.integer) {
      r.codes = reinterpret_cast<int8_t*>(arena.take(s.texts * r.stride));
      return r;
    }
    if (r.rounding->bits != 0) {
      r.rounded = arena.take(s.texts * w.inputs * wide);
      r.codes = reinterpret_cast<int8_t*>(arena.take(r.stride));
    }
    r.arranged.stride = padded(padded(w.group) * w.groups() * kernels(w).bytes_per_input);
    r.arranged.values = arena.take(s.texts * r.arranged.stride);
    r.arranged.sums = reinterpret_cast<float*>(arena.take(s.texts * w.groups() * 4));
    r.arranged.units = reinterpret_cast<float*>(arena.take(s.texts * w.groups() * 4));
    return r;
  }

  void prepare(Ready& r, const char* x) const {
    const Linear& w = *r.w;
    const Rounding& how = *r.rounding;
    const float high = static_cast<float>((1 << (how.bits == 0 ? 0 : how.bits - 1)) - 1);
    for (int64_t m = 0; how.bits != 0 && m < s.texts; ++m) {
      const char* row = x + m * w.inputs * wide;
      if (r.integer) {
        r.scale[m] = how.scale[0];
        int8_t* to = r.codes + m * r.stride;
        r.sums[m] = k.encode(row, type, w.inputs, how.bits, step_of(how), &r.scale[m], to);
        std::memset(to + w.inputs, 0, static_cast<size_t>(r.stride - w.inputs));
        continue;
      }
      const int64_t group = how.fixed ? w.inputs : how.group;
      for (int64_t g = 0, from = 0; from < w.inputs; ++g, from += group) {
        float scale = how.scale[how.fixed ? 0 : g];
        if (how.uneven) {
          round_uneven(row + from * wide, how.bits, scale, group, r.rounded + (m * w.inputs + from) * wide);
          continue;
        }
        k.encode(row + from * wide, type, group, how.bits, how.fixed ? 0 : scale / high, &scale, r.codes);
        char* to = r.rounded + m * w.inputs * wide;
        for (int64_t i = 0; i < group; ++i) write(to, type, from + i, static_cast<float>(r.codes[i]) * scale);
      }
    }
    if (!r.integer) kernels(w).arrange(w, how.bits != 0 ? r.rounded : x, type, s.texts, r.arranged);
  }

  // n entries on a grid of their own that reaches `share` of their extremes, as numerics/inputs.py does it.
  void round_uneven(const char* x, int bits, float share, int64_t n, char* out) const {
    float low, high;
    k.pieces->extremes(x, type, n, &low, &high);
    low *= share, high *= share;
    const float top = static_cast<float>((1 << bits) - 1), exact = (high - low) / top, scale = exact < 1e-8f ? 1e-8f : exact;
    const float zero = (-low / scale + kMagic) - kMagic;
    k.training->round(x, scale, -zero, top - zero, type, n, out);
  }

  // Rows begin … end of x W^T + bias, into T [rows, outputs].
  void multiply(const Ready& r, int64_t begin, int64_t end, char* out) const {
    const Linear& w = *r.w;
    const int rows = static_cast<int>(s.texts);
    union {
      float y[kMostRows * kMaxRows];
      int32_t n[kMostRows * kMaxRows];
    } sums;
    if (r.integer) {
      k.integer(w, r.codes, r.stride, rows, begin, end, sums.n);
      finish(w, sums.n, r.sums, r.scale, rows, begin, end, type, out);
    } else {
      kernels(w).product(w, r.arranged, type, rows, begin, end, sums.y);
      finish(k, w, sums.y, rows, begin, end, type, out);
    }
  }

  // Several linears of one input at once.
  void multiply(Ready* const* some, int n, char* const* outs) const {
    int64_t steps[3], pieces = 0;
    for (int i = 0; i < n; ++i) {
      steps[i] = rows_at_once(*some[i]->w, some[i]->w->outputs, s.threads);
      pieces += (some[i]->w->outputs + steps[i] - 1) / steps[i];
    }
    parallel_for(pieces, s.threads, [&](int64_t piece) {
      int i = 0;
      for (; piece * steps[i] >= some[i]->w->outputs; ++i) piece -= (some[i]->w->outputs + steps[i] - 1) / steps[i];
      const int64_t begin = piece * steps[i], end = begin + steps[i], all = some[i]->w->outputs;
      multiply(*some[i], begin, end < all ? end : all, outs[i]);
    });
  }

  void norm(Where where, const char* x, int64_t n, char* out) const {
    for (int64_t m = 0; m < s.texts; ++m) k.pieces->norm(x + m * n * wide, b.norm[where], type, n, out + m * n * wide);
  }

  // Attention over the prefix and length + 1 rows of the cache, pieces of it side by side, then put together.
  void attention(const char* query, char* out, float* wide_query, float* parts) const {
    const int64_t group = b.heads / b.key_heads, one = part_size(b) * group, pieces = pieces_of(b, most_rows());
    for (int64_t i = 0; i < s.texts * b.heads * b.size; ++i) wide_query[i] = read(query, type, i);
    parallel_for(s.texts * b.key_heads * pieces, s.threads, [&](int64_t i) {
      const int64_t pair = i / pieces;
      const Rows rows{b, held, pair, first_of(s.first, pair / b.key_heads), held.length + 1};
      rows.attend(k, i % pieces, wide_query + pair * group * b.size, static_cast<int>(group), nullptr, parts + i * one);
    });
    for (int64_t i = 0; i < s.texts * b.heads; ++i) {
      k.pieces->merge(parts + i / group * pieces * one + i % group * part_size(b), pieces, one, type, b.size, out + i * b.size * wide);
    }
  }

  // Rows that the text with the most of them sees.
  int64_t most_rows() const {
    int64_t least = held.length;
    for (int64_t m = 0; m < s.texts; ++m) least = first_of(s.first, m) < least ? first_of(s.first, m) : least;
    return held.length + 1 - least;
  }

  // With no memory in the arena: only counts.
  void run(Arena& arena) const {
    const int64_t hidden = linear(kQuery).inputs, middle = linear(kDown).inputs;
    const int64_t queries = linear(kQuery).outputs, keys = linear(kKey).outputs;
    const int64_t pieces = pieces_of(b, most_rows());
    char* normed = arena.take(s.texts * hidden * wide);
    char *query = arena.take(s.texts * queries * wide), *key = arena.take(s.texts * keys * wide);
    char *value = arena.take(s.texts * keys * wide), *seen = arena.take(s.texts * queries * wide);
    char *added = arena.take(s.texts * hidden * wide), *stream = arena.take(s.texts * hidden * wide);
    char *gate = arena.take(s.texts * middle * wide), *up = arena.take(s.texts * middle * wide);
    char* work = arena.take((middle > b.size ? middle : b.size) * 4);
    float* wide_query = reinterpret_cast<float*>(arena.take(s.texts * queries * 4));
    float* parts = reinterpret_cast<float*>(arena.take(s.texts * b.heads * pieces * part_size(b) * 4));
    Ready ready[kLinears];
    for (int i = 0; i < kLinears; ++i) ready[i] = reserve(arena, i);
    if (arena.data == nullptr) return;

    const char* x = static_cast<const char*>(s.x);
    norm(kBefore, x, hidden, normed);
    for (int i = kQuery; i <= kValue; ++i) prepare(ready[i], normed);
    Ready* first[] = {&ready[kQuery], &ready[kKey], &ready[kValue]};
    char* outs[] = {query, key, value};
    multiply(first, 3, outs);
    for (int64_t m = 0; m < s.texts; ++m) {
      const int64_t at = s.one_place ? 0 : m * b.size * wide;
      const char *cos = static_cast<const char*>(s.cos) + at, *sin = static_cast<const char*>(s.sin) + at;
      place(k, b, query + m * queries * wide, b.heads, kOfQuery, cos, sin, work);
      place(k, b, key + m * keys * wide, b.key_heads, kOfKey, cos, sin, work);
      store(k, b, key + m * keys * wide, b.key, held.keys, held.room, m, held.length);
      store(k, b, value + m * keys * wide, b.value, held.values, held.room, m, held.length);
    }
    attention(query, seen, wide_query, parts);
    prepare(ready[kOutput], seen);
    over_outputs(linear(kOutput), s.threads, [&](int64_t begin, int64_t end) { multiply(ready[kOutput], begin, end, added); });
    k.pieces->add(x, added, type, s.texts * hidden, stream);

    norm(kBetween, stream, hidden, normed);
    prepare(ready[kGate], normed);
    prepare(ready[kUp], normed);
    over_outputs(linear(kGate), s.threads, [&](int64_t begin, int64_t end) {
      multiply(ready[kGate], begin, end, gate);
      multiply(ready[kUp], begin, end, up);
      for (int64_t m = 0; m < s.texts; ++m) {
        const int64_t at = (m * middle + begin) * wide;
        k.pieces->glu(gate + at, up + at, type, end - begin, gate + at);
      }
    });
    for (int64_t m = 0; b.down.order != 0 && m < s.texts; ++m) {
      k.pieces->turn(gate + m * middle * wide, b.down, type, reinterpret_cast<float*>(work));
    }
    prepare(ready[kDown], gate);
    over_outputs(linear(kDown), s.threads, [&](int64_t begin, int64_t end) { multiply(ready[kDown], begin, end, added); });
    k.pieces->add(stream, added, type, s.texts * hidden, static_cast<char*>(s.out));
  }
};

bool takes(const Block& b, const Held& held, const Token& s) {
  if (s.texts < 1 || s.texts > kMaxRows || !attends(b) || held.length >= held.room) return false;
  for (int64_t m = 0; m < s.texts; ++m)
    if (first_of(s.first, m) < 0 || first_of(s.first, m) > held.length) return false;
  return true;
}

}  // namespace

int decode(const Kernels& k, const Block* blocks, const Held* held, int n, const Token& token) {
  for (int i = 0; i < n; ++i)
    if (!takes(blocks[i], held[i], token)) return -1;
  thread_local Scratch stream, memory;
  const int64_t bytes = token.texts * blocks[0].linear[kQuery].inputs * width(blocks[0].type);
  char* between = static_cast<char*>(stream.get(2 * bytes));
  together(token.threads, [&] {
    Token now = token;
    for (int i = 0; i < n; ++i) {
      const Block& b = blocks[i];
      now.x = i == 0 ? token.x : now.out;
      now.out = i == n - 1 ? token.out : between + i % 2 * bytes;
      const Type type = static_cast<Type>(b.type);
      const Call call{k, b, held[i], now, type, width(type)};
      Arena count{nullptr};
      call.run(count);
      Arena arena{static_cast<char*>(memory.get(count.used))};
      call.run(arena);
    }
  });
  return 0;
}

}  // namespace sordino
