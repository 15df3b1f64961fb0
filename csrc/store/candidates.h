// Which pages may have to leave memory, and in what order. Owns none of them: a page that goes takes itself
// off. Not thread-safe.
#pragma once

#include <cstdint>
#include <deque>

#include "base/memory_pool.h"

namespace csd {

struct Page;

// The list of candidates that has a page.
enum class Listed : uint8_t { kNo, kTail, kSealed };

class Candidates {
 public:
  explicit Candidates(MemoryPool* pool) : sealed_(pool), tails_(pool) {}
  Candidates(const Candidates&) = delete;
  Candidates& operator=(const Candidates&) = delete;

  // Only a page in memory that is not being written becomes a candidate. It leaves before those of its kind
  // that were there.
  void add(Page* page);
  void add_last(Page* page);  // after them
  void remove(Page* page);    // if it is one

  // The next to leave: of the full pages the last, because what stays should be a fixed set (a scan over
  // everything defeats any recency order); if there is none, a tail. Null: no candidates.
  Page* next() const;

 private:
  // Pages know their places, so that they get off a list at once. The gaps they leave are cut off at both
  // ends, and swept out when most of a list is gaps.
  struct List {
    using Pages = std::deque<Page*, PoolAllocator<Page*>>;
    explicit List(MemoryPool* pool) : pages(PoolAllocator<Page*>(pool)) {}
    Pages pages;               // null: a gap; neither the first nor the last is one
    uint32_t first_place = 0;  // wraps around
    size_t gaps = 0;
  };

  List& list_of(Listed listed) { return listed == Listed::kSealed ? sealed_ : tails_; }

  List sealed_;  // full pages
  List tails_;   // pages that a row still fills
};

}  // namespace csd
