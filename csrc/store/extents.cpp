#include "store/extents.h"

#include <fcntl.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>

#include "base/error.h"

namespace csd {
namespace {

constexpr int64_t kGrownExtentBytesMax = int64_t{1} << 20;  // dense reads are made of reads of 1 MiB or more
constexpr int64_t kExtentBytesMax = int64_t{8}
                                    << 20;  // freed only as a whole: keep what a live page holds small
constexpr int64_t kGrowthBytesMax = int64_t{64} << 20;  // fallocate in large steps keeps the file contiguous

}  // namespace

int64_t FileSpace::allocate(int64_t bytes) {
  for (auto it = free_.begin(); it != free_.end(); ++it) {
    if (it->second < bytes) continue;
    const int64_t offset = it->first;
    const int64_t rest = it->second - bytes;
    free_.erase(it);
    if (rest > 0) free_[offset + bytes] = rest;
    return offset;
  }
  if (end_ + bytes > reserved_) reserve(end_ + bytes);
  const int64_t offset = end_;
  end_ += bytes;
  return offset;
}

void FileSpace::release(int64_t offset, int64_t bytes) {
  auto next = free_.lower_bound(offset);
  if (next != free_.end() && offset + bytes == next->first) {
    bytes += next->second;
    next = free_.erase(next);
  }
  if (next != free_.begin()) {
    auto previous = std::prev(next);
    if (previous->first + previous->second == offset) {
      offset = previous->first;
      bytes += previous->second;
      free_.erase(previous);
    }
  }
  if (offset + bytes == end_) {  // at the end of the file: hand back to the growing edge
    end_ = offset;
    return;
  }
  free_[offset] = bytes;
}

void FileSpace::adopt(const std::vector<PageRun>& used, int64_t file_bytes) {
  int64_t end = kDataOffset;
  for (const PageRun& run : used) {
    if (run.file_offset > end) free_[end] = run.file_offset - end;
    end = run.file_offset + run.page_bytes * run.page_count;
  }
  CSD_CHECK(end <= std::max(file_bytes, kDataOffset), "pages beyond the end of the file");
  end_ = end;
  reserved_ = std::max(file_bytes, kDataOffset);
}

int64_t FileSpace::shrink() {
  const int64_t surplus = reserved_ - end_;
  if (surplus == 0) return 0;
  int error;
  do {
    error = ftruncate(fd_, end_) == 0 ? 0 : errno;
  } while (error == EINTR);
  if (error != 0) throw io_error(path_, "cutting the file to " + std::to_string(end_) + " bytes", error);
  reserved_ = end_;
  return surplus;
}

int64_t FileSpace::free_bytes() const {
  int64_t bytes = reserved_ - end_;
  for (const FreeSpan& span : free_) bytes += span.second;
  return bytes;
}

int64_t FileSpace::growth_bytes() const {
  const int64_t available = available_bytes();
  const int64_t allowed = bytes_max_ == 0 ? available : std::max<int64_t>(0, bytes_max_ - reserved_);
  return available < 0 ? allowed : std::min(available, allowed);
}

// Of the file system, for us; -1: it does not say.
int64_t FileSpace::available_bytes() const {
  struct statvfs stats {};
  if (fstatvfs(fd_, &stats) != 0) return -1;
  return static_cast<int64_t>(stats.f_bavail) * static_cast<int64_t>(stats.f_frsize);
}

void FileSpace::reserve(int64_t end) {
  if (bytes_max_ > 0 && end > bytes_max_) {
    throw Error(ErrorKind::kNoSpace, path_ + ": the file may take max_bytes=" + std::to_string(bytes_max_) +
                                         " and would need " + std::to_string(end) +
                                         "; free sequences or layers, or raise max_bytes");
  }
  // Grow by a quarter, so that a large file grows in few steps and a small one does not take much more than
  // it needs.
  int64_t growth = std::min(kGrowthBytesMax, round_up(reserved_ / 4, kDataOffset));
  if (bytes_max_ > 0) growth = std::min(growth, bytes_max_ - reserved_);
  int error = 0;
  for (const int64_t target : {std::max(end, reserved_ + growth), end}) {
    do {
      error = fallocate(fd_, 0, reserved_, target - reserved_) == 0 ? 0 : errno;
    } while (error == EINTR);
    if (error == EOPNOTSUPP || error == ENOSYS) error = ftruncate(fd_, target) == 0 ? 0 : errno;
    if (error == 0) {
      reserved_ = target;
      return;
    }
  }
  throw io_error(path_,
                 "growing the file from " + std::to_string(reserved_) + " to " + std::to_string(end) +
                     " bytes (free on the device: " + std::to_string(available_bytes()) +
                     "); free some space or choose another directory",
                 error);
}

Ref<Extent> ExtentStream::new_extent(int64_t page_bytes, int64_t page_count) {
  return Ref<Extent>::make(space_->pool(), space_, page_bytes, page_count);
}

std::pair<int64_t, Ref<Extent>> ExtentStream::take() {
  if (current_ == nullptr || current_->full()) {
    // As much as is known to come; else as much again as the row has, so that many short rows take little
    // space and long ones lie in long runs.
    const int64_t grown = std::min(taken_pages_, std::max<int64_t>(1, kGrownExtentBytesMax / page_bytes_));
    const int64_t expected = std::min(expected_pages_, std::max<int64_t>(1, kExtentBytesMax / page_bytes_));
    const int64_t page_count = std::max<int64_t>({1, grown, expected});
    current_.reset();  // before allocating, so that an extent nobody else uses can be reused
    try {
      current_ = new_extent(page_bytes_, page_count);
    } catch (const Error& error) {
      if (error.kind() != ErrorKind::kNoSpace || page_count == 1) throw;
      current_ = new_extent(page_bytes_, 1);  // the last of the drive goes page by page
    }
  }
  expected_pages_ = std::max<int64_t>(0, expected_pages_ - 1);
  taken_pages_++;
  return {current_->take(), current_};
}

std::pair<int64_t, Ref<Extent>> ExtentStream::take_alone(int64_t page_bytes) {
  auto extent = new_extent(page_bytes, 1);
  return {extent->take(), extent};
}

}  // namespace csd
