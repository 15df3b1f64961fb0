#include "executor/summarise.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "base/checksum.h"
#include "executor/tile.h"

namespace csd {
namespace {

// What bfloat16 keeps of a value, to nearest. (Inline: called for every channel of every group.)
float as_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000;
  std::memcpy(&value, &bits, sizeof(bits));
  return value;
}

// Codes are to nearest and radii must not shrink: half a step more than the widest rounding.
constexpr float kHalfStep = 0.5f / 15.0f * 1.01f;
// bfloat16 rounds to nearest: at most so much off.
constexpr float kRoundedUp = 1.0f + 1.0f / 128.0f;

}  // namespace

bool any_not_finite(const float* values, int64_t count) {
  uint32_t found = 0;
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits;
    std::memcpy(&bits, values + i, sizeof(bits));
    found |= (bits & 0x7f800000) == 0x7f800000 ? 1 : 0;
  }
  return found != 0;
}

void Summariser::add(const PageLayout& layout, const uint8_t* image, int64_t page_index, int64_t kv_head,
                     float* scratch, SummaryBlock* block) const {
  const int64_t page = page_index % shape_.pages_per_block();
  const uint8_t* bytes = image + kv_head * layout.tile_bytes();
  block->checksums[static_cast<size_t>(page * shape_.num_kv_heads + kv_head)] =
      crc32c(bytes, layout.tile_bytes());
  if (shape_.head_dim_v > 0) {
    float* v = scratch;
    Tile(kernels_, layout, image, kv_head).unpack_v(0, kPageTokens, DType::kFloat32, v);
    float* sum = block->sums + (page * shape_.num_kv_heads + kv_head) * shape_.head_dim_v;
    std::copy_n(v, shape_.head_dim_v, sum);
    for (int64_t t = 1; t < kPageTokens; ++t) {
      kernels_.blend(sum, 1.0f, v + t * shape_.head_dim_v, 1.0f, shape_.head_dim_v, sum);
    }
  }
  if (shape_.tiles_per_head == 0) return;
  const int64_t width = shape_.head_dim;
  float* k = scratch;  // [kPageTokens][head_dim]
  Tile(kernels_, layout, image, kv_head).unpack_k(0, kPageTokens, DType::kFloat32, k);
  const PageLayout filling = shape_.filling();
  const int64_t members = shape_.members_per_page;
  const int64_t slot = page * members;
  if (shape_.tiles_per_head == 1) {
    kernels_.pack_k(DType::kFloat32, k, width, DType::kBFloat16, width, slot, members,
                    tile(block->memory, filling, kv_head, 0));
    return;
  }
  float* centres = scratch + kPageTokens * width;  // [members][head_dim], and the radii behind them
  float* radii = centres + members * width;
  bound(k, centres, radii);
  for (int64_t part = 0; part < 2; ++part) {
    kernels_.pack_k(DType::kFloat32, part == 0 ? centres : radii, width, DType::kBFloat16, width, slot,
                    members, tile(block->memory, filling, kv_head, part));
  }
}

// Of each channel over each group of tokens: the middle of its range as bfloat16 has it, and how far the
// range goes from there.
void Summariser::bound(const float* k, float* centres, float* radii) const {
  const int64_t width = shape_.head_dim;
  const int64_t group_tokens = kPageTokens / shape_.members_per_page;
  for (int64_t g = 0; g < shape_.members_per_page; ++g) {
    float* low = centres + g * width;
    float* high = radii + g * width;
    const float* token = k + g * group_tokens * width;
    std::copy_n(token, width, low);
    std::copy_n(token, width, high);
    const bool finite = !any_not_finite(token, group_tokens * width);
    for (int64_t t = 0; t < group_tokens; ++t, token += width) {
      for (int64_t d = 0; d < width; ++d) {
        low[d] = std::min(low[d], token[d]);
        high[d] = std::max(high[d], token[d]);
      }
    }
    for (int64_t d = 0; d < width; ++d) {
      const float centre = as_bfloat16(0.5f * low[d] + 0.5f * high[d]);
      const float radius = std::max(high[d] - centre, centre - low[d]) * kRoundedUp;
      // A key that is not finite must be looked at: the bound is NaN then, which no bound is above.
      low[d] = finite ? centre : NAN;
      high[d] = finite ? radius : NAN;
    }
  }
}

void Summariser::finish(int64_t kv_head, float* scratch, SummaryBlock* block) const {
  if (shape_.head_dim_v > 0) {
    const int64_t stride = shape_.num_kv_heads * shape_.head_dim_v;
    const float* sum = block->sums + kv_head * shape_.head_dim_v;
    float* total = block->sums + shape_.pages_per_block() * stride + kv_head * shape_.head_dim_v;
    std::copy_n(sum, shape_.head_dim_v, total);
    for (int64_t page = 1; page < shape_.pages_per_block(); ++page) {
      kernels_.blend(total, 1.0f, sum + page * stride, 1.0f, shape_.head_dim_v, total);
    }
  }
  if (shape_.tiles_per_head == 0) return;
  const int64_t width = shape_.head_dim;
  const PageLayout filling = shape_.filling();
  const PageLayout full = shape_.full();
  float* centres = scratch;
  float* radii = scratch + kPageTokens * width;
  const auto load = [&](int64_t part, float* values) {
    kernels_.unpack_k(DType::kBFloat16, tile(block->memory, filling, kv_head, part), width, 0, kPageTokens,
                      DType::kFloat32, width, values);
  };
  const auto quantise = [&](int64_t part, const float* values) {
    uint8_t* codes = tile(block->next_memory, full, kv_head, part);
    kernels_.quantise_k(full.code_bits, DType::kFloat32, values, width, width, codes,
                        reinterpret_cast<uint16_t*>(codes + full.params_offset()));
  };
  load(0, centres);
  quantise(0, centres);
  if (shape_.tiles_per_head == 1) return;
  load(1, radii);
  // The boxes must go on holding their keys: what a centre moves by, its radius grows by.
  const uint8_t* codes = tile(block->next_memory, full, kv_head, 0);
  const auto* params = reinterpret_cast<const uint16_t*>(codes + full.params_offset());
  alignas(64) float moved[kHeadDimMax];
  for (int64_t i = 0; i < kPageTokens; ++i) {
    kernels_.dequantise_k(full.code_bits, codes, params, width, i, 1, DType::kFloat32, width, moved);
    for (int64_t d = 0; d < width; ++d) radii[i * width + d] += std::fabs(centres[i * width + d] - moved[d]);
  }
  for (int64_t d = 0; d < width; ++d) {
    float low = radii[d];
    float high = radii[d];
    for (int64_t i = 1; i < kPageTokens; ++i) {
      low = std::min(low, radii[i * width + d]);
      high = std::max(high, radii[i * width + d]);
    }
    const float more = (high - low) * kHalfStep;
    for (int64_t i = 0; i < kPageTokens; ++i) radii[i * width + d] += more;
  }
  quantise(1, radii);
}

void Summariser::reopen(const SummaryBlock& full_block, int64_t kv_head, float* scratch,
                        uint8_t* filling) const {
  const int64_t width = shape_.head_dim;
  const int64_t count = kPageTokens * width;
  const PageLayout full = shape_.full();
  for (int64_t part = 0; part < shape_.tiles_per_head; ++part) {
    const uint8_t* codes = tile(full_block.memory, full, kv_head, part);
    kernels_.dequantise_k(full.code_bits, codes,
                          reinterpret_cast<const uint16_t*>(codes + full.params_offset()), width, 0,
                          kPageTokens, DType::kFloat32, width, scratch + part * count);
  }
  // Rounding moves centres again.
  for (int64_t i = 0; i < count && shape_.tiles_per_head == 2; ++i) {
    scratch[count + i] = (scratch[count + i] + std::fabs(scratch[i] - as_bfloat16(scratch[i]))) * kRoundedUp;
  }
  for (int64_t part = 0; part < shape_.tiles_per_head; ++part) {
    kernels_.pack_k(DType::kFloat32, scratch + part * count, width, DType::kBFloat16, width, 0, kPageTokens,
                    tile(filling, shape_.filling(), kv_head, part));
  }
}

}  // namespace csd
