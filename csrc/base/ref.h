// Shared ownership of small objects in a memory pool, counted in the object: 8 bytes for each pointer and 4
// for each object, where std::shared_ptr takes twice 16.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <new>
#include <utility>

#include "base/memory_pool.h"

namespace csd {

template <typename T>
class Ref;

// Base of what a Ref may own. T also has pool(), the memory pool that it lies in, which outlives it.
class Counted {
 public:
  Counted(const Counted&) = delete;
  Counted& operator=(const Counted&) = delete;

 protected:
  Counted() = default;
  ~Counted() = default;

 private:
  template <typename T>
  friend class Ref;
  std::atomic<uint32_t> uses_{0};
};

// Null, or one of the owners of a T. The count may be changed by several threads at once, one Ref may not.
template <typename T>
class Ref {
 public:
  template <typename... Arguments>
  static Ref make(MemoryPool* pool, Arguments&&... arguments) {
    void* memory = pool->allocate(sizeof(T));
    try {
      return Ref(new (memory) T(std::forward<Arguments>(arguments)...));
    } catch (...) {
      pool->release(memory, sizeof(T));
      throw;
    }
  }

  Ref() = default;
  Ref(std::nullptr_t) {}  // as std::shared_ptr has it: implicit
  // One owner more of an object that has some.
  explicit Ref(T* object) noexcept : object_(object) {
    if (object_ != nullptr) object_->uses_.fetch_add(1, std::memory_order_relaxed);
  }
  Ref(const Ref& other) noexcept : Ref(other.object_) {}
  Ref(Ref&& other) noexcept : object_(std::exchange(other.object_, nullptr)) {}
  Ref& operator=(Ref other) noexcept {
    std::swap(object_, other.object_);
    return *this;
  }
  ~Ref() {
    if (object_ == nullptr || object_->uses_.fetch_sub(1, std::memory_order_acq_rel) != 1) return;
    MemoryPool* pool = object_->pool();
    object_->~T();
    pool->release(object_, sizeof(T));
  }

  void reset() { *this = nullptr; }
  T* get() const { return object_; }
  T* operator->() const { return object_; }
  T& operator*() const { return *object_; }
  int64_t use_count() const { return object_->uses_.load(std::memory_order_acquire); }

  bool operator==(const Ref& other) const { return object_ == other.object_; }
  bool operator!=(const Ref& other) const { return object_ != other.object_; }
  bool operator==(std::nullptr_t) const { return object_ == nullptr; }
  bool operator!=(std::nullptr_t) const { return object_ != nullptr; }

 private:
  T* object_ = nullptr;
};

}  // namespace csd
