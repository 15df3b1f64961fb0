// Pages that somebody outside of the drive works with, as a card does: leases of pages that are there, and
// pages of an append whose bytes come later, by another way.

#include <algorithm>
#include <atomic>
#include <cstring>
#include <mutex>
#include <utility>

#include "base/error.h"
#include "executor/drive.h"

namespace csd {
namespace {

// Copying less than this is over before another thread wakes; PCIe 5 takes more than four threads bring.
constexpr int64_t kWakeBytes = int64_t{512} << 10;

std::string text(int64_t value) { return std::to_string(value); }

}  // namespace

// What a layer's pages are for everybody else while some of them have no bytes yet.
Layer& Drive::find_settled(int64_t layer_id) {
  Layer& layer = find(layer_id);
  CSD_CHECK(layer.arriving == 0, "pages of this layer are still on their way from the card");
  return layer;
}

Lease& Drive::find_lease(int64_t lease_id) {
  const auto found = leases_.find(lease_id);
  if (found == leases_.end()) throw Error(ErrorKind::kClosed, "this lease has ended");
  return found->second;
}

LeasedPage Drive::describe(const Page& page) {
  const bool in_memory = page.memory != nullptr;
  return {&page, in_memory ? -1 : page.file_offset, in_memory ? 0 : page.checksum};
}

std::vector<LeasedUse> Drive::lease(int64_t lease_id, int64_t layer_id, int64_t epoch, const Span& span) {
  check_process();
  std::lock_guard<FairMutex> lock(mutex_);
  Layer& layer = find_settled(layer_id);
  check_span(layer, epoch, span);
  if (std::exchange(layer.restored, false) && options_.resident) bring_back(layer);
  Lease lease;
  lease.layer_id = layer_id;
  lease.page_bytes = layer.geometry.stored().page_bytes();
  std::vector<LeasedUse> uses;
  for (int64_t i = span.row_begin; i < span.row_begin + span.row_count; ++i) {
    const Row& row = layer.rows[static_cast<size_t>(i)];
    const int64_t end = std::min(span.kv_end >= 0 ? span.kv_end : row.length, row.length);
    // Up to the first that may still change: a tail, or one that is of another kind than the others.
    for (int64_t index = span.kv_begin / kPageTokens; index < end / kPageTokens; ++index) {
      const Ref<Page>& page = row.page(index);
      if (page->quantised != layer.geometry.quantised() || !(page->sealed || page->written)) break;
      lease.pages.push_back(page);
      uses.push_back({i, index, describe(*page)});
    }
  }
  leases_[lease_id] = std::move(lease);
  return uses;
}

int64_t Drive::leased_page_bytes(int64_t lease_id) {
  check_process();
  std::lock_guard<FairMutex> lock(mutex_);
  return find_lease(lease_id).page_bytes;
}

std::vector<LeasedPage> Drive::copy_leased(int64_t lease_id, const std::vector<int64_t>& places,
                                           uint8_t* target) {
  check_process();
  std::lock_guard<FairMutex> lock(mutex_);
  const Lease& lease = find_lease(lease_id);
  std::vector<LeasedPage> found;
  std::vector<std::pair<const Page*, uint8_t*>> copies;
  int64_t bytes = 0;
  for (const int64_t place : places) {
    const Page& page = *lease.at(place);
    found.push_back(describe(page));
    if (page.memory != nullptr) {
      copies.emplace_back(&page, target);
      bytes += page.page_bytes();
    }
    target += page.page_bytes();
  }
  const auto count = static_cast<int64_t>(copies.size());
  const auto workers = static_cast<int>(std::clamp<int64_t>(bytes / kWakeBytes, 1, pool_.worker_count()));
  std::atomic<int64_t> next{0};
  pool_.compute(workers, [&](int) {
    for (int64_t i = next++; i < count; i = next++) {
      const auto& [page, place] = copies[static_cast<size_t>(i)];
      std::memcpy(place, page->memory, static_cast<size_t>(page->page_bytes()));
    }
  });
  leased_copy_bytes_ += bytes;
  return found;
}

// ---- pages whose bytes come later ----

void Drive::check_reserved(const Layer& layer, const AppendRequest& request) const {
  CSD_CHECK(request.lengths == nullptr, "pages are reserved in appends of the same tokens to every row");
  for (const Row& row : layer.rows) {
    const int64_t begin = row.length + request.reserved_begin;
    const int64_t end = begin + request.reserved_count;
    const int64_t length = row.length + request.q_len + request.reserved_count;
    const int64_t last = layer.geometry.quantised() ? first_tail_page(length) : length / kPageTokens;
    if (begin % kPageTokens != 0 || end % kPageTokens != 0 || end > last * kPageTokens) {
      throw Error(ErrorKind::kValue, "append: wanted to reserve tokens " + text(begin) + " to " + text(end) +
                                         " of a row of " + text(length) + "; only whole pages of " +
                                         text(kPageTokens) + " that stay as they are can be, up to " +
                                         text(last * kPageTokens));
    }
  }
}

// Pages of a row that whoever holds the lease will fill: in memory, as long as there is room that nobody has
// to make, else at a place on the drive.
void Drive::reserve_pages(const Layer& layer, Row* row, int64_t row_index, int64_t count, Lease* lease) {
  const PageLayout layout = layer.geometry.stored();
  for (int64_t i = 0; i < count; ++i) {
    const int64_t index = row->length / kPageTokens;
    auto page = Ref<Page>::make(&table_memory_, row->home, layout);
    const int64_t page_bytes = page->page_bytes();
    // Until they are filled they cannot make room for anybody: tails need some.
    const bool affordable =
        arriving_memory_bytes_ + lease->memory_bytes + page_bytes <= arena_->limit_bytes() / 2;
    if (options_.resident && affordable) page->memory = arena_->allocate(page_bytes);
    if (page->memory != nullptr) {
      page->pinned = true;
      lease->memory_bytes += page_bytes;
    } else {
      auto [offset, extent] = row->home->stream.take();
      page->file_offset = offset;
      page->extent = std::move(extent);
    }
    if (row->pages.empty()) row->first_page = index;
    row->pages.push_back(page);
    row->length += kPageTokens;
    lease->pages.push_back(std::move(page));
    lease->places.emplace_back(row_index, index);
    lease->arriving++;
  }
}

std::vector<LeasedUse> Drive::hold_reserved(int64_t lease_id, Layer* layer, Lease lease) {
  std::vector<LeasedUse> uses;
  for (size_t i = 0; i < lease.pages.size(); ++i) {
    uses.push_back({lease.places[i].first, lease.places[i].second, describe(*lease.pages[i])});
  }
  layer->arriving += lease.arriving;
  arriving_memory_bytes_ += lease.memory_bytes;
  leases_[lease_id] = std::move(lease);
  return uses;
}

void Drive::note_arrived(Lease* lease, int64_t memory_bytes) {
  lease->arriving--;
  lease->memory_bytes -= memory_bytes;
  arriving_memory_bytes_ -= memory_bytes;
  const auto layer = layers_.find(lease->layer_id);
  if (layer != layers_.end()) layer->second.arriving--;
}

void Drive::fill_reserved(int64_t lease_id, const std::vector<int64_t>& places, const uint8_t* source) {
  check_process();
  std::lock_guard<FairMutex> lock(mutex_);
  Lease& lease = find_lease(lease_id);
  for (const int64_t place : places) {
    const Ref<Page>& page = lease.at(place);
    CSD_CHECK(page->pinned && page->memory != nullptr && !page->sealed, "this page has its bytes already");
    std::memcpy(page->memory, source, static_cast<size_t>(page->page_bytes()));
    source += page->page_bytes();
    page->pinned = false;
    note_arrived(&lease, page->page_bytes());
    seal(page);
  }
}

void Drive::finish_reserved(int64_t lease_id, const std::vector<int64_t>& places,
                            const std::vector<int64_t>& checksums) {
  check_process();
  std::lock_guard<FairMutex> lock(mutex_);
  Lease& lease = find_lease(lease_id);
  CSD_CHECK(places.size() == checksums.size(), "a checksum for each page");
  for (size_t i = 0; i < places.size(); ++i) {
    const Ref<Page>& page = lease.at(places[i]);
    CSD_CHECK(page->memory == nullptr && !page->written, "this page has its bytes already");
    page->checksum = static_cast<uint32_t>(checksums[i]);
    page->sealed = true;
    page->written = true;
    note_arrived(&lease, 0);
  }
}

// An append of which pages did not arrive is undone.
void Drive::end_lease(int64_t lease_id) {
  check_process();
  std::lock_guard<FairMutex> lock(mutex_);
  const auto found = leases_.find(lease_id);
  if (found == leases_.end()) return;
  Lease lease = std::move(found->second);
  leases_.erase(found);
  if (lease.arriving > 0) {
    arriving_memory_bytes_ -= lease.memory_bytes;
    const auto layer = layers_.find(lease.layer_id);
    if (layer != layers_.end()) {
      layer->second.arriving -= lease.arriving;
      if (lease.lengths_before.empty()) layer->second.rows.clear();
      for (size_t i = 0; i < lease.lengths_before.size(); ++i) {
        Row& row = layer->second.rows[i];
        truncate_row(layer->second, &row, std::min(row.length, lease.lengths_before[i]));
      }
      layer->second.epoch++;
    }
  }
  lease.pages.clear();
  tiles_->release_unused();
  stream_->release_unused();
}

}  // namespace csd
