// Every way to compute CRC-32C that this processor has, against known values and against one bit at a time.
// With an argument, measures each in GB/s instead. Plain program: exits non-zero on the first failure.
//
// In one line, from the repository's root:
//
//   g++ -std=c++17 -O2 -g -Wall -Wextra -Icsrc tests/native/test_checksum.cpp csrc/base/checksum.cpp -o
//   test_crc

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "base/checksum.h"

using namespace csd;

namespace {

constexpr int64_t kLengthMax = 1100;  // past several rounds of every path
constexpr int64_t kOffsets = 9;
constexpr int64_t kPageBytes[] = {
    4096, 4096 + 1, 5 * 1024, 8192 - 1, 73728, 256 * 1024, 256 * 1024 + 4096 + 77};

uint32_t reference(const uint8_t* bytes, int64_t byte_count) {
  uint32_t state = ~uint32_t{0};
  for (int64_t i = 0; i < byte_count; ++i) {
    state ^= bytes[i];
    for (int bit = 0; bit < 8; ++bit) state = (state >> 1) ^ ((state & 1) != 0 ? 0x82F63B78u : 0);
  }
  return ~state;
}

uint32_t whole(const Crc32cPath& path, const uint8_t* bytes, int64_t byte_count) {
  return ~path.update(~uint32_t{0}, bytes, byte_count);
}

void check(uint32_t got, uint32_t expected, const char* name, int64_t offset, int64_t byte_count) {
  if (got == expected) return;
  std::fprintf(stderr, "%s: %08x instead of %08x for %lld bytes from byte %lld on\n", name, got, expected,
               static_cast<long long>(byte_count), static_cast<long long>(offset));
  std::exit(1);
}

void test(const Crc32cPath& path, const std::vector<uint8_t>& bytes) {
  const std::vector<uint8_t> zeros(32, 0), ones(32, 0xFF);
  const auto* digits = reinterpret_cast<const uint8_t*>("123456789");
  check(whole(path, digits, 9), 0xE3069283, path.name, 0, 9);
  check(whole(path, digits, 0), 0, path.name, 0, 0);
  check(whole(path, zeros.data(), 32), 0x8A9136AA, path.name, 0, 32);  // RFC 3720, B.4
  check(whole(path, ones.data(), 32), 0x62A8AB43, path.name, 0, 32);
  for (int64_t offset = 0; offset < kOffsets; ++offset) {
    for (int64_t count = 0; count <= kLengthMax; ++count) {
      check(whole(path, bytes.data() + offset, count), reference(bytes.data() + offset, count), path.name,
            offset, count);
    }
  }
  for (const int64_t count : kPageBytes) {
    const uint32_t expected = reference(bytes.data() + 3, count);
    check(whole(path, bytes.data() + 3, count), expected, path.name, 3, count);
    for (const int64_t part : {int64_t{1}, int64_t{255}, int64_t{4095}, count / 2}) {
      const uint32_t state = path.update(~uint32_t{0}, bytes.data() + 3, part);
      check(~path.update(state, bytes.data() + 3 + part, count - part), expected, path.name, part,
            count - part);
    }
  }
}

void measure(const Crc32cPath& path, const std::vector<uint8_t>& bytes, int64_t byte_count) {
  const auto total = static_cast<int64_t>(bytes.size());
  double best = 0;
  uint32_t state = 0;
  for (int round = 0; round < 9; ++round) {
    int64_t done = 0;
    const auto begin = std::chrono::steady_clock::now();
    for (int64_t at = 0; done < int64_t{1} << 28; done += byte_count, at += byte_count) {
      if (at + byte_count > total) at = 0;
      state = path.update(state, bytes.data() + (byte_count < total / 8 ? 0 : at), byte_count);
    }
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - begin;
    best = std::max(best, static_cast<double>(done) / elapsed.count() / 1e9);
  }
  std::printf("%-8s %9lld bytes  %6.1f GB/s  (%08x)\n", path.name, static_cast<long long>(byte_count), best,
              state);
}

}  // namespace

int main(int argc, char**) {
  std::vector<uint8_t> bytes(argc > 1 ? int64_t{1} << 28 : int64_t{1} << 20);
  std::mt19937_64 random(7);
  for (size_t i = 0; i + 8 <= bytes.size(); i += 8) {
    const uint64_t word = random();
    std::memcpy(bytes.data() + i, &word, 8);
  }
  std::string names;
  for (const Crc32cPath& path : crc32c_paths()) {
    if (argc > 1) {
      for (const int64_t count : {4096, 32768, 262144, 1 << 26}) measure(path, bytes, count);
      continue;
    }
    test(path, bytes);
    names += std::string(" ") + path.name;
  }
  if (argc > 1) return 0;
  check(crc32c("123456789", 9), 0xE3069283, "crc32c", 0, 9);
  std::printf("%s: ok\n", names.c_str());
}
