// Memory for pages, bounded: what this holds of the process never exceeds limit_bytes. Not thread-safe.
//
// Pages are carved from 2 MiB chunks (one huge page each, so that streaming attention does not run on TLB
// misses); an emptied chunk serves any page size.
#pragma once

#include <cstdint>
#include <map>
#include <vector>

namespace csd {

class Arena {
 public:
  explicit Arena(int64_t limit_bytes);
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  // kBlockBytes-aligned, uninitialised; null when the limit leaves no room.
  uint8_t* allocate(int64_t page_bytes);
  void release(uint8_t* page);

  // What so many pages take, in chunks that they share with no other size.
  int64_t bytes_for(int64_t page_bytes, int64_t page_count) const;
  // What each of many takes at the least: its share of a chunk that is full of them.
  int64_t share_bytes(int64_t page_bytes) const;

  int64_t limit_bytes() const { return limit_bytes_; }
  // Where more than that is mapped, allocate() finds no room until enough was released.
  void set_limit(int64_t bytes);
  int64_t mapped_bytes() const { return mapped_bytes_; }

 private:
  struct Chunk {
    int64_t bytes = 0;
    int64_t slot_bytes = 0;
    int64_t slot_count = 0;
    std::vector<uint32_t> free_slots;
  };

  bool shares_chunk(int64_t page_bytes) const { return page_bytes * 2 <= chunk_bytes_; }
  void unmap_empty_chunks();

  int64_t limit_bytes_;
  const int64_t chunk_bytes_;
  int64_t mapped_bytes_ = 0;
  std::map<uint8_t*, Chunk> chunks_;  // by base address; those with at least one page in use
  std::map<int64_t, std::vector<uint8_t*>> open_chunks_;  // by slot size: bases of chunks with a free slot
  std::vector<uint8_t*> empty_chunks_;                    // mapped, of chunk_bytes_, without a page
};

}  // namespace csd
