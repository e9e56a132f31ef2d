// What the C functions share: scratch memory, and how the rows of a weight are divided among threads.
#pragma once
#include <new>

#include "kernels.h"

#ifdef _WIN32
#define SORDINO_API extern "C" __declspec(dllexport)
#else
#define SORDINO_API extern "C" __attribute__((visibility("default")))
#endif

namespace sordino {

const Kernels& in_use();  // what was chosen (dispatch.cpp)

namespace {

constexpr int64_t kPiece = 1 << 15;  // weights that a thread takes at once, at least: some microseconds of work
constexpr int64_t kTimes = 4;        // that it takes some, where that makes them more: every new place in memory is read slowly at first
constexpr int64_t kMostRows = 512;   // of a weight in such a piece

// Grows, never shrinks; 64-byte aligned. One a thread and purpose.
struct Scratch {
  void* data = nullptr;
  size_t size = 0;

  void* get(int64_t wanted) {
    if (static_cast<size_t>(wanted) > size) {
      release();
      data = nullptr, size = 0;
      const size_t more = static_cast<size_t>(wanted) * 5 / 4;
      data = ::operator new(more, std::align_val_t(64));
      size = more;
    }
    return data;
  }
  void release() {
    if (data != nullptr) ::operator delete(data, std::align_val_t(64));
  }
  ~Scratch() { release(); }
};

// How many of `outputs` rows of the weight a thread takes at once: a multiple of 8.
inline int64_t rows_at_once(const Linear& w, int64_t outputs, int threads) {
  const int64_t even = outputs * w.inputs / (kTimes * threads), most = even > kPiece ? even : kPiece;
  const int64_t rows = most / (w.inputs > 0 ? w.inputs : 1) / 8 * 8;
  return rows < 8 ? 8 : rows > kMostRows ? kMostRows : rows;
}

inline float bias_at(const Linear& w, int64_t o) { return w.bias == nullptr ? 0.0f : read(w.bias, static_cast<Type>(w.bias_type), o); }

// The product of a token's codes, whose scale is `scale`, and row o: the operations of QuantLinear._multiply.
inline float scaled(const Linear& w, int64_t o, int32_t sum, float scale) {
  const float value = static_cast<float>(sum) * (scale * widen(w.scale[o]));
  return w.bias == nullptr ? value : value + bias_at(w, o);
}

// Products y[(o - begin) * rows + m] of outputs begin … end with the weight's bias, into out [rows, outputs].
inline void finish(const Kernels& k, const Linear& w, const float* y, int rows, int64_t begin, int64_t end, Type type, void* out) {
  if (rows == 1) return k.pieces->finish(y, w, begin, end - begin, type, static_cast<char*>(out) + begin * width(type));
  for (int64_t o = begin; o < end; ++o) {
    const float bias = bias_at(w, o);
    for (int m = 0; m < rows; ++m) write(out, type, m * w.outputs + o, *y++ + bias);
  }
}

// The same of integer products with codes as stored, of tokens whose codes' sums are `sums` and whose scales are `scale`.
inline void finish(const Linear& w, const int32_t* y, const int32_t* sums, const float* scale, int rows, int64_t begin,
                   int64_t end, Type type, void* out) {
  for (int64_t o = begin; o < end; ++o) {
    for (int m = 0; m < rows; ++m) write(out, type, m * w.outputs + o, scaled(w, o, *y++ - w.middle() * sums[m], scale[m]));
  }
}

constexpr int64_t kTokens = 8;       // that a thread takes at once
constexpr int64_t kEntries = 4096;  // the same, where tokens do not matter

// Entries of x less those of `mean`, in place.
inline void take_off(char* x, const char* mean, int64_t n, Type type) {
  for (int64_t i = 0; i < n; ++i) write(x, type, i, read(x, type, i) - read(mean, type, i));
}

// body(begin, end) over 0 … n, `step` at once, shared among threads.
template <class Body>
void over(int64_t n, int64_t step, int threads, Body body) {
  parallel_for((n + step - 1) / step, threads, [&](int64_t i) {
    const int64_t begin = i * step, end = begin + step < n ? begin + step : n;
    body(begin, end);
  });
}

// The same over all rows of the weight.
template <class Body>
void over_outputs(const Linear& w, int threads, Body body) {
  over(w.outputs, rows_at_once(w, w.outputs, threads), threads, body);
}

}  // namespace
}  // namespace sordino
