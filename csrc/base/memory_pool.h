// Memory for small objects that live long: page tables and the like. Kept away from malloc's heap, where one
// of them in the gap that an aligned allocation leaves (torch's tensors are aligned) keeps the gap from being
// used again: a process that appended tensor after tensor grew by the size of each (glibc 2.36).
#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <vector>

namespace csd {

// Thread-safe. Gives its memory back when it is destroyed.
class MemoryPool {
 public:
  MemoryPool() = default;
  ~MemoryPool();
  MemoryPool(const MemoryPool&) = delete;
  MemoryPool& operator=(const MemoryPool&) = delete;

  // 16-byte aligned. Throws std::bad_alloc.
  void* allocate(size_t bytes);
  void release(void* memory, size_t bytes);
  int64_t bytes();  // handed out

 private:
  static constexpr size_t kStep = 16;
  static constexpr size_t kSmallBytes = 1024;  // larger ones are mapped each by itself
  struct Free {
    Free* next;
  };

  std::mutex mutex_;
  int64_t bytes_ = 0;
  Free* free_[kSmallBytes / kStep + 1] = {};  // by size in steps
  std::vector<void*> regions_;
  char* next_ = nullptr;  // of the last region
  char* end_ = nullptr;
};

// For containers. Copies of a container stay in its pool.
template <typename T>
struct PoolAllocator {
  using value_type = T;
  using propagate_on_container_copy_assignment = std::true_type;
  using propagate_on_container_move_assignment = std::true_type;
  using propagate_on_container_swap = std::true_type;

  explicit PoolAllocator(MemoryPool* pool) : pool(pool) {}
  template <typename U>
  PoolAllocator(const PoolAllocator<U>& other) : pool(other.pool) {}  // as containers need it: implicit

  T* allocate(size_t count) { return static_cast<T*>(pool->allocate(count * sizeof(T))); }
  void deallocate(T* memory, size_t count) { pool->release(memory, count * sizeof(T)); }
  template <typename U>
  bool operator==(const PoolAllocator<U>& other) const {
    return pool == other.pool;
  }
  template <typename U>
  bool operator!=(const PoolAllocator<U>& other) const {
    return pool != other.pool;
  }

  MemoryPool* pool;
};

}  // namespace csd
