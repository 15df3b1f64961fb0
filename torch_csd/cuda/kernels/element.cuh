// From elements to fp32 (exactly) and back (round to nearest even), bit for bit as csrc/kernels/serial.cpp
// does.
#pragma once

#include "tile.cuh"

#define CSD_DEVICE __device__ __forceinline__

namespace csd {

constexpr int kWarpLanes = 32;
constexpr uint32_t kAllLanes = 0xffffffff;

CSD_DEVICE float infinity() { return __uint_as_float(0x7f800000); }

CSD_DEVICE float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t exponent = half & 0x7c00;
  const uint32_t magnitude = static_cast<uint32_t>(half & 0x7fff) << 13;
  const float subnormal =
      static_cast<float>(static_cast<int>(half & 0x3ff)) * 5.9604644775390625e-8f;  // 2^-24
  const uint32_t normal = magnitude + (112u << 23);                                 // exponent bias 15 to 127
  const uint32_t special = magnitude | 0x7f800000 | (magnitude << 9 != 0 ? 0x400000 : 0);  // NaN is quieted
  return __uint_as_float(sign | (exponent == 0        ? __float_as_uint(subnormal)
                                 : exponent == 0x7c00 ? special
                                                      : normal));
}

CSD_DEVICE uint16_t float_to_half(float value) {
  const uint32_t bits = __float_as_uint(value);
  const uint32_t sign = (bits >> 16) & 0x8000;
  const uint32_t magnitude = bits & 0x7fffffff;
  // 0.5's last bit is 2^-24, the step of fp16's subnormals: the addition rounds to it.
  const uint32_t subnormal =
      __float_as_uint(__fadd_rn(__uint_as_float(magnitude), 0.5f)) - __float_as_uint(0.5f);
  const uint32_t rebased = magnitude - (112u << 23);
  const uint32_t normal = (rebased + 0xfff + ((rebased >> 13) & 1)) >> 13;  // carries into infinity
  const uint32_t quiet_nan = 0x7e00 | ((magnitude >> 13) & 0x3ff);
  const uint32_t result = magnitude > 0x7f800000    ? quiet_nan
                          : magnitude >= 0x47800000 ? 0x7c00     // 65536 and above
                          : magnitude < 0x38800000  ? subnormal  // below 2^-14
                                                    : normal;
  return static_cast<uint16_t>(sign | result);
}

CSD_DEVICE float bfloat_to_float(uint16_t element) {
  return __uint_as_float(static_cast<uint32_t>(element) << 16);
}

CSD_DEVICE uint16_t float_to_bfloat(float value) {
  const uint32_t bits = __float_as_uint(value);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const uint32_t quiet_nan = (bits >> 16) | 0x40;  // rounding could carry a NaN into infinity
  return static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? quiet_nan : rounded);
}

CSD_DEVICE float widen(Float32, uint32_t bits) { return __uint_as_float(bits); }
CSD_DEVICE float widen(BFloat16, uint16_t bits) { return bfloat_to_float(bits); }
CSD_DEVICE float widen(Float16, uint16_t bits) { return half_to_float(bits); }
CSD_DEVICE uint32_t narrow(Float32, float value) { return __float_as_uint(value); }
CSD_DEVICE uint16_t narrow(BFloat16, float value) { return float_to_bfloat(value); }
CSD_DEVICE uint16_t narrow(Float16, float value) { return float_to_half(value); }

// Equal types keep their bits, those of a NaN too.
template <typename From, typename To>
struct Convert {
  static CSD_DEVICE typename To::Bits of(typename From::Bits bits) {
    return narrow(To(), widen(From(), bits));
  }
};
template <typename Same>
struct Convert<Same, Same> {
  static CSD_DEVICE typename Same::Bits of(typename Same::Bits bits) { return bits; }
};

// ---- pairs of 16-bit elements in a register, the first in the low half ----

#ifdef CSD_EMULATED
CSD_DEVICE uint32_t pack_halves(float low, float high) {
  return float_to_half(low) | static_cast<uint32_t>(float_to_half(high)) << 16;
}
CSD_DEVICE uint32_t pack_bfloats(float low, float high) {
  return float_to_bfloat(low) | static_cast<uint32_t>(float_to_bfloat(high)) << 16;
}
CSD_DEVICE float low_half(uint32_t pair) { return half_to_float(static_cast<uint16_t>(pair)); }
CSD_DEVICE float high_half(uint32_t pair) { return half_to_float(static_cast<uint16_t>(pair >> 16)); }
#else
CSD_DEVICE uint32_t pack_halves(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
CSD_DEVICE uint32_t pack_bfloats(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
CSD_DEVICE float low_half(uint32_t pair) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(static_cast<uint16_t>(pair)));
  return value;
}
CSD_DEVICE float high_half(uint32_t pair) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(static_cast<uint16_t>(pair >> 16)));
  return value;
}
#endif
CSD_DEVICE float low_bfloat(uint32_t pair) { return __uint_as_float(pair << 16); }
CSD_DEVICE float high_bfloat(uint32_t pair) { return __uint_as_float(pair & 0xffff0000); }

}  // namespace csd
