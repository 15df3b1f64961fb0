#include "kernels/quantise.h"

#include <cmath>
#include <cstring>
#include <limits>

#include "kernels/kernels.h"

namespace csd {
namespace {

constexpr float kHalfMax = 65504.0f;

uint16_t nearest_half(float value) {
  uint16_t half;
  kSerialKernels.store(DType::kFloat16, &value, 1.0f, 1, &half);
  return half;
}

// The neighbour of a finite half in the direction of +1 or -1.
uint16_t step_half(uint16_t half, int direction) {
  const bool negative = (half & 0x8000) != 0;
  if ((half & 0x7fff) == 0) return direction > 0 ? 0x0001 : 0x8001;
  return static_cast<uint16_t>(half + (negative == (direction > 0) ? -1 : 1));
}

float clamp_to_half(float value) { return std::fmin(std::fmax(value, -kHalfMax), kHalfMax); }

uint16_t half_below(float value) {
  value = clamp_to_half(value);
  const uint16_t half = nearest_half(value);
  return half_to_float(half) > value ? step_half(half, -1) : half;
}

uint16_t half_above(float value) {
  value = clamp_to_half(value);
  const uint16_t half = nearest_half(value);
  return half_to_float(half) < value ? step_half(half, 1) : half;
}

uint16_t code_of(float value, float zero, float inverse, float top) {
  const float code = std::nearbyint((value - zero) * inverse);
  return static_cast<uint16_t>(code > 0.0f ? (code < top ? code : top) : 0.0f);  // a NaN becomes 0
}

uint16_t get_code(const uint16_t* line, CodePlace place, int code_bits) {
  return static_cast<uint16_t>((line[place.word] >> place.shift) & ((1 << code_bits) - 1));
}

const uint16_t* k_line(const void* k_codes, int code_bits, int64_t channel) {
  return static_cast<const uint16_t*>(k_codes) + channel / 2 * line_words(code_bits, kPageTokens);
}

// The V block of one token that holds `channel`; *lanes and *lane say where in it.
const uint16_t* v_line(const void* v_codes, int code_bits, int64_t head_dim, int64_t token, int64_t channel,
                       int64_t* lanes, int64_t* lane) {
  const int64_t block = channel / kCodeBlockLanes * kCodeBlockLanes;
  *lanes = block_lanes(head_dim, block);
  *lane = channel - block;
  return static_cast<const uint16_t*>(v_codes) + token / 2 * line_words(code_bits, head_dim) +
         line_words(code_bits, block);
}

void convert_out(const float* values, int64_t count, DType dtype, void* target, int64_t index) {
  auto* bytes = static_cast<char*>(target) + index * element_bytes(dtype);
  kSerialKernels.store(dtype, values, 1.0f, count, bytes);
}

}  // namespace

float half_to_float(uint16_t half) {
  float value;
  kSerialKernels.load(DType::kFloat16, &half, 1.0f, 1, &value);
  return value;
}

CodeParams code_params(int code_bits, float least, float greatest, float* inverse, float* zero) {
  if (!(greatest - least <= std::numeric_limits<float>::max())) {
    *inverse = 0.0f;
    *zero = std::numeric_limits<float>::quiet_NaN();
    return {0, 0x7e00};
  }
  const uint16_t zero_half = half_below(least + 0.0f);  // which of 0 and -0 is less depends on their order
  *zero = half_to_float(zero_half);
  const float top = static_cast<float>((1 << code_bits) - 1);
  const uint16_t scale_half = half_above(std::fmax(greatest - *zero, 0.0f) / top);
  const float scale = half_to_float(scale_half);
  *inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
  return {scale_half, zero_half};
}

namespace plain {

void score_codes(int code_bits, const float* q, const void* k_codes, const uint16_t* k_params,
                 int64_t query_count, int64_t head_dim, float* scores) {
  std::memset(scores, 0, static_cast<size_t>(query_count * kPageTokens) * sizeof(float));
  for (int64_t d = 0; d < head_dim; ++d) {
    const uint16_t* line = k_line(k_codes, code_bits, d);
    const float scale = half_to_float(k_params[d]);
    const float zero = half_to_float(k_params[head_dim + d]);
    for (int64_t t = 0; t < kPageTokens; ++t) {
      const CodePlace place = code_place(code_bits, kPageTokens, d & 1, t);
      const float k = zero + scale * static_cast<float>(get_code(line, place, code_bits));
      for (int64_t m = 0; m < query_count; ++m) scores[m * kPageTokens + t] += q[m * head_dim + d] * k;
    }
  }
}

void accumulate_codes(int code_bits, const float* p, const float* shrink, const void* v_codes,
                      const uint16_t* v_params, int64_t query_count, int64_t head_dim, int64_t token_begin,
                      int64_t token_end, float* out) {
  for (int64_t m = 0; m < query_count; ++m) {
    for (int64_t d = 0; d < head_dim; ++d) out[m * head_dim + d] *= shrink[m];
  }
  for (int64_t t = token_begin; t < token_end; ++t) {
    const float scale = half_to_float(v_params[t]);
    const float zero = half_to_float(v_params[kPageTokens + t]);
    for (int64_t d = 0; d < head_dim; ++d) {
      int64_t lanes, lane;
      const uint16_t* line = v_line(v_codes, code_bits, head_dim, t, d, &lanes, &lane);
      const CodePlace place = code_place(code_bits, lanes, t & 1, lane);
      const float v = zero + scale * static_cast<float>(get_code(line, place, code_bits));
      for (int64_t m = 0; m < query_count; ++m) out[m * head_dim + d] += p[m * kPageTokens + t] * v;
    }
  }
}

void quantise_k(int code_bits, DType source_dtype, const void* source, int64_t token_stride, int64_t head_dim,
                void* k_codes, uint16_t* k_params) {
  const float top = static_cast<float>((1 << code_bits) - 1);
  const auto* base = static_cast<const char*>(source);
  std::memset(k_codes, 0, static_cast<size_t>(head_dim * kPageTokens * code_bits / 8));
  for (int64_t d = 0; d < head_dim; ++d) {
    float values[kPageTokens];
    float least = std::numeric_limits<float>::infinity();
    float greatest = -least;
    bool finite = true;
    for (int64_t t = 0; t < kPageTokens; ++t) {
      kSerialKernels.load(source_dtype, base + (t * token_stride + d) * element_bytes(source_dtype), 1.0f, 1,
                          &values[t]);
      finite = finite && std::isfinite(values[t]);
      least = std::fmin(least, values[t]);
      greatest = std::fmax(greatest, values[t]);
    }
    float inverse, zero;
    const CodeParams params = code_params(code_bits, finite ? least : -std::numeric_limits<float>::infinity(),
                                          greatest, &inverse, &zero);
    k_params[d] = params.scale;
    k_params[head_dim + d] = params.zero;
    auto* line = const_cast<uint16_t*>(k_line(k_codes, code_bits, d));
    for (int64_t t = 0; t < kPageTokens; ++t) {
      const CodePlace place = code_place(code_bits, kPageTokens, d & 1, t);
      line[place.word] |= static_cast<uint16_t>(code_of(values[t], zero, inverse, top) << place.shift);
    }
  }
}

void quantise_v(int code_bits, DType source_dtype, const void* source, int64_t token_stride, int64_t head_dim,
                void* v_codes, uint16_t* v_params) {
  const float top = static_cast<float>((1 << code_bits) - 1);
  const auto* base = static_cast<const char*>(source);
  std::memset(v_codes, 0, static_cast<size_t>(head_dim * kPageTokens * code_bits / 8));
  for (int64_t t = 0; t < kPageTokens; ++t) {
    float values[kHeadDimMax];
    kSerialKernels.load(source_dtype, base + t * token_stride * element_bytes(source_dtype), 1.0f, head_dim,
                        values);
    float least = std::numeric_limits<float>::infinity();
    float greatest = -least;
    bool finite = true;
    for (int64_t d = 0; d < head_dim; ++d) {
      finite = finite && std::isfinite(values[d]);
      least = std::fmin(least, values[d]);
      greatest = std::fmax(greatest, values[d]);
    }
    float inverse, zero;
    const CodeParams params = code_params(code_bits, finite ? least : -std::numeric_limits<float>::infinity(),
                                          greatest, &inverse, &zero);
    v_params[t] = params.scale;
    v_params[kPageTokens + t] = params.zero;
    for (int64_t d = 0; d < head_dim; ++d) {
      int64_t lanes, lane;
      auto* line = const_cast<uint16_t*>(v_line(v_codes, code_bits, head_dim, t, d, &lanes, &lane));
      const CodePlace place = code_place(code_bits, lanes, t & 1, lane);
      line[place.word] |= static_cast<uint16_t>(code_of(values[d], zero, inverse, top) << place.shift);
    }
  }
}

void dequantise_k(int code_bits, const void* k_codes, const uint16_t* k_params, int64_t head_dim,
                  int64_t token_begin, int64_t token_count, DType target_dtype, int64_t token_stride,
                  void* target) {
  for (int64_t i = 0; i < token_count; ++i) {
    float values[kHeadDimMax];
    for (int64_t d = 0; d < head_dim; ++d) {
      const CodePlace place = code_place(code_bits, kPageTokens, d & 1, token_begin + i);
      const uint16_t code = get_code(k_line(k_codes, code_bits, d), place, code_bits);
      values[d] =
          half_to_float(k_params[head_dim + d]) + half_to_float(k_params[d]) * static_cast<float>(code);
    }
    convert_out(values, head_dim, target_dtype, target, i * token_stride);
  }
}

void dequantise_v(int code_bits, const void* v_codes, const uint16_t* v_params, int64_t head_dim,
                  int64_t token_begin, int64_t token_count, DType target_dtype, int64_t token_stride,
                  void* target) {
  for (int64_t i = 0; i < token_count; ++i) {
    const int64_t t = token_begin + i;
    const float scale = half_to_float(v_params[t]);
    const float zero = half_to_float(v_params[kPageTokens + t]);
    float values[kHeadDimMax];
    for (int64_t d = 0; d < head_dim; ++d) {
      int64_t lanes, lane;
      const uint16_t* line = v_line(v_codes, code_bits, head_dim, t, d, &lanes, &lane);
      values[d] = zero + scale * static_cast<float>(
                                     get_code(line, code_place(code_bits, lanes, t & 1, lane), code_bits));
    }
    convert_out(values, head_dim, target_dtype, target, i * token_stride);
  }
}

}  // namespace plain
}  // namespace csd
