// Arithmetic of summaries (store/summary.h): from a page to its members of a block, and from a block that is
// full to its codes. No I/O, no page tables.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/kernels.h"
#include "store/summary.h"

namespace csd {

bool any_not_finite(const float* values, int64_t count);

class Summariser {
 public:
  Summariser(const Kernels& kernels, const SummaryShape& shape) : kernels_(kernels), shape_(shape) {}

  // Floats that the others need to work in.
  int64_t scratch_floats() const { return kPageTokens * std::max(2 * shape_.head_dim, shape_.head_dim_v); }

  // Puts one kv head of a page into its block, which is being filled. Heads may go in at once; pages of one
  // block may not. image: the page as it is stored.
  void add(const PageLayout& layout, const uint8_t* image, int64_t page_index, int64_t kv_head,
           float* scratch, SummaryBlock* block) const;
  // The codes of a kv head's members, which are all there, to next_memory.
  void finish(int64_t kv_head, float* scratch, SummaryBlock* block) const;
  // The reverse, for a block that goes on being filled: members of a full one, as far as codes tell them.
  void reopen(const SummaryBlock& full, int64_t kv_head, float* scratch, uint8_t* filling) const;

 private:
  uint8_t* tile(uint8_t* memory, const PageLayout& layout, int64_t kv_head, int64_t part) const {
    return memory + (shape_.tiles_per_head * kv_head + part) * layout.tile_bytes();
  }
  void bound(const float* k, float* centres, float* radii) const;

  const Kernels& kernels_;
  const SummaryShape shape_;
};

}  // namespace csd
