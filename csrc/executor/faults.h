// What is said of pages that the drive does not give back as they were written: which they are, and what to
// do. layer: the caller's number for it, or -1.
#pragma once

#include <cstdint>
#include <string>

#include "base/error.h"
#include "executor/plan.h"

namespace csd {

// Reading the pages of these uses, from file_offset on, failed (twice, for EIO).
Error unreadable_pages(const std::string& path, int64_t layer, const PageUse* uses, int64_t use_count,
                       int64_t file_offset, int errno_value);

// Bytes of a page, from its byte `begin` on, and their checksums.
struct Mismatch {
  int64_t begin = 0;
  int64_t bytes = 0;
  uint32_t checksum_read = 0;
  uint32_t checksum_written = 0;
};

// They came back with another checksum than they were written with.
Error damaged_page(const std::string& path, int64_t layer, const PageUse& use, const Mismatch& mismatch);

}  // namespace csd
