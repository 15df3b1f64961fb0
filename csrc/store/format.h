// The header of a drive's file. FORMAT.md is normative.
#pragma once

#include <cstdint>
#include <string>

namespace csd {

// Writes the header block at offset 0. fd may be open with O_DIRECT. Throws kStore, kNoSpace.
void write_header(int fd, const std::string& path);

}  // namespace csd
