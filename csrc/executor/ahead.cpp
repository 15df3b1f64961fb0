#include "executor/ahead.h"

#include <algorithm>
#include <set>

namespace csd {
namespace {

constexpr int kMissesMax = 8;
constexpr int kMissesTolerated = 2;  // each one beyond them quarters what is read ahead

}  // namespace

void ReadAhead::note(PassKey pass, const std::vector<PageUse>& uses) {
  if (last_) {
    Known& before = known_[*last_];
    if (!before.next) {
      before.next = pass;
    } else if (*before.next == pass) {
      before.misses = 0;
      misses_ = std::max(0, misses_ - 1);
    } else {
      misses_ = std::min(kMissesMax, misses_ + 1);
      if (++before.misses == 2) {
        before.next = pass;
        before.misses = 0;
      }
    }
  }
  last_ = pass;
  std::vector<Range>& ranges = known_[pass].ranges;
  ranges.clear();
  for (const PageUse& use : uses) {
    if (!ranges.empty() && ranges.back().row == use.row && ranges.back().end == use.index) {
      ranges.back().end++;
    } else {
      ranges.push_back({use.row, use.index, use.index + 1, false});
    }
  }
  const Layer& layer = layers_.at(pass.layer_id);
  for (Range& range : ranges) {
    range.grows = range.end == layer.rows[static_cast<size_t>(range.row)].end_page();
  }
}

std::vector<std::vector<PageUse>> ReadAhead::after(PassKey pass, int64_t bytes_max,
                                                   int64_t page_bytes_max) const {
  std::vector<std::vector<PageUse>> passes;
  std::set<PassKey> seen;
  auto known = known_.find(pass);
  while (bytes_max > 0 && known != known_.end() && known->second.next) {
    const PassKey key = *known->second.next;
    const auto found = layers_.find(key.layer_id);
    known = known_.find(key);
    if (found == layers_.end() || known == known_.end() || !seen.insert(key).second) break;
    const Layer& layer = found->second;
    if (layer.geometry.full_precision().page_bytes() > page_bytes_max) break;
    std::vector<PageUse> uses;
    for (const Range& range : known->second.ranges) {
      if (range.row >= static_cast<int64_t>(layer.rows.size())) continue;
      const Row& row = layer.rows[static_cast<size_t>(range.row)];
      const int64_t end = range.grows ? row.end_page() : std::min(range.end, row.end_page());
      for (int64_t index = std::max(range.begin, row.first_page); index < end; ++index) {
        const Page* page = row.page(index).get();
        if (page->memory != nullptr || !page->sealed) continue;
        uses.push_back({page, range.row, index});
        bytes_max -= page->page_bytes();
      }
    }
    passes.push_back(std::move(uses));
  }
  return passes;
}

int64_t ReadAhead::worthwhile_bytes(int64_t window_bytes) const {
  return window_bytes >> (2 * std::max(0, misses_ - kMissesTolerated));
}

void ReadAhead::forget(int64_t layer_id) {
  const auto begin = known_.lower_bound({layer_id, PassKind::kAttend});
  auto end = begin;
  while (end != known_.end() && end->first.layer_id == layer_id) ++end;
  known_.erase(begin, end);
  for (auto& [key, known] : known_) {
    if (known.next && known.next->layer_id == layer_id) known.next.reset();
  }
  if (last_ && last_->layer_id == layer_id) last_.reset();
}

}  // namespace csd
