#include "executor/faults.h"

#include <cerrno>
#include <cstdio>

namespace csd {
namespace {

std::string text(int64_t value) { return std::to_string(value); }

std::string hex(uint32_t value) {
  char digits[9];
  std::snprintf(digits, sizeof(digits), "%08x", value);
  return digits;
}

std::string place(int64_t layer, const PageUse& use) {
  return (layer >= 0 ? "layer " + text(layer) + ", " : "") + "row " + text(use.row) + ", page " +
         text(use.index);
}

}  // namespace

Error unreadable_pages(const std::string& path, int64_t layer, const PageUse* uses, int64_t use_count,
                       int64_t file_offset, int errno_value) {
  int64_t others = 0;
  for (int64_t i = 1; i < use_count; ++i) others += uses[i].page != uses[i - 1].page ? 1 : 0;
  return io_error(path,
                  place(layer, uses[0]) + (others > 0 ? " and " + text(others) + " more" : "") +
                      ": reading KV pages at byte " + text(file_offset) + " failed" +
                      (errno_value == EIO ? " twice; see what the kernel's log says of the drive" : ""),
                  errno_value);
}

Error damaged_page(const std::string& path, int64_t layer, const PageUse& use, const Mismatch& mismatch) {
  return Error(ErrorKind::kCorrupt,
               path + ": " + place(layer, use) + ": checksum mismatch at byte " +
                   text(use.page->file_offset + mismatch.begin) + " (" + text(mismatch.bytes) +
                   " bytes with CRC-32C " + hex(mismatch.checksum_read) + ", written with " +
                   hex(mismatch.checksum_written) +
                   "): the drive returned other bytes than were written; check the drive, and prefill this " +
                   "row again from token " + text(use.index * kPageTokens) + " on");
}

}  // namespace csd
