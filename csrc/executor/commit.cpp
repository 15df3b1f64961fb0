// What of a drive outlives the process: commits, and how their layers come back.

#include <sys/stat.h>

#include <algorithm>
#include <cstring>
#include <mutex>
#include <set>
#include <utility>

#include "base/checksum.h"
#include "base/error.h"
#include "executor/drive.h"

namespace csd {
namespace {

constexpr int64_t kImageExtentBytesMax = int64_t{8} << 20;
constexpr int64_t kReadBytes = int64_t{4} << 20;  // at once, to verify or to stay

std::string text(int64_t value) { return std::to_string(value); }

bool by_offset(const Ref<Extent>& a, const Ref<Extent>& b) { return a->file_offset() < b->file_offset(); }

// Copies on the drive of pages that rows go on filling in memory.
class TailImages {
 public:
  TailImages(FileSpace* space, Writer* writer) : space_(space), writer_(writer) {}

  void want(const Ref<Page>& page) {
    if (entries_.emplace(page.get(), PageEntry{}).second) wanted_[page->page_bytes()].push_back(page);
  }

  // Queues all that are wanted, side by side.
  void write() {
    for (const auto& [page_bytes, pages] : wanted_) {
      const auto per_extent = std::max<int64_t>(1, kImageExtentBytesMax / page_bytes);
      Extent* extent = nullptr;
      auto left = static_cast<int64_t>(pages.size());
      for (const Ref<Page>& page : pages) {
        if (extent == nullptr || extent->full()) {
          extents_.push_back(
              Ref<Extent>::make(space_->pool(), space_, page_bytes, std::min(left, per_extent)));
          extent = extents_.back().get();
        }
        PageEntry entry{extent->take(), page_bytes, crc32c(page->memory, page_bytes), page->quantised};
        writer_->add_image(page, entry.file_offset, extents_.back());
        entries_[page.get()] = entry;
        left--;
      }
    }
  }

  const PageEntry* find(const Page& page) const {
    const auto found = entries_.find(&page);
    return found == entries_.end() ? nullptr : &found->second;
  }
  const std::vector<Ref<Extent>>& extents() const { return extents_; }

 private:
  FileSpace* const space_;
  Writer* const writer_;
  std::map<int64_t, std::vector<Ref<Page>>> wanted_;  // by size
  std::map<const Page*, PageEntry> entries_;
  std::vector<Ref<Extent>> extents_;
};

}  // namespace

std::vector<int64_t> Drive::adopt(const std::vector<int64_t>& snapshot_ids,
                                  const std::vector<std::vector<PageEntry>>& tables) {
  check_process();
  std::lock_guard<FairMutex> lock(mutex_);
  CSD_CHECK(snapshot_ids.size() == tables.size(), "adopt: a table for each snapshot");
  CSD_CHECK(layers_.empty() && snapshots_.empty(), "adopt comes before everything else");
  std::set<size_t> damaged;
  const std::vector<PageRun> runs = find_runs(tables, &damaged);
  space_->adopt(runs, durable_file_bytes_);
  std::vector<Ref<Extent>> extents;
  extents.reserve(runs.size());
  for (const PageRun& run : runs) extents.push_back(Ref<Extent>::make(&table_memory_, space_.get(), run));
  for (size_t i = 0; i < tables.size(); ++i) {
    std::vector<Ref<Extent>>& held = snapshots_[snapshot_ids[i]];
    for (const PageEntry& entry : tables[i]) held.push_back(extent_at(extents, entry.file_offset));
    std::sort(held.begin(), held.end(), by_offset);
    held.erase(std::unique(held.begin(), held.end()), held.end());
    held.shrink_to_fit();
  }
  std::vector<int64_t> refused;
  for (const size_t table : damaged) refused.push_back(snapshot_ids[table]);
  return refused;
}

// The one that holds this place; extents are by file offset.
const Ref<Extent>& Drive::extent_at(const std::vector<Ref<Extent>>& extents, int64_t file_offset) {
  const auto behind = std::upper_bound(
      extents.begin(), extents.end(), file_offset,
      [](int64_t offset, const Ref<Extent>& extent) { return offset < extent->file_offset(); });
  CSD_CHECK(behind != extents.begin(), "a page of no extent");
  const Ref<Extent>& found = *std::prev(behind);
  CSD_CHECK(file_offset < found->file_offset() + found->bytes(), "a page of no extent");
  return found;
}

void Drive::restore_layer(int64_t layer_id, const Geometry& geometry, int64_t number, const LayerTable& table,
                          int64_t snapshot_id) {
  check_layer(geometry, table.begin, table.rows, table.entries);
  create_layer(layer_id, geometry, number);
  std::lock_guard<FairMutex> lock(mutex_);
  const auto held = snapshots_.find(snapshot_id);
  CSD_CHECK(held != snapshots_.end(), "restore_layer: no such snapshot");
  Layer layer = find(layer_id);
  layer.begin = table.begin;
  std::map<int64_t, Ref<Page>> pages;  // by place: rows of a batch may share some
  const PageEntry* entry = table.entries.data();
  for (const RowTable& stored : table.rows) {
    Row row = new_row(geometry);
    row.first_page = stored.first_page;
    row.length = stored.length;
    for (int64_t count = page_count(stored); count > 0; --count, ++entry) {
      Ref<Page>& page = pages[entry->file_offset];
      if (page == nullptr) {
        page = Ref<Page>::make(&table_memory_, row.home,
                               entry->quantised ? geometry.stored() : geometry.full_precision());
        page->file_offset = entry->file_offset;
        page->extent = extent_at(held->second, entry->file_offset);
        page->checksum = entry->checksum;
        page->written = true;
      }
      row.pages.push_back(page);
    }
    layer.rows.push_back(std::move(row));
  }
  layer.restored = true;
  layers_[layer_id] = std::move(layer);
}

// What the catalogue knew is on the drive only. As much of it as there is room for is read now, to stay, and
// not at every step. What cannot be read, or is damaged, is left to the pass that needs it.
void Drive::bring_back(const Layer& layer) {
  for (const Row& row : layer.rows) {
    for (int64_t begin = row.first_page, end; begin < row.end_page(); begin = end) {
      const int64_t bytes = adjacent_pages(row, begin, &end);
      if (row.page(begin)->memory != nullptr || !row.page(begin)->written) continue;
      const uint8_t* image = nullptr;
      if (read_bytes(row.page(begin)->file_offset, bytes, &image) != 0) return;
      brought_back_bytes_ += bytes;
      for (int64_t index = begin; index < end; ++index) {
        Page& page = *row.page(index);
        const int64_t page_bytes = page.page_bytes();
        if (page.memory == nullptr) {
          if (options_.checksums && crc32c(image, page_bytes) != page.checksum) return;
          page.memory = arena_->allocate(page_bytes);
          if (page.memory == nullptr)
            return;  // no room is made for it: what is there has as good a right to stay
          std::memcpy(page.memory, image, static_cast<size_t>(page_bytes));
          page.sealed = true;
          candidates_.add(&page);
        }
        image += page_bytes;
      }
    }
  }
}

// The pages of a row that lie side by side on the drive, from begin on and up to so many bytes. Returns
// theirs.
int64_t Drive::adjacent_pages(const Row& row, int64_t begin, int64_t* end) {
  const Page& first = *row.page(begin);
  const int64_t page_bytes = first.page_bytes();
  int64_t bytes = page_bytes;
  for (*end = begin + 1; *end < row.end_page() && bytes + page_bytes <= kReadBytes;
       ++*end, bytes += page_bytes) {
    const Page& next = *row.page(*end);
    if (next.page_bytes() != page_bytes || next.file_offset != first.file_offset + bytes) break;
  }
  return bytes;
}

std::vector<LayerTable> Drive::commit(int64_t snapshot_id, const std::vector<int64_t>& layer_ids) {
  check_process();
  check_writable();
  CSD_CHECK(!options_.durable_path.empty(), "commit of a scratch file");
  std::lock_guard<FairMutex> lock(mutex_);
  if (sync_failed_) {
    throw Error(ErrorKind::kStore,
                file_.path +
                    ": an earlier fdatasync failed, after which the kernel may have dropped what it "
                    "could not write; what was committed before is safe: close the store, look at "
                    "the drive and open it again");
  }
  settle_writes();
  TailImages images(space_.get(), writer_.get());
  std::vector<Ref<Extent>> held;
  try {
    for (const int64_t layer_id : layer_ids) {
      for (const Row& row : find_settled(layer_id).rows) {
        for (const Ref<Page>& page : row.pages) {
          if (!page->writable()) continue;
          if (page->sealed) {
            writer_->add_resident(page);
          } else {
            images.want(page);
          }
        }
      }
    }
    images.write();
    writer_->drain();
    settle_writes();
    sync_failed_ = true;
    sync_data(file_.fd, file_.path);
    sync_failed_ = false;
  } catch (...) {
    try {
      writer_->drain();  // appends may change what images are made of
    } catch (const Error&) {
      // The first error is the one to tell.
    }
    throw;
  }
  std::vector<LayerTable> tables;
  for (const int64_t layer_id : layer_ids) {
    const Layer& layer = find(layer_id);
    LayerTable table;
    table.begin = layer.begin;
    for (const Row& row : layer.rows) {
      table.rows.push_back({row.first_page, row.length});
      for (const Ref<Page>& page : row.pages) {
        if (const PageEntry* image = images.find(*page)) {
          table.entries.push_back(*image);
          continue;
        }
        CSD_CHECK(page->written, "a commit left a page in memory only");
        table.entries.push_back({page->file_offset, page->page_bytes(), page->checksum, page->quantised});
        if (held.empty() || held.back() != page->extent) held.push_back(page->extent);
      }
    }
    tables.push_back(std::move(table));
  }
  held.insert(held.end(), images.extents().begin(), images.extents().end());
  std::sort(held.begin(), held.end(), by_offset);
  held.erase(std::unique(held.begin(), held.end()), held.end());
  held.shrink_to_fit();
  snapshots_[snapshot_id] = std::move(held);
  return tables;
}

void Drive::release(int64_t snapshot_id) {
  check_process();
  std::lock_guard<FairMutex> lock(mutex_);
  snapshots_.erase(snapshot_id);
  stream_->release_unused();
}

std::vector<BadPage> Drive::verify(int64_t layer_id) {
  check_process();
  std::lock_guard<FairMutex> lock(mutex_);
  settle_writes();
  std::vector<BadPage> bad;
  const Layer& layer = find_settled(layer_id);
  for (size_t i = 0; i < layer.rows.size(); ++i) {
    const Row& row = layer.rows[i];
    for (int64_t begin = row.first_page, end; begin < row.end_page(); begin = end) {
      const Page& first = *row.page(begin);
      const int64_t bytes = adjacent_pages(row, begin, &end);
      if (!first.written) continue;
      const int64_t page_bytes = first.page_bytes();
      const uint8_t* images = nullptr;
      const bool apart = read_bytes(first.file_offset, bytes, &images) != 0;
      for (int64_t index = begin; index < end; ++index) {
        const Page& page = *row.page(index);
        const uint8_t* image = images + (index - begin) * page_bytes;
        // One that cannot be read must not hide the others.
        const int error = apart ? read_bytes(page.file_offset, page_bytes, &image) : 0;
        if (error != 0 || crc32c(image, page_bytes) != page.checksum) {
          bad.push_back({static_cast<int64_t>(i), index, page.file_offset, error});
        }
      }
    }
  }
  return bad;
}

int64_t Drive::file_bytes() {
  std::lock_guard<FairMutex> lock(mutex_);
  return space_->file_bytes();
}

int64_t Drive::shrink() {
  check_process();
  check_writable();
  std::lock_guard<FairMutex> lock(mutex_);
  writer_->drain();
  settle_writes();
  return space_->shrink();
}

void Drive::check_room(int64_t bytes) {
  check_process();
  check_writable();
  std::lock_guard<FairMutex> lock(mutex_);
  const bool durable = !options_.durable_path.empty();
  const int64_t free = space_->free_bytes();
  const int64_t growth = space_->growth_bytes();
  // What stays in memory needs no room on the drive, but for a commit.
  const int64_t memory = durable || !options_.resident
                             ? 0
                             : std::max<int64_t>(0, arena_->limit_bytes() - arena_->mapped_bytes());
  if (bytes <= free + growth + memory) return;
  const std::string limit =
      space_->bytes_max() > 0 ? ", of max_bytes=" + text(space_->bytes_max()) : std::string();
  throw Error(ErrorKind::kNoSpace,
              file_.path + ": wanted room for " + text(bytes) + " bytes of keys and values more; " +
                  text(free) + " bytes of the file are free, it can grow by " + text(growth) + limit +
                  (memory > 0 ? ", and " + text(memory) + " bytes fit in memory" : std::string()) +
                  "; free some space, choose another directory, or a smaller kv_dtype");
}

}  // namespace csd
