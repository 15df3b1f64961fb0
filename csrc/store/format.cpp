#include "store/format.h"

#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "base/aligned_buffer.h"
#include "base/error.h"
#include "base/types.h"
#include "store/extents.h"

namespace csd {
namespace {

constexpr char kMagic[8] = {'C', 'S', 'D', 'P', 'O', 'O', 'L', '\0'};
constexpr uint32_t kVersion = 1;
constexpr uint32_t kByteOrderMark = 0x01020304;

struct Header {
  char magic[8];
  uint32_t version;
  uint32_t byte_order;
  uint32_t header_bytes;
  uint32_t page_tokens;
  uint32_t block_bytes;
  uint32_t lifetime;  // 0: scratch
  uint64_t data_offset;
};
static_assert(sizeof(Header) == 40, "FORMAT.md fixes the header's layout");

}  // namespace

void write_header(int fd, const std::string& path) {
  void* memory = nullptr;
  if (posix_memalign(&memory, static_cast<size_t>(kBlockBytes), static_cast<size_t>(kBlockBytes)) != 0) {
    throw std::bad_alloc();
  }
  std::memset(memory, 0, static_cast<size_t>(kBlockBytes));
  Header header{};
  std::memcpy(header.magic, kMagic, sizeof(kMagic));
  header.version = kVersion;
  header.byte_order = kByteOrderMark;
  header.header_bytes = sizeof(Header);
  header.page_tokens = static_cast<uint32_t>(kPageTokens);
  header.block_bytes = static_cast<uint32_t>(kBlockBytes);
  header.data_offset = static_cast<uint64_t>(kDataOffset);
  std::memcpy(memory, &header, sizeof(header));
  ssize_t written;
  do {
    written = pwrite(fd, memory, static_cast<size_t>(kBlockBytes), 0);
  } while (written < 0 && errno == EINTR);
  const int error = written < 0 ? errno : (written == kBlockBytes ? 0 : ENOSPC);
  std::free(memory);
  if (error != 0) throw io_error(path, "writing the file's header failed", error);
}

}  // namespace csd
