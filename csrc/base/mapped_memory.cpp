#include "base/mapped_memory.h"

#include <sys/mman.h>

#include <cerrno>
#include <cstring>

#include "base/error.h"
#include "base/types.h"

namespace csd {
namespace {

constexpr int64_t kHugePageBytes = int64_t{2} << 20;

}  // namespace

uint8_t* map_memory(int64_t bytes, const char* what) {
  const bool huge = bytes % kHugePageBytes == 0;
  // mmap aligns to ordinary pages only: take more and cut.
  const int64_t spare = huge ? kHugePageBytes : 0;
  void* mapped = mmap(nullptr, static_cast<size_t>(bytes + spare), PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) {
    throw Error(ErrorKind::kBudget, "mapping " + std::to_string(bytes) + " bytes for " + what + ": " +
                                        std::strerror(errno) +
                                        "; lower memory_budget or raise the process's limit");
  }
  auto* start = static_cast<uint8_t*>(mapped);
  if (!huge) return start;
  const auto address = reinterpret_cast<uintptr_t>(start);
  uint8_t* aligned =
      start + (round_up(static_cast<int64_t>(address), kHugePageBytes) - static_cast<int64_t>(address));
  if (aligned > start) munmap(start, static_cast<size_t>(aligned - start));
  const int64_t tail = start + bytes + spare - (aligned + bytes);
  if (tail > 0) munmap(aligned + bytes, static_cast<size_t>(tail));
  madvise(aligned, static_cast<size_t>(bytes),
          MADV_HUGEPAGE);  // best effort: kernels without it serve 4 KiB pages
  return aligned;
}

void unmap_memory(uint8_t* memory, int64_t bytes) { munmap(memory, static_cast<size_t>(bytes)); }

}  // namespace csd
