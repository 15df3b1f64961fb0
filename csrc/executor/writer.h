// Write-behind: takes pages onto the drive, and out of memory, without making the caller wait for the drive.
//
// Adjacent pages go out in one vectored write. A page stays readable in memory until its write has completed;
// if the write fails (twice, for EIO) the page stays in memory, unwritten, and the error is kept for the next
// append. Not thread-safe.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "io/io.h"
#include "store/layer.h"

namespace csd {

class Writer {
 public:
  Writer(std::unique_ptr<IoQueue> queue, std::string path);
  ~Writer();  // waits for what is in flight

  // Assigns the page its place and queues it; once it is written it leaves memory, or stays there besides.
  // Throws kNoSpace when the drive has no place; the page is then as before.
  void add(const Ref<Page>& page) { add(page, After::kLeaves); }
  void add_resident(const Ref<Page>& page) { add(page, After::kStays); }
  // Queues a copy of the page at a place of this extent, which is kept until it is written. The page knows
  // nothing of it; nobody may change it before drain().
  void add_image(const Ref<Page>& page, int64_t file_offset, const Ref<Extent>& extent);
  // Starts what add() still holds back to coalesce it.
  void flush();
  // Frees the memory of pages whose write is done. wait: blocks until at least one request is done.
  void reap(bool wait);
  void drain();

  bool idle() const { return queue_->in_flight() == 0 && batch_.pages.empty(); }
  int64_t pending_bytes() const { return pending_bytes_; }
  int64_t written_bytes() const { return written_bytes_; }

  // Throws the error of a write that failed since the last call, once. Pages it concerned are back in memory.
  void throw_error();
  // The pages of failed writes, to be kept track of again.
  std::vector<Ref<Page>> take_failed();

 private:
  // What becomes of a page that is written.
  enum class After : uint8_t { kLeaves, kStays, kIsImage };

  struct Batch {
    After after = After::kLeaves;
    int64_t file_offset = 0;
    int64_t bytes = 0;
    int64_t page_bytes = 0;
    std::vector<Ref<Page>> pages;
    std::vector<iovec> segments;
    std::vector<Ref<Extent>> extents;  // of images
    bool retried = false;
  };

  void add(const Ref<Page>& page, After after);
  void begin(int64_t file_offset, int64_t page_bytes, After after);
  void push(const Ref<Page>& page);
  void settle(Batch* request, int error);
  void submit(uint64_t tag);

  std::unique_ptr<IoQueue> queue_;
  const std::string path_;
  Batch batch_;                  // being filled
  std::vector<Batch> requests_;  // by tag
  std::vector<uint64_t> free_tags_;
  std::vector<IoCompletion> completions_;
  std::vector<Ref<Page>> failed_;
  int64_t pending_bytes_ = 0;
  int64_t written_bytes_ = 0;
  int error_ = 0;
  int64_t error_offset_ = 0;
};

}  // namespace csd
