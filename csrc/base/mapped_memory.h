// Anonymous memory from the kernel, on huge pages where it is large enough for one.
//
// Huge pages decide more than TLB misses: a 1 MiB O_DIRECT read into 4 KiB pages is 256 scattered segments to
// the device, into a huge page it is one. On a virtio drive that was 1.5 against 3.6 GB/s
// (benchmarks/README.md).
#pragma once

#include <cstdint>

namespace csd {

// Zeroed, aligned to kBlockBytes; multiples of 2 MiB are aligned to that and advised to be huge pages. what:
// for the error text. Throws kBudget when the process may not have more.
uint8_t* map_memory(int64_t bytes, const char* what);
void unmap_memory(uint8_t* memory, int64_t bytes);

}  // namespace csd
