// Small steps of training with AVX-512, where compilers make less of training.h. The operations are the same, one by one, but for
// sums in another order and numbers below 2^-126, which become zero when they are rounded to bf16.
#include "block.h"

namespace sordino {
namespace {

void weigh512(float* scores, float scaling, int64_t seen, int64_t n, uint16_t* out) {
  const __m512 factor = _mm512_set1_ps(scaling);
  __m512 most = _mm512_set1_ps(-INFINITY), sums = _mm512_setzero_ps();
  for (int64_t i = 0; i < seen; i += 16) {
    most = _mm512_mask_max_ps(most, static_cast<__mmask16>(first(seen - i)), most, _mm512_mul_ps(load16(scores + i, seen - i), factor));
  }
  const __m512 largest = _mm512_set1_ps(_mm512_reduce_max_ps(most));
  for (int64_t i = 0; i < seen; i += 16) {
    const __mmask16 here = static_cast<__mmask16>(first(seen - i));
    const __m512 v = exponential(_mm512_sub_ps(_mm512_mul_ps(load16(scores + i, seen - i), factor), largest));
    sums = _mm512_mask_add_ps(sums, here, sums, v);
    _mm512_mask_storeu_ps(scores + i, here, v);
  }
  const __m512 share = _mm512_set1_ps(1.0f / _mm512_reduce_add_ps(sums));
  for (int64_t i = 0; i < n; i += 16) put16(out + i, n - i, _mm512_mul_ps(load16(scores + i, seen - i), share));
}

void glu_back512(const void* gate, const void* up, const void* grad, Type type, int64_t n, void* to_gate, void* to_up) {
  if (type == kFloat) return any_glu_back(gate, up, grad, type, n, to_gate, to_up);
  const auto *gates = static_cast<const uint16_t*>(gate), *ups = static_cast<const uint16_t*>(up);
  const auto* grads = static_cast<const uint16_t*>(grad);
  const __m512 one = _mm512_set1_ps(1);
  for (int64_t i = 0; i < n; i += 16) {
    const __m512 g = load16(gates + i, n - i), y = load16(grads + i, n - i);
    const __m512 share = _mm512_div_ps(one, _mm512_add_ps(one, exponential(_mm512_sub_ps(_mm512_setzero_ps(), g))));
    const __m512 slope = _mm512_mul_ps(share, _mm512_add_ps(one, _mm512_mul_ps(g, _mm512_sub_ps(one, share))));
    put16(static_cast<uint16_t*>(to_up) + i, n - i, _mm512_mul_ps(y, rounded16(_mm512_mul_ps(g, share))));
    put16(static_cast<uint16_t*>(to_gate) + i, n - i, _mm512_mul_ps(rounded16(_mm512_mul_ps(y, load16(ups + i, n - i))), slope));
  }
}

constexpr Training kTraining512 = [] {
  Training training = kTraining;
  training.weigh = weigh512;
  training.glu_back = glu_back512;
  return training;
}();

}  // namespace
}  // namespace sordino
