// The kernels for AVX2, FMA and F16C. Elements go in groups of 16: two registers of fp32.
#if defined(__x86_64__)

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

CSD_TARGET_BEGIN("avx2,fma,f16c")

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

constexpr int64_t kGroup = 16;

// Queries whose sums stay in registers while K or V streams by: 6 rows x 2 registers of the 16.
constexpr int64_t kRowBlock = 6;

// Of codes 4 rows: their products need registers of their own before they are added.
constexpr int64_t kCodeRowBlock = 4;

// How far ahead of its use a tile is fetched (into L1, as in avx512.cpp); where K, V and the next tile are
// adjacent this runs on into them. Chosen for AVX-512; here it takes bf16 decode from 0.38 of the core's
// plain read to 0.60.
template <typename Element>
constexpr int64_t kPrefetchBytes = (sizeof(Element) == 2 ? 32 : 16) * 1024;

// The same for codes.
constexpr int64_t kCodePrefetchBytes = 32 * 1024;

struct F32x16 {
  __m256 first;
  __m256 second;
};

inline F32x16 zero_f32x16() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }

// Of a group that is not whole only the first 8 elements are touched in memory.

template <bool kWhole>
inline F32x16 load_f32x16(const float* p) {
  return {_mm256_loadu_ps(p), kWhole ? _mm256_loadu_ps(p + 8) : _mm256_setzero_ps()};
}

template <bool kWhole>
inline void store_f32x16(float* p, F32x16 x) {
  _mm256_storeu_ps(p, x.first);
  if (kWhole) _mm256_storeu_ps(p + 8, x.second);
}

inline __m128i load_u16x8(const uint16_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }

inline void store_u16x16(uint16_t* p, __m256i x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x); }

inline __m256i round_to_bf16(__m256 x) {  // in the low half of each 32 bits
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i high = _mm256_srli_epi32(bits, 16);
  const __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
  const __m256i rounded =
      _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, odd), _mm256_set1_epi32(0x7fff)), 16);
  const __m256i quiet_nan = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(rounded, quiet_nan, is_nan);
}

// Each dtype: `load` widens a group exactly, in whatever order is cheapest; `ordered` puts what was computed
// from it back in the elements' order; `store` narrows a whole group that is in order.

struct Float32 {
  using Element = float;
  template <bool kWhole>
  static F32x16 load(const float* p) {
    return load_f32x16<kWhole>(p);
  }
  static F32x16 ordered(F32x16 x) { return x; }
  static void store(float* p, F32x16 x) { store_f32x16<true>(p, x); }
};

struct BFloat16 {
  using Element = uint16_t;
  // Even elements, then odd ones: a shift and an AND, where keeping the order would take two shuffles more.
  template <bool kWhole>
  static F32x16 load(const uint16_t* p) {
    const __m256i pairs = kWhole ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))
                                 : _mm256_zextsi128_si256(load_u16x8(p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)),
            _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xffff0000))))};
  }
  static F32x16 ordered(F32x16 x) {
    const __m256 low = _mm256_unpacklo_ps(x.first, x.second);   // elements 0..3 and 8..11
    const __m256 high = _mm256_unpackhi_ps(x.first, x.second);  // elements 4..7 and 12..15
    return {_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31)};
  }
  static void store(uint16_t* p, F32x16 x) {
    const __m256i mixed = _mm256_packus_epi32(round_to_bf16(x.first), round_to_bf16(x.second));
    store_u16x16(p, _mm256_permute4x64_epi64(mixed, 0xd8));
  }
};

struct Float16 {
  using Element = uint16_t;
  template <bool kWhole>
  static F32x16 load(const uint16_t* p) {
    return {_mm256_cvtph_ps(load_u16x8(p)),
            kWhole ? _mm256_cvtph_ps(load_u16x8(p + 8)) : _mm256_setzero_ps()};
  }
  static F32x16 ordered(F32x16 x) { return x; }
  static void store(uint16_t* p, F32x16 x) {
    store_u16x16(p, _mm256_set_m128i(_mm256_cvtps_ph(x.second, _MM_FROUND_TO_NEAREST_INT),
                                     _mm256_cvtps_ph(x.first, _MM_FROUND_TO_NEAREST_INT)));
  }
};

// Rows of the next block when `row_count` rows are left. Blocks are even: 8 rows go 4 + 4 and not 6 + 2.
inline int64_t next_rows(int64_t row_count, int64_t row_block = kRowBlock) {
  const int64_t block_count = (row_count + row_block - 1) / row_block;
  return (row_count + block_count - 1) / block_count;
}

// kRows queries x the 16 tokens that begin at k_tile.
template <typename D, int kRows>
void score_block(const float* q, const typename D::Element* k, int64_t head_dim, const char* ahead,
                 float* scores) {
  F32x16 sum[kRows];
  CSD_UNROLL
  for (int m = 0; m < kRows; ++m) sum[m] = zero_f32x16();
  for (int64_t d = 0; d < head_dim; ++d, k += kPageTokens) {
    _mm_prefetch(ahead + d * kGroup * sizeof(*k), _MM_HINT_T0);
    const F32x16 k_group = D::template load<true>(k);
    CSD_UNROLL
    for (int m = 0; m < kRows; ++m) {
      const __m256 weight = _mm256_set1_ps(q[m * head_dim + d]);
      sum[m].first = _mm256_fmadd_ps(weight, k_group.first, sum[m].first);
      sum[m].second = _mm256_fmadd_ps(weight, k_group.second, sum[m].second);
    }
  }
  CSD_UNROLL
  for (int m = 0; m < kRows; ++m) store_f32x16<true>(scores + m * kPageTokens, D::ordered(sum[m]));
}

// Tokens outside, queries inside: 16 tokens of K stay in L1 while hundreds of queries pass. What is fetched
// ahead goes up in memory without a gap, unlike what is read.
template <typename D>
void score_all(const float* q, const void* k_tile, int64_t query_count, int64_t head_dim, float* scores) {
  using Block = void (*)(const float*, const typename D::Element*, int64_t, const char*, float*);
  static constexpr Block kBlock[] = {score_block<D, 1>, score_block<D, 2>, score_block<D, 3>,
                                     score_block<D, 4>, score_block<D, 5>, score_block<D, 6>};
  const auto* k = static_cast<const typename D::Element*>(k_tile);
  for (int64_t t = 0; t < kPageTokens; t += kGroup) {
    const char* ahead = reinterpret_cast<const char*>(k + t * head_dim) + kPrefetchBytes<typename D::Element>;
    for (int64_t m = 0, rows; m < query_count; m += rows) {
      rows = next_rows(query_count - m);
      kBlock[rows - 1](q + m * head_dim, k + t, head_dim, ahead, scores + m * kPageTokens + t);
      ahead = reinterpret_cast<const char*>(k);  // from here on these tokens are in the cache
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

// exp(x) for x <= 0, within 1.2e-7 of it relatively; a NaN stays one. x = n ln 2 + r and exp(r) by a minimax
// polynomial (3.7e-9), in Estrin's order: a row's softmax waits for it twice. Below ln(FLT_MIN) the result is
// 0: subnormals would be slow in what follows and weigh nothing beside the maximum's 1.
inline __m256 exp_f32x8(__m256 x) {
  const __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)),
                                   _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  // ln 2 in two parts: n times the first is exact.
  __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), x);
  r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), r);
  const __m256 r2 = _mm256_mul_ps(r, r);
  const __m256 low = _mm256_fmadd_ps(r, _mm256_set1_ps(1.666652113e-1f), _mm256_set1_ps(4.999999404e-1f));
  __m256 high = _mm256_fmadd_ps(r, _mm256_set1_ps(8.368745446e-3f), _mm256_set1_ps(4.166838899e-2f));
  high = _mm256_fmadd_ps(r2, _mm256_set1_ps(1.381453942e-3f), high);
  const __m256 y = _mm256_fmadd_ps(_mm256_fmadd_ps(high, r2, low), r2, r);  // exp(r) - 1
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  const __m256 power = _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));  // 2^n
  const __m256 normal = _mm256_cmp_ps(x, _mm256_set1_ps(-87.336544f), _CMP_NLT_UQ);
  return _mm256_and_ps(normal, _mm256_mul_ps(_mm256_add_ps(y, _mm256_set1_ps(1.0f)), power));
}

// Cephes tanhf: an odd polynomial near 0, where 1 - exp would cancel, and exp elsewhere.
inline __m256 tanh_f32x8(__m256 x) {
  const __m256 one = _mm256_set1_ps(1.0f);
  const __m256 sign = _mm256_and_ps(x, _mm256_set1_ps(-0.0f));
  const __m256 magnitude = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x);
  const __m256 e = exp_f32x8(_mm256_mul_ps(magnitude, _mm256_set1_ps(-2.0f)));
  const __m256 large = _mm256_div_ps(_mm256_sub_ps(one, e), _mm256_add_ps(one, e));

  const __m256 z = _mm256_mul_ps(x, x);
  __m256 y = _mm256_set1_ps(-5.70498872745e-3f);
  y = _mm256_fmadd_ps(y, z, _mm256_set1_ps(2.06390887954e-2f));
  y = _mm256_fmadd_ps(y, z, _mm256_set1_ps(-5.37397155531e-2f));
  y = _mm256_fmadd_ps(y, z, _mm256_set1_ps(1.33314422036e-1f));
  y = _mm256_fmadd_ps(y, z, _mm256_set1_ps(-3.33332819422e-1f));
  const __m256 small = _mm256_fmadd_ps(_mm256_mul_ps(y, z), x, x);

  const __m256 is_small = _mm256_cmp_ps(magnitude, _mm256_set1_ps(0.625f), _CMP_LT_OQ);
  return _mm256_blendv_ps(_mm256_or_ps(large, sign), small, is_small);
}

inline float reduce_max(__m256 x) {
  __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = _mm_max_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
}

inline float reduce_add(__m256 x) {
  __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = _mm_add_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
}

float softmax_row(float* scores, const ScoreModifier& modifier, SoftmaxState* state) {
  const __m256 minus_infinity = _mm256_set1_ps(-kInfinity);
  const __m256 lane = _mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256 range_begin = _mm256_set1_ps(static_cast<float>(modifier.token_begin));
  const __m256 range_end = _mm256_set1_ps(static_cast<float>(modifier.token_end));

  // max_ps gives its second operand when the first is NaN, so row_max is that of the numbers.
  __m256 max = minus_infinity;
  __m256 nan = _mm256_setzero_ps();
  for (int64_t t = 0; t < kPageTokens; t += 8) {
    __m256 s = _mm256_load_ps(scores + t);
    if (modifier.softcap != 0.0f) {
      const __m256 cap = _mm256_set1_ps(modifier.softcap);
      s = _mm256_mul_ps(cap, tanh_f32x8(_mm256_div_ps(s, cap)));
    }
    if (modifier.bias != nullptr) s = _mm256_add_ps(s, _mm256_loadu_ps(modifier.bias + t));
    const __m256 token = _mm256_add_ps(lane, _mm256_set1_ps(static_cast<float>(t)));
    if (modifier.alibi_slope != 0.0f) {
      const __m256 position = _mm256_add_ps(_mm256_set1_ps(modifier.alibi_offset), token);
      s = _mm256_fmadd_ps(_mm256_set1_ps(modifier.alibi_slope), position, s);
    }
    const __m256 in_range = _mm256_and_ps(_mm256_cmp_ps(token, range_begin, _CMP_GE_OQ),
                                          _mm256_cmp_ps(token, range_end, _CMP_LT_OQ));
    s = _mm256_blendv_ps(minus_infinity, s, in_range);
    max = _mm256_max_ps(s, max);
    nan = _mm256_or_ps(nan, _mm256_cmp_ps(s, s, _CMP_UNORD_Q));
    _mm256_store_ps(scores + t, s);
  }
  float row_max = reduce_max(max);
  if (row_max == -kInfinity && _mm256_movemask_ps(nan) == 0) {  // masked everywhere
    std::memset(scores, 0, kPageTokens * sizeof(float));
    return 1.0f;
  }
  // A NaN poisons the sum; where it stands alone the maximum is made finite, or the state would look empty.
  if (row_max == -kInfinity) row_max = std::numeric_limits<float>::lowest();

  const float new_max = row_max > state->max ? row_max : state->max;
  const bool moved = state->max != -kInfinity && state->max != new_max;
  const float shrink = moved ? _mm256_cvtss_f32(exp_f32x8(_mm256_set1_ps(state->max - new_max))) : 1.0f;
  __m256 sum = _mm256_setzero_ps();
  for (int64_t t = 0; t < kPageTokens; t += 8) {
    const __m256 probability = exp_f32x8(_mm256_sub_ps(_mm256_load_ps(scores + t), _mm256_set1_ps(new_max)));
    _mm256_store_ps(scores + t, probability);
    sum = _mm256_add_ps(sum, probability);
  }
  state->max = new_max;
  state->sum = state->sum * shrink + reduce_add(sum);
  return shrink;
}

// kRows queries x one group of channels.
template <typename D, int kRows, bool kWhole>
void accumulate_block(const float* p, const float* shrink, const typename D::Element* v, int64_t head_dim,
                      int64_t token_begin, int64_t token_end, const char* ahead, float* out) {
  F32x16 sum[kRows];
  CSD_UNROLL
  for (int m = 0; m < kRows; ++m) sum[m] = zero_f32x16();
  for (int64_t t = token_begin; t < token_end; ++t) {
    const auto* token = v + t * head_dim;
    _mm_prefetch(ahead + t * kGroup * sizeof(*v), _MM_HINT_T0);
    const F32x16 v_group = D::template load<kWhole>(token);
    CSD_UNROLL
    for (int m = 0; m < kRows; ++m) {
      const __m256 weight = _mm256_set1_ps(p[m * kPageTokens + t]);
      sum[m].first = _mm256_fmadd_ps(weight, v_group.first, sum[m].first);
      sum[m].second = _mm256_fmadd_ps(weight, v_group.second, sum[m].second);
    }
  }
  CSD_UNROLL
  for (int m = 0; m < kRows; ++m) {
    const __m256 factor = _mm256_set1_ps(shrink[m]);
    const F32x16 before = load_f32x16<kWhole>(out + m * head_dim);
    F32x16 after = D::ordered(sum[m]);
    after.first = _mm256_fmadd_ps(before.first, factor, after.first);
    after.second = _mm256_fmadd_ps(before.second, factor, after.second);
    store_f32x16<kWhole>(out + m * head_dim, after);
  }
}

template <typename D, bool kWhole>
void accumulate_group(const float* p, const float* shrink, const typename D::Element* v, int64_t query_count,
                      int64_t head_dim, int64_t token_begin, int64_t token_end, const char* ahead,
                      float* out) {
  using Block = void (*)(const float*, const float*, const typename D::Element*, int64_t, int64_t, int64_t,
                         const char*, float*);
  static constexpr Block kBlock[] = {accumulate_block<D, 1, kWhole>, accumulate_block<D, 2, kWhole>,
                                     accumulate_block<D, 3, kWhole>, accumulate_block<D, 4, kWhole>,
                                     accumulate_block<D, 5, kWhole>, accumulate_block<D, 6, kWhole>};
  for (int64_t m = 0, rows; m < query_count; m += rows) {
    rows = next_rows(query_count - m);
    kBlock[rows - 1](p + m * kPageTokens, shrink + m, v, head_dim, token_begin, token_end, ahead,
                     out + m * head_dim);
    ahead = reinterpret_cast<const char*>(v);  // from here on these channels are in the cache
  }
}

// Channels outside, queries inside, for the same reasons.
template <typename D>
void accumulate_all(const float* p, const float* shrink, const void* v_tile, int64_t query_count,
                    int64_t head_dim, int64_t token_begin, int64_t token_end, float* out) {
  const auto* v = static_cast<const typename D::Element*>(v_tile);
  for (int64_t d = 0; d < head_dim; d += kGroup) {
    const auto group = head_dim - d >= kGroup ? accumulate_group<D, true> : accumulate_group<D, false>;
    const char* ahead =
        reinterpret_cast<const char*>(v + d * kPageTokens) + kPrefetchBytes<typename D::Element>;
    group(p, shrink, v + d, query_count, head_dim, token_begin, token_end, ahead, out + d);
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

// The last, broken group of a plain row goes through a copy that is whole.
template <typename Element>
struct WholeGroup {
  Element elements[kGroup] = {};
  WholeGroup() = default;
  WholeGroup(const Element* from, int64_t count) { std::memcpy(elements, from, count * sizeof(Element)); }
};

inline void blend_group(const float* a, __m256 a_factor, const float* b, __m256 b_factor, float* out) {
  const F32x16 x = load_f32x16<true>(a);
  const F32x16 y = load_f32x16<true>(b);
  store_f32x16<true>(out, {_mm256_fmadd_ps(x.first, a_factor, _mm256_mul_ps(y.first, b_factor)),
                           _mm256_fmadd_ps(x.second, a_factor, _mm256_mul_ps(y.second, b_factor))});
}

void blend(const float* a, float a_weight, const float* b, float b_weight, int64_t count, float* out) {
  if (a_weight == 0.0f && b_weight == 0.0f) {
    std::memset(out, 0, count * sizeof(float));
    return;
  }
  const __m256 a_factor = _mm256_set1_ps(a_weight);
  const __m256 b_factor = _mm256_set1_ps(b_weight);
  const int64_t whole = count / kGroup * kGroup;
  for (int64_t i = 0; i < whole; i += kGroup) blend_group(a + i, a_factor, b + i, b_factor, out + i);
  if (whole == count) return;
  const WholeGroup<float> last_a(a + whole, count - whole);
  const WholeGroup<float> last_b(b + whole, count - whole);
  WholeGroup<float> last;
  blend_group(last_a.elements, a_factor, last_b.elements, b_factor, last.elements);
  std::memcpy(out + whole, last.elements, (count - whole) * sizeof(float));
}

template <typename D>
inline void load_group(const typename D::Element* in, __m256 factor, float* out) {
  const F32x16 x = D::ordered(D::template load<true>(in));
  store_f32x16<true>(out, {_mm256_mul_ps(x.first, factor), _mm256_mul_ps(x.second, factor)});
}

template <typename D>
void load_all(const void* in, float factor, int64_t count, float* out) {
  const auto* elements = static_cast<const typename D::Element*>(in);
  const __m256 factors = _mm256_set1_ps(factor);
  const int64_t whole = count / kGroup * kGroup;
  for (int64_t i = 0; i < whole; i += kGroup) load_group<D>(elements + i, factors, out + i);
  if (whole == count) return;
  const WholeGroup<typename D::Element> last_in(elements + whole, count - whole);
  WholeGroup<float> last;
  load_group<D>(last_in.elements, factors, last.elements);
  std::memcpy(out + whole, last.elements, (count - whole) * sizeof(float));
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
inline void store_group(const float* in, __m256 factor, typename D::Element* out) {
  const F32x16 x = load_f32x16<true>(in);
  D::store(out, {_mm256_mul_ps(x.first, factor), _mm256_mul_ps(x.second, factor)});
}

template <typename D>
void store_all(const float* in, float factor, int64_t count, void* out) {
  auto* elements = static_cast<typename D::Element*>(out);
  const __m256 factors = _mm256_set1_ps(factor);
  const int64_t whole = count / kGroup * kGroup;
  for (int64_t i = 0; i < whole; i += kGroup) store_group<D>(in + i, factors, elements + i);
  if (whole == count) return;
  const WholeGroup<float> last_in(in + whole, count - whole);
  WholeGroup<typename D::Element> last;
  store_group<D>(last_in.elements, factors, last.elements);
  std::memcpy(elements + whole, last.elements, (count - whole) * sizeof(typename D::Element));
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
  for (int half = 0; half < 8; half += 4) {
    __m256i row[4];  // row i and, in the upper lane, row i + 4: two blocks of 4 x 4 at once
    for (int i = 0; i < 4; ++i) {
      const auto* upper = reinterpret_cast<const __m128i*>(source + (i + 4) * source_stride + half);
      const auto* lower = reinterpret_cast<const __m128i*>(source + i * source_stride + half);
      row[i] = _mm256_set_m128i(_mm_loadu_si128(upper), _mm_loadu_si128(lower));
    }
    for (int round = 0; round < 2; ++round) {
      __m256i mixed[4];
      for (int i = 0; i < 2; ++i) {
        mixed[2 * i] = _mm256_unpacklo_epi32(row[i], row[i + 2]);
        mixed[2 * i + 1] = _mm256_unpackhi_epi32(row[i], row[i + 2]);
      }
      for (int i = 0; i < 4; ++i) row[i] = mixed[i];
    }
    for (int i = 0; i < 4; ++i) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(target + (half + i) * target_stride), row[i]);
    }
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
// in the mask.
struct Groups {
  alignas(32) float scale[kHeadDimMax];
  alignas(32) float zero[kHeadDimMax];
  alignas(32) float mask[kHeadDimMax];

  Groups(const uint16_t* params, int64_t count, int64_t begin, int64_t end) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    for (int64_t i = 0; i < count; i += 8) {
      const __m256i group = _mm256_add_epi32(lane, _mm256_set1_epi32(static_cast<int>(i)));
      const __m256i before = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(begin)), group);
      const __m256i inside =
          _mm256_andnot_si256(before, _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(end)), group));
      const __m256 mask_f32x8 = _mm256_castsi256_ps(inside);
      _mm256_store_ps(mask + i, mask_f32x8);
      _mm256_store_ps(scale + i, _mm256_and_ps(mask_f32x8, _mm256_cvtph_ps(load_u16x8(params + i))));
      _mm256_store_ps(zero + i, _mm256_and_ps(mask_f32x8, _mm256_cvtph_ps(load_u16x8(params + count + i))));
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

// Weights of groups outside the mask do not matter: their integers are 0. The integers are as large as int32
// sums over `count` products allow.
inline Folded fold(int code_bits, const Groups& groups, const float* weights, int64_t count,
                   int16_t* integers) {
  __m256 base = _mm256_setzero_ps();
  __m256 max = _mm256_setzero_ps();
  for (int64_t i = 0; i < count; i += 8) {
    const __m256 weight = _mm256_and_ps(_mm256_load_ps(groups.mask + i), _mm256_loadu_ps(weights + i));
    const __m256 scaled = _mm256_mul_ps(weight, _mm256_load_ps(groups.scale + i));
    base = _mm256_fmadd_ps(weight, _mm256_load_ps(groups.zero + i), base);
    max = _mm256_max_ps(max, _mm256_andnot_ps(_mm256_set1_ps(-0.0f), scaled));
  }
  const float integer_max = code_integer_max(code_bits, count);
  const float weight_max = reduce_max(max);
  // Below 1e-30 the reciprocal could overflow, and the products are nothing.
  const float inverse = weight_max > 1e-30f ? integer_max / weight_max : 0.0f;
  const float factor = weight_max * (1.0f / integer_max);
  const __m256 inverses = _mm256_set1_ps(inverse);
  const __m256 middle = _mm256_set1_ps(0.5f * static_cast<float>((1 << code_bits) - 1) * factor);
  for (int64_t i = 0; i < count; i += 8) {
    const __m256 scale = _mm256_mul_ps(_mm256_load_ps(groups.scale + i), inverses);
    const __m256 weight = _mm256_and_ps(_mm256_load_ps(groups.mask + i), _mm256_loadu_ps(weights + i));
    const __m256 scaled = _mm256_mul_ps(weight, scale);
    const __m256i integer = _mm256_cvtps_epi32(scaled);
    base = _mm256_fmadd_ps(_mm256_sub_ps(scaled, _mm256_cvtepi32_ps(integer)), middle, base);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(integers + i),
                     _mm_packs_epi32(_mm256_castsi256_si128(integer), _mm256_extracti128_si256(integer, 1)));
  }
  return {reduce_add(base), factor};
}

// A quarter of a block of `lanes` lanes: the two registers of codes that eight of a line's 32-bit words
// expand to.
constexpr int kQuarters = 4;
template <int kBits>
struct CodeLanes {
  int64_t word;      // the first of the eight
  int64_t count;     // of words that are there, 0 to 8
  int64_t first[2];  // lane of the register's first code
  int pair;          // of the codes in a 16-bit word: 0, or of int4 1

  CodeLanes(int64_t lanes, int quarter) {
    constexpr int kRegisters = kBits / 2;  // of words in a whole line
    const int64_t step = lanes * kBits / 16;
    pair = quarter / kRegisters;
    word = quarter % kRegisters * 8;
    count = step <= word ? 0 : step - word < 8 ? step - word : 8;
    for (int j = 0; j < 2; ++j) first[j] = (2 * pair + j) * step + word;
  }

  __m256i mask() const {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)),
                              _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
};

// kRows queries x a quarter of a block, over line_count lines.
template <int kBits, int kPair, int kRows>
inline __attribute__((always_inline)) void sum_codes(const int16_t* integers, int64_t integer_stride,
                                                     const char* codes, int64_t line_bytes,
                                                     int64_t line_count, const CodeLanes<kBits>& lanes,
                                                     const char* ahead, __m256i (&sum)[kRows][2]) {
  constexpr int64_t kQuarterBytes = 2 * line_words(kBits, kCodeBlockLanes) / kQuarters;
  const __m256i low = _mm256_set1_epi32(kBits == 4 ? 0x000f000f : 0x00ff00ff);
  const __m256i mask = lanes.mask();
  const bool whole = lanes.count == 8;
  CSD_UNROLL
  for (int m = 0; m < kRows; ++m) sum[m][0] = sum[m][1] = _mm256_setzero_si256();
  codes += 4 * lanes.word;
  for (int64_t s = 0; s < line_count; ++s, codes += line_bytes) {
    _mm_prefetch(ahead + s * kQuarterBytes, _MM_HINT_T0);
    const __m256i x = whole ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes))
                            : _mm256_maskload_epi32(reinterpret_cast<const int*>(codes), mask);
    const __m256i first = _mm256_and_si256(kPair == 0 ? x : _mm256_srli_epi16(x, 8), low);
    const __m256i high = _mm256_srli_epi16(x, kBits * (2 * kPair + 1));
    const __m256i second = kBits * (2 * kPair + 2) == 16 ? high : _mm256_and_si256(high, low);
    CSD_UNROLL
    for (int m = 0; m < kRows; ++m) {
      int32_t pair;
      std::memcpy(&pair, integers + m * integer_stride + 2 * s, sizeof(pair));
      const __m256i pairs = _mm256_set1_epi32(pair);
      sum[m][0] = _mm256_add_epi32(sum[m][0], _mm256_madd_epi16(first, pairs));
      sum[m][1] = _mm256_add_epi32(sum[m][1], _mm256_madd_epi16(second, pairs));
    }
  }
}

inline __m256 unfold(const Folded& folded, __m256i sum) {
  return _mm256_fmadd_ps(_mm256_set1_ps(folded.factor), _mm256_cvtepi32_ps(sum), _mm256_set1_ps(folded.base));
}

template <int kBits, int kPair, int kRows>
void score_codes_block(const int16_t* integers, const Folded* folded, const char* codes, int64_t head_dim,
                       const CodeLanes<kBits>& lanes, const char* ahead, float* scores) {
  __m256i sum[kRows][2];
  sum_codes<kBits, kPair, kRows>(integers, kHeadDimMax, codes, 2 * line_words(kBits, kPageTokens),
                                 head_dim / 2, lanes, ahead, sum);
  CSD_UNROLL
  for (int m = 0; m < kRows; ++m) {
    _mm256_storeu_ps(scores + m * kPageTokens + lanes.first[0], unfold(folded[m], sum[m][0]));
    _mm256_storeu_ps(scores + m * kPageTokens + lanes.first[1], unfold(folded[m], sum[m][1]));
  }
}

template <int kBits>
void score_codes_all(const float* q, const void* k_codes, const uint16_t* k_params, int64_t query_count,
                     int64_t head_dim, float* scores) {
  using Block = void (*)(const int16_t*, const Folded*, const char*, int64_t, const CodeLanes<kBits>&,
                         const char*, float*);
  static constexpr Block kBlock[2][kCodeRowBlock] = {
      {score_codes_block<kBits, 0, 1>, score_codes_block<kBits, 0, 2>, score_codes_block<kBits, 0, 3>,
       score_codes_block<kBits, 0, 4>},
      {score_codes_block<kBits, kBits == 4, 1>, score_codes_block<kBits, kBits == 4, 2>,
       score_codes_block<kBits, kBits == 4, 3>, score_codes_block<kBits, kBits == 4, 4>}};
  alignas(32) int16_t integers[kFoldBlock * kHeadDimMax];
  Folded folded[kFoldBlock];
  const Groups groups(k_params, head_dim, 0, head_dim);
  const auto* codes = static_cast<const char*>(k_codes);
  const int64_t quarter_bytes = head_dim / 2 * 2 * line_words(kBits, kPageTokens) / kQuarters;
  for (int64_t begin = 0; begin < query_count; begin += kFoldBlock) {
    const int64_t count = query_count - begin < kFoldBlock ? query_count - begin : kFoldBlock;
    for (int64_t m = 0; m < count; ++m) {
      folded[m] = fold(kBits, groups, q + (begin + m) * head_dim, head_dim, integers + m * kHeadDimMax);
    }
    for (int quarter = 0; quarter < kQuarters; ++quarter) {
      const CodeLanes<kBits> lanes(kPageTokens, quarter);
      const char* ahead = begin == 0 ? codes + quarter * quarter_bytes + kCodePrefetchBytes : codes;
      for (int64_t m = 0, rows; m < count; m += rows) {
        rows = next_rows(count - m, kCodeRowBlock);
        kBlock[lanes.pair][rows - 1](integers + m * kHeadDimMax, folded + m, codes, head_dim, lanes, ahead,
                                     scores + (begin + m) * kPageTokens);
        ahead = codes;  // from here on these tokens are in the cache
      }
    }
  }
}

void score_codes(int code_bits, const float* q, const void* k_codes, const uint16_t* k_params,
                 int64_t query_count, int64_t head_dim, float* scores) {
  const auto all = code_bits == 4 ? score_codes_all<4> : score_codes_all<8>;
  all(q, k_codes, k_params, query_count, head_dim, scores);
}

inline void accumulate_register(float* out, int64_t count, __m256i mask, float shrink, __m256 added) {
  const __m256 before = _mm256_maskload_ps(out, mask);
  const __m256 after = _mm256_fmadd_ps(before, _mm256_set1_ps(shrink), added);
  if (count == 8) {
    _mm256_storeu_ps(out, after);
  } else {
    _mm256_maskstore_ps(out, mask, after);  // slow on AMD processors
  }
}

// Token pairs of line_count lines x a quarter of a block of channels.
template <int kBits, int kPair, int kRows>
void accumulate_codes_block(const int16_t* integers, const Folded* folded, const float* shrink,
                            const char* codes, int64_t line_bytes, int64_t line_count,
                            const CodeLanes<kBits>& lanes, int64_t head_dim, const char* ahead, float* out) {
  __m256i sum[kRows][2];
  sum_codes<kBits, kPair, kRows>(integers, kPageTokens, codes, line_bytes, line_count, lanes, ahead, sum);
  const __m256i mask = lanes.mask();
  CSD_UNROLL
  for (int m = 0; m < kRows; ++m) {
    float* row = out + m * head_dim;
    accumulate_register(row + lanes.first[0], lanes.count, mask, shrink[m], unfold(folded[m], sum[m][0]));
    accumulate_register(row + lanes.first[1], lanes.count, mask, shrink[m], unfold(folded[m], sum[m][1]));
  }
}

template <int kBits>
void accumulate_codes_all(const float* p, const float* shrink, const void* v_codes, const uint16_t* v_params,
                          int64_t query_count, int64_t head_dim, int64_t token_begin, int64_t token_end,
                          float* out) {
  using Block = void (*)(const int16_t*, const Folded*, const float*, const char*, int64_t, int64_t,
                         const CodeLanes<kBits>&, int64_t, const char*, float*);
  static constexpr Block kBlock[2][kCodeRowBlock] = {
      {accumulate_codes_block<kBits, 0, 1>, accumulate_codes_block<kBits, 0, 2>,
       accumulate_codes_block<kBits, 0, 3>, accumulate_codes_block<kBits, 0, 4>},
      {accumulate_codes_block<kBits, kBits == 4, 1>, accumulate_codes_block<kBits, kBits == 4, 2>,
       accumulate_codes_block<kBits, kBits == 4, 3>, accumulate_codes_block<kBits, kBits == 4, 4>}};
  alignas(32) int16_t integers[kFoldBlock * kPageTokens];
  Folded folded[kFoldBlock];
  const Groups groups(v_params, kPageTokens, token_begin, token_end);
  const int64_t line_bytes = 2 * line_words(kBits, head_dim);
  const int64_t line_begin = token_begin / 2;
  const int64_t line_count = (token_end + 1) / 2 - line_begin;
  for (int64_t begin = 0; begin < query_count; begin += kFoldBlock) {
    const int64_t count = query_count - begin < kFoldBlock ? query_count - begin : kFoldBlock;
    for (int64_t m = 0; m < count; ++m) {
      folded[m] = fold(kBits, groups, p + (begin + m) * kPageTokens, kPageTokens, integers + m * kPageTokens);
    }
    for (int64_t d = 0; d < head_dim; d += kCodeBlockLanes) {
      const int64_t block_bytes = 2 * line_words(kBits, block_lanes(head_dim, d)) * kPageTokens / 2;
      const char* block = static_cast<const char*>(v_codes) + 2 * line_words(kBits, d) * kPageTokens / 2;
      const char* codes =
          static_cast<const char*>(v_codes) + line_begin * line_bytes + 2 * line_words(kBits, d);
      for (int quarter = 0; quarter < kQuarters; ++quarter) {
        const CodeLanes<kBits> lanes(block_lanes(head_dim, d), quarter);
        if (lanes.count == 0) continue;
        const char* ahead =
            begin == 0 ? block + quarter * (block_bytes / kQuarters) + kCodePrefetchBytes : codes;
        for (int64_t m = 0, rows; m < count; m += rows) {
          rows = next_rows(count - m, kCodeRowBlock);
          kBlock[lanes.pair][rows - 1](integers + m * kPageTokens + 2 * line_begin, folded + m,
                                       shrink + begin + m, codes, line_bytes, line_count, lanes, head_dim,
                                       ahead, out + (begin + m) * head_dim + d);
          ahead = codes;  // from here on these channels are in the cache
        }
      }
    }
  }
}

void accumulate_codes(int code_bits, const float* p, const float* shrink, const void* v_codes,
                      const uint16_t* v_params, int64_t query_count, int64_t head_dim, int64_t token_begin,
                      int64_t token_end, float* out) {
  const auto all = code_bits == 4 ? accumulate_codes_all<4> : accumulate_codes_all<8>;
  all(p, shrink, v_codes, v_params, query_count, head_dim, token_begin, token_end, out);
}

// Eight groups' parameters: code_params() of quantise.cpp, to the bit. Directed rounding of the conversion
// does what is stepped to there.
struct ParamsX8 {
  __m128i scale;
  __m128i zero;
  __m256 inverse;
  __m256 zero_f32;
};

// poison: NaN where the group holds an infinity or a NaN.
inline ParamsX8 code_params_x8(int code_bits, __m256 least, __m256 greatest, __m256 poison) {
  const __m256 half_max = _mm256_set1_ps(65504.0f);
  const __m256 none = _mm256_setzero_ps();
  const __m256 span_max = _mm256_set1_ps(std::numeric_limits<float>::max());
  const __m256 finite = _mm256_and_ps(_mm256_cmp_ps(poison, poison, _CMP_ORD_Q),
                                      _mm256_cmp_ps(_mm256_sub_ps(greatest, least), span_max, _CMP_LE_OQ));
  const __m128i finite_u16 = _mm_packs_epi32(_mm_castps_si128(_mm256_castps256_ps128(finite)),
                                             _mm_castps_si128(_mm256_extractf128_ps(finite, 1)));
  ParamsX8 params;
  const __m256 bottom =
      _mm256_min_ps(_mm256_max_ps(_mm256_add_ps(least, none), _mm256_sub_ps(none, half_max)), half_max);
  const __m128i zero = _mm256_cvtps_ph(bottom, _MM_FROUND_TO_NEG_INF);
  const __m256 zero_f32 = _mm256_cvtph_ps(zero);
  const __m256 top = _mm256_set1_ps(static_cast<float>((1 << code_bits) - 1));
  const __m256 step = _mm256_div_ps(_mm256_max_ps(_mm256_sub_ps(greatest, zero_f32), none), top);
  const __m128i scale = _mm256_cvtps_ph(_mm256_min_ps(step, half_max), _MM_FROUND_TO_POS_INF);
  const __m256 scale_f32 = _mm256_cvtph_ps(scale);
  const __m256 invertible = _mm256_and_ps(finite, _mm256_cmp_ps(scale_f32, none, _CMP_GT_OQ));
  params.inverse = _mm256_and_ps(invertible, _mm256_div_ps(_mm256_set1_ps(1.0f), scale_f32));
  params.scale = _mm_and_si128(finite_u16, scale);
  params.zero = _mm_blendv_epi8(_mm_set1_epi16(0x7e00), zero, finite_u16);
  params.zero_f32 =
      _mm256_blendv_ps(_mm256_set1_ps(std::numeric_limits<float>::quiet_NaN()), zero_f32, finite);
  return params;
}

// code_of() of quantise.cpp: max_ps gives its second operand where the first is NaN.
inline __m256i code_x8(__m256 value, __m256 zero, __m256 inverse, __m256 top) {
  const __m256 code = _mm256_mul_ps(_mm256_sub_ps(value, zero), inverse);
  return _mm256_cvtps_epi32(_mm256_min_ps(_mm256_max_ps(code, _mm256_setzero_ps()), top));
}

// Even elements, then odd ones.
template <typename D, bool kWhole>
inline F32x16 load_even_odd(const typename D::Element* p) {
  const F32x16 x = D::ordered(D::template load<kWhole>(p));
  const __m256d even = _mm256_castps_pd(_mm256_shuffle_ps(x.first, x.second, 0x88));
  const __m256d odd = _mm256_castps_pd(_mm256_shuffle_ps(x.first, x.second, 0xdd));
  return {_mm256_castpd_ps(_mm256_permute4x64_pd(even, 0xd8)),
          _mm256_castpd_ps(_mm256_permute4x64_pd(odd, 0xd8))};
}

inline __m256i interleave_u16x16(__m128i even, __m128i odd) {
  return _mm256_or_si256(_mm256_cvtepu16_epi32(even), _mm256_slli_epi32(_mm256_cvtepu16_epi32(odd), 16));
}

// 16 channels, or 8 where they are not whole.
template <int kBits, typename D, bool kWhole>
void quantise_k_channels(const typename D::Element* elements, int64_t token_stride, uint32_t* codes,
                         uint16_t* scale, uint16_t* zero) {
  constexpr int64_t kStep = kPageTokens * kBits / 16;
  constexpr int64_t kLineStride = line_words(kBits, kPageTokens) / 2;
  constexpr int64_t kPairs = kWhole ? 8 : 4;
  const __m256 top = _mm256_set1_ps(static_cast<float>((1 << kBits) - 1));
  const __m256 none = _mm256_setzero_ps();
  F32x16 least = {_mm256_set1_ps(kInfinity), _mm256_set1_ps(kInfinity)};
  F32x16 greatest = {_mm256_set1_ps(-kInfinity), _mm256_set1_ps(-kInfinity)};
  F32x16 poison = zero_f32x16();
  for (int64_t t = 0; t < kPageTokens; ++t) {
    const F32x16 x = load_even_odd<D, kWhole>(elements + t * token_stride);
    least = {_mm256_min_ps(least.first, x.first), _mm256_min_ps(least.second, x.second)};
    greatest = {_mm256_max_ps(greatest.first, x.first), _mm256_max_ps(greatest.second, x.second)};
    poison = {_mm256_fmadd_ps(x.first, none, poison.first), _mm256_fmadd_ps(x.second, none, poison.second)};
  }
  const ParamsX8 even = code_params_x8(kBits, least.first, greatest.first, poison.first);
  const ParamsX8 odd = code_params_x8(kBits, least.second, greatest.second, poison.second);
  alignas(32) uint16_t params[2][kGroup];
  store_u16x16(params[0], interleave_u16x16(even.scale, odd.scale));
  store_u16x16(params[1], interleave_u16x16(even.zero, odd.zero));
  std::memcpy(scale, params[0], 2 * kPairs * sizeof(uint16_t));
  std::memcpy(zero, params[1], 2 * kPairs * sizeof(uint16_t));
  for (int64_t i = 0; i < kStep; i += 8) {
    alignas(32) uint32_t words[8 * 8];  // [words of a line][pairs of channels]
    alignas(32) uint32_t lines[8 * 8];  // the other way round
    for (int64_t r = 0; r < 8; ++r) {
      __m256i word = _mm256_setzero_si256();
      CSD_UNROLL
      for (int j = 0; j < 16 / kBits; ++j) {
        const F32x16 x = load_even_odd<D, kWhole>(elements + (i + r + kStep * j) * token_stride);
        const __m256i first = code_x8(x.first, even.zero_f32, even.inverse, top);
        const __m256i second = code_x8(x.second, odd.zero_f32, odd.inverse, top);
        const __m256i pair = _mm256_or_si256(first, _mm256_slli_epi32(second, 16));
        word = _mm256_or_si256(word, _mm256_slli_epi32(pair, kBits * j));
      }
      _mm256_store_si256(reinterpret_cast<__m256i*>(words + 8 * r), word);
    }
    transpose_block(words, 8, lines, 8);
    for (int64_t c = 0; c < kPairs; ++c) std::memcpy(codes + c * kLineStride + i, lines + 8 * c, 32);
  }
}

// 16 channels at a time, so that what is read twice stays in L1.
template <int kBits, typename D>
void quantise_k_all(const void* source, int64_t token_stride, int64_t head_dim, void* k_codes,
                    uint16_t* k_params) {
  for (int64_t d = 0; d < head_dim; d += kGroup) {
    const auto channels =
        head_dim - d >= kGroup ? quantise_k_channels<kBits, D, true> : quantise_k_channels<kBits, D, false>;
    channels(static_cast<const typename D::Element*>(source) + d, token_stride,
             static_cast<uint32_t*>(k_codes) + d / 2 * line_words(kBits, kPageTokens) / 2, k_params + d,
             k_params + head_dim + d);
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

// Two tokens of fp32, to one line.
template <int kBits>
void quantise_v_line(const float* const* tokens, const float* zero, const float* inverse, int64_t head_dim,
                     char* line) {
  constexpr int kRegisters = kBits / 2;
  const __m256 top = _mm256_set1_ps(static_cast<float>((1 << kBits) - 1));
  for (int64_t d = 0; d < head_dim; d += kCodeBlockLanes) {
    for (int a = 0; a < kRegisters; ++a) {
      const CodeLanes<kBits> lanes(block_lanes(head_dim, d), a);
      const int64_t step = block_lanes(head_dim, d) * kBits / 16;
      __m256i word = _mm256_setzero_si256();
      CSD_UNROLL
      for (int member = 0; member < 2; ++member) {
        CSD_UNROLL
        for (int j = 0; j < 16 / kBits; ++j) {
          const __m256 x = _mm256_loadu_ps(tokens[member] + d + lanes.first[0] + j * step);
          const __m256i code = code_x8(x, _mm256_set1_ps(zero[member]), _mm256_set1_ps(inverse[member]), top);
          word = _mm256_or_si256(word, _mm256_slli_epi32(code, 16 * member + kBits * j));
        }
      }
      auto* target = reinterpret_cast<int*>(line + 2 * line_words(kBits, d) + 4 * lanes.word);
      if (lanes.count == 8) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), word);
      } else {
        _mm256_maskstore_epi32(target, lanes.mask(), word);
      }
    }
  }
}

template <int kBits, typename D>
void quantise_v_all(const void* source, int64_t token_stride, int64_t head_dim, void* v_codes,
                    uint16_t* v_params) {
  constexpr int64_t kTokens = 8;
  // The codes of lanes behind head_dim are computed, of whatever stands there, and not stored.
  alignas(32) float tokens[kTokens * kHeadDimMax + kCodeBlockLanes];
  std::memset(tokens, 0, sizeof(tokens));
  for (int64_t begin = 0; begin < kPageTokens; begin += kTokens) {
    alignas(32) float least[kTokens];
    alignas(32) float greatest[kTokens];
    alignas(32) float poison[kTokens];
    for (int64_t i = 0; i < kTokens; ++i) {
      float* token = tokens + i * kHeadDimMax;
      load_all<D>(static_cast<const typename D::Element*>(source) + (begin + i) * token_stride, 1.0f,
                  head_dim, token);
      __m256 low = _mm256_set1_ps(kInfinity);
      __m256 high = _mm256_set1_ps(-kInfinity);
      __m256 nan = _mm256_setzero_ps();
      for (int64_t d = 0; d < head_dim; d += 8) {
        const __m256 x = _mm256_load_ps(token + d);
        low = _mm256_min_ps(low, x);
        high = _mm256_max_ps(high, x);
        nan = _mm256_fmadd_ps(x, _mm256_setzero_ps(), nan);
      }
      least[i] = -reduce_max(_mm256_xor_ps(low, _mm256_set1_ps(-0.0f)));
      greatest[i] = reduce_max(high);
      poison[i] = reduce_add(nan);
    }
    const ParamsX8 params =
        code_params_x8(kBits, _mm256_load_ps(least), _mm256_load_ps(greatest), _mm256_load_ps(poison));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(v_params + begin), params.scale);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(v_params + kPageTokens + begin), params.zero);
    alignas(32) float zero[kTokens];
    alignas(32) float inverse[kTokens];
    _mm256_store_ps(zero, params.zero_f32);
    _mm256_store_ps(inverse, params.inverse);
    for (int64_t i = 0; i < kTokens; i += 2) {
      const float* const pair[2] = {tokens + i * kHeadDimMax, tokens + (i + 1) * kHeadDimMax};
      quantise_v_line<kBits>(pair, zero + i, inverse + i, head_dim,
                             static_cast<char*>(v_codes) + (begin + i) * line_words(kBits, head_dim));
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
  constexpr int64_t kLineStride = line_words(kBits, kPageTokens) / 2;
  const __m256i top = _mm256_set1_epi32((1 << kBits) - 1);
  const Groups groups(k_params, head_dim, 0, head_dim);
  for (int64_t d = 0; d < head_dim; d += kGroup) {
    const int64_t channel_count = head_dim - d < kGroup ? head_dim - d : kGroup;
    const bool whole = channel_count == kGroup;
    const F32x16 scale = whole ? load_even_odd<Float32, true>(groups.scale + d)
                               : load_even_odd<Float32, false>(groups.scale + d);
    const F32x16 zero = whole ? load_even_odd<Float32, true>(groups.zero + d)
                              : load_even_odd<Float32, false>(groups.zero + d);
    const auto* codes = static_cast<const uint32_t*>(k_codes) + d / 2 * kLineStride;
    for (int64_t i = 0; i < kStep; i += 8) {
      alignas(32) uint32_t lines[8 * 8] = {};  // [pairs of channels][words of a line]
      alignas(32) uint32_t words[8 * 8];       // the other way round
      for (int64_t c = 0; c < channel_count / 2; ++c) {
        std::memcpy(lines + 8 * c, codes + c * kLineStride + i, 32);
      }
      transpose_block(lines, 8, words, 8);
      for (int64_t r = 0; r < 8; ++r) {
        const __m256i word = _mm256_load_si256(reinterpret_cast<const __m256i*>(words + 8 * r));
        for (int j = 0; j < 16 / kBits; ++j) {
          const int64_t token = i + r + kStep * j - token_begin;
          if (token < 0 || token >= token_count) continue;
          const __m256i even = _mm256_and_si256(_mm256_srli_epi32(word, kBits * j), top);
          const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(word, 16 + kBits * j), top);
          const F32x16 value = {_mm256_fmadd_ps(scale.first, _mm256_cvtepi32_ps(even), zero.first),
                                _mm256_fmadd_ps(scale.second, _mm256_cvtepi32_ps(odd), zero.second)};
          alignas(32) float values[kGroup];
          store_f32x16<true>(values, BFloat16::ordered(value));
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
  constexpr int kRegisters = kBits / 2;  // of words in a whole line
  const __m256i top = _mm256_set1_epi32((1 << kBits) - 1);
  const Groups groups(v_params, kPageTokens, 0, kPageTokens);
  for (int64_t i = 0; i < token_count; ++i) {
    const int64_t t = token_begin + i;
    const auto* line = static_cast<const char*>(v_codes) + t / 2 * 2 * line_words(kBits, head_dim);
    const __m256 scale = _mm256_set1_ps(groups.scale[t]);
    const __m256 zero = _mm256_set1_ps(groups.zero[t]);
    // Lanes that are not there fall on those of the next register, which come later, or behind head_dim.
    alignas(32) float values[kHeadDimMax + 8];
    for (int64_t d = 0; d < head_dim; d += kCodeBlockLanes) {
      const int64_t step = block_lanes(head_dim, d) * kBits / 16;
      for (int j = 0; j < 16 / kBits; ++j) {
        for (int a = 0; a < kRegisters; ++a) {
          const CodeLanes<kBits> lanes(block_lanes(head_dim, d), a);
          if (lanes.count == 0) continue;
          const __m256i words = _mm256_maskload_epi32(
              reinterpret_cast<const int*>(line + 2 * line_words(kBits, d) + 4 * lanes.word), lanes.mask());
          const __m256i code =
              _mm256_and_si256(_mm256_srli_epi32(words, static_cast<int>(16 * (t & 1)) + kBits * j), top);
          _mm256_storeu_ps(values + d + j * step + lanes.word,
                           _mm256_fmadd_ps(scale, _mm256_cvtepi32_ps(code), zero));
        }
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

// How far ahead of its use a row is fetched: int8 reads 22 GB/s with 8 KiB, 20 with 4 or 32.
constexpr int64_t kWeightPrefetchBytes = 8 * 1024;

// Groups whose parameters are chosen or widened at a time.
constexpr int64_t kWeightBatch = 8;

inline __m256i load_u8x8(const uint8_t* p) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}

// Scale and zero, in turn, of `count` groups, count <= kWeightBatch.
inline void load_weight_params(const uint8_t* pairs, int64_t count, float* params) {
  alignas(16) uint16_t halves[2 * kWeightBatch] = {};
  std::memcpy(halves, pairs, static_cast<size_t>(4 * count));
  _mm256_store_ps(params, _mm256_cvtph_ps(load_u16x8(halves)));
  _mm256_store_ps(params + 8, _mm256_cvtph_ps(load_u16x8(halves + 8)));
}

// Eight bytes of codes: values of features [8 * i, 8 * i + 8) of the group, and, of 4 bits, of those 32 on.
template <int kBits>
inline F32x16 load_weights(const uint8_t* codes, int64_t i, __m256 scale, __m256 zero) {
  const __m256i bytes = load_u8x8(codes + 8 * i);
  if (kBits == 8) return {_mm256_fmadd_ps(scale, _mm256_cvtepi32_ps(bytes), zero), zero};
  const __m256i low = _mm256_and_si256(bytes, _mm256_set1_epi32(15));
  const __m256i high = _mm256_srli_epi32(bytes, 4);
  return {_mm256_fmadd_ps(scale, _mm256_cvtepi32_ps(low), zero),
          _mm256_fmadd_ps(scale, _mm256_cvtepi32_ps(high), zero)};
}

// Up to eight elements, then zeros.
template <typename D>
inline __m256 load_x8(const typename D::Element* p, int64_t count) {
  if (count >= 8) return D::ordered(D::template load<false>(p)).first;
  alignas(32) typename D::Element elements[16] = {};
  if (count > 0) std::memcpy(elements, p, static_cast<size_t>(count) * sizeof(*p));
  return D::ordered(D::template load<true>(elements)).first;
}

// All bits of the first `count` of eight lanes.
inline __m256i first_lanes(int64_t count) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(count < 8 ? static_cast<int>(count) : 8), lane);
}

// Codes of up to eight elements, then zeros.
template <typename D>
inline __m256i codes_x8(const typename D::Element* p, int64_t count, __m256 zero, __m256 inverse,
                        __m256 top) {
  const __m256i code = code_x8(load_x8<D>(p, count), zero, inverse, top);
  return _mm256_and_si256(code, first_lanes(count));
}

// The low bytes of eight words.
inline void store_u8x8(uint8_t* p, __m256i x) {
  const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(words, words));
}

template <int kBits, typename D>
void quantise_weight_all(const void* source, int64_t in_features, uint8_t* row) {
  const auto* elements = static_cast<const typename D::Element*>(source);
  const int64_t group_count = weight_group_count(in_features);
  const int64_t params_offset = weight_params_offset(kBits, in_features);
  const __m256 top = _mm256_set1_ps(static_cast<float>((1 << kBits) - 1));
  for (int64_t begin = 0; begin < group_count; begin += kWeightBatch) {
    const int64_t count = group_count - begin < kWeightBatch ? group_count - begin : kWeightBatch;
    alignas(32) float least[kWeightBatch] = {};
    alignas(32) float greatest[kWeightBatch] = {};
    alignas(32) float poison[kWeightBatch] = {};
    for (int64_t i = 0; i < count; ++i) {
      const int64_t first = (begin + i) * kWeightGroup;
      __m256 low = _mm256_set1_ps(kInfinity);
      __m256 high = _mm256_set1_ps(-kInfinity);
      __m256 nan = _mm256_setzero_ps();
      for (int64_t j = 0; j < kWeightGroup && first + j < in_features; j += 8) {
        const int64_t left = in_features - first - j;
        const __m256 x = load_x8<D>(elements + first + j, left);
        const __m256 there = _mm256_castsi256_ps(first_lanes(left));
        low = _mm256_min_ps(low, _mm256_blendv_ps(_mm256_set1_ps(kInfinity), x, there));
        high = _mm256_max_ps(high, _mm256_blendv_ps(_mm256_set1_ps(-kInfinity), x, there));
        nan = _mm256_fmadd_ps(x, _mm256_setzero_ps(), nan);
      }
      least[i] = -reduce_max(_mm256_xor_ps(low, _mm256_set1_ps(-0.0f)));
      greatest[i] = reduce_max(high);
      poison[i] = reduce_add(nan);
    }
    const ParamsX8 params =
        code_params_x8(kBits, _mm256_load_ps(least), _mm256_load_ps(greatest), _mm256_load_ps(poison));
    alignas(32) uint16_t pairs[2 * kWeightBatch];
    store_u16x16(pairs, interleave_u16x16(params.scale, params.zero));
    std::memcpy(row + params_offset + 4 * begin, pairs, static_cast<size_t>(4 * count));
    alignas(32) float zero[kWeightBatch];
    alignas(32) float inverse[kWeightBatch];
    _mm256_store_ps(zero, params.zero_f32);
    _mm256_store_ps(inverse, params.inverse);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t first = (begin + i) * kWeightGroup;
      uint8_t* codes = row + (begin + i) * weight_group_bytes(kBits);
      const auto* group = elements + first;
      const int64_t left = in_features - first;
      const __m256 zeros = _mm256_set1_ps(zero[i]);
      const __m256 inverses = _mm256_set1_ps(inverse[i]);
      for (int64_t j = 0; j < kWeightGroup * kBits / 8; j += 8) {
        __m256i bytes = codes_x8<D>(group + j, left - j, zeros, inverses, top);
        if (kBits == 4) {
          const int64_t other = j + kWeightGroup / 2;
          const __m256i high = codes_x8<D>(group + other, left - other, zeros, inverses, top);
          bytes = _mm256_or_si256(bytes, _mm256_slli_epi32(high, 4));
        }
        store_u8x8(codes + j, bytes);
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

template <int kBits>
void dequantise_weight_of(const uint8_t* row, int64_t in_features, DType target_dtype, void* target) {
  const int64_t group_count = weight_group_count(in_features);
  const uint8_t* pairs = row + weight_params_offset(kBits, in_features);
  for (int64_t begin = 0; begin < group_count; begin += kWeightBatch) {
    const int64_t end = begin + kWeightBatch < group_count ? begin + kWeightBatch : group_count;
    alignas(32) float params[2 * kWeightBatch];
    load_weight_params(pairs + 4 * begin, end - begin, params);
    alignas(32) float values[kWeightBatch * kWeightGroup];
    for (int64_t g = begin; g < end; ++g) {
      const uint8_t* codes = row + g * weight_group_bytes(kBits);
      float* group = values + (g - begin) * kWeightGroup;
      const __m256 scale = _mm256_set1_ps(params[2 * (g - begin)]);
      const __m256 zero = _mm256_set1_ps(params[2 * (g - begin) + 1]);
      CSD_UNROLL
      for (int64_t i = 0; i < kBits; ++i) {
        const F32x16 weights = load_weights<kBits>(codes, i, scale, zero);
        _mm256_store_ps(group + 8 * i, weights.first);
        if (kBits == 4) _mm256_store_ps(group + kWeightGroup / 2 + 8 * i, weights.second);
      }
    }
    const int64_t first = begin * kWeightGroup;
    const int64_t count = in_features - first;
    store(target_dtype, values, 1.0f,
          count < kWeightBatch * kWeightGroup ? count : kWeightBatch * kWeightGroup,
          static_cast<char*>(target) + first * element_bytes(target_dtype));
  }
}

void dequantise_weight_row(int code_bits, const uint8_t* row, int64_t in_features, DType target_dtype,
                           void* target) {
  const auto of = code_bits == 4 ? dequantise_weight_of<4> : dequantise_weight_of<8>;
  of(row, in_features, target_dtype, target);
}

// kX rows of x by one row of the weight. Each product has a chain of sums of its own, and as many as keep two
// multiply-adds a cycle busy, which take four.
template <int kBits, int kX>
void weight_dots_row(const float* x, const uint8_t* row, int64_t group_count, int64_t ahead_bytes, float* out,
                     int64_t out_stride) {
  constexpr int64_t kGroupBytes = weight_group_bytes(kBits);
  constexpr int kChains = kX == 1 ? 8 : kX == 2 ? 4 : 2;
  const int64_t x_stride = group_count * kWeightGroup;
  __m256 sum[kX][kChains];
  CSD_UNROLL
  for (int m = 0; m < kX; ++m) {
    CSD_UNROLL
    for (int c = 0; c < kChains; ++c) sum[m][c] = _mm256_setzero_ps();
  }
  for (int64_t begin = 0; begin < group_count; begin += kWeightBatch) {
    const int64_t end = begin + kWeightBatch < group_count ? begin + kWeightBatch : group_count;
    alignas(32) float params[2 * kWeightBatch];
    load_weight_params(row + group_count * kGroupBytes + 4 * begin, end - begin, params);
    for (int64_t g = begin; g < end; ++g) {
      const uint8_t* codes = row + g * kGroupBytes;
      _mm_prefetch(reinterpret_cast<const char*>(codes) + ahead_bytes, _MM_HINT_T0);
      const __m256 scale = _mm256_set1_ps(params[2 * (g - begin)]);
      const __m256 zero = _mm256_set1_ps(params[2 * (g - begin) + 1]);
      CSD_UNROLL
      for (int i = 0; i < kBits; ++i) {
        const F32x16 weights = load_weights<kBits>(codes, i, scale, zero);
        CSD_UNROLL
        for (int m = 0; m < kX; ++m) {
          const float* x_part = x + m * x_stride + g * kWeightGroup + 8 * i;
          __m256& first = sum[m][(kBits == 4 ? 2 * i : i) % kChains];
          first = _mm256_fmadd_ps(_mm256_load_ps(x_part), weights.first, first);
          if (kBits == 4) {
            __m256& second = sum[m][(2 * i + 1) % kChains];
            second = _mm256_fmadd_ps(_mm256_load_ps(x_part + kWeightGroup / 2), weights.second, second);
          }
        }
      }
    }
  }
  CSD_UNROLL
  for (int m = 0; m < kX; ++m) {
    __m256 total = sum[m][0];
    CSD_UNROLL
    for (int c = 1; c < kChains; ++c) total = _mm256_add_ps(total, sum[m][c]);
    out[m * out_stride] = reduce_add(total);
  }
}

// Rows of x that are taken at once: of more, the sums would leave the registers.
constexpr int64_t kWeightRowBlock = 4;

template <int kBits>
void weight_dots_of(const float* x, int64_t x_count, const uint8_t* rows, int64_t row_count,
                    int64_t in_features, float* out, int64_t out_stride) {
  using Row = void (*)(const float*, const uint8_t*, int64_t, int64_t, float*, int64_t);
  static constexpr Row kRow[] = {weight_dots_row<kBits, 1>, weight_dots_row<kBits, 2>,
                                 weight_dots_row<kBits, 3>, weight_dots_row<kBits, 4>};
  const int64_t group_count = weight_group_count(in_features);
  for (int64_t n = 0; n < row_count; ++n, rows += weight_row_bytes(kBits, in_features)) {
    for (int64_t m = 0, block; m < x_count; m += block) {
      block = next_rows(x_count - m, kWeightRowBlock);
      kRow[block - 1](x + m * group_count * kWeightGroup, rows, group_count,
                      m == 0 ? kWeightPrefetchBytes : 0, out + m * out_stride + n, out_stride);
    }
  }
}

void weight_dots(int code_bits, const float* x, int64_t x_count, const uint8_t* rows, int64_t row_count,
                 int64_t in_features, float* out, int64_t out_stride) {
  const auto of = code_bits == 4 ? weight_dots_of<4> : weight_dots_of<8>;
  of(x, x_count, rows, row_count, in_features, out, out_stride);
}

}  // namespace

CSD_TARGET_END

const Kernels kAvx2Kernels = {
    "avx2",
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
    score_codes,
    accumulate_codes,
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
