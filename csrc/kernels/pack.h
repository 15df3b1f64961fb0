// Moves tokens between dense rows and a tile's K and V: the part that is the same for every instruction set.
// The arguments mean what they mean in kernels.h.
#pragma once

#include <cstdint>

#include "base/types.h"

namespace csd {

// What an instruction set brings.
struct PackSteps {
  void (*load)(DType dtype, const void* in, float factor, int64_t count, float* out);
  void (*store)(DType dtype, const float* in, float factor, int64_t count, void* out);

  // target[c * target_stride + r] = source[r * source_stride + c], r < row_count, c < column_count. Strides
  // count elements; an element is 2 or 4 bytes and is moved as it is.
  void (*transpose)(int64_t bytes_per_element, const void* source, int64_t source_stride, int64_t row_count,
                    int64_t column_count, void* target, int64_t target_stride);
};

void pack_k(const PackSteps& steps, DType source_dtype, const void* source, int64_t token_stride,
            DType tile_dtype, int64_t head_dim, int64_t token_begin, int64_t token_count, void* k_tile);
void pack_v(const PackSteps& steps, DType source_dtype, const void* source, int64_t token_stride,
            DType tile_dtype, int64_t head_dim, int64_t token_begin, int64_t token_count, void* v_tile);
void unpack_k(const PackSteps& steps, DType tile_dtype, const void* k_tile, int64_t head_dim,
              int64_t token_begin, int64_t token_count, DType target_dtype, int64_t token_stride,
              void* target);
void unpack_v(const PackSteps& steps, DType tile_dtype, const void* v_tile, int64_t head_dim,
              int64_t token_begin, int64_t token_count, DType target_dtype, int64_t token_stride,
              void* target);

}  // namespace csd
