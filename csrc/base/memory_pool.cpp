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
  if (bytes > kSmallBytes) return map(bytes);
  const size_t steps = (bytes + kStep - 1) / kStep;
  std::lock_guard<std::mutex> lock(mutex_);
  if (Free* free = free_[steps]) {
    free_[steps] = free->next;
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
  return memory;
}

void MemoryPool::release(void* memory, size_t bytes) {
  if (bytes > kSmallBytes) {
    munmap(memory, bytes);
    return;
  }
  std::lock_guard<std::mutex> lock(mutex_);
  auto* free = static_cast<Free*>(memory);
  free->next = free_[(bytes + kStep - 1) / kStep];
  free_[(bytes + kStep - 1) / kStep] = free;
}

}  // namespace csd
