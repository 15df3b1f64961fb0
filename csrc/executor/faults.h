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

// The page came back with another checksum than it was written with.
Error damaged_page(const std::string& path, int64_t layer, const PageUse& use, uint32_t checksum_read);

}  // namespace csd
