// CRC-32C: what FORMAT.md calls a checksum. Pure arithmetic on bytes; thread-safe.
#pragma once

#include <cstdint>
#include <vector>

namespace csd {

uint32_t crc32c(const void* bytes, int64_t byte_count);

// One way to compute it. update() goes on from the state that the bytes before left; the first state, and the
// final XOR, is 0xFFFFFFFF.
struct Crc32cPath {
  const char* name;  // "serial", "sse42", "avx512"
  uint32_t (*update)(uint32_t state, const uint8_t* bytes, int64_t byte_count);
};

// Those that this processor runs, slowest first: crc32c() takes the last.
const std::vector<Crc32cPath>& crc32c_paths();

}  // namespace csd
