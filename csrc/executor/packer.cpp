#include "executor/packer.h"

#include <algorithm>
#include <atomic>
#include <utility>

#include "base/error.h"

namespace csd {
namespace {

// Packing less than this is over before another thread wakes.
constexpr int64_t kWakeBytes = int64_t{512} << 10;

uint16_t* k_params(uint8_t* tile, const PageLayout& layout) {
  return reinterpret_cast<uint16_t*>(tile + layout.params_offset());
}

const uint16_t* k_params(const uint8_t* tile, const PageLayout& layout) {
  return reinterpret_cast<const uint16_t*>(tile + layout.params_offset());
}

}  // namespace

void Packer::add(Job job) {
  job.page->pinned = true;
  if (job.source != nullptr) job.source->pinned = true;
  queued_bytes_ += job.page->page_bytes;
  jobs_.push_back(std::move(job));
}

void Packer::pack_all() {
  const auto count = static_cast<int64_t>(jobs_.size());
  const auto workers = static_cast<int>(std::min(count, 1 + queued_bytes_ / kWakeBytes));
  const int worker_count = std::clamp(workers, 1, pool_.worker_count());
  while (static_cast<int>(scratch_.size()) < worker_count) scratch_.emplace_back();
  std::atomic<int64_t> next{0};
  pool_.compute(worker_count, [&](int worker) {
    auto* memory = static_cast<float*>(scratch_[static_cast<size_t>(worker)].reserve(
        kPageTokens * kHeadDimMax * static_cast<int64_t>(sizeof(float))));
    for (int64_t i = next++; i < count; i = next++) pack(jobs_[static_cast<size_t>(i)], memory);
  });
}

void Packer::pack(const Job& job, float* scratch) const {
  if (job.source == nullptr) {
    pack_tokens(job);
  } else {
    convert_page(job.source->memory, job.source_layout, job.page->memory, job.layout, scratch);
  }
}

void Packer::pack_tokens(const Job& job) const {
  const PageLayout& layout = job.layout;
  const NewTokens& tokens = job.tokens;
  const int64_t bytes = element_bytes(tokens.dtype);
  CSD_CHECK(layout.code_bits == 0 || tokens.count == kPageTokens,
            "a quantised page takes a whole page of tokens");
  for (int64_t h = 0; h < layout.num_kv_heads; ++h) {
    const uint8_t* k = tokens.k + h * tokens.k_strides[0] * bytes;
    const uint8_t* v = tokens.v + h * tokens.v_strides[0] * bytes;
    uint8_t* k_tile = job.page->memory + h * layout.tile_bytes();
    uint8_t* v_tile = k_tile + layout.k_bytes();
    if (layout.code_bits != 0) {
      uint16_t* params = k_params(k_tile, layout);
      kernels_.quantise_k(layout.code_bits, tokens.dtype, k, tokens.k_strides[1], layout.head_dim_k, k_tile,
                          params);
      kernels_.quantise_v(layout.code_bits, tokens.dtype, v, tokens.v_strides[1], layout.head_dim_v, v_tile,
                          params + 2 * layout.head_dim_k);
    } else {
      kernels_.pack_k(tokens.dtype, k, tokens.k_strides[1], layout.dtype, layout.head_dim_k, tokens.slot,
                      tokens.count, k_tile);
      kernels_.pack_v(tokens.dtype, v, tokens.v_strides[1], layout.dtype, layout.head_dim_v, tokens.slot,
                      tokens.count, v_tile);
    }
  }
}

void Packer::convert(const uint8_t* source, const PageLayout& source_layout, uint8_t* target,
                     const PageLayout& layout) {
  if (scratch_.empty()) scratch_.emplace_back();
  auto* memory = static_cast<float*>(
      scratch_[0].reserve(kPageTokens * kHeadDimMax * static_cast<int64_t>(sizeof(float))));
  convert_page(source, source_layout, target, layout, memory);
}

// By way of one kv head's dense K or V in fp32, which holds every stored value exactly.
void Packer::convert_page(const uint8_t* source, const PageLayout& source_layout, uint8_t* target,
                          const PageLayout& layout, float* scratch) const {
  const int64_t k_width = layout.head_dim_k;
  const int64_t v_width = layout.head_dim_v;
  for (int64_t h = 0; h < layout.num_kv_heads; ++h) {
    const uint8_t* from = source + h * source_layout.tile_bytes();
    uint8_t* to = target + h * layout.tile_bytes();
    if (source_layout.code_bits != 0) {
      kernels_.dequantise_k(source_layout.code_bits, from, k_params(from, source_layout), k_width, 0,
                            kPageTokens, DType::kFloat32, k_width, scratch);
    } else {
      kernels_.unpack_k(source_layout.dtype, from, k_width, 0, kPageTokens, DType::kFloat32, k_width,
                        scratch);
    }
    if (layout.code_bits != 0) {
      kernels_.quantise_k(layout.code_bits, DType::kFloat32, scratch, k_width, k_width, to,
                          k_params(to, layout));
    } else {
      kernels_.pack_k(DType::kFloat32, scratch, k_width, layout.dtype, k_width, 0, kPageTokens, to);
    }
    const uint8_t* from_v = from + source_layout.k_bytes();
    uint8_t* to_v = to + layout.k_bytes();
    if (source_layout.code_bits != 0) {
      const uint16_t* params = k_params(from, source_layout) + 2 * k_width;
      kernels_.dequantise_v(source_layout.code_bits, from_v, params, v_width, 0, kPageTokens, DType::kFloat32,
                            v_width, scratch);
    } else {
      kernels_.unpack_v(source_layout.dtype, from_v, v_width, 0, kPageTokens, DType::kFloat32, v_width,
                        scratch);
    }
    if (layout.code_bits != 0) {
      kernels_.quantise_v(layout.code_bits, DType::kFloat32, scratch, v_width, v_width, to_v,
                          k_params(to, layout) + 2 * k_width);
    } else {
      kernels_.pack_v(DType::kFloat32, scratch, v_width, layout.dtype, v_width, 0, kPageTokens, to_v);
    }
  }
}

}  // namespace csd
