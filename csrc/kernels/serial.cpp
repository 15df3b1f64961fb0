// The kernels in plain C++: what runs where no other table does, and what the others are read against.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "kernels/kernels.h"
#include "kernels/pack.h"
#include "kernels/quantise.h"
#include "kernels/weights.h"

namespace csd {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Queries that share one widening of a K channel or a V token.
constexpr int64_t kRowBlock = 8;

uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// Each dtype: how an element becomes fp32 (exactly) and how fp32 becomes an element (round to nearest even).

struct Float32 {
  using Element = float;
  static float widen(float element) { return element; }
  static float narrow(float value) { return value; }
};

struct BFloat16 {
  using Element = uint16_t;
  static float widen(uint16_t element) { return float_of(static_cast<uint32_t>(element) << 16); }
  static uint16_t narrow(float value) {
    const uint32_t bits = bits_of(value);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const uint32_t quiet_nan = (bits >> 16) | 0x40;  // rounding could carry a NaN into infinity
    return static_cast<uint16_t>(value != value ? quiet_nan : rounded);
  }
};

struct Float16 {
  using Element = uint16_t;
  static float widen(uint16_t element) {
    const uint32_t sign = static_cast<uint32_t>(element & 0x8000) << 16;
    const uint32_t exponent = element & 0x7c00;
    const uint32_t magnitude = static_cast<uint32_t>(element & 0x7fff) << 13;
    const float subnormal = static_cast<float>(static_cast<int32_t>(element & 0x3ff)) * 0x1p-24f;
    const uint32_t normal = magnitude + (112u << 23);  // exponent bias 15 to 127
    const uint32_t special = magnitude | 0x7f800000 | (magnitude << 9 != 0 ? 0x400000 : 0);  // NaN is quieted
    return float_of(sign | (exponent == 0 ? bits_of(subnormal) : exponent == 0x7c00 ? special : normal));
  }
  static uint16_t narrow(float value) {
    const uint32_t bits = bits_of(value);
    const uint32_t sign = (bits >> 16) & 0x8000;
    const uint32_t magnitude = bits & 0x7fffffff;
    // 0.5's last bit is 2^-24, the step of fp16's subnormals: the addition rounds to it.
    const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
    const uint32_t rebased = magnitude - (112u << 23);
    const uint32_t normal = (rebased + 0xfff + ((rebased >> 13) & 1)) >> 13;  // carries into infinity
    const uint32_t quiet_nan = 0x7e00 | ((magnitude >> 13) & 0x3ff);
    const uint32_t result = magnitude > 0x7f800000    ? quiet_nan
                            : magnitude >= 0x47800000 ? 0x7c00     // 65536 and above
                            : magnitude < 0x38800000  ? subnormal  // below 2^-14
                                                      : normal;
    return static_cast<uint16_t>(sign | result);
  }
};

template <typename D>
void score_all(const float* q, const void* k_tile, int64_t query_count, int64_t head_dim, float* scores) {
  const auto* k = static_cast<const typename D::Element*>(k_tile);
  for (int64_t begin = 0; begin < query_count; begin += kRowBlock) {
    const int64_t end = begin + kRowBlock < query_count ? begin + kRowBlock : query_count;
    for (int64_t i = begin * kPageTokens; i < end * kPageTokens; ++i) scores[i] = 0.0f;
    for (int64_t d = 0; d < head_dim; ++d) {
      float channel[kPageTokens];
      for (int64_t t = 0; t < kPageTokens; ++t) channel[t] = D::widen(k[d * kPageTokens + t]);
      for (int64_t m = begin; m < end; ++m) {
        float* row = scores + m * kPageTokens;
        const float weight = q[m * head_dim + d];
        for (int64_t t = 0; t < kPageTokens; ++t) row[t] += weight * channel[t];
      }
    }
  }
}

void score_tile(DType dtype, const float* q, const void* k_tile, int64_t query_count, int64_t head_dim,
                float* scores) {
  switch (dtype) {
    case DType::kFloat32:
      return score_all<Float32>(q, k_tile, query_count, head_dim, scores);
    case DType::kBFloat16:
      return score_all<BFloat16>(q, k_tile, query_count, head_dim, scores);
    case DType::kFloat16:
      return score_all<Float16>(q, k_tile, query_count, head_dim, scores);
  }
}

float softmax_row(float* scores, const ScoreModifier& modifier, SoftmaxState* state) {
  float row_max = -kInfinity;
  bool has_nan = false;
  for (int64_t t = 0; t < kPageTokens; ++t) {
    float score = scores[t];
    if (modifier.softcap != 0.0f) score = modifier.softcap * std::tanh(score / modifier.softcap);
    if (modifier.bias != nullptr) score += modifier.bias[t];
    score += modifier.alibi_slope * (modifier.alibi_offset + static_cast<float>(t));
    if (t < modifier.token_begin || t >= modifier.token_end) score = -kInfinity;
    row_max = score > row_max ? score : row_max;
    has_nan = has_nan || score != score;
    scores[t] = score;
  }
  if (row_max == -kInfinity && !has_nan) {  // masked everywhere
    for (int64_t t = 0; t < kPageTokens; ++t) scores[t] = 0.0f;
    return 1.0f;
  }
  // A NaN poisons the sum; where it stands alone the maximum is made finite, or the state would look empty.
  if (row_max == -kInfinity) row_max = std::numeric_limits<float>::lowest();

  const float new_max = row_max > state->max ? row_max : state->max;
  const bool moved = state->max != -kInfinity && state->max != new_max;
  const float shrink = moved ? std::exp(state->max - new_max) : 1.0f;
  float row_sum = 0.0f;
  for (int64_t t = 0; t < kPageTokens; ++t) {
    scores[t] = std::exp(scores[t] - new_max);
    row_sum += scores[t];
  }
  state->max = new_max;
  state->sum = state->sum * shrink + row_sum;
  return shrink;
}

template <typename D>
void accumulate_all(const float* p, const float* shrink, const void* v_tile, int64_t query_count,
                    int64_t head_dim, int64_t token_begin, int64_t token_end, float* out) {
  const auto* v = static_cast<const typename D::Element*>(v_tile);
  for (int64_t begin = 0; begin < query_count; begin += kRowBlock) {
    const int64_t end = begin + kRowBlock < query_count ? begin + kRowBlock : query_count;
    for (int64_t m = begin; m < end; ++m) {
      for (int64_t d = 0; d < head_dim; ++d) out[m * head_dim + d] *= shrink[m];
    }
    for (int64_t t = token_begin; t < token_end; ++t) {
      float token[kHeadDimMax];
      for (int64_t d = 0; d < head_dim; ++d) token[d] = D::widen(v[t * head_dim + d]);
      for (int64_t m = begin; m < end; ++m) {
        float* row = out + m * head_dim;
        const float weight = p[m * kPageTokens + t];
        for (int64_t d = 0; d < head_dim; ++d) row[d] += weight * token[d];
      }
    }
  }
}

void accumulate_tile(DType dtype, const float* p, const float* shrink, const void* v_tile,
                     int64_t query_count, int64_t head_dim, int64_t token_begin, int64_t token_end,
                     float* out) {
  switch (dtype) {
    case DType::kFloat32:
      return accumulate_all<Float32>(p, shrink, v_tile, query_count, head_dim, token_begin, token_end, out);
    case DType::kBFloat16:
      return accumulate_all<BFloat16>(p, shrink, v_tile, query_count, head_dim, token_begin, token_end, out);
    case DType::kFloat16:
      return accumulate_all<Float16>(p, shrink, v_tile, query_count, head_dim, token_begin, token_end, out);
  }
}

void blend(const float* a, float a_weight, const float* b, float b_weight, int64_t count, float* out) {
  if (a_weight == 0.0f && b_weight == 0.0f) {
    std::memset(out, 0, count * sizeof(float));
    return;
  }
  for (int64_t i = 0; i < count; ++i) out[i] = a[i] * a_weight + b[i] * b_weight;
}

template <typename D>
void load_all(const void* in, float factor, int64_t count, float* out) {
  const auto* elements = static_cast<const typename D::Element*>(in);
  for (int64_t i = 0; i < count; ++i) out[i] = D::widen(elements[i]) * factor;
}

void load(DType dtype, const void* in, float factor, int64_t count, float* out) {
  switch (dtype) {
    case DType::kFloat32:
      return load_all<Float32>(in, factor, count, out);
    case DType::kBFloat16:
      return load_all<BFloat16>(in, factor, count, out);
    case DType::kFloat16:
      return load_all<Float16>(in, factor, count, out);
  }
}

template <typename D>
void store_all(const float* in, float factor, int64_t count, void* out) {
  auto* elements = static_cast<typename D::Element*>(out);
  for (int64_t i = 0; i < count; ++i) elements[i] = D::narrow(in[i] * factor);
}

void store(DType dtype, const float* in, float factor, int64_t count, void* out) {
  switch (dtype) {
    case DType::kFloat32:
      return store_all<Float32>(in, factor, count, out);
    case DType::kBFloat16:
      return store_all<BFloat16>(in, factor, count, out);
    case DType::kFloat16:
      return store_all<Float16>(in, factor, count, out);
  }
}

template <typename Element>
void transpose_all(const void* source, int64_t source_stride, int64_t row_count, int64_t column_count,
                   void* target, int64_t target_stride) {
  const auto* from = static_cast<const Element*>(source);
  auto* to = static_cast<Element*>(target);
  for (int64_t r = 0; r < row_count; ++r) {
    for (int64_t c = 0; c < column_count; ++c) to[c * target_stride + r] = from[r * source_stride + c];
  }
}

void transpose(int64_t bytes_per_element, const void* source, int64_t source_stride, int64_t row_count,
               int64_t column_count, void* target, int64_t target_stride) {
  // Unsigned, because a float that is moved as one may have its NaN quieted on some processors.
  if (bytes_per_element == 2) {
    transpose_all<uint16_t>(source, source_stride, row_count, column_count, target, target_stride);
  } else {
    transpose_all<uint32_t>(source, source_stride, row_count, column_count, target, target_stride);
  }
}

constexpr PackSteps kSteps = {load, store, transpose};

void pack_k(DType source_dtype, const void* source, int64_t token_stride, DType tile_dtype, int64_t head_dim,
            int64_t token_begin, int64_t token_count, void* k_tile) {
  csd::pack_k(kSteps, source_dtype, source, token_stride, tile_dtype, head_dim, token_begin, token_count,
              k_tile);
}

void pack_v(DType source_dtype, const void* source, int64_t token_stride, DType tile_dtype, int64_t head_dim,
            int64_t token_begin, int64_t token_count, void* v_tile) {
  csd::pack_v(kSteps, source_dtype, source, token_stride, tile_dtype, head_dim, token_begin, token_count,
              v_tile);
}

void unpack_k(DType tile_dtype, const void* k_tile, int64_t head_dim, int64_t token_begin,
              int64_t token_count, DType target_dtype, int64_t token_stride, void* target) {
  csd::unpack_k(kSteps, tile_dtype, k_tile, head_dim, token_begin, token_count, target_dtype, token_stride,
                target);
}

void unpack_v(DType tile_dtype, const void* v_tile, int64_t head_dim, int64_t token_begin,
              int64_t token_count, DType target_dtype, int64_t token_stride, void* target) {
  csd::unpack_v(kSteps, tile_dtype, v_tile, head_dim, token_begin, token_count, target_dtype, token_stride,
                target);
}

}  // namespace

const Kernels kSerialKernels = {
    "serial",
    score_tile,
    softmax_row,
    accumulate_tile,
    blend,
    load,
    store,
    pack_k,
    pack_v,
    unpack_k,
    unpack_v,
    plain::score_codes,
    plain::accumulate_codes,
    plain::quantise_k,
    plain::quantise_v,
    plain::dequantise_k,
    plain::dequantise_v,
    plain::quantise_weight_row,
    plain::dequantise_weight_row,
    plain::weight_dots,
    plain::widen_mxfp4_row,
    plain::widen_fp8_row,
    plain::mxfp4_dots,
};

}  // namespace csd
