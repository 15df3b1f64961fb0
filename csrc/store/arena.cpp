#include "store/arena.h"

#include <algorithm>

#include "base/mapped_memory.h"

namespace csd {
namespace {

constexpr int64_t kChunkBytesMax = int64_t{2} << 20;  // one huge page
constexpr int64_t kChunkBytesMin = int64_t{64} << 10;

// Small budgets get small chunks: with a handful of page sizes, 2 MiB chunks would strand most of an 8 MiB
// budget.
int64_t choose_chunk_bytes(int64_t limit_bytes) {
  int64_t bytes = kChunkBytesMax;
  while (bytes > kChunkBytesMin && bytes * 32 > limit_bytes) bytes /= 2;
  return bytes;
}

}  // namespace

Arena::Arena(int64_t limit_bytes)
    : limit_bytes_(limit_bytes), chunk_bytes_(choose_chunk_bytes(limit_bytes)) {}

Arena::~Arena() {
  for (auto& [base, chunk] : chunks_) unmap_memory(base, chunk.bytes);
  unmap_empty_chunks();
}

void Arena::set_limit(int64_t bytes) {
  limit_bytes_ = bytes;
  if (mapped_bytes_ > limit_bytes_) unmap_empty_chunks();
}

int64_t Arena::bytes_for(int64_t page_bytes, int64_t page_count) const {
  if (!shares_chunk(page_bytes)) return page_count * page_bytes;
  const int64_t pages_per_chunk = chunk_bytes_ / page_bytes;
  return (page_count + pages_per_chunk - 1) / pages_per_chunk * chunk_bytes_;
}

int64_t Arena::share_bytes(int64_t page_bytes) const {
  return shares_chunk(page_bytes) ? chunk_bytes_ / (chunk_bytes_ / page_bytes) : page_bytes;
}

uint8_t* Arena::allocate(int64_t page_bytes) {
  std::vector<uint8_t*>& open = open_chunks_[page_bytes];
  if (open.empty()) {
    uint8_t* base = nullptr;
    int64_t bytes = chunk_bytes_;
    if (shares_chunk(page_bytes) && !empty_chunks_.empty()) {
      base = empty_chunks_.back();
      empty_chunks_.pop_back();
    } else {
      if (!shares_chunk(page_bytes)) bytes = page_bytes;
      if (mapped_bytes_ + bytes > limit_bytes_) unmap_empty_chunks();
      if (mapped_bytes_ + bytes > limit_bytes_) return nullptr;
      base = map_memory(bytes, "KV pages");
      mapped_bytes_ += bytes;
    }
    Chunk& chunk = chunks_[base];
    chunk.bytes = bytes;
    chunk.slot_bytes = page_bytes;
    chunk.slot_count = bytes / page_bytes;
    chunk.free_slots.clear();
    for (int64_t slot = chunk.slot_count; slot-- > 0;)
      chunk.free_slots.push_back(static_cast<uint32_t>(slot));
    open.push_back(base);
  }
  uint8_t* base = open.back();
  Chunk& chunk = chunks_[base];
  const uint32_t slot = chunk.free_slots.back();
  chunk.free_slots.pop_back();
  if (chunk.free_slots.empty()) open.pop_back();
  return base + slot * page_bytes;
}

void Arena::release(uint8_t* page) {
  auto found = std::prev(chunks_.upper_bound(page));
  uint8_t* base = found->first;
  Chunk& chunk = found->second;
  std::vector<uint8_t*>& open = open_chunks_[chunk.slot_bytes];
  if (chunk.free_slots.empty()) open.push_back(base);
  chunk.free_slots.push_back(static_cast<uint32_t>((page - base) / chunk.slot_bytes));
  if (static_cast<int64_t>(chunk.free_slots.size()) < chunk.slot_count) return;
  open.erase(std::find(open.begin(), open.end(), base));
  if (chunk.bytes == chunk_bytes_ && mapped_bytes_ <= limit_bytes_) {
    empty_chunks_.push_back(base);
  } else {
    unmap_memory(base, chunk.bytes);
    mapped_bytes_ -= chunk.bytes;
  }
  chunks_.erase(found);
}

void Arena::unmap_empty_chunks() {
  for (uint8_t* base : empty_chunks_) {
    unmap_memory(base, chunk_bytes_);
    mapped_bytes_ -= chunk_bytes_;
  }
  empty_chunks_.clear();
}

}  // namespace csd
