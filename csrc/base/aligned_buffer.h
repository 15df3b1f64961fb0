// Uninitialised scratch memory that grows and is reused. Aligned for direct I/O, and so for every register.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

#include "base/types.h"

namespace csd {

class AlignedBuffer {
 public:
  AlignedBuffer() = default;
  ~AlignedBuffer() { std::free(data_); }
  AlignedBuffer(const AlignedBuffer&) = delete;
  AlignedBuffer& operator=(const AlignedBuffer&) = delete;

  // At least bytes of memory; what was in it is lost.
  void* reserve(int64_t bytes) {
    if (bytes <= bytes_) return data_;
    std::free(data_);
    data_ = nullptr;
    bytes_ = 0;
    if (posix_memalign(&data_, kAlignment, static_cast<size_t>(bytes)) != 0) {
      data_ = nullptr;
      throw std::bad_alloc();
    }
    bytes_ = bytes;
    return data_;
  }
  int64_t bytes() const { return bytes_; }

 private:
  static constexpr size_t kAlignment = kBlockBytes;
  void* data_ = nullptr;
  int64_t bytes_ = 0;
};

}  // namespace csd
