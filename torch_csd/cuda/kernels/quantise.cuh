// Scales, zero points and codes: bit for bit what csrc/kernels/quantise.cpp computes. Nothing here may be
// contracted to a fused multiply-add, nor divide approximately.
#pragma once

#include "element.cuh"

namespace csd {

constexpr float kHalfMax = 65504.0f;
constexpr float kFloatMax = 3.402823466e38f;

// The neighbour of a finite half in the direction of +1 or -1.
CSD_DEVICE uint16_t step_half(uint16_t half, int direction) {
  const bool negative = (half & 0x8000) != 0;
  if ((half & 0x7fff) == 0) return direction > 0 ? 0x0001 : 0x8001;
  return static_cast<uint16_t>(half + (negative == (direction > 0) ? -1 : 1));
}

CSD_DEVICE float clamp_to_half(float value) { return fminf(fmaxf(value, -kHalfMax), kHalfMax); }

CSD_DEVICE uint16_t half_below(float value) {
  value = clamp_to_half(value);
  const uint16_t half = float_to_half(value);
  return half_to_float(half) > value ? step_half(half, -1) : half;
}

CSD_DEVICE uint16_t half_above(float value) {
  value = clamp_to_half(value);
  const uint16_t half = float_to_half(value);
  return half_to_float(half) < value ? step_half(half, 1) : half;
}

// What a group's values have in common. A lane that has seen nothing holds {infinity, -infinity, true}.
struct Range {
  float least, greatest;
  bool finite;

  CSD_DEVICE void see(float value) {
    finite = finite && (__float_as_uint(value) & 0x7f800000) != 0x7f800000;
    least = fminf(least, value);
    greatest = fmaxf(greatest, value);
  }
  // With the lanes whose numbers differ in the bits of `lanes` - 1.
  CSD_DEVICE void merge(int lanes) {
    for (int distance = lanes / 2; distance > 0; distance /= 2) {
      least = fminf(least, __shfl_xor_sync(kAllLanes, least, distance));
      greatest = fmaxf(greatest, __shfl_xor_sync(kAllLanes, greatest, distance));
      finite = __shfl_xor_sync(kAllLanes, static_cast<int>(finite), distance) != 0 && finite;
    }
  }
};

struct CodeParams {
  uint16_t scale_half, zero_half;
  float inverse, zero;
};

CSD_DEVICE CodeParams code_params(int code_bits, const Range& range) {
  const float least = range.finite ? range.least : -infinity();
  if (!(__fsub_rn(range.greatest, least) <= kFloatMax)) {
    return {0, 0x7e00, 0.0f, __uint_as_float(0x7fc00000)};
  }
  CodeParams params;
  params.zero_half = half_below(__fadd_rn(least, 0.0f));  // which of 0 and -0 is less depends on their order
  params.zero = half_to_float(params.zero_half);
  const float top = static_cast<float>((1 << code_bits) - 1);
  params.scale_half = half_above(__fdiv_rn(fmaxf(__fsub_rn(range.greatest, params.zero), 0.0f), top));
  const float scale = half_to_float(params.scale_half);
  params.inverse = scale > 0.0f ? __fdiv_rn(1.0f, scale) : 0.0f;
  return params;
}

CSD_DEVICE uint32_t code_of(float value, const CodeParams& params, float top) {
  const float code = rintf(__fmul_rn(__fsub_rn(value, params.zero), params.inverse));
  return static_cast<uint32_t>(code > 0.0f ? (code < top ? code : top) : 0.0f);  // a NaN becomes 0
}

}  // namespace csd
