#include "executor/packer.h"

#include <algorithm>
#include <atomic>
#include <utility>

#include "base/error.h"
#include "executor/tile.h"

namespace csd {
namespace {

// Packing less than this is over before another thread wakes.
constexpr int64_t kWakeBytes = int64_t{512} << 10;

// One kv head's K and V of a page in fp32.
constexpr int64_t kScratchBytes = 2 * kPageTokens * kHeadDimMax * static_cast<int64_t>(sizeof(float));

// One kv head's tokens, k_stride and v_stride elements apart, into its tile. A quantised one takes all of
// them.
void pack_tile(const Kernels& kernels, const PageLayout& layout, DType dtype, const void* k, int64_t k_stride,
               const void* v, int64_t v_stride, int64_t slot, int64_t count, uint8_t* tile) {
  uint8_t* v_tile = tile + layout.k_bytes();
  if (layout.code_bits == 0) {
    kernels.pack_k(dtype, k, k_stride, layout.dtype, layout.head_dim_k, slot, count, tile);
    kernels.pack_v(dtype, v, v_stride, layout.dtype, layout.head_dim_v, slot, count, v_tile);
    return;
  }
  CSD_CHECK(slot == 0 && count == kPageTokens, "a quantised page takes a whole page of tokens");
  auto* params = reinterpret_cast<uint16_t*>(tile + layout.params_offset());
  kernels.quantise_k(layout.code_bits, dtype, k, k_stride, layout.head_dim_k, tile, params);
  kernels.quantise_v(layout.code_bits, dtype, v, v_stride, layout.head_dim_v, v_tile,
                     params + 2 * layout.head_dim_k);
}

}  // namespace

void Packer::add(Job job) {
  job.page->pinned = true;
  if (job.source != nullptr) job.source->pinned = true;
  queued_bytes_ += job.page->page_bytes();
  jobs_.push_back(std::move(job));
}

void Packer::pack_all() {
  const auto count = static_cast<int64_t>(jobs_.size());
  const auto workers = static_cast<int>(std::min(count, 1 + queued_bytes_ / kWakeBytes));
  const int worker_count = std::clamp(workers, 1, pool_.worker_count());
  while (static_cast<int>(scratch_.size()) < worker_count) scratch_.emplace_back();
  std::atomic<int64_t> next{0};
  pool_.compute(worker_count, [&](int worker) {
    auto* memory = static_cast<float*>(scratch_[static_cast<size_t>(worker)].reserve(kScratchBytes));
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
  const NewTokens& tokens = job.tokens;
  const int64_t bytes = element_bytes(tokens.dtype);
  for (int64_t h = 0; h < job.layout.num_kv_heads; ++h) {
    pack_tile(kernels_, job.layout, tokens.dtype, tokens.k + h * tokens.k_strides[0] * bytes,
              tokens.k_strides[1], tokens.v + h * tokens.v_strides[0] * bytes, tokens.v_strides[1],
              tokens.slot, tokens.count, job.page->memory + h * job.layout.tile_bytes());
  }
}

void Packer::convert(const uint8_t* source, const PageLayout& source_layout, uint8_t* target,
                     const PageLayout& layout) {
  if (scratch_.empty()) scratch_.emplace_back();
  auto* memory = static_cast<float*>(scratch_[0].reserve(kScratchBytes));
  convert_page(source, source_layout, target, layout, memory);
}

// By way of one kv head's dense K and V in fp32, which holds every stored value exactly.
void Packer::convert_page(const uint8_t* source, const PageLayout& source_layout, uint8_t* target,
                          const PageLayout& layout, float* scratch) const {
  float* k = scratch;
  float* v = scratch + kPageTokens * kHeadDimMax;
  for (int64_t h = 0; h < layout.num_kv_heads; ++h) {
    const Tile from(kernels_, source_layout, source, h);
    from.unpack_k(0, kPageTokens, DType::kFloat32, k);
    from.unpack_v(0, kPageTokens, DType::kFloat32, v);
    pack_tile(kernels_, layout, DType::kFloat32, k, layout.head_dim_k, v, layout.head_dim_v, 0, kPageTokens,
              target + h * layout.tile_bytes());
  }
}

}  // namespace csd
