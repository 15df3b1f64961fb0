#include "store/format.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "base/aligned_buffer.h"
#include "base/checksum.h"
#include "base/error.h"
#include "base/types.h"

namespace csd {
namespace {

constexpr char kMagic[8] = {'C', 'S', 'D', 'P', 'O', 'O', 'L', '\0'};
constexpr uint32_t kVersion = 2;
constexpr uint32_t kByteOrderMark = 0x01020304;

struct HeaderBytes {
  char magic[8];
  uint32_t version;
  uint32_t byte_order;
  uint32_t header_bytes;
  uint32_t page_tokens;
  uint32_t block_bytes;
  uint32_t lifetime;
  uint64_t data_offset;
  uint8_t store_id[16];
  uint32_t reserved;
  uint32_t checksum;  // of what comes before it
};
static_assert(sizeof(HeaderBytes) == 64, "FORMAT.md fixes the header's layout");

uint32_t checksum_of(const HeaderBytes& header) { return crc32c(&header, offsetof(HeaderBytes, checksum)); }

[[noreturn]] void corrupt(const std::string& path, const std::string& what) {
  throw Error(ErrorKind::kCorrupt, path + ": " + what);
}

}  // namespace

Header parse_header(const uint8_t* bytes, int64_t byte_count, const std::string& path) {
  HeaderBytes header;
  if (byte_count < static_cast<int64_t>(sizeof(header))) {
    corrupt(path, "cut short: " + std::to_string(byte_count) + " bytes, less than a header");
  }
  std::memcpy(&header, bytes, sizeof(header));
  if (std::memcmp(header.magic, kMagic, sizeof(kMagic)) != 0) {
    corrupt(path, "not a file of pages: it does not begin with CSDPOOL");
  }
  if (header.byte_order != kByteOrderMark)
    corrupt(path, "damaged: the byte order mark in its header is wrong");
  // Before the checksum, which another version may keep elsewhere.
  if (header.version != kVersion) {
    throw Error(ErrorKind::kStore, path + ": version " + std::to_string(header.version) +
                                       " of the format; this torch_csd reads version " +
                                       std::to_string(kVersion) + ": use the one that wrote it");
  }
  if (header.header_bytes < sizeof(header) || header.header_bytes > kBlockBytes) {
    corrupt(path, "damaged: a header of " + std::to_string(header.header_bytes) + " bytes");
  }
  if (header.checksum != checksum_of(header)) corrupt(path, "damaged: the checksum of its header is wrong");
  if (header.page_tokens != kPageTokens || header.block_bytes != kBlockBytes ||
      header.data_offset != static_cast<uint64_t>(kDataOffset)) {
    corrupt(path, "pages of " + std::to_string(header.page_tokens) + " tokens on blocks of " +
                      std::to_string(header.block_bytes) + " bytes from byte " +
                      std::to_string(header.data_offset) + " on; this torch_csd reads those of " +
                      std::to_string(kPageTokens) + " on " + std::to_string(kBlockBytes) + " from byte " +
                      std::to_string(kDataOffset) + " on");
  }
  if (header.lifetime > static_cast<uint32_t>(Lifetime::kDurable)) {
    corrupt(path, "damaged: lifetime " + std::to_string(header.lifetime));
  }
  Header result;
  result.lifetime = static_cast<Lifetime>(header.lifetime);
  std::copy(std::begin(header.store_id), std::end(header.store_id), result.store_id.begin());
  return result;
}

void write_header(int fd, const std::string& path, const Header& header) {
  HeaderBytes bytes{};
  std::memcpy(bytes.magic, kMagic, sizeof(kMagic));
  bytes.version = kVersion;
  bytes.byte_order = kByteOrderMark;
  bytes.header_bytes = sizeof(bytes);
  bytes.page_tokens = static_cast<uint32_t>(kPageTokens);
  bytes.block_bytes = static_cast<uint32_t>(kBlockBytes);
  bytes.lifetime = static_cast<uint32_t>(header.lifetime);
  bytes.data_offset = static_cast<uint64_t>(kDataOffset);
  std::copy(header.store_id.begin(), header.store_id.end(), bytes.store_id);
  bytes.checksum = checksum_of(bytes);
  AlignedBuffer block;
  void* memory = block.reserve(kBlockBytes);
  std::memset(memory, 0, static_cast<size_t>(kBlockBytes));
  std::memcpy(memory, &bytes, sizeof(bytes));
  ssize_t written;
  do {
    written = pwrite(fd, memory, static_cast<size_t>(kBlockBytes), 0);
  } while (written < 0 && errno == EINTR);
  const int error = written < 0 ? errno : (written == kBlockBytes ? 0 : ENOSPC);
  if (error != 0) throw io_error(path, "writing the file's header failed", error);
}

Header read_header(int fd, const std::string& path) {
  AlignedBuffer block;
  auto* memory = static_cast<uint8_t*>(block.reserve(kBlockBytes));
  ssize_t count;
  do {
    count = pread(fd, memory, static_cast<size_t>(kBlockBytes), 0);
  } while (count < 0 && errno == EINTR);
  if (count < 0) throw io_error(path, "reading the file's header failed", errno);
  return parse_header(memory, count, path);
}

Header read_header(const std::string& path) {
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (fd < 0) throw io_error(path, "opening", errno);
  try {
    const Header header = read_header(fd, path);
    close(fd);
    return header;
  } catch (...) {
    close(fd);
    throw;
  }
}

}  // namespace csd
