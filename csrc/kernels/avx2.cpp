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

namespace csd {

CSD_TARGET_BEGIN("avx2,fma,f16c")

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

constexpr int64_t kGroup = 16;

// Queries whose sums stay in registers while K or V streams by: 6 rows x 2 registers of the 16.
constexpr int64_t kRowBlock = 6;

// How far ahead of its use a tile is fetched into L2; where K, V and the next tile are adjacent this runs on
// into them. Chosen for AVX-512; here it takes bf16 decode from 0.38 of the core's plain read to 0.60.
template <typename Element>
constexpr int64_t kPrefetchBytes = (sizeof(Element) == 2 ? 32 : 16) * 1024;

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
inline int64_t next_rows(int64_t row_count) {
  const int64_t block_count = (row_count + kRowBlock - 1) / kRowBlock;
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
    _mm_prefetch(ahead + d * kGroup * sizeof(*k), _MM_HINT_T1);
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
    _mm_prefetch(ahead + t * kGroup * sizeof(*v), _MM_HINT_T1);
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
    plain::score_codes,
    plain::accumulate_codes,
    plain::quantise_k,
    plain::quantise_v,
    plain::dequantise_k,
    plain::dequantise_v,
};

}  // namespace csd

#endif  // __x86_64__
