// Small steps of training a decoder layer, forward and backward: loops as those of pieces.h, behind which a unit includes this.
#include "block.h"

namespace sordino {
namespace {

template <class T>
void grid_of(const float* latent, uint8_t* codes, float scale, float zero, int bits, int64_t n, T* out) {
  const float top = static_cast<float>((1 << bits) - 1), step = as(out, scale);
  if (latent != nullptr) {
    SORDINO_APART
    for (int64_t i = 0; i < n; ++i) {
      float v = ((latent[i] + kMagic) - kMagic) + zero;
      v = v > 0 ? v : 0.0f, v = v < top ? v : top;
      codes[i] = static_cast<uint8_t>(static_cast<int32_t>(v));
    }
  }
  SORDINO_APART
  for (int64_t i = 0; i < n; ++i) put(out, i, (static_cast<float>(codes[i]) - zero) * step);
}

template <class T>
void grid_back_of(const T* grad, const uint8_t* codes, float scale, float zero, int64_t n, float* to_latent, float* to_scale) {
  if (to_latent != nullptr) {
    SORDINO_APART
    for (int64_t i = 0; i < n; ++i) to_latent[i] = get(grad, i) * scale;
  }
  if (to_scale == nullptr) return;
  float lanes[kLanes] = {}, rest = 0;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int k = 0; k < kLanes; ++k) lanes[k] += (static_cast<float>(codes[i + k]) - zero) * get(grad, i + k);
  for (; i < n; ++i) rest += (static_cast<float>(codes[i]) - zero) * get(grad, i);
  *to_scale = sum_of(lanes) + rest;
}

void keep_near(float* latent, float zero, int bits, float edge, int64_t n) {
  const float low = -zero - edge, high = (static_cast<float>((1 << bits) - 1) - zero) + edge;
  SORDINO_APART
  for (int64_t i = 0; i < n; ++i) {
    float v = latent[i];
    v = v > low ? v : low, v = v < high ? v : high;
    latent[i] = v;
  }
}

template <class T>
void norm_back_of(const T* x, const T* grad, const T* gain, float eps, int64_t n, T* out, float* to_gain) {
  float squares[kLanes] = {}, products[kLanes] = {}, more = 0, rest = 0;
  auto turned = [&](int64_t i) { return as(out, get(grad, i) * get(gain, i)); };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int k = 0; k < kLanes; ++k) squares[k] += get(x, i + k) * get(x, i + k);
    for (int k = 0; k < kLanes; ++k) products[k] += get(x, i + k) * turned(i + k);
  }
  for (; i < n; ++i) more += get(x, i) * get(x, i), rest += get(x, i) * turned(i);
  const float size = static_cast<float>(n), r = 1.0f / std::sqrt((sum_of(squares) + more) / size + eps);
  const float pull = (sum_of(products) + rest) * r * r / size;
  if (to_gain != nullptr) {
    SORDINO_APART
    for (i = 0; i < n; ++i) to_gain[i] += get(grad, i) * as(out, get(x, i) * r);
  }
  SORDINO_APART
  for (i = 0; i < n; ++i) put(out, i, (turned(i) - get(x, i) * pull) * r);
}

template <class T>
void glu_back_of(const T* gate, const T* up, const T* grad, int64_t n, T* to_gate, T* to_up) {
  SORDINO_APART
  for (int64_t i = 0; i < n; ++i) {
    const float g = get(gate, i), y = get(grad, i), share = 1.0f / (1.0f + exponential(-g));
    put(to_up, i, y * as(to_up, g * share));
    put(to_gate, i, as(to_gate, y * get(up, i)) * (share * (1.0f + g * (1.0f - share))));
  }
}

template <class T>
void round_of(const T* x, float scale, float low, float high, int64_t n, T* out) {
  SORDINO_APART
  for (int64_t i = 0; i < n; ++i) {
    float v = (get(x, i) / scale + kMagic) - kMagic;
    v = v < low ? low : v, v = v > high ? high : v;
    put(out, i, v * scale);
  }
}

// Returns the scale's gradient.
template <class T>
float round_back_of(const T* x, const T* grad, float scale, float low, float high, int64_t n, T* to_x) {
  auto one = [&](int64_t i) {
    const float y = get(grad, i), steps = get(x, i) / scale, near = (steps + kMagic) - kMagic;
    const bool below = near < low, above = near > high;
    put(to_x, i, below || above ? 0.0f : y);
    return y * (below ? low : above ? high : near - steps);
  };
  float lanes[kLanes] = {}, rest = 0;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int k = 0; k < kLanes; ++k) lanes[k] += one(i + k);
  for (; i < n; ++i) rest += one(i);
  return sum_of(lanes) + rest;
}

// softmax of `seen` scores, which are overwritten; nothing for the rest of n.
void weigh_row(float* scores, float scaling, int64_t seen, int64_t n, uint16_t* out) {
  float most[kLanes], sums[kLanes] = {}, largest = -INFINITY, rest = 0;
  for (int k = 0; k < kLanes; ++k) most[k] = -INFINITY;
  int64_t i = 0;
  for (; i + kLanes <= seen; i += kLanes) {
    for (int k = 0; k < kLanes; ++k) {
      const float v = scores[i + k] * scaling;
      scores[i + k] = v, most[k] = v > most[k] ? v : most[k];
    }
  }
  for (; i < seen; ++i) {
    const float v = scores[i] * scaling;
    scores[i] = v, largest = v > largest ? v : largest;
  }
  for (int k = 0; k < kLanes; ++k) largest = most[k] > largest ? most[k] : largest;
  SORDINO_APART
  for (i = 0; i < seen; ++i) scores[i] = exponential(scores[i] - largest);
  for (i = 0; i + kLanes <= seen; i += kLanes)
    for (int k = 0; k < kLanes; ++k) sums[k] += scores[i + k];
  for (; i < seen; ++i) rest += scores[i];
  const float share = 1.0f / (sum_of(sums) + rest);
  SORDINO_APART
  for (i = 0; i < seen; ++i) out[i] = narrow(scores[i] * share);
  for (i = seen; i < n; ++i) out[i] = 0;
}

void weigh_back_row(const uint16_t* grad, const uint16_t* weights, float inner, float scaling, int64_t seen, int64_t n, uint16_t* out) {
  SORDINO_APART
  for (int64_t i = 0; i < seen; ++i) out[i] = narrow((widen(grad[i]) - inner) * widen(weights[i]) * scaling);
  for (int64_t i = seen; i < n; ++i) out[i] = 0;
}

// ---- for either dtype ----

void any_grid(const float* latent, uint8_t* codes, float scale, float zero, int bits, Type type, int64_t n, void* out) {
  either(type, [&](auto t) { grid_of(latent, codes, scale, zero, bits, n, static_cast<decltype(t)*>(out)); });
}

void any_grid_back(const void* grad, Type type, const uint8_t* codes, float scale, float zero, int64_t n, float* to_latent,
                   float* to_scale) {
  either(type, [&](auto t) { grid_back_of(static_cast<const decltype(t)*>(grad), codes, scale, zero, n, to_latent, to_scale); });
}

void any_norm_back(const void* x, const void* grad, const Norm& norm, Type type, int64_t n, void* out, float* to_gain) {
  either(type, [&](auto t) {
    using T = decltype(t);
    norm_back_of(static_cast<const T*>(x), static_cast<const T*>(grad), static_cast<const T*>(norm.gain),
                 static_cast<float>(norm.eps), n, static_cast<T*>(out), to_gain);
  });
}

void any_glu_back(const void* gate, const void* up, const void* grad, Type type, int64_t n, void* to_gate, void* to_up) {
  either(type, [&](auto t) {
    using T = decltype(t);
    glu_back_of(static_cast<const T*>(gate), static_cast<const T*>(up), static_cast<const T*>(grad), n, static_cast<T*>(to_gate),
                static_cast<T*>(to_up));
  });
}

void any_round(const void* x, float scale, float low, float high, Type type, int64_t n, void* out) {
  either(type, [&](auto t) {
    using T = decltype(t);
    round_of(static_cast<const T*>(x), scale, low, high, n, static_cast<T*>(out));
  });
}

float any_round_back(const void* x, const void* grad, float scale, float low, float high, Type type, int64_t n, void* to_x) {
  float pull = 0;
  either(type, [&](auto t) {
    using T = decltype(t);
    pull = round_back_of(static_cast<const T*>(x), static_cast<const T*>(grad), scale, low, high, n, static_cast<T*>(to_x));
  });
  return pull;
}

constexpr Training kTraining = {any_grid, any_grid_back, keep_near, any_norm_back, any_glu_back,
                                any_round, any_round_back, weigh_row, weigh_back_row};

}  // namespace
}  // namespace sordino
