// The C functions that Python calls (library.py), and the choice of an instruction set.
//
// Every function returns 0, or -1 where the chosen instruction set and the portable one both have nothing for it; memory
// belongs to the caller. Tensors are contiguous. Nothing is kept between calls but scratch memory of each thread.
#include <atomic>
#include <cstdlib>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "block.h"
#include "products.h"

namespace sordino {
namespace {

// Zen 4, AMD's only family 25 with AVX-512, reads weights of integer products and heads of 8 bits a tenth to a fifth faster when nothing is
// asked for ahead; products that take longer than memory (floating activations, 4 bits) lose as much.
int64_t best_ahead() {
#if defined(__x86_64__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kAuth = 0x68747541;  // "Auth"enticAMD
  if (__get_cpuid(0, &a, &b, &c, &d) && b == kAuth && __get_cpuid(1, &a, &b, &c, &d)) {
    const unsigned family = (a >> 8 & 15) + (a >> 20 & 255);
    if (family == 25) return 0;
  }
#endif
  return kAhead;
}

std::atomic<const Kernels*> chosen{&kPortable};

const Kernels* available(int level) {
  if (level == 0) return &kPortable;
#if defined(__x86_64__) && (defined(SORDINO_AVX2) || defined(SORDINO_AVX512))
  __builtin_cpu_init();
#ifdef SORDINO_AVX2
  if (level == 1 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) {
    return &kAvx2;
  }
#endif
#ifdef SORDINO_AVX512
#ifdef SORDINO_AMX
  if (level == 3 && available(2) != nullptr) {
    constexpr unsigned kTiles = 1u << 22 | 1u << 24 | 1u << 25;  // AMX-BF16, AMX-TILE, AMX-INT8
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kTiles) == kTiles && allowed_tiles()) return &tiled();
  }
#endif
  if (level == 2 && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vbmi") &&
      __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("bmi2")) {
    return &kAvx512;
  }
#endif
#endif
  return nullptr;
}

// Integer products of codes int8 [rows, stride] whose sums are `sums`, scaled.
void integer_product(const Kernels& k, const Linear& w, const int8_t* codes, int64_t stride, const int32_t* sums,
                     const float* scale, Type type, int64_t rows, void* out, int threads) {
  over_outputs(w, threads, [&](int64_t begin, int64_t end) {
    int32_t y[kMostRows * kMaxRows];
    for (int64_t m = 0; m < rows; m += kMaxRows) {
      const int some = static_cast<int>(rows - m < kMaxRows ? rows - m : kMaxRows);
      k.integer(w, codes + m * stride, stride, some, begin, end, y);
      finish(w, y, sums + m, scale + m, some, begin, end, type, static_cast<char*>(out) + m * w.outputs * width(type));
    }
  });
}

}  // namespace

int64_t light_ahead = best_ahead();

const Kernels& in_use() { return *chosen.load(); }

}  // namespace sordino

using namespace sordino;

// 0 portable, 1 AVX2, 2 AVX-512, 3 AMX: chooses it if this machine has it. Returns 0 or -1.
SORDINO_API int sordino_choose(int level) {
  const Kernels* found = available(level);
  if (found == nullptr) return -1;
  chosen = found;
  return 0;
}

// x W^T + bias: x and out [rows, inputs] and [rows, outputs] of `type`. Meant for few rows.
SORDINO_API int sordino_product(const Linear* w, const void* x, int type, int64_t rows, void* out, int threads) {
  const Kernels& k = in_use().fits(*w) ? in_use() : kPortable;
  thread_local Scratch memory;
  const int64_t stride = padded(padded(w->group) * w->groups() * k.bytes_per_input);
  const int64_t all = rows < kMaxRows ? rows : kMaxRows;
  char* data = static_cast<char*>(memory.get(all * (stride + w->groups() * 8)));
  float* of_groups = reinterpret_cast<float*>(data + all * stride);
  const Arranged arranged{data, of_groups, of_groups + all * w->groups(), stride};
  const int64_t wide = width(type);
  for (int64_t m = 0; m < rows; m += kMaxRows) {
    const int some = static_cast<int>(rows - m < kMaxRows ? rows - m : kMaxRows);
    k.arrange(*w, static_cast<const char*>(x) + m * w->inputs * wide, static_cast<Type>(type), some, arranged);
    over_outputs(*w, threads, [&](int64_t begin, int64_t end) {
      float y[kMostRows * kMaxRows];
      k.product(*w, arranged, static_cast<Type>(type), some, begin, end, y);
      finish(k, *w, y, some, begin, end, static_cast<Type>(type), static_cast<char*>(out) + m * w->outputs * wide);
    });
  }
  return 0;
}

// Rounds x to `bits` (with a static scale, or one scale a token: share * largest entry) and multiplies the codes: few rows, one
// scale a row of the weight, symmetric.
SORDINO_API int sordino_rounded_product(const Linear* w, const void* x, int type, int64_t rows, int bits, float share,
                                        const float* fixed, void* out, int threads) {
  const Kernels& k = in_use();
  thread_local Scratch memory;
  const int64_t stride = padded(w->inputs), wide = width(type);
  char* data = static_cast<char*>(memory.get(rows * (stride + 8)));
  int8_t* codes = reinterpret_cast<int8_t*>(data);
  float* scale = reinterpret_cast<float*>(data + rows * stride);
  int32_t* sums = reinterpret_cast<int32_t*>(scale + rows);
  for (int64_t m = 0; m < rows; ++m) {
    if (fixed != nullptr) scale[m] = *fixed;
    const void* row = static_cast<const char*>(x) + m * w->inputs * wide;
    int8_t* to = codes + m * stride;
    sums[m] = k.encode(row, static_cast<Type>(type), w->inputs, bits, fixed != nullptr ? 0.0f : share, scale + m, to);
    std::memset(to + w->inputs, 0, static_cast<size_t>(stride - w->inputs));
  }
  integer_product(k, *w, codes, stride, sums, scale, static_cast<Type>(type), rows, out, threads);
  return 0;
}

// Codes int8 [rows, n] and scales [rows] of x; with a static scale, `scale` holds it and is only read ([1], share 0).
SORDINO_API int sordino_encode(const void* x, int type, int64_t rows, int64_t n, int bits, float share, float* scale,
                               int8_t* codes, int threads) {
  const Kernels& k = in_use();
  const int64_t wide = width(type);
  over(rows, kTokens, threads, [&](int64_t first, int64_t last) {
    for (int64_t m = first; m < last; ++m) {
      const void* row = static_cast<const char*>(x) + m * n * wide;
      k.encode(row, static_cast<Type>(type), n, bits, share, share > 0 ? scale + m : scale, codes + m * n);
    }
  });
  return 0;
}

// Scales integer products [rows, end - begin] into columns begin … end of out [rows, outputs].
SORDINO_API int sordino_rescale(const Linear* w, const int32_t* sums, int64_t rows, int64_t begin, int64_t end,
                                const float* scale, int one_scale, void* out, int type, int threads) {
  const Kernels& k = in_use();
  const int64_t wide = width(type);
  over(rows, kTokens, threads, [&](int64_t first, int64_t last) {
    for (int64_t m = first; m < last; ++m) {
      char* to = static_cast<char*>(out) + (m * w->outputs + begin) * wide;
      k.pieces->rescale(sums + m * (end - begin), *w, begin, end - begin, scale[one_scale ? 0 : m], static_cast<Type>(type), to);
    }
  });
  return 0;
}

// Weights of rows begin … end: fp32 or bf16 [end - begin, inputs], rounded once.
SORDINO_API int sordino_values(const Linear* w, int64_t begin, int64_t end, int type, void* out, int threads) {
  const Kernels& k = in_use();
  const int64_t bytes = w->inputs * width(type);
  over(end - begin, rows_at_once(*w, end - begin, threads), threads, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) k.values(*w, begin + i, static_cast<Type>(type), static_cast<char*>(out) + i * bytes);
  });
  return 0;
}

// Codes less 2^(b-1) of rows begin … end: int8 [end - begin, inputs].
SORDINO_API int sordino_centred(const Linear* w, int64_t begin, int64_t end, int8_t* out, int threads) {
  const Kernels& k = in_use();
  over(end - begin, rows_at_once(*w, end - begin, threads), threads, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) k.centred(*w, begin + i, out + i * w->inputs);
  });
  return 0;
}

// One token of each of `texts` texts through n layers (block.h); -1 for shapes it does not take. Every cache gets a row.
SORDINO_API int sordino_decode(const Block* blocks, const Held* held, int n, const void* x, void* out, const void* cos,
                               const void* sin, int one_place, const int64_t* first, int64_t texts, int threads) {
  return decode(in_use(), blocks, held, n, {x, out, cos, sin, first, texts, one_place, threads});
}

// 0 if sordino_prompt takes such layers, else -1.
SORDINO_API int sordino_suits_prompt(const Block* blocks, int n) { return suits_prompt(in_use(), blocks, n); }

// The same as sordino_decode of `tokens` tokens of each text, for layers whose linears multiply codes with codes; seconds in their products are
// added to `products`.
SORDINO_API int sordino_prompt(const Block* blocks, const Held* held, int n, const void* x, void* out, const void* cos,
                               const void* sin, int one_place, const int64_t* first, int64_t texts, int64_t tokens, double* products,
                               int threads) {
  return prompt(in_use(), blocks, held, n, {{x, out, cos, sin, first, texts, one_place, threads}, tokens, products});
}

// Scaled products of input codes and weight codes (Kernels::many); -1 where the instruction set has nothing for it.
SORDINO_API int sordino_many(const Linear* w, const int8_t* codes, int64_t rows, const float* scale, int one_scale, void* out,
                             int type, int threads) {
  const Kernels& k = in_use();
  if (k.many == nullptr) return -1;
  const Product product{w, out};
  k.many(&product, 1, codes, scale, one_scale != 0, static_cast<Type>(type), rows, threads);
  return 0;
}
