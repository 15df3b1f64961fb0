// Tiles that passes chose lately, kept in memory for the next step: what a query wants changes little from
// one token to the next (KVSwap, 2511.11907, calls it a reuse buffer).
//
// Not by recency: a step goes over all layers in turn, so that the least recent tile is the one that is
// needed next. What a layer's last pass used stays; what it did not use makes room. Not thread-safe, but for
// filling.
#pragma once

#include <cstdint>
#include <deque>
#include <unordered_map>
#include <vector>

#include "executor/plan.h"
#include "store/arena.h"
#include "store/layer.h"

namespace csd {

class TileCache {
 public:
  explicit TileCache(Arena* arena) : arena_(*arena) {}
  ~TileCache() { clear(); }
  TileCache(const TileCache&) = delete;
  TileCache& operator=(const TileCache&) = delete;

  // Around one layer's pass, or several that belong to one call. bytes_max: what may be kept from now on.
  void begin(int64_t layer_id, int64_t bytes_max);
  bool has(const PageUse& use) const;
  // Finds what a pass is about to use, or a place for it to be kept in. Parts of pages only.
  void serve(std::vector<PageUse>* uses);
  // filled: the uses that were served were consumed, so that their places are filled.
  void end(bool filled);

  bool wants_room() const { return refused_; }  // in the last call, although it was below its bytes_max
  bool drop_one();                              // to make room; false when it is empty
  void clear();
  void release_unused();  // tiles of pages that nobody else keeps
  void forget(int64_t layer_id);

  bool empty() const { return entries_.empty(); }
  int64_t bytes() const { return bytes_; }
  int64_t served_bytes() const { return served_bytes_; }

 private:
  struct Key {
    const Page* page;
    int32_t begin;
    int32_t end;
    bool operator==(const Key& other) const {
      return page == other.page && begin == other.begin && end == other.end;
    }
  };
  struct Hash {
    size_t operator()(const Key& key) const {
      return (reinterpret_cast<uintptr_t>(key.page) >> 4) * 0x9e3779b97f4a7c15u ^
             (static_cast<uint64_t>(static_cast<uint32_t>(key.begin)) << 20) * 0xff51afd7ed558ccdu;
    }
  };
  struct Entry {
    Ref<Page> page;  // so that its place on the drive stays its own
    uint8_t* memory = nullptr;
    int64_t bytes = 0;
    uint64_t call = 0;    // that used it last
    uint64_t listed = 0;  // at whose end it was seen
    uint64_t stale = 0;   // at whose end it went into stale_; 0: it is in use
    bool filled = false;
  };
  struct Stale {
    Key key;
    uint64_t since;
  };

  bool is_stale(const Stale& place) const;  // still
  uint8_t* room(int64_t bytes);
  bool drop_stale();  // the oldest; false when there is none
  void erase(const Key& key);

  Arena& arena_;
  std::unordered_map<Key, Entry, Hash> entries_;
  std::unordered_map<int64_t, std::vector<Key>> of_layer_;
  std::deque<Stale> stale_;  // the longest unused first; some are in use again, or gone
  int64_t layer_id_ = -1;
  uint64_t call_ = 0;
  int64_t bytes_ = 0;
  int64_t bytes_max_ = 0;
  int64_t served_bytes_ = 0;
  bool refused_ = false;
};

}  // namespace csd
