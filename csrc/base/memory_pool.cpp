#include "base/memory_pool.h"

#include <sys/mman.h>

#include <new>

namespace csd {
namespace {

constexpr size_t kRegionBytes = size_t{256} << 10;

void* map(size_t bytes) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  return memory;
}

}  // namespace

MemoryPool::~MemoryPool() {
  for (void* region : regions_) munmap(region, kRegionBytes);
}

void* MemoryPool::allocate(size_t bytes) {
  std::lock_guard<std::mutex> lock(mutex_);
  const size_t steps = (bytes + kStep - 1) / kStep;
  if (bytes > kSmallBytes) {
    void* memory = map(bytes);
    bytes_ += static_cast<int64_t>(steps * kStep);
    return memory;
  }
  if (Free* free = free_[steps]) {
    free_[steps] = free->next;
    bytes_ += static_cast<int64_t>(steps * kStep);
    return free;
  }
  if (static_cast<size_t>(end_ - next_) < steps * kStep) {
    regions_.reserve(regions_.size() + 1);
    next_ = static_cast<char*>(map(kRegionBytes));
    end_ = next_ + kRegionBytes;
    regions_.push_back(next_);
  }
  void* memory = next_;
  next_ += steps * kStep;
  bytes_ += static_cast<int64_t>(steps * kStep);
  return memory;
}

void MemoryPool::release(void* memory, size_t bytes) {
  std::lock_guard<std::mutex> lock(mutex_);
  const size_t steps = (bytes + kStep - 1) / kStep;
  bytes_ -= static_cast<int64_t>(steps * kStep);
  if (bytes > kSmallBytes) {
    munmap(memory, bytes);
    return;
  }
  auto* free = static_cast<Free*>(memory);
  free->next = free_[steps];
  free_[steps] = free;
}

int64_t MemoryPool::bytes() {
  std::lock_guard<std::mutex> lock(mutex_);
  return bytes_;
}

}  // namespace csd
