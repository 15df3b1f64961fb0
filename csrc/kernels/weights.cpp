#include "kernels/weights.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "kernels/kernels.h"
#include "kernels/quantise.h"

namespace csd {
namespace {

uint8_t get_code(const uint8_t* group, int code_bits, int64_t i) {
  if (code_bits == 8) return group[i];
  return i < kWeightGroup / 2 ? group[i] & 15 : group[i - kWeightGroup / 2] >> 4;
}

void put_code(uint8_t* group, int code_bits, int64_t i, uint8_t code) {
  if (code_bits == 8) {
    group[i] = code;
  } else if (i < kWeightGroup / 2) {
    group[i] |= code;
  } else {
    group[i - kWeightGroup / 2] |= static_cast<uint8_t>(code << 4);
  }
}

// All kWeightGroup values of group g.
void dequantise_group(int code_bits, const uint8_t* row, int64_t in_features, int64_t g, float* values) {
  uint16_t params[2];
  std::memcpy(params, row + weight_params_offset(code_bits, in_features) + 4 * g, sizeof(params));
  const float scale = half_to_float(params[0]);
  const float zero = half_to_float(params[1]);
  const uint8_t* codes = row + g * weight_group_bytes(code_bits);
  // The product is exact: 11 bits by 8. So a fused multiply-add gives the same.
  for (int64_t i = 0; i < kWeightGroup; ++i) {
    values[i] = zero + scale * static_cast<float>(get_code(codes, code_bits, i));
  }
}

float e2m1(int code) {
  constexpr float kMagnitudes[] = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f};
  return std::copysign(kMagnitudes[code & 7], (code & 8) != 0 ? -1.0f : 1.0f);
}

float e8m0(int code) {
  return code == 255 ? std::numeric_limits<float>::quiet_NaN() : std::ldexp(1.0f, code - 127);
}

float widen_fp8(Fp8 format, int code) {
  const bool two_bits = format == Fp8::kE5M2;
  const int bias = two_bits ? 15 : format == Fp8::kE4M3Fn ? 7 : 8;
  const int mantissa_bits = two_bits ? 2 : 3;
  const int magnitude = code & 0x7f;
  const int exponent = magnitude >> mantissa_bits;
  const int mantissa = magnitude & ((1 << mantissa_bits) - 1);
  float value = exponent == 0 ? std::ldexp(static_cast<float>(mantissa), 1 - bias - mantissa_bits)
                              : std::ldexp(static_cast<float>(mantissa + (1 << mantissa_bits)),
                                           exponent - bias - mantissa_bits);
  if (two_bits && exponent == 31) value = std::numeric_limits<float>::infinity();
  const bool nan = two_bits ? magnitude > 0x7c : format == Fp8::kE4M3Fn ? magnitude == 0x7f : code == 0x80;
  if (nan) value = std::numeric_limits<float>::quiet_NaN();
  return code >= 128 ? -value : value;
}

}  // namespace

namespace plain {

void quantise_weight_row(int code_bits, DType source_dtype, const void* source, int64_t in_features,
                         uint8_t* row) {
  const float top = static_cast<float>((1 << code_bits) - 1);
  std::memset(row, 0, static_cast<size_t>(weight_row_bytes(code_bits, in_features)));
  uint8_t* pairs = row + weight_params_offset(code_bits, in_features);
  for (int64_t g = 0; g < weight_group_count(in_features); ++g) {
    const int64_t begin = g * kWeightGroup;
    const int64_t count = std::min(in_features - begin, kWeightGroup);
    float values[kWeightGroup];
    kSerialKernels.load(source_dtype, static_cast<const char*>(source) + begin * element_bytes(source_dtype),
                        1.0f, count, values);
    float least = std::numeric_limits<float>::infinity();
    float greatest = -least;
    bool finite = true;
    for (int64_t i = 0; i < count; ++i) {
      finite = finite && std::isfinite(values[i]);
      least = std::fmin(least, values[i]);
      greatest = std::fmax(greatest, values[i]);
    }
    float inverse, zero;
    const CodeParams params = code_params(code_bits, finite ? least : -std::numeric_limits<float>::infinity(),
                                          greatest, &inverse, &zero);
    const uint16_t pair[2] = {params.scale, params.zero};
    std::memcpy(pairs + 4 * g, pair, sizeof(pair));
    for (int64_t i = 0; i < count; ++i) {
      const float code = std::nearbyint((values[i] - zero) * inverse);
      const float clamped = code > 0.0f ? std::fmin(code, top) : 0.0f;  // a NaN becomes 0
      put_code(row + g * weight_group_bytes(code_bits), code_bits, i, static_cast<uint8_t>(clamped));
    }
  }
}

void dequantise_weight_row(int code_bits, const uint8_t* row, int64_t in_features, DType target_dtype,
                           void* target) {
  for (int64_t g = 0; g < weight_group_count(in_features); ++g) {
    float values[kWeightGroup];
    dequantise_group(code_bits, row, in_features, g, values);
    const int64_t begin = g * kWeightGroup;
    kSerialKernels.store(target_dtype, values, 1.0f, std::min(in_features - begin, kWeightGroup),
                         static_cast<char*>(target) + begin * element_bytes(target_dtype));
  }
}

void weight_dots(int code_bits, const float* x, int64_t x_count, const uint8_t* rows, int64_t row_count,
                 int64_t in_features, float* out, int64_t out_stride) {
  const int64_t group_count = weight_group_count(in_features);
  for (int64_t n = 0; n < row_count; ++n) {
    const uint8_t* row = rows + n * weight_row_bytes(code_bits, in_features);
    float sum[kWeightDotsMax] = {};
    for (int64_t g = 0; g < group_count; ++g) {
      float values[kWeightGroup];
      dequantise_group(code_bits, row, in_features, g, values);
      for (int64_t m = 0; m < x_count; ++m) {
        const float* x_group = x + (m * group_count + g) * kWeightGroup;
        float group_sum = 0.0f;
        for (int64_t i = 0; i < kWeightGroup; ++i) group_sum += x_group[i] * values[i];
        sum[m] += group_sum;
      }
    }
    for (int64_t m = 0; m < x_count; ++m) out[m * out_stride + n] = sum[m];
  }
}

void widen_mxfp4_row(const uint8_t* values, const uint8_t* scales, int64_t block_count, DType target_dtype,
                     void* target) {
  const int64_t target_bytes = kMxBlock * element_bytes(target_dtype);
  for (int64_t g = 0; g < block_count; ++g) {
    const float scale = e8m0(scales[g]);
    float block[kMxBlock];
    for (int64_t i = 0; i < kMxBlock; ++i) {
      block[i] = e2m1(values[(g * kMxBlock + i) / 2] >> (4 * (i % 2)) & 15) * scale;
    }
    kSerialKernels.store(target_dtype, block, 1.0f, kMxBlock, static_cast<char*>(target) + g * target_bytes);
  }
}

void widen_fp8_row(Fp8 format, const uint8_t* values, int64_t count, const float* scales, int64_t block,
                   int64_t begin, DType target_dtype, void* target) {
  float table[256];
  for (int code = 0; code < 256; ++code) table[code] = widen_fp8(format, code);
  for (int64_t i = 0; i < count; ++i) {
    const float value = table[values[i]] * scales[(begin + i) / block];
    kSerialKernels.store(target_dtype, &value, 1.0f, 1,
                         static_cast<char*>(target) + i * element_bytes(target_dtype));
  }
}

void mxfp4_dots(const float* x, int64_t x_count, const uint8_t* values, int64_t values_stride,
                const uint8_t* scales, int64_t scales_stride, int64_t row_count, int64_t block_count,
                float* out, int64_t out_stride) {
  const int64_t x_stride = block_count * kMxBlock;
  for (int64_t n = 0; n < row_count; ++n) {
    float sum[kWeightDotsMax] = {};
    for (int64_t g = 0; g < block_count; ++g) {
      float block[kMxBlock];
      widen_mxfp4_row(values + n * values_stride + g * (kMxBlock / 2), scales + n * scales_stride + g, 1,
                      DType::kFloat32, block);
      for (int64_t m = 0; m < x_count; ++m) {
        const float* x_block = x + m * x_stride + g * kMxBlock;
        float block_sum = 0.0f;
        for (int64_t i = 0; i < kMxBlock; ++i)
          block_sum += x_block[i / 2 + kMxBlock / 2 * (i % 2)] * block[i];
        sum[m] += block_sum;
      }
    }
    for (int64_t m = 0; m < x_count; ++m) out[m * out_stride + n] = sum[m];
  }
}

}  // namespace plain
}  // namespace csd
