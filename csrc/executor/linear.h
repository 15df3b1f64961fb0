// Linear layers on quantised weights, to and from them, and from what checkpoints store (kernels/weights.h):
// splits rows over threads.
// Knows no files: the rows lie in memory, at any byte.
//
// Thread-safe: nothing is kept between calls.
#pragma once

#include <cstdint>

#include "base/thread_pool.h"
#include "base/types.h"
#include "kernels/kernels.h"
#include "kernels/weights.h"

namespace csd {

// What computes. Little work stays on the calling thread, as does all where lend is null or refuses.
struct LinearContext {
  const Kernels& kernels;
  int threads_max;
  LendThreads lend;
};

struct QuantisedLinear {
  int code_bits;
  int64_t in_features;
  const uint8_t* rows;  // [row_count], adjacent
  int64_t row_count;
  DType dtype;    // of x, bias and out
  const void* x;  // [x_count], x_stride elements apart
  int64_t x_count;
  int64_t x_stride;
  const void* bias;  // [row_count], or null
  void* out;         // [x_count][row_count]
};

// out = x @ weight^T + bias, in fp32 until out is rounded to dtype.
void quantised_linear(const LinearContext& context, const QuantisedLinear& linear);

// source: [row_count], source_stride elements apart; rows: adjacent, all of their bytes are written.
void quantise_rows(const LinearContext& context, int code_bits, DType source_dtype, const void* source,
                   int64_t source_stride, int64_t row_count, int64_t in_features, uint8_t* rows);

// target: [row_count][in_features].
void dequantise_rows(const LinearContext& context, int code_bits, const uint8_t* rows, int64_t row_count,
                     int64_t in_features, DType target_dtype, void* target);

struct Mxfp4Rows {
  const uint8_t* values;  // [row_count][kMxBlock / 2 * block_count], values_stride bytes apart
  int64_t values_stride;
  const uint8_t* scales;  // [row_count][block_count], scales_stride bytes apart
  int64_t scales_stride;
  int64_t row_count;
  int64_t block_count;
};

// target: [row_count][kMxBlock * block_count].
void widen_mxfp4(const LinearContext& context, const Mxfp4Rows& rows, DType target_dtype, void* target);

struct Mxfp4Linear {
  Mxfp4Rows rows;
  DType dtype;    // of x, bias and out
  const void* x;  // [x_count][kMxBlock * block_count], x_stride elements apart
  int64_t x_count;
  int64_t x_stride;
  const void* bias;  // [row_count], or null
  void* out;         // [x_count][row_count]
};

// out = x @ weight^T + bias, in fp32 until out is rounded to dtype.
void mxfp4_linear(const LinearContext& context, const Mxfp4Linear& linear);

struct Fp8Rows {
  Fp8 format;
  const uint8_t* values;  // [row_count][column_count], values_stride bytes apart
  int64_t values_stride;
  int64_t row_count;
  int64_t column_count;
  // Of blocks of block_rows x block_columns, scales_stride apart; the first element is element
  // [begin_row][begin_column] of its block.
  const float* scales;
  int64_t scales_stride;
  int64_t block_rows;
  int64_t block_columns;
  int64_t begin_row;
  int64_t begin_column;
};

// target: [row_count][column_count].
void widen_fp8(const LinearContext& context, const Fp8Rows& rows, DType target_dtype, void* target);

}  // namespace csd
