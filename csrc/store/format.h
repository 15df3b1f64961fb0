// The header of a drive's file. FORMAT.md is normative.
#pragma once

#include <array>
#include <cstdint>
#include <string>

namespace csd {

// The first byte that pages may use; before it lies the header.
constexpr int64_t kDataOffset = int64_t{1} << 20;

enum class Lifetime : uint32_t { kScratch = 0, kDurable = 1 };

using StoreId = std::array<uint8_t, 16>;

struct Header {
  Lifetime lifetime = Lifetime::kScratch;
  StoreId store_id{};  // zeros in a scratch file
};

// Pure. bytes: the file's first, as many as there are of the header block. path is for error texts. Throws
// kCorrupt, and kStore for a version that this is too old or too new for.
Header parse_header(const uint8_t* bytes, int64_t byte_count, const std::string& path);

// The header block at offset 0. fd may be open with O_DIRECT. Throw kStore, kNoSpace, and what parse_header
// does.
void write_header(int fd, const std::string& path, const Header& header);
Header read_header(int fd, const std::string& path);
// Opens the file to read it, whatever it is: a FIFO, say, is an error, and no reason to wait.
Header read_header(const std::string& path);

}  // namespace csd
