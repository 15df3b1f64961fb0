// Codes: how a quantised tile's bits lie, and the plain form of everything that is done to them.
//
// A group of values (of K: one channel over the page; of V: one token) becomes codes 0 .. 2^code_bits - 1:
// value = zero + scale * code, both float16. zero is the largest float16 that is not above the group's least
// value, scale the smallest that lets the highest code reach its greatest; so no value is off by more than
// scale / 2 (KIVI, 2402.02750, has the grouping). A group that holds an infinity or a NaN gets a NaN for its
// zero point, and what is computed from it is NaN. Groups beyond float16's range (65504) are clamped to it.
//
// Codes go in lines of 16-bit words, two groups' members side by side, so that one integer product takes a
// pair of them: of K, line c holds channels 2c and 2c + 1 of all kPageTokens tokens; of V, line s holds
// tokens 2s and 2s + 1, in blocks of 64 channels and a last one of what is left (a multiple of 8). With n =
// 16 / code_bits codes to a word and `lanes` tokens or channels to a line or block, the code of member m (0
// or 1) in lane l is
//
//   word 2 * (l % (lanes / n)) + m,   bits [code_bits * (l / (lanes / n)), + code_bits)
#pragma once

#include <cstdint>

#include "base/types.h"

namespace csd {

constexpr int64_t kCodeBlockLanes = 64;

struct CodePlace {
  int64_t word;
  int shift;
};

constexpr CodePlace code_place(int code_bits, int64_t lanes, int64_t member, int64_t lane) {
  const int64_t step = lanes / (16 / code_bits);
  return {2 * (lane % step) + member, static_cast<int>(code_bits * (lane / step))};
}

// 16-bit words of one line of `lanes` lanes.
constexpr int64_t line_words(int code_bits, int64_t lanes) { return 2 * lanes * code_bits / 16; }

// Lanes of the V block that starts at `channel`.
constexpr int64_t block_lanes(int64_t head_dim, int64_t channel) {
  return head_dim - channel < kCodeBlockLanes ? head_dim - channel : kCodeBlockLanes;
}

// The largest integer weight with which `count` products of codes add up inside int32.
constexpr float code_integer_max(int code_bits, int64_t count) {
  const int64_t fit = int64_t{0x7fffffff} / (count * ((1 << code_bits) - 1));
  return static_cast<float>(fit < 32767 ? fit : 32767);
}

// Scale and zero point of a group from its least and greatest value; the inverse of scale (0 where it is 0)
// goes to *inverse.
struct CodeParams {
  uint16_t scale;
  uint16_t zero;
};
CodeParams code_params(int code_bits, float least, float greatest, float* inverse, float* zero);

float half_to_float(uint16_t half);

// The table's functions in plain C++ (kernels.h).
namespace plain {

void score_codes(int code_bits, const float* q, const void* k_codes, const uint16_t* k_params,
                 int64_t query_count, int64_t head_dim, float* scores);
void accumulate_codes(int code_bits, const float* p, const float* shrink, const void* v_codes,
                      const uint16_t* v_params, int64_t query_count, int64_t head_dim, int64_t token_begin,
                      int64_t token_end, float* out);
void quantise_k(int code_bits, DType source_dtype, const void* source, int64_t token_stride, int64_t head_dim,
                void* k_codes, uint16_t* k_params);
void quantise_v(int code_bits, DType source_dtype, const void* source, int64_t token_stride, int64_t head_dim,
                void* v_codes, uint16_t* v_params);
void dequantise_k(int code_bits, const void* k_codes, const uint16_t* k_params, int64_t head_dim,
                  int64_t token_begin, int64_t token_count, DType target_dtype, int64_t token_stride,
                  void* target);
void dequantise_v(int code_bits, const void* v_codes, const uint16_t* v_params, int64_t head_dim,
                  int64_t token_begin, int64_t token_count, DType target_dtype, int64_t token_stride,
                  void* target);

}  // namespace plain
}  // namespace csd
