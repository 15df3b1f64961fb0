// Pure arithmetic on raw pointers over one tile (base/types.h). Knows no files, no threads, no torch.
//
// One file per instruction set, each with the same functions in the same order, behind this table. All
// arithmetic is fp32: stored bf16 and fp16 widen exactly, so results differ from exact attention by fp32
// rounding only.
#pragma once

#include <cstdint>

#include "base/types.h"

namespace csd {

// Running maximum and denominator of one query's softmax. Empty is max = -inf, sum = 0 (FlashAttention,
// 2205.14135).
struct SoftmaxState {
  float max;
  float sum;
};

// What is done to one query's scores of one page before the softmax. Applied in this order: soft-cap, bias,
// ALiBi, range. Everything outside [token_begin, token_end) gets probability 0.
struct ScoreModifier {
  int64_t token_begin = 0;
  int64_t token_end = kPageTokens;
  float softcap = 0.0f;         // cap * tanh(s / cap); 0: none
  const float* bias = nullptr;  // [kPageTokens], added; -inf masks; null: none
  float alibi_slope = 0.0f;     // adds alibi_slope * (alibi_offset + t) for token t of the page
  float alibi_offset = 0.0f;
};

enum class Fp8 : uint8_t;  // weights.h

struct Kernels {
  const char* name;

  // scores[m][t] = sum over d of q[m][d] * k[d][t], for all kPageTokens tokens of the tile.
  // q: [query_count][head_dim] fp32, already scaled. k_tile: [head_dim][kPageTokens] of dtype, 64-byte
  // aligned. scores: [query_count][kPageTokens] fp32, 64-byte aligned. Slots that hold no token give garbage,
  // never a fault.
  void (*score_tile)(DType dtype, const float* q, const void* k_tile, int64_t query_count, int64_t head_dim,
                     float* scores);

  // Online softmax over one query's row: modifies scores, folds them into state, leaves probabilities
  // relative to the new maximum in scores (0 outside the range or where masked), and returns the factor by
  // which what was accumulated so far must shrink (1 when the maximum did not move; 1 while the state is
  // still empty).
  float (*softmax_row)(float* scores, const ScoreModifier& modifier, SoftmaxState* state);

  // out[m][d] = out[m][d] * shrink[m] + sum over t in [token_begin, token_end) of p[m][t] * v[t][d].
  // p: [query_count][kPageTokens] fp32; v_tile: [kPageTokens][head_dim] of dtype; out:
  // [query_count][head_dim] fp32. Tokens outside the range are never read: their slots may hold anything.
  void (*accumulate_tile)(DType dtype, const float* p, const float* shrink, const void* v_tile,
                          int64_t query_count, int64_t head_dim, int64_t token_begin, int64_t token_end,
                          float* out);

  // out[i] = a[i] * a_weight + b[i] * b_weight, i < count. out may be a. With both weights 0 the result is 0,
  // whatever a and b hold.
  void (*blend)(const float* a, float a_weight, const float* b, float b_weight, int64_t count, float* out);

  // out[i] = in[i] * factor, converted between dtypes with round-to-nearest-even. in and out do not overlap.
  void (*load)(DType dtype, const void* in, float factor, int64_t count, float* out);
  void (*store)(DType dtype, const float* in, float factor, int64_t count, void* out);

  // Writes token_count tokens of one kv head into a tile's K (transposing) or V, starting at slot
  // token_begin, converting source_dtype to tile_dtype (exact when they are equal). Token i of the source
  // starts at source + i * token_stride elements; its head_dim elements are adjacent. Other slots keep what
  // they held.
  void (*pack_k)(DType source_dtype, const void* source, int64_t token_stride, DType tile_dtype,
                 int64_t head_dim, int64_t token_begin, int64_t token_count, void* k_tile);
  void (*pack_v)(DType source_dtype, const void* source, int64_t token_stride, DType tile_dtype,
                 int64_t head_dim, int64_t token_begin, int64_t token_count, void* v_tile);

  // The reverse of pack_k and pack_v: slots [token_begin, token_begin + token_count) to dense tokens,
  // token_stride elements apart.
  void (*unpack_k)(DType tile_dtype, const void* k_tile, int64_t head_dim, int64_t token_begin,
                   int64_t token_count, DType target_dtype, int64_t token_stride, void* target);
  void (*unpack_v)(DType tile_dtype, const void* v_tile, int64_t head_dim, int64_t token_begin,
                   int64_t token_count, DType target_dtype, int64_t token_stride, void* target);

  // ---- quantised tiles: code_bits is 8 or 4, the bits lie as quantise.h says ----

  // As score_tile. The channels' scales fold into q and the zero points into one sum per query; q then has
  // the 16 bits of integer products (quantise.h says how near that is). k_params: [2][head_dim], scale then
  // zero.
  void (*score_codes)(int code_bits, const float* q, const void* k_codes, const uint16_t* k_params,
                      int64_t query_count, int64_t head_dim, float* scores);

  // As accumulate_tile, with the tokens' scales folded into p. v_params: [2][kPageTokens], scale then zero.
  void (*accumulate_codes)(int code_bits, const float* p, const float* shrink, const void* v_codes,
                           const uint16_t* v_params, int64_t query_count, int64_t head_dim,
                           int64_t token_begin, int64_t token_end, float* out);

  // Quantises kPageTokens tokens of one kv head: K per channel over the page, V per token. The source is as
  // in pack_k and pack_v.
  void (*quantise_k)(int code_bits, DType source_dtype, const void* source, int64_t token_stride,
                     int64_t head_dim, void* k_codes, uint16_t* k_params);
  void (*quantise_v)(int code_bits, DType source_dtype, const void* source, int64_t token_stride,
                     int64_t head_dim, void* v_codes, uint16_t* v_params);

  // The reverse, as unpack_k and unpack_v.
  void (*dequantise_k)(int code_bits, const void* k_codes, const uint16_t* k_params, int64_t head_dim,
                       int64_t token_begin, int64_t token_count, DType target_dtype, int64_t token_stride,
                       void* target);
  void (*dequantise_v)(int code_bits, const void* v_codes, const uint16_t* v_params, int64_t head_dim,
                       int64_t token_begin, int64_t token_count, DType target_dtype, int64_t token_stride,
                       void* target);

  // ---- quantised rows of a linear layer's weight: code_bits is 8 or 4, weights.h says how they lie ----

  // Writes all weight_row_bytes of one row; the source's elements are adjacent. Every table writes the same.
  void (*quantise_weight_row)(int code_bits, DType source_dtype, const void* source, int64_t in_features,
                              uint8_t* row);

  // The row's in_features values, rounded to target_dtype; the same from every table.
  void (*dequantise_weight_row)(int code_bits, const uint8_t* row, int64_t in_features, DType target_dtype,
                                void* target);

  // out[m * out_stride + n] = sum over i of x[m][i] * value i of row n, for adjacent rows. The values are
  // those that dequantise_weight_row gives in fp32, so tables differ by the order of the sum only. x:
  // [x_count][group_count * kWeightGroup] fp32, 64-byte aligned, 0 from in_features on; 1 <= x_count <=
  // kWeightDotsMax.
  void (*weight_dots)(int code_bits, const float* x, int64_t x_count, const uint8_t* rows, int64_t row_count,
                      int64_t in_features, float* out, int64_t out_stride);

  // ---- weights as checkpoints store them: weights.h says what they stand for ----

  // A row of block_count blocks of MXFP4, rounded to target_dtype; the same from every table.
  void (*widen_mxfp4_row)(const uint8_t* values, const uint8_t* scales, int64_t block_count,
                          DType target_dtype, void* target);

  // A row of `count` fp8 elements, rounded to target_dtype; the same from every table, but for the bits of a
  // NaN. The first scale is that of block - begin elements, 0 <= begin < block, each further one that of
  // block elements, the last of what is left.
  void (*widen_fp8_row)(Fp8 format, const uint8_t* values, int64_t count, const float* scales, int64_t block,
                        int64_t begin, DType target_dtype, void* target);

  // As weight_dots, of rows of MXFP4 whose values and scales are values_stride and scales_stride bytes apart,
  // x: [x_count][block_count * kMxBlock] fp32, 64-byte aligned, of each block the even elements first.
  void (*mxfp4_dots)(const float* x, int64_t x_count, const uint8_t* values, int64_t values_stride,
                     const uint8_t* scales, int64_t scales_stride, int64_t row_count, int64_t block_count,
                     float* out, int64_t out_stride);
};

extern const Kernels kSerialKernels;
extern const Kernels kAvx2Kernels;        // requires avx2, fma, f16c
extern const Kernels kAvx512Kernels;      // requires avx512 f, bw, dq, vl
extern const Kernels kAvx512VnniKernels;  // requires avx512_vnni besides

// The fastest table this processor runs, or the one asked for: "auto" or a table's name. Throws kValue for an
// unknown name and for one this processor does not have, naming those it has.
const Kernels& select_kernels(const char* name);

// Comma-separated names of the tables this processor runs, slowest first.
const char* supported_kernels();

}  // namespace csd
