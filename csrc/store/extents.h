// Space in the drive's one file: extents of adjacent pages, freed and reused. Not thread-safe.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "base/memory_pool.h"
#include "base/ref.h"
#include "base/types.h"
#include "store/format.h"
#include "store/table.h"

namespace csd {

class FileSpace {
 public:
  // pool: for what is known about the space; outlives it. bytes_max: what the file may take, 0: any.
  FileSpace(int fd, std::string path, int64_t bytes_max, MemoryPool* pool)
      : fd_(fd),
        path_(std::move(path)),
        bytes_max_(bytes_max),
        pool_(pool),
        free_(PoolAllocator<FreeSpan>(pool)) {}

  MemoryPool* pool() const { return pool_; }

  // First fit among what was freed, else at the end of the file, which grows by fallocate so that a full
  // drive is known before a page is lost. Throws kNoSpace.
  int64_t allocate(int64_t bytes);
  void release(int64_t offset, int64_t bytes);

  // What a file of so many bytes has in use already: adjacent or apart, by offset. Before anything else.
  void adopt(const std::vector<PageRun>& used, int64_t file_bytes);
  // Gives the file's unused end back to the file system. Returns its bytes. Throws kStore.
  int64_t shrink();

  int64_t file_bytes() const { return reserved_; }  // space the file takes on the drive
  int64_t free_bytes() const;                       // of it, in use by nobody
  // By which the file can still grow: what bytes_max and the file system leave.
  int64_t growth_bytes() const;
  int64_t bytes_max() const { return bytes_max_; }

 private:
  void reserve(int64_t end);
  int64_t available_bytes() const;

  using FreeSpan = std::pair<const int64_t, int64_t>;  // offset, bytes

  const int fd_;
  const std::string path_;
  const int64_t bytes_max_;
  MemoryPool* const pool_;
  int64_t end_ = kDataOffset;       // allocated or freed up to here
  int64_t reserved_ = kDataOffset;  // file size
  std::map<int64_t, int64_t, std::less<int64_t>, PoolAllocator<FreeSpan>> free_;  // coalesced
};

// A run of adjacent pages. Pages and the row that fills it share it; the last to let go gives the space back.
class Extent : public Counted {
 public:
  // space: outlives it.
  Extent(FileSpace* space, int64_t page_bytes, int64_t page_count)
      : page_bytes_(static_cast<int32_t>(page_bytes)),
        page_count_(static_cast<int32_t>(page_count)),
        space_(space),
        offset_(space->allocate(page_bytes * page_count)) {}
  // One that the space has adopted, and that is full.
  Extent(FileSpace* space, const PageRun& run)
      : page_bytes_(static_cast<int32_t>(run.page_bytes)),
        page_count_(static_cast<int32_t>(run.page_count)),
        next_(page_count_),
        space_(space),
        offset_(run.file_offset) {}
  ~Extent() { space_->release(offset_, bytes()); }

  MemoryPool* pool() const { return space_->pool(); }
  bool full() const { return next_ == page_count_; }
  int64_t take() { return offset_ + int64_t{page_bytes_} * next_++; }
  int64_t file_offset() const { return offset_; }
  int64_t bytes() const { return int64_t{page_bytes_} * page_count_; }

 private:
  const int32_t page_bytes_;
  const int32_t page_count_;
  int32_t next_ = 0;
  FileSpace* const space_;
  const int64_t offset_;
};

// Where a row's pages go as they are written: one extent after another, so that they lie side by side.
class ExtentStream {
 public:
  // space: outlives it.
  ExtentStream(FileSpace* space, int64_t page_bytes) : space_(space), page_bytes_(page_bytes) {}

  MemoryPool* pool() const { return space_->pool(); }

  // The coming writes are likely to be this many pages: the next extent is made that long (within limits).
  void expect(int64_t page_count) { expected_pages_ = page_count; }

  // The row has lost all of its pages: the extent that it was filling is free.
  void restart() {
    current_.reset();
    taken_pages_ = 0;
  }

  // The next place for a page, and the extent that it keeps alive.
  std::pair<int64_t, Ref<Extent>> take();
  // The same, away from the others: for a page that will not stay.
  std::pair<int64_t, Ref<Extent>> take_alone(int64_t page_bytes);

 private:
  Ref<Extent> new_extent(int64_t page_bytes, int64_t page_count);

  FileSpace* const space_;
  const int64_t page_bytes_;
  int64_t expected_pages_ = 0;
  int64_t taken_pages_ = 0;
  Ref<Extent> current_;
};

}  // namespace csd
