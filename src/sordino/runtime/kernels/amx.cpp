// Integer products of many rows, and attention in half precision, by matrix tiles (AMX: Sapphire Rapids and later), everything else
// as with AVX-512.
//
// A tile is 16 rows of 64 bytes. One instruction adds the products of 16 rows of input codes and 16 rows of a weight, 64 inputs
// long, to 16 x 16 sums. Weight codes are unpacked and laid out for it once for all rows of the input, as many outputs as the
// second-level cache holds, and sums are scaled as soon as they are complete.
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "attend_half.h"
#include "many_outputs512.h"

namespace sordino {
namespace {

constexpr int kTile = 16, kWide = 2 * kTile;
constexpr int64_t kBytes = kTile * kBlock;  // of a tile
constexpr int64_t kHeld = 768 << 10;        // bytes of weights laid out at once

struct alignas(64) Config {
  uint8_t palette = 1, start = 0, unused[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// What tile instructions read and write is not told to every compiler: memory is as it should be from here on.
void written(const void* what) { __asm__ volatile("" : : "r"(what) : "memory"); }

// Holds the tiles of this thread as above.
struct InUse {
  InUse() {
    const Config config;
    written(&config);
    _tile_loadconfig(&config);
  }
  ~InUse() { _tile_release(); }
};

// 16 rows of 32 sums into rows m … of out [rows, outputs], from output o on.
void put_rows(const int32_t* sums, const Linear& w, const Scaled<2>& scaled, const float* scale, bool one_scale, int64_t m, int64_t rows,
              int64_t o, Type type, void* out) {
  for (int64_t r = 0; r < kTile && m + r < rows; ++r) {
    char* to = static_cast<char*>(out) + (m + r) * w.outputs * width(type);
    for (int s = 0; s < 2; ++s) {
      scaled.put(_mm512_loadu_si512(sums + r * kWide + s * kTile), s, scale[one_scale ? 0 : m + r], type, o, w.outputs, to);
    }
  }
}

// Codes [rows, inputs] as tiles [blocks of 16 rows, steps of 64 inputs, 16, 64], zero where there are none: rows that lie a power of two
// apart would fight for the same lines of the cache.
void cut(const int8_t* x, int64_t rows, int64_t inputs, int8_t* to, int threads) {
  const int64_t steps = padded(inputs) / kBlock, blocks = (rows + kWide - 1) / kWide * 2;
  parallel_for(blocks, threads, [&](int64_t b) {
    for (int64_t r = 0; r < kTile; ++r) {
      const int64_t m = b * kTile + r;
      for (int64_t s = 0; s < steps; ++s) {
        const int64_t left = m < rows ? inputs - s * kBlock : 0;
        const __mmask64 some = left >= 64 ? ~0ull : (1ull << left) - 1;
        const __m512i v = _mm512_maskz_loadu_epi8(some, x + m * inputs + s * kBlock);
        _mm512_storeu_si512(to + ((b * steps + s) * kTile + r) * kBlock, v);
      }
    }
  });
}

// 32 rows of codes times 32 outputs, `steps` blocks of inputs long: sums[i] of rows 16 i … 16 i + 15.
void multiply(const int8_t* a, const int8_t* b, int64_t steps, int32_t (*sums)[kTile * kWide]) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t s = 0; s < steps; ++s, a += kBytes, b += 2 * kBytes) {
    _tile_loadd(4, a, kBlock);
    _tile_loadd(6, b, kBlock);
    _tile_dpbssd(0, 4, 6);
    _tile_loadd(7, b + kBytes, kBlock);
    _tile_dpbssd(1, 4, 7);
    _tile_loadd(5, a + steps * kBytes, kBlock);
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
  }
  _tile_stored(0, sums[0], 4 * kWide);
  _tile_stored(1, sums[0] + kTile, 4 * kWide);
  _tile_stored(2, sums[1], 4 * kWide);
  _tile_stored(3, sums[1] + kTile, 4 * kWide);
  written(sums);
}

void many_of(const Linear& w, const int8_t* x, const float* scale, bool one_scale, Type type, int64_t rows, void* out, int threads) {
  const int64_t steps = padded(w.inputs) / kBlock, stride = padded(w.inputs), strip = steps * 2 * kBytes;
  thread_local Scratch all;
  int8_t* cuts = static_cast<int8_t*>(all.get((rows + kWide) * stride));
  cut(x, rows, w.inputs, cuts, threads);
  // Strips of 32 outputs. A piece of them stays in the cache while all rows go by, and every thread gets some pieces.
  const int64_t strips = (w.outputs + kWide - 1) / kWide, held = kHeld / strip, share = strips / (4 * threads) + 1;
  const int64_t together = held < 1 ? 1 : held < share ? held : share;
  parallel_for((strips + together - 1) / together, threads, [&](int64_t piece) {
    const int64_t first = piece * together, n = first + together < strips ? together : strips - first;
    thread_local Scratch memory;
    int8_t* tiles = static_cast<int8_t*>(memory.get(n * (strip + static_cast<int64_t>(sizeof(Scaled<2>)))));
    Scaled<2>* scaled = reinterpret_cast<Scaled<2>*>(tiles + n * strip);
    for (int64_t i = 0; i < n; ++i) {
      for (int s = 0; s < 2; ++s) {
        const int64_t o = (first + i) * kWide + s * kTile;
        lay_out<true>(w, o, tiles + i * strip + s * kBytes, kBlock, 2 * kBytes);
        scaled[i].set(w, o, s);
      }
    }
    const InUse tiles_in_use;
    for (int64_t m = 0; m < rows; m += kWide) {
      for (int64_t i = 0; i < n; ++i) {
        alignas(64) int32_t sums[2][kTile * kWide];
        multiply(cuts + m * stride, tiles + i * strip, steps, sums);
        const int64_t o = (first + i) * kWide;
        put_rows(sums[0], w, scaled[i], scale, one_scale, m, rows, o, type, out);
        if (m + kTile < rows) put_rows(sums[1], w, scaled[i], scale, one_scale, m + kTile, rows, o, type, out);
      }
    }
  });
}

void many(const Product* products, int n, const int8_t* x, const float* scale, bool one_scale, Type type, int64_t rows, int threads) {
  for (int i = 0; i < n; ++i) many_of(*products[i].w, x, scale, one_scale, type, rows, products[i].out, threads);
}

// Products of attention (attend_half.h).
struct Tiles {
  const InUse in_use;

  static void scores(const uint16_t* keys, int64_t blocks, int64_t n, const uint16_t* query, float* to) {
    int64_t block = 0;
    for (; block + 4 <= blocks; block += 4) some_scores<4>(keys + block * kTile * n, n, query, to + block * kTile * kTile);
    for (; block < blocks; block += 2) some_scores<2>(keys + block * kTile * n, n, query, to + block * kTile * kTile);
    written(to);
  }

  // Of 4 or 2 blocks of rows.
  template <int kBlocks>
  static void some_scores(const uint16_t* keys, int64_t n, const uint16_t* query, float* to) {
    constexpr int64_t kSums = kTile * kTile;
    const int64_t next = kTile * n, stride = 2 * n;
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (kBlocks > 2) {
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int64_t i = 0; i < n; i += 2 * kTile) {
      _tile_loadd(4, query + i * kTile, 64);
      _tile_loadd(5, keys + i, stride);
      _tile_dpbf16ps(0, 5, 4);
      _tile_loadd(6, keys + next + i, stride);
      _tile_dpbf16ps(1, 6, 4);
      if constexpr (kBlocks > 2) {
        _tile_loadd(5, keys + 2 * next + i, stride);
        _tile_dpbf16ps(2, 5, 4);
        _tile_loadd(6, keys + 3 * next + i, stride);
        _tile_dpbf16ps(3, 6, 4);
      }
    }
    _tile_stored(0, to, 64);
    _tile_stored(1, to + kSums, 64);
    if constexpr (kBlocks > 2) {
      _tile_stored(2, to + 2 * kSums, 64);
      _tile_stored(3, to + 3 * kSums, 64);
    }
  }

  static void weigh(const uint16_t* weights, int64_t blocks, int64_t n, const uint16_t* values, int, float* to) {
    for (int64_t at = 0; at < n; at += 4 * kTile) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (int64_t b = 0; b < blocks; ++b) {
        const uint16_t* here = values + 2 * (b * kTile * n + at);
        _tile_loadd(4, weights + b * kPairs, 64);
        _tile_loadd(5, here, 4 * n);
        _tile_dpbf16ps(0, 4, 5);
        _tile_loadd(6, here + 2 * kTile, 4 * n);
        _tile_dpbf16ps(1, 4, 6);
        _tile_loadd(5, here + 4 * kTile, 4 * n);
        _tile_dpbf16ps(2, 4, 5);
        _tile_loadd(6, here + 6 * kTile, 4 * n);
        _tile_dpbf16ps(3, 4, 6);
      }
      _tile_stored(0, to + at, 4 * n);
      _tile_stored(1, to + at + kTile, 4 * n);
      _tile_stored(2, to + at + 2 * kTile, 4 * n);
      _tile_stored(3, to + at + 3 * kTile, 4 * n);
    }
    written(to);
  }
};

void attend(const float* query, int count, int64_t n, float scaling, const Span& keys, const Span& values, int64_t begin, int64_t end,
            const int64_t* ends, float* out) {
  if (keys.type == kBfloat && n % kBlock == 0) attend_half<Tiles>(query, count, n, scaling, keys, values, begin, end, ends, out);
  else kAvx512.pieces->attend(query, count, n, scaling, keys, values, begin, end, ends, out);
}

}  // namespace

bool allowed_tiles() {
  constexpr long kAsk = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, for the whole process
  return syscall(SYS_arch_prctl, kAsk, kTileData) == 0;
}

const Kernels& tiled() {
  static const Pieces pieces = [] {
    Pieces p = *kAvx512.pieces;
    p.attend = attend;
    return p;
  }();
  static const Kernels all = [] {
    Kernels k = kAvx512;
    k.name = "amx", k.many = many, k.pieces = &pieces;
    return k;
  }();
  return all;
}

}  // namespace sordino
