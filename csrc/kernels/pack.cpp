#include "kernels/pack.h"

#include <cstring>

namespace csd {
namespace {

// Tokens converted at a time between the two dtypes of a K: two of the widest transposition's blocks, 36 KiB
// of stack at most.
constexpr int64_t kChunkTokens = 16;

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

const char* at(const void* base, int64_t index, DType dtype) {
  return static_cast<const char*>(base) + index * element_bytes(dtype);
}

char* at(void* base, int64_t index, DType dtype) {
  return static_cast<char*>(base) + index * element_bytes(dtype);
}

// count <= kHeadDimMax. Equal dtypes are copied bit for bit, so that a NaN keeps its payload.
void convert(const PackSteps& steps, DType source_dtype, const void* source, DType target_dtype,
             int64_t count, void* target) {
  if (source_dtype == target_dtype) {
    std::memcpy(target, source, count * element_bytes(source_dtype));
  } else if (target_dtype == DType::kFloat32) {
    steps.load(source_dtype, source, 1.0f, count, static_cast<float*>(target));
  } else if (source_dtype == DType::kFloat32) {
    steps.store(target_dtype, static_cast<const float*>(source), 1.0f, count, target);
  } else {
    float wide[kHeadDimMax];
    steps.load(source_dtype, source, 1.0f, count, wide);
    steps.store(target_dtype, wide, 1.0f, count, target);
  }
}

}  // namespace

void pack_k(const PackSteps& steps, DType source_dtype, const void* source, int64_t token_stride,
            DType tile_dtype, int64_t head_dim, int64_t token_begin, int64_t token_count, void* k_tile) {
  const int64_t bytes_per_element = element_bytes(tile_dtype);
  if (source_dtype == tile_dtype) {
    steps.transpose(bytes_per_element, source, token_stride, token_count, head_dim,
                    at(k_tile, token_begin, tile_dtype), kPageTokens);
    return;
  }
  alignas(
      64) char chunk[kChunkTokens * kHeadDimMax * sizeof(float)];  // [kChunkTokens][head_dim] of tile_dtype
  for (int64_t begin = 0; begin < token_count; begin += kChunkTokens) {
    const int64_t count = smaller(kChunkTokens, token_count - begin);
    for (int64_t i = 0; i < count; ++i) {
      convert(steps, source_dtype, at(source, (begin + i) * token_stride, source_dtype), tile_dtype, head_dim,
              at(chunk, i * head_dim, tile_dtype));
    }
    steps.transpose(bytes_per_element, chunk, head_dim, count, head_dim,
                    at(k_tile, token_begin + begin, tile_dtype), kPageTokens);
  }
}

void pack_v(const PackSteps& steps, DType source_dtype, const void* source, int64_t token_stride,
            DType tile_dtype, int64_t head_dim, int64_t token_begin, int64_t token_count, void* v_tile) {
  for (int64_t i = 0; i < token_count; ++i) {
    convert(steps, source_dtype, at(source, i * token_stride, source_dtype), tile_dtype, head_dim,
            at(v_tile, (token_begin + i) * head_dim, tile_dtype));
  }
}

void unpack_k(const PackSteps& steps, DType tile_dtype, const void* k_tile, int64_t head_dim,
              int64_t token_begin, int64_t token_count, DType target_dtype, int64_t token_stride,
              void* target) {
  const int64_t bytes_per_element = element_bytes(tile_dtype);
  if (tile_dtype == target_dtype) {
    steps.transpose(bytes_per_element, at(k_tile, token_begin, tile_dtype), kPageTokens, head_dim,
                    token_count, target, token_stride);
    return;
  }
  alignas(
      64) char chunk[kChunkTokens * kHeadDimMax * sizeof(float)];  // [kChunkTokens][head_dim] of tile_dtype
  for (int64_t begin = 0; begin < token_count; begin += kChunkTokens) {
    const int64_t count = smaller(kChunkTokens, token_count - begin);
    steps.transpose(bytes_per_element, at(k_tile, token_begin + begin, tile_dtype), kPageTokens, head_dim,
                    count, chunk, head_dim);
    for (int64_t i = 0; i < count; ++i) {
      convert(steps, tile_dtype, at(chunk, i * head_dim, tile_dtype), target_dtype, head_dim,
              at(target, (begin + i) * token_stride, target_dtype));
    }
  }
}

void unpack_v(const PackSteps& steps, DType tile_dtype, const void* v_tile, int64_t head_dim,
              int64_t token_begin, int64_t token_count, DType target_dtype, int64_t token_stride,
              void* target) {
  for (int64_t i = 0; i < token_count; ++i) {
    convert(steps, tile_dtype, at(v_tile, (token_begin + i) * head_dim, tile_dtype), target_dtype, head_dim,
            at(target, i * token_stride, target_dtype));
  }
}

}  // namespace csd
