#include "executor/tile_cache.h"

#include <algorithm>

namespace csd {
namespace {

constexpr size_t kStaleMin = 1024;  // that are worth looking through

}  // namespace

void TileCache::begin(int64_t layer_id, int64_t bytes_max) {
  layer_id_ = layer_id;
  bytes_max_ = bytes_max;
  refused_ = false;
  call_++;
}

bool TileCache::has(const PageUse& use) const {
  const auto found = entries_.find({use.page, use.begin, use.end});
  return found != entries_.end() && found->second.filled;
}

void TileCache::serve(std::vector<PageUse>* uses) {
  for (PageUse& use : *uses) {
    if (use.whole() || use.page->memory != nullptr) continue;
    const Key key{use.page, use.begin, use.end};
    const auto found = entries_.find(key);
    if (found != entries_.end()) {
      Entry& entry = found->second;
      // Two rows that share a page: the second use of what is not there yet reads it, too.
      if (entry.filled) {
        use.kept = entry.memory;
        served_bytes_ += use.bytes();
      }
      entry.call = call_;
      entry.stale = 0;
      continue;
    }
    uint8_t* memory = room(use.bytes());
    if (memory == nullptr) continue;
    Entry& entry = entries_[key];
    entry.page = Ref<Page>(const_cast<Page*>(use.page));  // to own it, not to change it
    entry.memory = memory;
    entry.bytes = use.bytes();
    entry.call = call_;
    of_layer_[layer_id_].push_back(key);
    use.keep_at = memory;
  }
}

uint8_t* TileCache::room(int64_t bytes) {
  for (;;) {
    if (bytes_ + bytes <= bytes_max_) {
      if (uint8_t* memory = arena_.allocate(bytes)) {
        bytes_ += bytes;
        return memory;
      }
      refused_ = true;
    }
    if (!drop_stale()) return nullptr;
  }
}

bool TileCache::is_stale(const Stale& place) const {
  const auto found = entries_.find(place.key);
  return found != entries_.end() && found->second.stale == place.since;
}

bool TileCache::drop_stale() {
  while (!stale_.empty()) {
    const Stale oldest = stale_.front();
    stale_.pop_front();
    if (!is_stale(oldest)) continue;
    erase(oldest.key);
    return true;
  }
  return false;
}

void TileCache::end(bool filled) {
  std::vector<Key>& keys = of_layer_[layer_id_];
  size_t kept = 0;
  for (const Key& key : keys) {
    const auto found = entries_.find(key);
    if (found == entries_.end()) continue;
    Entry& entry = found->second;
    if (entry.listed == call_) continue;  // it went and came back
    entry.listed = call_;
    if (entry.call == call_ && !entry.filled) {
      if (!filled) {
        erase(key);
        continue;
      }
      entry.filled = true;
    } else if (entry.call != call_ && entry.stale == 0) {
      entry.stale = call_;
      stale_.push_back({key, call_});
    }
    keys[kept++] = key;
  }
  keys.resize(kept);
  // Where there is room for all, nobody else takes those away that are in use again.
  if (stale_.size() > 2 * entries_.size() + kStaleMin) {
    stale_.erase(
        std::remove_if(stale_.begin(), stale_.end(), [this](const Stale& place) { return !is_stale(place); }),
        stale_.end());
  }
}

void TileCache::erase(const Key& key) {
  const auto found = entries_.find(key);
  bytes_ -= found->second.bytes;
  arena_.release(found->second.memory);
  entries_.erase(found);
}

bool TileCache::drop_one() {
  if (entries_.empty()) return false;
  if (drop_stale()) return true;
  erase(entries_.begin()->first);
  return true;
}

void TileCache::clear() {
  while (!entries_.empty()) erase(entries_.begin()->first);
  of_layer_.clear();
  stale_.clear();
}

void TileCache::release_unused() {
  std::unordered_map<const Page*, int64_t> own;  // several tiles of a page may be here
  for (const auto& [key, entry] : entries_) own[key.page]++;
  std::vector<Key> gone;
  for (const auto& [key, entry] : entries_) {
    if (entry.page.use_count() == own[key.page]) gone.push_back(key);
  }
  for (const Key& key : gone) erase(key);
}

void TileCache::forget(int64_t layer_id) {
  const auto found = of_layer_.find(layer_id);
  if (found == of_layer_.end()) return;
  for (const Key& key : found->second) {
    if (entries_.count(key) != 0) erase(key);
  }
  of_layer_.erase(found);
}

}  // namespace csd
