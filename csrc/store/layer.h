// Page tables: which pages hold the tokens of each row of each layer, and where each page is. Plain state, no
// I/O.
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <utility>
#include <vector>

#include "base/memory_pool.h"
#include "base/ref.h"
#include "base/types.h"
#include "store/arena.h"
#include "store/candidates.h"
#include "store/extents.h"
#include "store/summary.h"

namespace csd {

// Where the pages that a row fills are kept: the same for all of them, so that none has to keep it.
struct Home : Counted {
  Home(Arena* arena, Candidates* candidates, FileSpace* space, int64_t page_bytes)
      : arena(arena), candidates(candidates), stream(space, page_bytes) {}

  MemoryPool* pool() const { return stream.pool(); }

  Arena* const arena;  // both outlive every page
  Candidates* const candidates;
  ExtentStream stream;  // where pages go when they have to leave memory
};

// kPageTokens tokens of one row of one layer, for all kv heads. It is in memory, or on the drive, or (while
// it is being written) in both. Rows share pages; a page that is shared or written is never modified again.
struct Page : Counted {
  Page(Ref<Home> home, const PageLayout& layout)
      : quantised(layout.code_bits != 0),
        sealed(false),
        pinned(false),
        written(false),
        block_count(static_cast<uint16_t>(layout.page_bytes() / kBlockBytes)),
        home(std::move(home)) {}
  ~Page() {
    home->candidates->remove(this);
    if (memory != nullptr) home->arena->release(memory);
  }

  MemoryPool* pool() const { return home->pool(); }
  int64_t page_bytes() const { return int64_t{block_count} * kBlockBytes; }
  bool writable() const { return memory != nullptr && file_offset < 0; }  // by its only owner
  // May leave memory: by being written, or at once where the drive has it already.
  bool evictable() const { return memory != nullptr && !pinned && (file_offset < 0 || written); }

  uint32_t place = 0;  // in the list of candidates that has it
  uint8_t* memory = nullptr;
  int64_t file_offset = -1;  // where it is, or is being written
  uint32_t checksum = 0;     // of its bytes, once it has a place on the drive
  const bool quantised : 1;  // else of full precision
  bool sealed : 1;   // full and as it will stay, so that it may leave memory at no cost to the next append
  bool pinned : 1;   // being filled, or read to fill another
  bool written : 1;  // the drive has it; it may be in memory besides
  Listed listed = Listed::kNo;
  const uint16_t block_count;  // page_bytes() is at most 16 MiB: see Drive::create_layer
  const Ref<Home> home;
  Ref<Extent> extent;  // keeps file_offset ours
};

// An int4 page may be as small as 72 KiB, and what is kept about it a thousandth of that: this, a pointer in
// the row's table and a share of an extent.
static_assert(sizeof(Page) <= 48);

// Page i holds tokens [i * kPageTokens, + kPageTokens), from a row's first page on.
using PageTable = std::deque<Ref<Page>, PoolAllocator<Ref<Page>>>;

// One sequence of the batch. Positions are absolute: dropping old tokens does not renumber the rest.
struct Row {
  Row(MemoryPool* pool, Ref<Home> home)
      : pages(PoolAllocator<Ref<Page>>(pool)),
        home(std::move(home)),
        summaries{RowSummary(pool), RowSummary(pool), RowSummary(pool)} {}

  PageTable pages;
  int64_t first_page = 0;
  int64_t length = 0;                               // tokens appended and not truncated
  Ref<Home> home;                                   // of the pages that it will fill
  std::array<RowSummary, kSummaryKinds> summaries;  // by kind, of those that the layer keeps

  int64_t end_page() const { return first_page + static_cast<int64_t>(pages.size()); }
  const RowSummary& summary(SummaryKind kind) const { return summaries[static_cast<size_t>(kind)]; }
  RowSummary& summary(SummaryKind kind) { return summaries[static_cast<size_t>(kind)]; }
  const Ref<Page>& page(int64_t index) const { return pages[static_cast<size_t>(index - first_page)]; }
  void truncate(int64_t new_length) {
    length = new_length;
    while (end_page() > (length + kPageTokens - 1) / kPageTokens && !pages.empty()) pages.pop_back();
  }
};

struct Layer {
  Geometry geometry;
  std::vector<Row> rows;
  int64_t begin = 0;  // tokens before it were dropped (sliding windows)
  int64_t epoch =
      0;  // changes whenever a token that could be read before cannot be read at its place any more
  int64_t number = -1;    // the caller's, for errors to name; -1: it gave none
  bool restored = false;  // from a catalogue, and not attended to yet
  int64_t arriving = 0;   // pages that lack their bytes: see Drive::append_reserved
  std::array<bool, kSummaryKinds>
      keeps{};  // by kind: summaries of the pages that fill; for good once asked for
  bool keeps_any() const { return keeps[0] || keeps[1] || keeps[2]; }
};

}  // namespace csd
