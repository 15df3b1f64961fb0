// Page tables: which pages hold the tokens of each row of each layer, and where each page is. Plain state, no
// I/O.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <vector>

#include "base/memory_pool.h"
#include "base/types.h"
#include "store/arena.h"
#include "store/extents.h"

namespace csd {

// Which of the drive's lists of pages that may leave memory has a page.
enum class Listed : uint8_t { kNo, kTail, kSealed };

// kPageTokens tokens of one row of one layer, for all kv heads. It is in memory, or on the drive, or (while
// it is being written) in both. Rows share pages; a page that is shared or written is never modified again.
struct Page {
  Page(Arena* arena, const PageLayout& layout)
      : arena(arena), page_bytes(layout.page_bytes()), quantised(layout.code_bits != 0) {}
  ~Page() {
    if (memory != nullptr) arena->release(memory);
  }
  Page(const Page&) = delete;
  Page& operator=(const Page&) = delete;

  bool writable() const { return memory != nullptr && file_offset < 0; }  // by its only owner
  bool evictable() const { return writable() && !pinned; }

  Arena* const arena;  // outlives every page
  const int64_t page_bytes;
  const bool quantised;  // else of full precision
  uint8_t* memory = nullptr;
  bool sealed = false;  // full and as it will stay, so that it may leave memory at no cost to the next append
  bool pinned = false;  // being filled, or read to fill another
  Listed listed = Listed::kNo;
  int64_t file_offset = -1;              // where it is, or is being written
  std::shared_ptr<ExtentStream> stream;  // where it will go when it has to leave memory
  std::shared_ptr<Extent> extent;        // keeps file_offset ours
};

// Page i holds tokens [i * kPageTokens, + kPageTokens), from a row's first page on.
using PageTable = std::deque<std::shared_ptr<Page>, PoolAllocator<std::shared_ptr<Page>>>;

// One sequence of the batch. Positions are absolute: dropping old tokens does not renumber the rest.
struct Row {
  Row(MemoryPool* pool, std::shared_ptr<ExtentStream> stream)
      : pages(PoolAllocator<std::shared_ptr<Page>>(pool)), stream(std::move(stream)) {}

  PageTable pages;
  int64_t first_page = 0;
  int64_t length = 0;  // tokens appended and not truncated
  std::shared_ptr<ExtentStream> stream;

  int64_t end_page() const { return first_page + static_cast<int64_t>(pages.size()); }
  const std::shared_ptr<Page>& page(int64_t index) const {
    return pages[static_cast<size_t>(index - first_page)];
  }
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
};

}  // namespace csd
