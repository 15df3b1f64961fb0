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

// How the pages of one layer lie in memory and on the drive: num_kv_heads tiles, one after another. FORMAT.md
// is normative. code_bits 0: elements of dtype, K [head_dim_k][kPageTokens], then V
// [kPageTokens][head_dim_v]. 8 or 4: codes of K, codes of V, then their scales and zero points
// (kernels/quantise.h says which bit is which).
struct PageLayout {
  int64_t num_kv_heads = 0;
  int64_t head_dim_k = 0;
  int64_t head_dim_v = 0;
  DType dtype = DType::kFloat32;
  int code_bits = 0;

  constexpr int64_t bits() const { return code_bits != 0 ? code_bits : 8 * element_bytes(dtype); }
  constexpr int64_t k_bytes() const { return head_dim_k * kPageTokens * bits() / 8; }
  constexpr int64_t v_bytes() const { return head_dim_v * kPageTokens * bits() / 8; }
  // Scale and zero point, float16: [2][head_dim_k] of K at params_offset(), [2][kPageTokens] of V behind
  // them.
  constexpr int64_t params_offset() const { return k_bytes() + v_bytes(); }
  constexpr int64_t k_params_bytes() const { return code_bits != 0 ? 4 * head_dim_k : 0; }
  constexpr int64_t v_params_bytes() const { return code_bits != 0 && head_dim_v != 0 ? 4 * kPageTokens : 0; }
  constexpr int64_t tile_bytes() const {
    return round_up(params_offset() + k_params_bytes() + v_params_bytes(), 64);
  }
  constexpr int64_t page_bytes() const { return round_up(num_kv_heads * tile_bytes(), kBlockBytes); }
};

// One layer's shape. Its newest pages are full-precision ones of dtype; where code_bits is 8 or 4, older ones
// are quantised.
struct Geometry {
  int64_t num_kv_heads = 0;
  int64_t head_dim_k = 0;
  int64_t head_dim_v = 0;
  DType dtype = DType::kFloat32;
  int code_bits = 0;

  constexpr bool quantised() const { return code_bits != 0; }
  constexpr bool operator==(const Geometry& other) const {
    return num_kv_heads == other.num_kv_heads && head_dim_k == other.head_dim_k &&
           head_dim_v == other.head_dim_v && dtype == other.dtype && code_bits == other.code_bits;
  }
  constexpr PageLayout full_precision() const { return {num_kv_heads, head_dim_k, head_dim_v, dtype, 0}; }
  constexpr PageLayout stored() const { return {num_kv_heads, head_dim_k, head_dim_v, dtype, code_bits}; }
};

}  // namespace csd
