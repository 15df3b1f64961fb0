// The kernels for AVX-512 F, BW, DQ and VL. Elements go in groups of 32: two registers of fp32.
#if defined(__x86_64__)

#if defined(__GNUC__) && !defined(__clang__)
// Its headers initialise "undefined" registers with themselves and then warn of it (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <limits>

#include "kernels/kernels.h"
#include "kernels/pack.h"
#include "kernels/quantise.h"
#include "kernels/target.h"
#include "kernels/weights.h"

namespace csd {

CSD_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl")

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Queries whose sums stay in registers while K or V streams by: 6 rows x 4 registers of the 32.
constexpr int64_t kRowBlock = 6;

// How far ahead of its use a tile is fetched; where K, V and the next tile are adjacent this runs on into
// them. Into L1, and so into L2 as well where L1 is too small to keep it: on a Zen 5 core (48 KiB), head_dim
// 128, 4 queries, bf16 reads 12 % more a second than when fetched into L2 alone, int8 18 %, int4 15 %, fp32
// 7 %. The distances are chosen from 8 to 48 KiB.
template <typename Element>
constexpr int64_t kPrefetchBytes = (sizeof(Element) == 2 ? 32 : 16) * 1024;

// The same for codes: int8 reads memory at 26 GB/s with 32 KiB, 25 with 16 or 64, 20 with 8.
constexpr int64_t kCodePrefetchBytes = 32 * 1024;

struct F32x32 {
  __m512 first;
  __m512 second;
};

inline __mmask16 first_half(__mmask32 mask) { return static_cast<__mmask16>(mask); }
inline __mmask16 second_half(__mmask32 mask) { return static_cast<__mmask16>(mask >> 16); }

// The first `count` of 32 elements: all of them from 32 on, none from 0 down.
inline __mmask32 mask_of(int64_t count) {
  if (count >= 32) return ~__mmask32{0};
  return count <= 0 ? __mmask32{0} : (__mmask32{1} << count) - 1;
}

inline F32x32 load_f32x32(const float* p, __mmask32 mask) {
  return {_mm512_maskz_loadu_ps(first_half(mask), p), _mm512_maskz_loadu_ps(second_half(mask), p + 16)};
}

inline void store_f32x32(float* p, __mmask32 mask, F32x32 x) {
  _mm512_mask_storeu_ps(p, first_half(mask), x.first);
  _mm512_mask_storeu_ps(p + 16, second_half(mask), x.second);
}

inline __m256i narrow_bf16x16(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i high = _mm512_srli_epi32(bits, 16);
  const __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
  const __m512i rounded =
      _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff)), 16);
  const __m512i quiet_nan = _mm512_or_si512(high, _mm512_set1_epi32(0x40));
  const __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, is_nan, quiet_nan));
}

// Each dtype: `load` widens 32 elements exactly, in whatever order is cheapest; `ordered` puts what was
// computed from them back in the elements' order; `store` narrows 32 values that are in order.

struct Float32 {
  using Element = float;
  static F32x32 load(const float* p, __mmask32 mask) { return load_f32x32(p, mask); }
  static F32x32 ordered(F32x32 x) { return x; }
  static void store(float* p, __mmask32 mask, F32x32 x) { store_f32x32(p, mask, x); }
};

struct BFloat16 {
  using Element = uint16_t;
  // Even elements, then odd ones: a shift and an AND, where keeping the order would take two shuffles more.
  static F32x32 load(const uint16_t* p, __mmask32 mask) {
    const __m512i pairs = _mm512_maskz_loadu_epi16(mask, p);
    return {_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)),
            _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000))))};
  }
  static F32x32 ordered(F32x32 x) {
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i high = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    return {_mm512_permutex2var_ps(x.first, low, x.second), _mm512_permutex2var_ps(x.first, high, x.second)};
  }
  static void store(uint16_t* p, __mmask32 mask, F32x32 x) {
    _mm256_mask_storeu_epi16(p, first_half(mask), narrow_bf16x16(x.first));
    _mm256_mask_storeu_epi16(p + 16, second_half(mask), narrow_bf16x16(x.second));
  }
};

struct Float16 {
  using Element = uint16_t;
  static F32x32 load(const uint16_t* p, __mmask32 mask) {
    return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_half(mask), p)),
            _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(second_half(mask), p + 16))};
  }
  static F32x32 ordered(F32x32 x) { return x; }
  static void store(uint16_t* p, __mmask32 mask, F32x32 x) {
    constexpr int kNearestEven = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    _mm256_mask_storeu_epi16(p, first_half(mask), _mm512_cvtps_ph(x.first, kNearestEven));
    _mm256_mask_storeu_epi16(p + 16, second_half(mask), _mm512_cvtps_ph(x.second, kNearestEven));
  }
};

// Rows of the next block when `row_count` rows are left. Blocks are even: 8 rows go 4 + 4 and not 6 + 2.
inline int64_t next_rows(int64_t row_count) {
  const int64_t block_count = (row_count + kRowBlock - 1) / kRowBlock;
  return (row_count + block_count - 1) / block_count;
}

inline __attribute__((always_inline)) void prefetch(const void* address, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch(static_cast<const char*>(address) + i, _MM_HINT_T0);
}

// kRows queries x the whole tile.
template <typename D, int kRows>
void score_block(const float* q, const void* k_tile, int64_t head_dim, int64_t ahead_bytes, float* scores) {
  constexpr __mmask32 kAll = ~__mmask32{0};
  const auto* k = static_cast<const typename D::Element*>(k_tile);
  __m512 sum[kRows][4];  // tokens 0..31, then 32..63
  CSD_UNROLL
  for (int m = 0; m < kRows; ++m) {
    CSD_UNROLL
    for (int j = 0; j < 4; ++j) sum[m][j] = _mm512_setzero_ps();
  }
  for (int64_t d = 0; d < head_dim; ++d, k += kPageTokens) {
    prefetch(reinterpret_cast<const char*>(k) + ahead_bytes, kPageTokens * sizeof(*k));
    const F32x32 k_left = D::load(k, kAll);
    const F32x32 k_right = D::load(k + 32, kAll);
    CSD_UNROLL
    for (int m = 0; m < kRows; ++m) {
      const __m512 weight = _mm512_set1_ps(q[m * head_dim + d]);
      sum[m][0] = _mm512_fmadd_ps(weight, k_left.first, sum[m][0]);
      sum[m][1] = _mm512_fmadd_ps(weight, k_left.second, sum[m][1]);
      sum[m][2] = _mm512_fmadd_ps(weight, k_right.first, sum[m][2]);
      sum[m][3] = _mm512_fmadd_ps(weight, k_right.second, sum[m][3]);
    }
  }
  CSD_UNROLL
  for (int m = 0; m < kRows; ++m) {
    store_f32x32(scores + m * kPageTokens, kAll, D::ordered({sum[m][0], sum[m][1]}));
    store_f32x32(scores + m * kPageTokens + 32, kAll, D::ordered({sum[m][2], sum[m][3]}));
  }
}

template <typename D>
void score_all(const float* q, const void* k_tile, int64_t query_count, int64_t head_dim, float* scores) {
  using Block = void (*)(const float*, const void*, int64_t, int64_t, float*);
  static constexpr Block kBlock[] = {score_block<D, 1>, score_block<D, 2>, score_block<D, 3>,
                                     score_block<D, 4>, score_block<D, 5>, score_block<D, 6>};
  for (int64_t m = 0, rows; m < query_count; m += rows) {
    rows = next_rows(query_count - m);
    // After the first block the tile is in the cache.
    kBlock[rows - 1](q + m * head_dim, k_tile, head_dim, m == 0 ? kPrefetchBytes<typename D::Element> : 0,
                     scores + m * kPageTokens);
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

// exp(x) for x <= 0, within 1.2e-7 of it relatively; a NaN stays one. x = n ln 2 + r and exp(r) by a minimax
// polynomial (3.7e-9), in Estrin's order: a row's softmax waits for it twice. Below ln(FLT_MIN) the result is
// 0: subnormals would be slow in what follows and weigh nothing beside the maximum's 1.
inline __m512 exp_f32x16(__m512 x) {
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)),
                                        _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  // ln 2 in two parts: n times the first is exact.
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  const __m512 r2 = _mm512_mul_ps(r, r);
  const __m512 low = _mm512_fmadd_ps(r, _mm512_set1_ps(1.666652113e-1f), _mm512_set1_ps(4.999999404e-1f));
  __m512 high = _mm512_fmadd_ps(r, _mm512_set1_ps(8.368745446e-3f), _mm512_set1_ps(4.166838899e-2f));
  high = _mm512_fmadd_ps(r2, _mm512_set1_ps(1.381453942e-3f), high);
  const __m512 y = _mm512_fmadd_ps(_mm512_fmadd_ps(high, r2, low), r2, r);  // exp(r) - 1
  const __mmask16 normal = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-87.336544f), _CMP_NLT_UQ);
  return _mm512_maskz_scalef_ps(normal, _mm512_add_ps(y, _mm512_set1_ps(1.0f)), n);
}

// Cephes tanhf: an odd polynomial near 0, where 1 - exp would cancel, and exp elsewhere.
inline __m512 tanh_f32x16(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.0f);
  const __m512 magnitude = _mm512_abs_ps(x);
  const __m512 e = exp_f32x16(_mm512_mul_ps(magnitude, _mm512_set1_ps(-2.0f)));
  const __m512 large = _mm512_div_ps(_mm512_sub_ps(one, e), _mm512_add_ps(one, e));
  const __m512 sign = _mm512_and_ps(x, _mm512_set1_ps(-0.0f));

  const __m512 z = _mm512_mul_ps(x, x);
  __m512 y = _mm512_set1_ps(-5.70498872745e-3f);
  y = _mm512_fmadd_ps(y, z, _mm512_set1_ps(2.06390887954e-2f));
  y = _mm512_fmadd_ps(y, z, _mm512_set1_ps(-5.37397155531e-2f));
  y = _mm512_fmadd_ps(y, z, _mm512_set1_ps(1.33314422036e-1f));
  y = _mm512_fmadd_ps(y, z, _mm512_set1_ps(-3.33332819422e-1f));
  const __m512 small = _mm512_fmadd_ps(_mm512_mul_ps(y, z), x, x);

  const __mmask16 is_small = _mm512_cmp_ps_mask(magnitude, _mm512_set1_ps(0.625f), _CMP_LT_OQ);
  return _mm512_mask_mov_ps(_mm512_or_ps(large, sign), is_small, small);
}

inline uint64_t first_tokens(int64_t count) {
  return count >= 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1;
}

float softmax_row(float* scores, const ScoreModifier& modifier, SoftmaxState* state) {
  constexpr int kVectors = kPageTokens / 16;
  const __m512 minus_infinity = _mm512_set1_ps(-kInfinity);
  __m512 s[kVectors];
  CSD_UNROLL
  for (int j = 0; j < kVectors; ++j) s[j] = _mm512_load_ps(scores + 16 * j);

  if (modifier.softcap != 0.0f) {
    const __m512 cap = _mm512_set1_ps(modifier.softcap);
    CSD_UNROLL
    for (int j = 0; j < kVectors; ++j) s[j] = _mm512_mul_ps(cap, tanh_f32x16(_mm512_div_ps(s[j], cap)));
  }
  if (modifier.bias != nullptr) {
    CSD_UNROLL
    for (int j = 0; j < kVectors; ++j) s[j] = _mm512_add_ps(s[j], _mm512_loadu_ps(modifier.bias + 16 * j));
  }
  if (modifier.alibi_slope != 0.0f) {
    const __m512 lane = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    CSD_UNROLL
    for (int j = 0; j < kVectors; ++j) {
      const __m512 token = _mm512_add_ps(lane, _mm512_set1_ps(static_cast<float>(16 * j)));
      const __m512 position = _mm512_add_ps(_mm512_set1_ps(modifier.alibi_offset), token);
      s[j] = _mm512_fmadd_ps(_mm512_set1_ps(modifier.alibi_slope), position, s[j]);
    }
  }

  // max_ps gives its second operand when the first is NaN, so row_max is that of the numbers.
  const uint64_t in_range = first_tokens(modifier.token_end) & ~first_tokens(modifier.token_begin);
  CSD_UNROLL
  for (int j = 0; j < kVectors; ++j) {
    s[j] = _mm512_mask_mov_ps(minus_infinity, static_cast<__mmask16>(in_range >> (16 * j)), s[j]);
  }
  const __m512 max = _mm512_max_ps(_mm512_max_ps(s[0], _mm512_max_ps(s[1], minus_infinity)),
                                   _mm512_max_ps(s[2], _mm512_max_ps(s[3], minus_infinity)));
  float row_max = _mm512_reduce_max_ps(max);
  if (row_max == -kInfinity) {
    __mmask16 is_nan = 0;
    CSD_UNROLL
    for (int j = 0; j < kVectors; ++j) is_nan |= _mm512_cmp_ps_mask(s[j], s[j], _CMP_UNORD_Q);
    if (!is_nan) {  // masked everywhere
      CSD_UNROLL
      for (int j = 0; j < kVectors; ++j) _mm512_store_ps(scores + 16 * j, _mm512_setzero_ps());
      return 1.0f;
    }
    // A NaN poisons the sum; the maximum is made finite, or the state would look empty.
    row_max = std::numeric_limits<float>::lowest();
  }

  const float new_max = row_max > state->max ? row_max : state->max;
  const bool moved = state->max != -kInfinity && state->max != new_max;
  const float shrink = moved ? _mm512_cvtss_f32(exp_f32x16(_mm512_set1_ps(state->max - new_max))) : 1.0f;
  CSD_UNROLL
  for (int j = 0; j < kVectors; ++j) {
    s[j] = exp_f32x16(_mm512_sub_ps(s[j], _mm512_set1_ps(new_max)));
    _mm512_store_ps(scores + 16 * j, s[j]);
  }
  const __m512 sum = _mm512_add_ps(_mm512_add_ps(s[0], s[1]), _mm512_add_ps(s[2], s[3]));
  state->max = new_max;
  state->sum = state->sum * shrink + _mm512_reduce_add_ps(sum);
  return shrink;
}

// kRows queries x the first `channel_count` of kGroups x 32 channels.
template <typename D, int kRows, int kGroups>
void accumulate_block(const float* p, const float* shrink, const typename D::Element* v, int64_t head_dim,
                      int64_t token_begin, int64_t token_end, int64_t channel_count, const char* ahead,
                      float* out) {
  constexpr int64_t kGroupBytes = kGroups * 32 * sizeof(*v);
  __mmask32 mask[kGroups];
  CSD_UNROLL
  for (int g = 0; g < kGroups; ++g) mask[g] = mask_of(channel_count - 32 * g);
  __m512 sum[kRows][2 * kGroups];
  CSD_UNROLL
  for (int m = 0; m < kRows; ++m) {
    CSD_UNROLL
    for (int j = 0; j < 2 * kGroups; ++j) sum[m][j] = _mm512_setzero_ps();
  }
  for (int64_t t = token_begin; t < token_end; ++t) {
    const auto* token = v + t * head_dim;
    prefetch(ahead + t * kGroupBytes, kGroupBytes);
    __m512 v_group[2 * kGroups];
    CSD_UNROLL
    for (int g = 0; g < kGroups; ++g) {
      const F32x32 x = D::load(token + 32 * g, mask[g]);
      v_group[2 * g] = x.first;
      v_group[2 * g + 1] = x.second;
    }
    CSD_UNROLL
    for (int m = 0; m < kRows; ++m) {
      const __m512 weight = _mm512_set1_ps(p[m * kPageTokens + t]);
      CSD_UNROLL
      for (int j = 0; j < 2 * kGroups; ++j) sum[m][j] = _mm512_fmadd_ps(weight, v_group[j], sum[m][j]);
    }
  }
  CSD_UNROLL
  for (int m = 0; m < kRows; ++m) {
    const __m512 factor = _mm512_set1_ps(shrink[m]);
    CSD_UNROLL
    for (int g = 0; g < kGroups; ++g) {
      float* target = out + m * head_dim + 32 * g;
      const F32x32 before = load_f32x32(target, mask[g]);
      F32x32 after = D::ordered({sum[m][2 * g], sum[m][2 * g + 1]});
      after.first = _mm512_fmadd_ps(before.first, factor, after.first);
      after.second = _mm512_fmadd_ps(before.second, factor, after.second);
      store_f32x32(target, mask[g], after);
    }
  }
}

template <typename D, int kGroups>
void accumulate_channels(const float* p, const float* shrink, const typename D::Element* v,
                         int64_t query_count, int64_t head_dim, int64_t token_begin, int64_t token_end,
                         int64_t channel_count, const char* ahead, float* out) {
  using Block = void (*)(const float*, const float*, const typename D::Element*, int64_t, int64_t, int64_t,
                         int64_t, const char*, float*);
  static constexpr Block kBlock[] = {accumulate_block<D, 1, kGroups>, accumulate_block<D, 2, kGroups>,
                                     accumulate_block<D, 3, kGroups>, accumulate_block<D, 4, kGroups>,
                                     accumulate_block<D, 5, kGroups>, accumulate_block<D, 6, kGroups>};
  for (int64_t m = 0, rows; m < query_count; m += rows) {
    rows = next_rows(query_count - m);
    kBlock[rows - 1](p + m * kPageTokens, shrink + m, v, head_dim, token_begin, token_end, channel_count,
                     ahead, out + m * head_dim);
    ahead = reinterpret_cast<const char*>(v);  // from here on these channels are in the cache
  }
}

// Channels outside, queries inside: 64 channels of V stay in L1 while hundreds of queries pass. What is
// fetched ahead goes up in memory without a gap, unlike what is read.
template <typename D>
void accumulate_all(const float* p, const float* shrink, const void* v_tile, int64_t query_count,
                    int64_t head_dim, int64_t token_begin, int64_t token_end, float* out) {
  const auto* v = static_cast<const typename D::Element*>(v_tile);
  for (int64_t d = 0; d < head_dim; d += 64) {
    const int64_t channel_count = head_dim - d;
    const auto channels = channel_count > 32 ? accumulate_channels<D, 2> : accumulate_channels<D, 1>;
    const char* ahead =
        reinterpret_cast<const char*>(v + d * kPageTokens) + kPrefetchBytes<typename D::Element>;
    channels(p, shrink, v + d, query_count, head_dim, token_begin, token_end, channel_count, ahead, out + d);
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
  const __m512 a_factor = _mm512_set1_ps(a_weight);
  const __m512 b_factor = _mm512_set1_ps(b_weight);
  for (int64_t i = 0; i < count; i += 32) {
    const __mmask32 mask = mask_of(count - i);
    const F32x32 x = load_f32x32(a + i, mask);
    const F32x32 y = load_f32x32(b + i, mask);
    store_f32x32(out + i, mask,
                 {_mm512_fmadd_ps(x.first, a_factor, _mm512_mul_ps(y.first, b_factor)),
                  _mm512_fmadd_ps(x.second, a_factor, _mm512_mul_ps(y.second, b_factor))});
  }
}

template <typename D>
void load_all(const void* in, float factor, int64_t count, float* out) {
  const auto* elements = static_cast<const typename D::Element*>(in);
  const __m512 factors = _mm512_set1_ps(factor);
  for (int64_t i = 0; i < count; i += 32) {
    const __mmask32 mask = mask_of(count - i);
    const F32x32 x = D::ordered(D::load(elements + i, mask));
    store_f32x32(out + i, mask, {_mm512_mul_ps(x.first, factors), _mm512_mul_ps(x.second, factors)});
  }
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
  const __m512 factors = _mm512_set1_ps(factor);
  for (int64_t i = 0; i < count; i += 32) {
    const __mmask32 mask = mask_of(count - i);
    const F32x32 x = load_f32x32(in + i, mask);
    D::store(elements + i, mask, {_mm512_mul_ps(x.first, factors), _mm512_mul_ps(x.second, factors)});
  }
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

// Transposes 8 x 8 elements. Three rounds of interleaving rows i and i + 4 move each element's row number
// into its column number, one bit a round.
inline void transpose_block(const uint16_t* source, int64_t source_stride, uint16_t* target,
                            int64_t target_stride) {
  __m128i row[8];
  for (int i = 0; i < 8; ++i) {
    row[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i * source_stride));
  }
  for (int round = 0; round < 3; ++round) {
    __m128i mixed[8];
    for (int i = 0; i < 4; ++i) {
      mixed[2 * i] = _mm_unpacklo_epi16(row[i], row[i + 4]);
      mixed[2 * i + 1] = _mm_unpackhi_epi16(row[i], row[i + 4]);
    }
    for (int i = 0; i < 8; ++i) row[i] = mixed[i];
  }
  for (int i = 0; i < 8; ++i) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(target + i * target_stride), row[i]);
  }
}

inline void transpose_block(const uint32_t* source, int64_t source_stride, uint32_t* target,
                            int64_t target_stride) {
  const __m256i low = _mm256_setr_epi32(0, 8, 1, 9, 2, 10, 3, 11);
  const __m256i high = _mm256_setr_epi32(4, 12, 5, 13, 6, 14, 7, 15);
  __m256i row[8];
  for (int i = 0; i < 8; ++i) {
    row[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source + i * source_stride));
  }
  for (int round = 0; round < 3; ++round) {
    __m256i mixed[8];
    for (int i = 0; i < 4; ++i) {
      mixed[2 * i] = _mm256_permutex2var_epi32(row[i], low, row[i + 4]);
      mixed[2 * i + 1] = _mm256_permutex2var_epi32(row[i], high, row[i + 4]);
    }
    for (int i = 0; i < 8; ++i) row[i] = mixed[i];
  }
  for (int i = 0; i < 8; ++i) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(target + i * target_stride), row[i]);
  }
}

template <typename Element>
void transpose_all(const void* source, int64_t source_stride, int64_t row_count, int64_t column_count,
                   void* target, int64_t target_stride) {
  const auto* from = static_cast<const Element*>(source);
  auto* to = static_cast<Element*>(target);
  const int64_t block_rows = row_count / 8 * 8;
  const int64_t block_columns = column_count / 8 * 8;
  for (int64_t r = 0; r < block_rows; r += 8) {
    for (int64_t c = 0; c < block_columns; c += 8) {
      transpose_block(from + r * source_stride + c, source_stride, to + c * target_stride + r, target_stride);
    }
  }
  // The edges: less than a block of rows or of columns.
  for (int64_t r = 0; r < row_count; ++r) {
    for (int64_t c = r < block_rows ? block_columns : 0; c < column_count; ++c) {
      to[c * target_stride + r] = from[r * source_stride + c];
    }
  }
}

void transpose(int64_t bytes_per_element, const void* source, int64_t source_stride, int64_t row_count,
               int64_t column_count, void* target, int64_t target_stride) {
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

// ---- quantised tiles ----

// Queries whose weights are folded at a time.
constexpr int64_t kFoldBlock = 32;

// Scale and zero point of up to kHeadDimMax groups, widened. Groups outside [begin, end) get 0, and are not
// in the masks of 16 groups each.
struct Groups {
  alignas(64) float scale[kHeadDimMax];
  alignas(64) float zero[kHeadDimMax];
  __mmask16 mask[kHeadDimMax / 16];

  Groups(const uint16_t* params, int64_t count, int64_t begin, int64_t end) {
    for (int64_t i = 0; i < count; i += 32) {
      const __mmask32 mask = mask_of(end - i) & ~mask_of(begin - i);
      this->mask[i / 16] = first_half(mask);
      this->mask[i / 16 + 1] = second_half(mask);
      store_f32x32(scale + i, ~__mmask32{0}, Float16::load(params + i, mask));
      store_f32x32(zero + i, ~__mmask32{0}, Float16::load(params + count + i, mask));
    }
  }
};

// One query's sum over groups of weight * (zero + scale * code), when weight * scale is rounded to integers:
// base + factor * (sum of integer * code). What the rounding took away is in the base at the middle code,
// which halves the error.
struct Folded {
  float base;
  float factor;
};

// Weights of groups outside the masks are not read: their integers, up to count rounded up to 16, are 0. The
// integers are as large as int32 sums over `count` products allow.
inline Folded fold(int code_bits, const Groups& groups, const float* weights, int64_t count,
                   int16_t* integers) {
  __m512 base = _mm512_setzero_ps();
  __m512 max = _mm512_setzero_ps();
  for (int64_t i = 0; i < count; i += 16) {
    const __m512 weight = _mm512_maskz_loadu_ps(groups.mask[i / 16], weights + i);
    base = _mm512_fmadd_ps(weight, _mm512_load_ps(groups.zero + i), base);
    max = _mm512_max_ps(max, _mm512_abs_ps(_mm512_mul_ps(weight, _mm512_load_ps(groups.scale + i))));
  }
  const float integer_max = code_integer_max(code_bits, count);
  const float weight_max = _mm512_reduce_max_ps(max);
  // Below 1e-30 the reciprocal could overflow, and the products are nothing.
  const float inverse = weight_max > 1e-30f ? integer_max / weight_max : 0.0f;
  const float factor = weight_max * (1.0f / integer_max);
  const __m512 inverses = _mm512_set1_ps(inverse);
  const __m512 middle = _mm512_set1_ps(0.5f * static_cast<float>((1 << code_bits) - 1) * factor);
  for (int64_t i = 0; i < count; i += 16) {
    const __m512 scale = _mm512_mul_ps(_mm512_load_ps(groups.scale + i), inverses);
    const __m512 weight = _mm512_mul_ps(_mm512_maskz_loadu_ps(groups.mask[i / 16], weights + i), scale);
    const __m512i integer = _mm512_cvtps_epi32(weight);
    base = _mm512_fmadd_ps(_mm512_sub_ps(weight, _mm512_cvtepi32_ps(integer)), middle, base);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(integers + i), _mm512_cvtsepi32_epi16(integer));
  }
  return {_mm512_reduce_add_ps(base), factor};
}

// Where the four registers of codes that a block of `lanes` lanes expands to lie, and what of them is there.
template <int kBits>
struct CodeLanes {
  __mmask16 mask[4];
  int64_t first[4];

  explicit CodeLanes(int64_t lanes) {
    constexpr int kRegisters = kBits / 4;  // of codes, before they expand
    const int64_t step = lanes * kBits / 16;
    CSD_UNROLL
    for (int j = 0; j < 4; ++j) {
      first[j] = j / kRegisters * step + j % kRegisters * 16;
      mask[j] = first_half(mask_of(step - j % kRegisters * 16));
    }
  }
};

// sum + the products of pairs of codes with one pair of integers. AVX512-VNNI has one instruction for it, in
// assembler because its intrinsic cannot be inlined into a region without it: int4 over 4 queries takes 0.75
// of the time on a Zen 5 core.
template <bool kVnni>
inline __m512i multiply_pairs(__m512i codes, __m512i integers, __m512i sum) {
  if (!kVnni) return _mm512_add_epi32(sum, _mm512_madd_epi16(codes, integers));
  asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(integers));
  return sum;
}

// kRows queries x one block of up to 64 lanes, over line_count lines.
template <int kBits, bool kVnni, int kRows>
inline __attribute__((always_inline)) void sum_codes(const int16_t* integers, int64_t integer_stride,
                                                     const char* codes, int64_t line_bytes,
                                                     int64_t line_count, const CodeLanes<kBits>& lanes,
                                                     const char* ahead, __m512i (&sum)[kRows][4]) {
  constexpr int64_t kBlockBytes64 = 16 * kBits;
  const __m512i low = _mm512_set1_epi32(kBits == 4 ? 0x000f000f : 0x00ff00ff);
  CSD_UNROLL
  for (int m = 0; m < kRows; ++m) {
    CSD_UNROLL
    for (int j = 0; j < 4; ++j) sum[m][j] = _mm512_setzero_si512();
  }
  for (int64_t s = 0; s < line_count; ++s, codes += line_bytes) {
    prefetch(ahead + s * kBlockBytes64, kBlockBytes64);
    const __m512i x = _mm512_maskz_loadu_epi32(lanes.mask[0], codes);
    __m512i code[4];
    code[0] = _mm512_and_si512(x, low);
    if (kBits == 4) {
      code[1] = _mm512_and_si512(_mm512_srli_epi16(x, 4), low);
      code[2] = _mm512_and_si512(_mm512_srli_epi16(x, 8), low);
      code[3] = _mm512_srli_epi16(x, 12);
    } else {
      const __m512i y = _mm512_maskz_loadu_epi32(lanes.mask[1], codes + 64);
      code[1] = _mm512_and_si512(y, low);
      code[2] = _mm512_srli_epi16(x, 8);
      code[3] = _mm512_srli_epi16(y, 8);
    }
    CSD_UNROLL
    for (int m = 0; m < kRows; ++m) {
      int32_t pair;
      std::memcpy(&pair, integers + m * integer_stride + 2 * s, sizeof(pair));
      CSD_UNROLL
      for (int j = 0; j < 4; ++j)
        sum[m][j] = multiply_pairs<kVnni>(code[j], _mm512_set1_epi32(pair), sum[m][j]);
    }
  }
}

template <int kBits, bool kVnni, int kRows>
void score_codes_block(const int16_t* integers, const Folded* folded, const char* codes, int64_t head_dim,
                       int64_t ahead_bytes, float* scores) {
  const CodeLanes<kBits> lanes(kPageTokens);
  __m512i sum[kRows][4];
  sum_codes<kBits, kVnni, kRows>(integers, kHeadDimMax, codes, 2 * line_words(kBits, kPageTokens),
                                 head_dim / 2, lanes, codes + ahead_bytes, sum);
  CSD_UNROLL
  for (int m = 0; m < kRows; ++m) {
    CSD_UNROLL
    for (int j = 0; j < 4; ++j) {
      _mm512_storeu_ps(scores + m * kPageTokens + 16 * j,
                       _mm512_fmadd_ps(_mm512_set1_ps(folded[m].factor), _mm512_cvtepi32_ps(sum[m][j]),
                                       _mm512_set1_ps(folded[m].base)));
    }
  }
}

template <int kBits, bool kVnni>
void score_codes_all(const float* q, const void* k_codes, const uint16_t* k_params, int64_t query_count,
                     int64_t head_dim, float* scores) {
  using Block = void (*)(const int16_t*, const Folded*, const char*, int64_t, int64_t, float*);
  static constexpr Block kBlock[] = {score_codes_block<kBits, kVnni, 1>, score_codes_block<kBits, kVnni, 2>,
                                     score_codes_block<kBits, kVnni, 3>, score_codes_block<kBits, kVnni, 4>,
                                     score_codes_block<kBits, kVnni, 5>, score_codes_block<kBits, kVnni, 6>};
  alignas(64) int16_t integers[kFoldBlock * kHeadDimMax];
  Folded folded[kFoldBlock];
  const Groups groups(k_params, head_dim, 0, head_dim);
  prefetch(reinterpret_cast<const char*>(k_params) + kCodePrefetchBytes, 4 * head_dim);
  for (int64_t begin = 0; begin < query_count; begin += kFoldBlock) {
    const int64_t count = query_count - begin < kFoldBlock ? query_count - begin : kFoldBlock;
    for (int64_t m = 0; m < count; ++m) {
      folded[m] = fold(kBits, groups, q + (begin + m) * head_dim, head_dim, integers + m * kHeadDimMax);
    }
    for (int64_t m = 0, rows; m < count; m += rows) {
      rows = next_rows(count - m);
      kBlock[rows - 1](integers + m * kHeadDimMax, folded + m, static_cast<const char*>(k_codes), head_dim,
                       begin + m == 0 ? kCodePrefetchBytes : 0, scores + (begin + m) * kPageTokens);
    }
  }
}

template <bool kVnni>
void score_codes(int code_bits, const float* q, const void* k_codes, const uint16_t* k_params,
                 int64_t query_count, int64_t head_dim, float* scores) {
  const auto all = code_bits == 4 ? score_codes_all<4, kVnni> : score_codes_all<8, kVnni>;
  all(q, k_codes, k_params, query_count, head_dim, scores);
}

// Lines of token pairs [line_begin, line_begin + line_count) x one block of channels.
template <int kBits, bool kVnni, int kRows>
void accumulate_codes_block(const int16_t* integers, const Folded* folded, const float* shrink,
                            const char* codes, int64_t line_bytes, int64_t line_count, int64_t lane_count,
                            int64_t head_dim, const char* ahead, float* out) {
  const CodeLanes<kBits> lanes(lane_count);
  __m512i sum[kRows][4];
  sum_codes<kBits, kVnni, kRows>(integers, kPageTokens, codes, line_bytes, line_count, lanes, ahead, sum);
  CSD_UNROLL
  for (int m = 0; m < kRows; ++m) {
    CSD_UNROLL
    for (int j = 0; j < 4; ++j) {
      float* target = out + m * head_dim + lanes.first[j];
      const __m512 before = _mm512_maskz_loadu_ps(lanes.mask[j], target);
      const __m512 added = _mm512_fmadd_ps(_mm512_set1_ps(folded[m].factor), _mm512_cvtepi32_ps(sum[m][j]),
                                           _mm512_set1_ps(folded[m].base));
      _mm512_mask_storeu_ps(target, lanes.mask[j], _mm512_fmadd_ps(before, _mm512_set1_ps(shrink[m]), added));
    }
  }
}

template <int kBits, bool kVnni>
void accumulate_codes_all(const float* p, const float* shrink, const void* v_codes, const uint16_t* v_params,
                          int64_t query_count, int64_t head_dim, int64_t token_begin, int64_t token_end,
                          float* out) {
  using Block = void (*)(const int16_t*, const Folded*, const float*, const char*, int64_t, int64_t, int64_t,
                         int64_t, const char*, float*);
  static constexpr Block kBlock[] = {
      accumulate_codes_block<kBits, kVnni, 1>, accumulate_codes_block<kBits, kVnni, 2>,
      accumulate_codes_block<kBits, kVnni, 3>, accumulate_codes_block<kBits, kVnni, 4>,
      accumulate_codes_block<kBits, kVnni, 5>, accumulate_codes_block<kBits, kVnni, 6>};
  alignas(64) int16_t integers[kFoldBlock * kPageTokens];
  Folded folded[kFoldBlock];
  const Groups groups(v_params, kPageTokens, token_begin, token_end);
  prefetch(reinterpret_cast<const char*>(v_params) + kCodePrefetchBytes, 4 * kPageTokens);
  const int64_t line_bytes = 2 * line_words(kBits, head_dim);
  const int64_t line_begin = token_begin / 2;
  const int64_t line_count = (token_end + 1) / 2 - line_begin;
  for (int64_t begin = 0; begin < query_count; begin += kFoldBlock) {
    const int64_t count = query_count - begin < kFoldBlock ? query_count - begin : kFoldBlock;
    for (int64_t m = 0; m < count; ++m) {
      folded[m] = fold(kBits, groups, p + (begin + m) * kPageTokens, kPageTokens, integers + m * kPageTokens);
    }
    for (int64_t d = 0; d < head_dim; d += kCodeBlockLanes) {
      const char* codes =
          static_cast<const char*>(v_codes) + line_begin * line_bytes + 2 * line_words(kBits, d);
      const char* ahead =
          static_cast<const char*>(v_codes) + kPageTokens / 2 * 2 * line_words(kBits, d) + kCodePrefetchBytes;
      for (int64_t m = 0, rows; m < count; m += rows) {
        rows = next_rows(count - m);
        kBlock[rows - 1](integers + m * kPageTokens + 2 * line_begin, folded + m, shrink + begin + m, codes,
                         line_bytes, line_count, block_lanes(head_dim, d), head_dim,
                         begin + m == 0 ? ahead : codes, out + (begin + m) * head_dim + d);
      }
    }
  }
}

template <bool kVnni>
void accumulate_codes(int code_bits, const float* p, const float* shrink, const void* v_codes,
                      const uint16_t* v_params, int64_t query_count, int64_t head_dim, int64_t token_begin,
                      int64_t token_end, float* out) {
  const auto all = code_bits == 4 ? accumulate_codes_all<4, kVnni> : accumulate_codes_all<8, kVnni>;
  all(p, shrink, v_codes, v_params, query_count, head_dim, token_begin, token_end, out);
}

// Sixteen groups' parameters: code_params() of quantise.cpp, to the bit. Directed rounding of the conversion
// does what is stepped to there.
struct Params16 {
  __m256i scale;
  __m256i zero;
  __m512 inverse;
  __m512 zero_f32;
};

// poison: NaN where the group holds an infinity or a NaN.
inline Params16 code_params_x16(int code_bits, __m512 least, __m512 greatest, __m512 poison) {
  const __m512 half_max = _mm512_set1_ps(65504.0f);
  const __m512 none = _mm512_setzero_ps();
  const __mmask16 finite = _mm512_cmp_ps_mask(poison, poison, _CMP_ORD_Q) &
                           _mm512_cmp_ps_mask(_mm512_sub_ps(greatest, least),
                                              _mm512_set1_ps(std::numeric_limits<float>::max()), _CMP_LE_OQ);
  Params16 params;
  const __m512 bottom =
      _mm512_min_ps(_mm512_max_ps(_mm512_add_ps(least, none), _mm512_sub_ps(none, half_max)), half_max);
  params.zero = _mm512_cvtps_ph(bottom, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  params.zero_f32 = _mm512_cvtph_ps(params.zero);
  const __m512 top = _mm512_set1_ps(static_cast<float>((1 << code_bits) - 1));
  const __m512 step = _mm512_div_ps(_mm512_max_ps(_mm512_sub_ps(greatest, params.zero_f32), none), top);
  params.scale = _mm512_cvtps_ph(_mm512_min_ps(step, half_max), _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC);
  const __m512 scale = _mm512_cvtph_ps(params.scale);
  params.inverse =
      _mm512_maskz_div_ps(finite & _mm512_cmp_ps_mask(scale, none, _CMP_GT_OQ), _mm512_set1_ps(1.0f), scale);
  params.scale = _mm256_maskz_mov_epi16(finite, params.scale);
  params.zero = _mm256_mask_mov_epi16(_mm256_set1_epi16(0x7e00), finite, params.zero);
  params.zero_f32 =
      _mm512_mask_mov_ps(_mm512_set1_ps(std::numeric_limits<float>::quiet_NaN()), finite, params.zero_f32);
  return params;
}

// code_of() of quantise.cpp: max_ps gives its second operand where the first is NaN.
inline __m512i code_x16(__m512 value, __m512 zero, __m512 inverse, __m512 top) {
  const __m512 code = _mm512_mul_ps(_mm512_sub_ps(value, zero), inverse);
  return _mm512_cvtps_epi32(_mm512_min_ps(_mm512_max_ps(code, _mm512_setzero_ps()), top));
}

// Sixteen elements in order.
template <typename D>
inline __m512 load_x16(const typename D::Element* p, __mmask16 mask);
template <>
inline __m512 load_x16<Float32>(const float* p, __mmask16 mask) {
  return _mm512_maskz_loadu_ps(mask, p);
}
template <>
inline __m512 load_x16<BFloat16>(const uint16_t* p, __mmask16 mask) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p)), 16));
}
template <>
inline __m512 load_x16<Float16>(const uint16_t* p, __mmask16 mask) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, p));
}

// Even elements, then odd ones.
template <typename D>
inline F32x32 load_even_odd(const typename D::Element* p, __mmask32 mask) {
  const F32x32 x = D::load(p, mask);
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  return {_mm512_permutex2var_ps(x.first, even, x.second), _mm512_permutex2var_ps(x.first, odd, x.second)};
}
template <>
inline F32x32 load_even_odd<BFloat16>(const uint16_t* p, __mmask32 mask) {
  return BFloat16::load(p, mask);
}

inline __m512i interleave_u16x32(__m256i even, __m256i odd) {
  return _mm512_or_si512(_mm512_cvtepu16_epi32(even), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
}

// Transposes 16 x 16, as transpose_block does 8 x 8.
inline void transpose_x16(__m512i (&row)[16]) {
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  for (int round = 0; round < 4; ++round) {
    __m512i mixed[16];
    for (int i = 0; i < 8; ++i) {
      mixed[2 * i] = _mm512_permutex2var_epi32(row[i], low, row[i + 8]);
      mixed[2 * i + 1] = _mm512_permutex2var_epi32(row[i], high, row[i + 8]);
    }
    for (int i = 0; i < 16; ++i) row[i] = mixed[i];
  }
}

// 32 channels at a time, so that what is read twice stays in L1.
template <int kBits, typename D>
void quantise_k_all(const void* source, int64_t token_stride, int64_t head_dim, void* k_codes,
                    uint16_t* k_params) {
  constexpr int64_t kStep = kPageTokens * kBits / 16;
  constexpr int64_t kLineBytes = 2 * line_words(kBits, kPageTokens);
  const __m512 top = _mm512_set1_ps(static_cast<float>((1 << kBits) - 1));
  for (int64_t d = 0; d < head_dim; d += 32) {
    const __mmask32 mask = mask_of(head_dim - d);
    const auto* elements = static_cast<const typename D::Element*>(source) + d;
    __m512 least[2], greatest[2], poison[2];
    for (int m = 0; m < 2; ++m) {
      least[m] = _mm512_set1_ps(kInfinity);
      greatest[m] = _mm512_set1_ps(-kInfinity);
      poison[m] = _mm512_setzero_ps();
    }
    for (int64_t t = 0; t < kPageTokens; ++t) {
      const F32x32 x = load_even_odd<D>(elements + t * token_stride, mask);
      least[0] = _mm512_min_ps(least[0], x.first);
      least[1] = _mm512_min_ps(least[1], x.second);
      greatest[0] = _mm512_max_ps(greatest[0], x.first);
      greatest[1] = _mm512_max_ps(greatest[1], x.second);
      poison[0] = _mm512_fmadd_ps(x.first, _mm512_setzero_ps(), poison[0]);
      poison[1] = _mm512_fmadd_ps(x.second, _mm512_setzero_ps(), poison[1]);
    }
    const Params16 even = code_params_x16(kBits, least[0], greatest[0], poison[0]);
    const Params16 odd = code_params_x16(kBits, least[1], greatest[1], poison[1]);
    _mm512_mask_storeu_epi16(k_params + d, mask, interleave_u16x32(even.scale, odd.scale));
    _mm512_mask_storeu_epi16(k_params + head_dim + d, mask, interleave_u16x32(even.zero, odd.zero));
    for (int64_t i = 0; i < kStep; i += 16) {
      __m512i words[16];
      for (int64_t r = 0; r < 16; ++r) {
        words[r] = _mm512_setzero_si512();
        CSD_UNROLL
        for (int j = 0; j < 16 / kBits; ++j) {
          const F32x32 x = load_even_odd<D>(elements + (i + r + kStep * j) * token_stride, mask);
          const __m512i first = code_x16(x.first, even.zero_f32, even.inverse, top);
          const __m512i second = code_x16(x.second, odd.zero_f32, odd.inverse, top);
          words[r] = _mm512_or_si512(words[r], _mm512_slli_epi32(first, kBits * j));
          words[r] = _mm512_or_si512(words[r], _mm512_slli_epi32(second, 16 + kBits * j));
        }
      }
      transpose_x16(words);
      char* line = static_cast<char*>(k_codes) + d / 2 * kLineBytes + 4 * i;
      for (int64_t c = 0; c < 16 && 2 * c < head_dim - d; ++c) {
        _mm512_storeu_si512(line + c * kLineBytes, words[c]);
      }
    }
  }
}

template <int kBits>
void quantise_k_of(DType source_dtype, const void* source, int64_t token_stride, int64_t head_dim,
                   void* k_codes, uint16_t* k_params) {
  switch (source_dtype) {
    case DType::kFloat32:
      return quantise_k_all<kBits, Float32>(source, token_stride, head_dim, k_codes, k_params);
    case DType::kBFloat16:
      return quantise_k_all<kBits, BFloat16>(source, token_stride, head_dim, k_codes, k_params);
    case DType::kFloat16:
      return quantise_k_all<kBits, Float16>(source, token_stride, head_dim, k_codes, k_params);
  }
}

void quantise_k(int code_bits, DType source_dtype, const void* source, int64_t token_stride, int64_t head_dim,
                void* k_codes, uint16_t* k_params) {
  const auto of = code_bits == 4 ? quantise_k_of<4> : quantise_k_of<8>;
  of(source_dtype, source, token_stride, head_dim, k_codes, k_params);
}

template <int kBits, typename D>
void quantise_v_all(const void* source, int64_t token_stride, int64_t head_dim, void* v_codes,
                    uint16_t* v_params) {
  const auto* elements = static_cast<const typename D::Element*>(source);
  alignas(64) float least[kPageTokens];
  alignas(64) float greatest[kPageTokens];
  alignas(64) float poison[kPageTokens];
  for (int64_t t = 0; t < kPageTokens; ++t) {
    __m512 low = _mm512_set1_ps(kInfinity);
    __m512 high = _mm512_set1_ps(-kInfinity);
    __m512 nan = _mm512_setzero_ps();
    for (int64_t d = 0; d < head_dim; d += 16) {
      const __mmask16 mask = first_half(mask_of(head_dim - d));
      const __m512 x = load_x16<D>(elements + t * token_stride + d, mask);
      low = _mm512_mask_min_ps(low, mask, low, x);
      high = _mm512_mask_max_ps(high, mask, high, x);
      nan = _mm512_fmadd_ps(x, _mm512_setzero_ps(), nan);
    }
    least[t] = _mm512_reduce_min_ps(low);
    greatest[t] = _mm512_reduce_max_ps(high);
    poison[t] = _mm512_reduce_add_ps(nan);
  }
  alignas(64) float zero[kPageTokens];
  alignas(64) float inverse[kPageTokens];
  for (int64_t t = 0; t < kPageTokens; t += 16) {
    const Params16 params = code_params_x16(kBits, _mm512_load_ps(least + t), _mm512_load_ps(greatest + t),
                                            _mm512_load_ps(poison + t));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(v_params + t), params.scale);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(v_params + kPageTokens + t), params.zero);
    _mm512_store_ps(zero + t, params.zero_f32);
    _mm512_store_ps(inverse + t, params.inverse);
  }
  const __m512 top = _mm512_set1_ps(static_cast<float>((1 << kBits) - 1));
  for (int64_t t = 0; t < kPageTokens; t += 2) {
    char* line = static_cast<char*>(v_codes) + t * line_words(kBits, head_dim);
    for (int64_t d = 0; d < head_dim; d += kCodeBlockLanes) {
      const CodeLanes<kBits> lanes(block_lanes(head_dim, d));
      __m512i words[kBits / 4];
      CSD_UNROLL
      for (int a = 0; a < kBits / 4; ++a) words[a] = _mm512_setzero_si512();
      CSD_UNROLL
      for (int member = 0; member < 2; ++member) {
        const auto* token = elements + (t + member) * token_stride + d;
        const __m512 zeros = _mm512_set1_ps(zero[t + member]);
        const __m512 inverses = _mm512_set1_ps(inverse[t + member]);
        CSD_UNROLL
        for (int j = 0; j < 4; ++j) {
          const __m512i code =
              code_x16(load_x16<D>(token + lanes.first[j], lanes.mask[j]), zeros, inverses, top);
          __m512i& word = words[j % (kBits / 4)];
          word = _mm512_or_si512(word, _mm512_slli_epi32(code, 16 * member + kBits * (j / (kBits / 4))));
        }
      }
      CSD_UNROLL
      for (int a = 0; a < kBits / 4; ++a) {
        _mm512_mask_storeu_epi32(line + 2 * line_words(kBits, d) + 64 * a, lanes.mask[a], words[a]);
      }
    }
  }
}

template <int kBits>
void quantise_v_of(DType source_dtype, const void* source, int64_t token_stride, int64_t head_dim,
                   void* v_codes, uint16_t* v_params) {
  switch (source_dtype) {
    case DType::kFloat32:
      return quantise_v_all<kBits, Float32>(source, token_stride, head_dim, v_codes, v_params);
    case DType::kBFloat16:
      return quantise_v_all<kBits, BFloat16>(source, token_stride, head_dim, v_codes, v_params);
    case DType::kFloat16:
      return quantise_v_all<kBits, Float16>(source, token_stride, head_dim, v_codes, v_params);
  }
}

void quantise_v(int code_bits, DType source_dtype, const void* source, int64_t token_stride, int64_t head_dim,
                void* v_codes, uint16_t* v_params) {
  const auto of = code_bits == 4 ? quantise_v_of<4> : quantise_v_of<8>;
  of(source_dtype, source, token_stride, head_dim, v_codes, v_params);
}

template <int kBits>
void dequantise_k_all(const void* k_codes, const uint16_t* k_params, int64_t head_dim, int64_t token_begin,
                      int64_t token_count, DType target_dtype, int64_t token_stride, void* target) {
  constexpr int64_t kStep = kPageTokens * kBits / 16;
  constexpr int64_t kLineBytes = 2 * line_words(kBits, kPageTokens);
  const __m512i top = _mm512_set1_epi32((1 << kBits) - 1);
  const Groups groups(k_params, head_dim, 0, head_dim);
  for (int64_t d = 0; d < head_dim; d += 32) {
    const int64_t channel_count = head_dim - d < 32 ? head_dim - d : 32;
    const F32x32 scale = load_even_odd<Float32>(groups.scale + d, mask_of(channel_count));
    const F32x32 zero = load_even_odd<Float32>(groups.zero + d, mask_of(channel_count));
    for (int64_t i = 0; i < kStep; i += 16) {
      const char* line = static_cast<const char*>(k_codes) + d / 2 * kLineBytes + 4 * i;
      __m512i words[16];
      for (int64_t c = 0; c < 16; ++c) {
        words[c] = 2 * c < channel_count ? _mm512_loadu_si512(line + c * kLineBytes) : _mm512_setzero_si512();
      }
      transpose_x16(words);
      for (int64_t r = 0; r < 16; ++r) {
        for (int j = 0; j < 16 / kBits; ++j) {
          const int64_t token = i + r + kStep * j - token_begin;
          if (token < 0 || token >= token_count) continue;
          const auto even = _mm512_and_si512(_mm512_srli_epi32(words[r], kBits * j), top);
          const auto odd = _mm512_and_si512(_mm512_srli_epi32(words[r], 16 + kBits * j), top);
          alignas(64) float values[32];
          store_f32x32(
              values, ~__mmask32{0},
              BFloat16::ordered({_mm512_fmadd_ps(scale.first, _mm512_cvtepi32_ps(even), zero.first),
                                 _mm512_fmadd_ps(scale.second, _mm512_cvtepi32_ps(odd), zero.second)}));
          store(target_dtype, values, 1.0f, channel_count,
                static_cast<char*>(target) + (token * token_stride + d) * element_bytes(target_dtype));
        }
      }
    }
  }
}

void dequantise_k(int code_bits, const void* k_codes, const uint16_t* k_params, int64_t head_dim,
                  int64_t token_begin, int64_t token_count, DType target_dtype, int64_t token_stride,
                  void* target) {
  const auto all = code_bits == 4 ? dequantise_k_all<4> : dequantise_k_all<8>;
  all(k_codes, k_params, head_dim, token_begin, token_count, target_dtype, token_stride, target);
}

template <int kBits>
void dequantise_v_all(const void* v_codes, const uint16_t* v_params, int64_t head_dim, int64_t token_begin,
                      int64_t token_count, DType target_dtype, int64_t token_stride, void* target) {
  constexpr int kRegisters = kBits / 4;  // of codes, before they expand
  const __m512i top = _mm512_set1_epi32((1 << kBits) - 1);
  const Groups groups(v_params, kPageTokens, 0, kPageTokens);
  for (int64_t i = 0; i < token_count; ++i) {
    const int64_t t = token_begin + i;
    const auto* line = static_cast<const char*>(v_codes) + t / 2 * 2 * line_words(kBits, head_dim);
    const __m512 scale = _mm512_set1_ps(groups.scale[t]);
    const __m512 zero = _mm512_set1_ps(groups.zero[t]);
    alignas(64) float values[kHeadDimMax];
    for (int64_t d = 0; d < head_dim; d += kCodeBlockLanes) {
      const CodeLanes<kBits> lanes(block_lanes(head_dim, d));
      for (int j = 0; j < 4; ++j) {
        const __m512i words =
            _mm512_maskz_loadu_epi32(lanes.mask[j], line + 2 * line_words(kBits, d) + 64 * (j % kRegisters));
        const auto shift = static_cast<unsigned>(16 * (t & 1) + kBits * (j / kRegisters));
        const __m512i code = _mm512_and_si512(_mm512_srli_epi32(words, shift), top);
        _mm512_mask_storeu_ps(values + d + lanes.first[j], lanes.mask[j],
                              _mm512_fmadd_ps(scale, _mm512_cvtepi32_ps(code), zero));
      }
    }
    store(target_dtype, values, 1.0f, head_dim,
          static_cast<char*>(target) + i * token_stride * element_bytes(target_dtype));
  }
}

void dequantise_v(int code_bits, const void* v_codes, const uint16_t* v_params, int64_t head_dim,
                  int64_t token_begin, int64_t token_count, DType target_dtype, int64_t token_stride,
                  void* target) {
  const auto all = code_bits == 4 ? dequantise_v_all<4> : dequantise_v_all<8>;
  all(v_codes, v_params, head_dim, token_begin, token_count, target_dtype, token_stride, target);
}

// ---- quantised rows of weights ----

// How far behind the rows in use the next ones are fetched. With 3072 features from memory int8 reads 41 GB/s
// with 16 KiB on a Zen 5 core, 36 with 8 or 24, 34 with 0; without any 13.
constexpr int64_t kWeightPrefetchBytes = 16 * 1024;

// Groups whose parameters are widened at a time: a register of them.
constexpr int64_t kWeightBatch = 8;

// Scale and zero, in turn, of groups [0, count), count <= kWeightBatch; the others are not touched.
inline void load_weight_params(const uint8_t* pairs, int64_t count, float* params) {
  const __mmask16 mask = first_half(mask_of(2 * count));
  _mm512_store_ps(params, _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, pairs)));
}

// What one group's codes stand for, `part` by part: 16 features each, in order.
template <int kBits>
struct GroupValues;

template <>
struct GroupValues<8> {
  __m512 scale;
  __m512 zero;

  GroupValues() = default;
  explicit GroupValues(const float* params)
      : scale(_mm512_set1_ps(params[0])), zero(_mm512_set1_ps(params[1])) {}
  __m512 part(const uint8_t* codes, int j) const {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + 16 * j));
    return _mm512_fmadd_ps(scale, _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes)), zero);
  }
};

// The sixteen values that there can be are computed, and chosen by code: an index's upper bits do not count.
template <>
struct GroupValues<4> {
  __m512 values;

  GroupValues() = default;
  explicit GroupValues(const float* params) {
    const __m512 code = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    values = _mm512_fmadd_ps(_mm512_set1_ps(params[0]), code, _mm512_set1_ps(params[1]));
  }
  __m512 part(const uint8_t* codes, int j) const {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + 16 * (j % 2)));
    const __m512i pair = _mm512_cvtepu8_epi32(bytes);
    return _mm512_permutexvar_ps(j < 2 ? pair : _mm512_srli_epi32(pair, 4), values);
  }
};

template <int kBits, typename D>
void quantise_weight_all(const void* source, int64_t in_features, uint8_t* row) {
  const auto* elements = static_cast<const typename D::Element*>(source);
  const int64_t group_count = weight_group_count(in_features);
  const int64_t params_offset = weight_params_offset(kBits, in_features);
  const __m512 top = _mm512_set1_ps(static_cast<float>((1 << kBits) - 1));
  for (int64_t begin = 0; begin < group_count; begin += 16) {
    const int64_t count = group_count - begin < 16 ? group_count - begin : 16;
    alignas(64) float least[16] = {};
    alignas(64) float greatest[16] = {};
    alignas(64) float poison[16] = {};
    for (int64_t i = 0; i < count; ++i) {
      const int64_t first = (begin + i) * kWeightGroup;
      __m512 low = _mm512_set1_ps(kInfinity);
      __m512 high = _mm512_set1_ps(-kInfinity);
      __m512 nan = _mm512_setzero_ps();
      CSD_UNROLL
      for (int j = 0; j < 4; ++j) {
        const __mmask16 mask = first_half(mask_of(in_features - first - 16 * j));
        const __m512 x = load_x16<D>(elements + first + 16 * j, mask);
        low = _mm512_mask_min_ps(low, mask, low, x);
        high = _mm512_mask_max_ps(high, mask, high, x);
        nan = _mm512_fmadd_ps(x, _mm512_setzero_ps(), nan);
      }
      least[i] = _mm512_reduce_min_ps(low);
      greatest[i] = _mm512_reduce_max_ps(high);
      poison[i] = _mm512_reduce_add_ps(nan);
    }
    const Params16 params =
        code_params_x16(kBits, _mm512_load_ps(least), _mm512_load_ps(greatest), _mm512_load_ps(poison));
    const __m512i pairs = _mm512_or_si512(_mm512_cvtepu16_epi32(params.scale),
                                          _mm512_slli_epi32(_mm512_cvtepu16_epi32(params.zero), 16));
    _mm512_mask_storeu_epi32(row + params_offset + 4 * begin, first_half(mask_of(count)), pairs);
    alignas(64) float zero[16];
    alignas(64) float inverse[16];
    _mm512_store_ps(zero, params.zero_f32);
    _mm512_store_ps(inverse, params.inverse);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t first = (begin + i) * kWeightGroup;
      uint8_t* codes = row + (begin + i) * weight_group_bytes(kBits);
      __m512i code[4];
      CSD_UNROLL
      for (int j = 0; j < 4; ++j) {
        const __mmask16 mask = first_half(mask_of(in_features - first - 16 * j));
        const __m512 x = load_x16<D>(elements + first + 16 * j, mask);
        code[j] = _mm512_maskz_mov_epi32(
            mask, code_x16(x, _mm512_set1_ps(zero[i]), _mm512_set1_ps(inverse[i]), top));
      }
      CSD_UNROLL
      for (int j = 0; j < kBits / 2; ++j) {
        const __m512i bytes =
            kBits == 8 ? code[j] : _mm512_or_si512(code[j], _mm512_slli_epi32(code[(j + 2) % 4], 4));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + 16 * j), _mm512_cvtepi32_epi8(bytes));
      }
    }
  }
  const int64_t end = params_offset + 4 * group_count;
  std::memset(row + end, 0, static_cast<size_t>(weight_row_bytes(kBits, in_features) - end));
}

template <int kBits>
void quantise_weight_of(DType source_dtype, const void* source, int64_t in_features, uint8_t* row) {
  switch (source_dtype) {
    case DType::kFloat32:
      return quantise_weight_all<kBits, Float32>(source, in_features, row);
    case DType::kBFloat16:
      return quantise_weight_all<kBits, BFloat16>(source, in_features, row);
    case DType::kFloat16:
      return quantise_weight_all<kBits, Float16>(source, in_features, row);
  }
}

void quantise_weight_row(int code_bits, DType source_dtype, const void* source, int64_t in_features,
                         uint8_t* row) {
  const auto of = code_bits == 4 ? quantise_weight_of<4> : quantise_weight_of<8>;
  of(source_dtype, source, in_features, row);
}

template <int kBits, typename D>
void dequantise_weight_all(const uint8_t* row, int64_t in_features, void* target) {
  auto* elements = static_cast<typename D::Element*>(target);
  const int64_t group_count = weight_group_count(in_features);
  const uint8_t* pairs = row + weight_params_offset(kBits, in_features);
  for (int64_t begin = 0; begin < group_count; begin += kWeightBatch) {
    const int64_t end = begin + kWeightBatch < group_count ? begin + kWeightBatch : group_count;
    alignas(64) float params[2 * kWeightBatch];
    load_weight_params(pairs + 4 * begin, end - begin, params);
    for (int64_t g = begin; g < end; ++g) {
      const GroupValues<kBits> values(params + 2 * (g - begin));
      const uint8_t* codes = row + g * weight_group_bytes(kBits);
      const int64_t first = g * kWeightGroup;
      D::store(elements + first, mask_of(in_features - first),
               {values.part(codes, 0), values.part(codes, 1)});
      D::store(elements + first + 32, mask_of(in_features - first - 32),
               {values.part(codes, 2), values.part(codes, 3)});
    }
  }
}

template <int kBits>
void dequantise_weight_of(const uint8_t* row, int64_t in_features, DType target_dtype, void* target) {
  switch (target_dtype) {
    case DType::kFloat32:
      return dequantise_weight_all<kBits, Float32>(row, in_features, target);
    case DType::kBFloat16:
      return dequantise_weight_all<kBits, BFloat16>(row, in_features, target);
    case DType::kFloat16:
      return dequantise_weight_all<kBits, Float16>(row, in_features, target);
  }
}

void dequantise_weight_row(int code_bits, const uint8_t* row, int64_t in_features, DType target_dtype,
                           void* target) {
  const auto of = code_bits == 4 ? dequantise_weight_of<4> : dequantise_weight_of<8>;
  of(row, in_features, target_dtype, target);
}

// Rows of the weight that share a load of x: 4 take 1.2 to 1.4 of the products a second that 2 do, since x of
// several rows does not fit L1.
constexpr int kWeightRows = 4;

// kX rows of x by kRows adjacent rows of the weight. Each pair has sums of its own, as many as it takes to
// have eight in all: two multiply-adds begin every cycle, and each takes four.
template <int kBits, int kX, int kRows>
void weight_dots_block(const float* x, const uint8_t* rows, int64_t row_bytes, int64_t group_count,
                       float* out, int64_t out_stride) {
  constexpr int64_t kGroupBytes = weight_group_bytes(kBits);
  constexpr int kChains = kX * kRows >= 8 ? 1 : kX * kRows >= 4 ? 2 : 4;
  const int64_t x_stride = group_count * kWeightGroup;
  __m512 sum[kRows][kX][kChains];
  CSD_UNROLL
  for (int r = 0; r < kRows; ++r) {
    CSD_UNROLL
    for (int m = 0; m < kX; ++m) {
      CSD_UNROLL
      for (int c = 0; c < kChains; ++c) sum[r][m][c] = _mm512_setzero_ps();
    }
  }
  const int64_t params_offset = group_count * kGroupBytes;
  // What is fetched ahead goes up in memory without a gap, unlike what is read.
  const auto* ahead = reinterpret_cast<const char*>(rows) + kRows * row_bytes + kWeightPrefetchBytes;
  const int64_t ahead_step = kRows * row_bytes / group_count;
  for (int64_t begin = 0; begin < group_count; begin += kWeightBatch) {
    const int64_t end = begin + kWeightBatch < group_count ? begin + kWeightBatch : group_count;
    alignas(64) float params[kRows][2 * kWeightBatch];
    CSD_UNROLL
    for (int r = 0; r < kRows; ++r) {
      load_weight_params(rows + r * row_bytes + params_offset + 4 * begin, end - begin, params[r]);
    }
    for (int64_t g = begin; g < end; ++g) {
      const uint8_t* codes = rows + g * kGroupBytes;
      GroupValues<kBits> values[kRows];
      CSD_UNROLL
      for (int r = 0; r < kRows; ++r) values[r] = GroupValues<kBits>(params[r] + 2 * (g - begin));
      prefetch(ahead + g * ahead_step, kRows * (kGroupBytes + 4));
      CSD_UNROLL
      for (int j = 0; j < 4; ++j) {
        __m512 weights[kRows];
        CSD_UNROLL
        for (int r = 0; r < kRows; ++r) weights[r] = values[r].part(codes + r * row_bytes, j);
        CSD_UNROLL
        for (int m = 0; m < kX; ++m) {
          const __m512 x_part = _mm512_load_ps(x + m * x_stride + g * kWeightGroup + 16 * j);
          CSD_UNROLL
          for (int r = 0; r < kRows; ++r) {
            __m512& chain = sum[r][m][j % kChains];
            chain = _mm512_fmadd_ps(x_part, weights[r], chain);
          }
        }
      }
    }
  }
  CSD_UNROLL
  for (int r = 0; r < kRows; ++r) {
    CSD_UNROLL
    for (int m = 0; m < kX; ++m) {
      __m512 total = sum[r][m][0];
      CSD_UNROLL
      for (int c = 1; c < kChains; ++c) total = _mm512_add_ps(total, sum[r][m][c]);
      out[m * out_stride + r] = _mm512_reduce_add_ps(total);
    }
  }
}

template <int kBits, int kX>
void weight_dots_rows(const float* x, const uint8_t* rows, int64_t row_count, int64_t in_features, float* out,
                      int64_t out_stride) {
  const int64_t row_bytes = weight_row_bytes(kBits, in_features);
  const int64_t group_count = weight_group_count(in_features);
  int64_t n = 0;
  for (; n + kWeightRows <= row_count; n += kWeightRows) {
    weight_dots_block<kBits, kX, kWeightRows>(x, rows + n * row_bytes, row_bytes, group_count, out + n,
                                              out_stride);
  }
  for (; n < row_count; ++n) {
    weight_dots_block<kBits, kX, 1>(x, rows + n * row_bytes, row_bytes, group_count, out + n, out_stride);
  }
}

void weight_dots(int code_bits, const float* x, int64_t x_count, const uint8_t* rows, int64_t row_count,
                 int64_t in_features, float* out, int64_t out_stride) {
  using Rows = void (*)(const float*, const uint8_t*, int64_t, int64_t, float*, int64_t);
  static constexpr Rows kRows[2][kWeightDotsMax] = {
      {weight_dots_rows<4, 1>, weight_dots_rows<4, 2>, weight_dots_rows<4, 3>, weight_dots_rows<4, 4>,
       weight_dots_rows<4, 5>, weight_dots_rows<4, 6>},
      {weight_dots_rows<8, 1>, weight_dots_rows<8, 2>, weight_dots_rows<8, 3>, weight_dots_rows<8, 4>,
       weight_dots_rows<8, 5>, weight_dots_rows<8, 6>}};
  kRows[code_bits == 8][x_count - 1](x, rows, row_count, in_features, out, out_stride);
}

}  // namespace

CSD_TARGET_END

const Kernels kAvx512Kernels = {
    "avx512",
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
    score_codes<false>,
    accumulate_codes<false>,
    quantise_k,
    quantise_v,
    dequantise_k,
    dequantise_v,
    quantise_weight_row,
    dequantise_weight_row,
    weight_dots,
};

const Kernels kAvx512VnniKernels = {
    "avx512vnni",
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
    score_codes<true>,
    accumulate_codes<true>,
    quantise_k,
    quantise_v,
    dequantise_k,
    dequantise_v,
    quantise_weight_row,
    dequantise_weight_row,
    weight_dots,
};

}  // namespace csd

#endif  // __x86_64__
