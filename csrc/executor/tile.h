// One kv head's part of a page, for whoever reads it. How it is stored matters only here.
#pragma once

#include <cstdint>

#include "base/types.h"
#include "kernels/kernels.h"

namespace csd {

class Tile {
 public:
  Tile(const Kernels& kernels, const PageLayout& layout, const uint8_t* page, int64_t kv_head)
      : kernels_(kernels), layout_(layout), k_(page + kv_head * layout.tile_bytes()) {}

  // Arguments as in kernels.h.
  void score(const float* q, int64_t query_count, float* scores) const {
    if (layout_.code_bits == 0) {
      kernels_.score_tile(layout_.dtype, q, k_, query_count, layout_.head_dim_k, scores);
    } else {
      kernels_.score_codes(layout_.code_bits, q, k_, k_params(), query_count, layout_.head_dim_k, scores);
    }
  }
  void accumulate(const float* p, const float* shrink, int64_t query_count, int64_t token_begin,
                  int64_t token_end, float* out) const {
    if (layout_.code_bits == 0) {
      kernels_.accumulate_tile(layout_.dtype, p, shrink, v(), query_count, layout_.head_dim_v, token_begin,
                               token_end, out);
    } else {
      kernels_.accumulate_codes(layout_.code_bits, p, shrink, v(), v_params(), query_count,
                                layout_.head_dim_v, token_begin, token_end, out);
    }
  }
  void unpack_k(int64_t token_begin, int64_t token_count, DType dtype, void* target) const {
    const int64_t stride = layout_.head_dim_k;
    if (layout_.code_bits == 0) {
      kernels_.unpack_k(layout_.dtype, k_, stride, token_begin, token_count, dtype, stride, target);
    } else {
      kernels_.dequantise_k(layout_.code_bits, k_, k_params(), stride, token_begin, token_count, dtype,
                            stride, target);
    }
  }
  void unpack_v(int64_t token_begin, int64_t token_count, DType dtype, void* target) const {
    const int64_t stride = layout_.head_dim_v;
    if (layout_.code_bits == 0) {
      kernels_.unpack_v(layout_.dtype, v(), stride, token_begin, token_count, dtype, stride, target);
    } else {
      kernels_.dequantise_v(layout_.code_bits, v(), v_params(), stride, token_begin, token_count, dtype,
                            stride, target);
    }
  }

 private:
  const uint8_t* v() const { return k_ + layout_.k_bytes(); }
  const uint16_t* k_params() const { return reinterpret_cast<const uint16_t*>(k_ + layout_.params_offset()); }
  const uint16_t* v_params() const { return k_params() + 2 * layout_.head_dim_k; }

  const Kernels& kernels_;
  const PageLayout& layout_;
  const uint8_t* const k_;
};

}  // namespace csd
