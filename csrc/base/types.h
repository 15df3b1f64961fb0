// The vocabulary every room shares: element types, the page, and how a tile lies in memory. No behaviour.
#pragma once

#include <cstdint>

namespace csd {

enum class DType : uint8_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

constexpr int64_t element_bytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

constexpr const char* dtype_name(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return "float32";
    case DType::kBFloat16:
      return "bfloat16";
    case DType::kFloat16:
      return "float16";
  }
  return "unknown";
}

// Tokens in a page. Part of the file format (store/FORMAT.md): the kernels rely on it being four AVX-512
// registers.
constexpr int64_t kPageTokens = 64;

// Direct I/O granularity: file offsets, lengths and buffers are multiples of it on every drive we meet (512
// or 4096).
constexpr int64_t kBlockBytes = 4096;

constexpr int64_t kHeadDimMultiple = 8;
constexpr int64_t kHeadDimMax = 576;

constexpr int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// One layer's shape on the drive. A page holds num_kv_heads tiles; a tile is K [head_dim_k][kPageTokens],
// then V [kPageTokens][head_dim_v].
struct Geometry {
  int64_t num_kv_heads = 0;
  int64_t head_dim_k = 0;
  int64_t head_dim_v = 0;
  DType dtype = DType::kFloat32;

  constexpr int64_t k_bytes() const { return head_dim_k * kPageTokens * element_bytes(dtype); }
  constexpr int64_t v_bytes() const { return head_dim_v * kPageTokens * element_bytes(dtype); }
  constexpr int64_t tile_bytes() const { return k_bytes() + v_bytes(); }
  constexpr int64_t page_bytes() const { return round_up(num_kv_heads * tile_bytes(), kBlockBytes); }
};

}  // namespace csd
