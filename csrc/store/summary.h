// What is kept in memory about pages that may lie on the drive, so that a pass can choose among them: bounds
// of their keys, or a low-bit copy of the keys, and the checksums of their tiles. Plain state, no arithmetic.
//
// Summaries lie in blocks. A block holds kPageTokens members for each kv head, as the K of a tile does (base/
// types.h): a member of a sketch is one token's key, a member of bounds one group of neighbouring tokens of a
// page. So the kernels that score a tile's tokens score a block's members.
#pragma once

#include <cstdint>
#include <deque>
#include <set>
#include <vector>

#include "base/memory_pool.h"
#include "base/ref.h"
#include "base/types.h"
#include "store/arena.h"

namespace csd {

enum class SummaryKind : uint8_t {
  kValues,  // the sum of V over each page: what tokens that are left out amount to
  kBounds,  // centre and radius of every channel over a group of tokens: of a box that holds their keys
  kSketch,  // every key in 4 bits
};
constexpr int kSummaryKinds = 3;

struct SummaryShape {
  SummaryShape(const Geometry& geometry, SummaryKind kind)
      : num_kv_heads(geometry.num_kv_heads),
        head_dim(geometry.head_dim_k),
        head_dim_v(kind == SummaryKind::kValues ? geometry.head_dim_v : 0),
        tiles_per_head(kind == SummaryKind::kBounds   ? 2
                       : kind == SummaryKind::kSketch ? 1
                                                      : 0),
        members_per_page(kind == SummaryKind::kBounds ? group_count(geometry) : kPageTokens) {}

  // Members of a block that one page takes: 64 for a sketch, else as many groups as 2 % of the page pay for.
  constexpr int64_t pages_per_block() const {
    return tiles_per_head == 0 ? kPageTokens : kPageTokens / members_per_page;
  }
  // A block that is being filled, and a full one: codes of 4 bits, scaled per channel over the block.
  constexpr PageLayout filling() const {
    return {tiles_per_head * num_kv_heads, head_dim, 0, DType::kBFloat16, 0};
  }
  constexpr PageLayout full() const {
    return {tiles_per_head * num_kv_heads, head_dim, 0, DType::kBFloat16, 4};
  }

  constexpr int64_t filling_bytes() const { return filling().num_kv_heads * filling().tile_bytes(); }
  constexpr int64_t full_bytes() const { return full().num_kv_heads * full().tile_bytes(); }
  // [pages_per_block + 1][num_kv_heads][head_dim_v] fp32: the last is the sum of all, once the block is full.
  constexpr int64_t sums_bytes() const {
    return round_up((pages_per_block() + 1) * num_kv_heads * head_dim_v * 4, kBlockBytes);
  }

  int64_t num_kv_heads;
  int64_t head_dim;        // of K
  int64_t head_dim_v;      // of sums; 0: there are none
  int64_t tiles_per_head;  // bounds: of centres, then of radii
  int64_t members_per_page;

 private:
  // Bounds of fewer tokens are tighter. 4-bit codes of two members a channel, and their share of the scales.
  static constexpr int64_t group_count(const Geometry& geometry) {
    const int64_t bytes_per_group = geometry.head_dim_k + 2 * 4 * geometry.head_dim_k / kPageTokens;
    int64_t groups = 4;
    while (groups > 1 && groups * bytes_per_group * 50 > geometry.stored().tile_bytes()) groups /= 2;
    return groups;
  }
};

struct SummaryBlock : Counted {
  SummaryBlock(MemoryPool* pool, Arena* arena, int64_t checksum_count)
      : checksums(static_cast<size_t>(checksum_count), 0), pool_(pool), arena_(arena) {}
  ~SummaryBlock() {
    if (memory != nullptr) arena_->release(memory);
    if (next_memory != nullptr) arena_->release(next_memory);
    if (sums != nullptr) arena_->release(reinterpret_cast<uint8_t*>(sums));
  }

  MemoryPool* pool() const { return pool_; }
  // What was filled is now in next_memory, as full() has it.
  void turn() {
    if (next_memory != nullptr) {
      if (memory != nullptr) arena_->release(memory);
      memory = next_memory;
      next_memory = nullptr;
    }
    full = true;
  }

  uint8_t* memory = nullptr;        // null where there are no tiles
  uint8_t* next_memory = nullptr;   // for the full block, once its last page is on its way
  float* sums = nullptr;            // null where there are none
  bool full = false;                // the layout of memory
  std::vector<uint32_t> checksums;  // [pages_per_block][num_kv_heads], of the pages' tiles

 private:
  MemoryPool* const pool_;
  Arena* const arena_;
};

// Of a row's pages from its first on, without gaps. Rows share blocks; one that is shared is never written
// to.
struct RowSummary {
  explicit RowSummary(MemoryPool* pool) : blocks(PoolAllocator<Ref<SummaryBlock>>(pool)) {}

  std::deque<Ref<SummaryBlock>, PoolAllocator<Ref<SummaryBlock>>> blocks;
  int64_t first_block = 0;
  int64_t end_page = 0;  // pages before it are summarised
  // During an append:
  std::set<int64_t> beyond;  // pages that are, behind a gap; it closes before the append ends
  int64_t end_before = 0;    // end_page when it began
  bool follows = false;      // nothing was missing then

  const Ref<SummaryBlock>& block(int64_t index) const {
    return blocks[static_cast<size_t>(index - first_block)];
  }
  int64_t end_block() const { return first_block + static_cast<int64_t>(blocks.size()); }
  void truncate(int64_t page_end, int64_t pages_per_block) {
    if (page_end < end_page) end_page = page_end;
    while (!blocks.empty() && (end_block() - 1) * pages_per_block >= end_page) blocks.pop_back();
  }
  void trim(int64_t first_page, int64_t pages_per_block) {
    if (first_page > end_page) end_page = first_page;
    while (!blocks.empty() && (first_block + 1) * pages_per_block <= first_page) {
      blocks.pop_front();
      first_block++;
    }
  }
};

}  // namespace csd
