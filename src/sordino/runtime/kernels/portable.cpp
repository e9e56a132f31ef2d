// Plain C++ for every machine and every group size; also the fallback of the vector units for shapes they do not take.
#include <vector>

#include "kernels.h"

namespace sordino {
namespace {

void unpack_row(const uint8_t* row, int64_t bytes, int bits, int64_t n, uint8_t* codes) {
  const uint8_t* end = row + bytes;
  const uint64_t mask = (1u << bits) - 1;
  for (int64_t i = 0; i < n; i += 8, row += bits) {
    const uint64_t word = unit(row, end);
    for (int k = 0; k < 8; ++k) codes[i + k] = static_cast<uint8_t>((word >> (k * bits)) & mask);
  }
}

// Codes of row o, one a byte; `out` has room for a whole last unit of eight.
void expand(const Linear& w, int64_t o, uint8_t* out) {
  unpack_row(w.codes + o * w.row_bytes(), w.row_bytes(), w.bits, w.inputs, out);
}

uint8_t* scratch(int64_t bytes) {
  thread_local std::vector<uint8_t> buffer;
  if (static_cast<int64_t>(buffer.size()) < bytes) buffer.resize(bytes);
  return buffer.data();
}

bool fits(const Linear&) { return true; }

void arrange(const Linear& w, const void* x, Type type, int64_t rows, const Arranged& to) {
  for (int64_t m = 0; m < rows; ++m) {
    float* row = reinterpret_cast<float*>(static_cast<char*>(to.values) + m * to.stride);
    for (int64_t i = 0; i < w.inputs; ++i) row[i] = read(x, type, m * w.inputs + i);
  }
}

float dot(const float* x, const uint8_t* codes, int64_t n, float zero) {
  float lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int k = 0; k < kLanes; ++k) lanes[k] += x[i + k] * (static_cast<float>(codes[i + k]) - zero);
  float sum = 0;
  for (; i < n; ++i) sum += x[i] * (static_cast<float>(codes[i]) - zero);
  for (float lane : lanes) sum += lane;
  return sum;
}

float dot(const float* x, const uint8_t* codes, int64_t n, const float* levels) {
  float lanes[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) lanes[i % kLanes] += x[i] * levels[codes[i]];
  float sum = 0;
  for (float lane : lanes) sum += lane;
  return sum;
}

void product(const Linear& w, const Arranged& x, Type, int rows, int64_t begin, int64_t end, float* y) {
  uint8_t* codes = scratch(w.inputs + 8);
  const int64_t groups = w.groups();
  for (int64_t o = begin; o < end; ++o) {
    expand(w, o, codes);
    float* out = y + (o - begin) * rows;
    for (int m = 0; m < rows; ++m) out[m] = 0;
    for (int64_t g = 0; g < groups; ++g) {
      const uint8_t* mine = codes + g * w.group;
      float levels[1 << kMaxPlanes];
      if (w.additive != 0) levels_of(w, o, g, levels);
      for (int m = 0; m < rows; ++m) {
        const float* row = reinterpret_cast<const float*>(static_cast<const char*>(x.values) + m * x.stride) + g * w.group;
        if (w.additive != 0) out[m] += dot(row, mine, w.group, levels);
        else out[m] += widen(w.scale[o * groups + g]) * dot(row, mine, w.group, static_cast<float>(zero_at(w, o, g)));
      }
    }
  }
}

void integer(const Linear& w, const int8_t* x, int64_t stride, int rows, int64_t begin, int64_t end, int32_t* y) {
  uint8_t* codes = scratch(w.inputs + 8);
  for (int64_t o = begin; o < end; ++o) {
    expand(w, o, codes);
    for (int m = 0; m < rows; ++m) {
      const int8_t* row = x + m * stride;
      int32_t sum = 0;
      for (int64_t i = 0; i < w.inputs; ++i) sum += static_cast<int32_t>(row[i]) * codes[i];
      y[(o - begin) * rows + m] = sum;
    }
  }
}

void values(const Linear& w, int64_t o, Type type, void* out) {
  uint8_t* codes = scratch(w.inputs + 8);
  expand(w, o, codes);
  const int64_t groups = w.groups();
  for (int64_t g = 0; g < groups; ++g) {
    if (w.additive != 0) {
      float levels[1 << kMaxPlanes];
      levels_of(w, o, g, levels);
      for (int64_t i = g * w.group; i < (g + 1) * w.group; ++i) write(out, type, i, levels[codes[i]]);
      continue;
    }
    const float scale = widen(w.scale[o * groups + g]), zero = static_cast<float>(zero_at(w, o, g));
    for (int64_t i = g * w.group; i < (g + 1) * w.group; ++i) write(out, type, i, (static_cast<float>(codes[i]) - zero) * scale);
  }
}

void centred(const Linear& w, int64_t o, int8_t* out) {
  uint8_t* codes = scratch(w.inputs + 8);
  expand(w, o, codes);
  for (int64_t i = 0; i < w.inputs; ++i) out[i] = static_cast<int8_t>(codes[i] - w.middle());
}

}  // namespace
}  // namespace sordino

#include "pieces.h"
#include "training.h"

namespace sordino {

const Kernels kPortable = {"portable", 4, fits, arrange, product, integer, values, centred, encode_token, &kPieces, &kTraining, nullptr};

}  // namespace sordino
