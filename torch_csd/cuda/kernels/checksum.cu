// CRC-32C of page images (csrc/store/FORMAT.md): polynomial 0x1EDC6F41, reflected, initial value and final
// XOR all ones.
//
// A CRC is the message, as a polynomial, modulo P. So parts are taken by themselves, and what stands k bytes
// before the end counts x^(8k) mod P times. A block takes a page; a lane takes 128 bytes of every block of 4
// KiB that its warp takes, multiplying what it has by x^(8 * distance) in between.
#include "element.cuh"

namespace csd {

constexpr int kChecksumThreads = 256;
constexpr int kChecksumWarps = kChecksumThreads / kWarpLanes;
constexpr int kLaneBytes = 4096 / kWarpLanes;
constexpr uint32_t kPolynomial = 0x82f63b78;  // reflected: x^0 is the highest bit

// a * b mod P.
CSD_CONSTEXPR uint32_t multiply_mod(uint32_t a, uint32_t b) {
  uint32_t product = 0;
  for (int i = 0; i < 32; ++i) {
    product ^= b & (0u - (a >> 31));
    a <<= 1;
    b = (b >> 1) ^ (kPolynomial & (0u - (b & 1)));
  }
  return product;
}

// x^(8 * bytes) mod P.
CSD_CONSTEXPR uint32_t shift_bytes(int64_t bytes) {
  uint32_t power = 0x00800000, result = 0x80000000;  // x^8 and 1
  for (; bytes > 0; bytes /= 2) {
    if (bytes % 2 == 1) result = multiply_mod(result, power);
    power = multiply_mod(power, power);
  }
  return result;
}

// The grid has one block for each page. page_bytes is a multiple of 4096, pages 16-byte aligned.
__global__ void __launch_bounds__(kChecksumThreads)
    checksum(const uint8_t* __restrict__ pages, int64_t page_bytes, uint32_t* __restrict__ checksums) {
  // table[i][b]: byte b followed by i zero bytes ("slicing by four").
  __shared__ uint32_t table[4][256];
  __shared__ uint32_t warp_sums[kChecksumWarps];
  {
    uint32_t entry = threadIdx.x;
    for (int i = 0; i < 8; ++i) entry = (entry >> 1) ^ (kPolynomial & (0u - (entry & 1)));
    table[0][threadIdx.x] = entry;
    __syncthreads();
    for (int i = 1; i < 4; ++i) {
      entry = (entry >> 8) ^ table[0][entry & 0xff];
      table[i][threadIdx.x] = entry;
    }
    __syncthreads();
  }
  const int lane = threadIdx.x % kWarpLanes, warp = threadIdx.x / kWarpLanes;
  const uint8_t* page = pages + blockIdx.x * page_bytes;
  const int64_t block_count = page_bytes / 4096;
  constexpr uint32_t kToNext = shift_bytes(kChecksumWarps * 4096 - kLaneBytes);
  uint32_t state = 0;
  int64_t end = 0;  // of what the state is of
  for (int64_t block = warp; block < block_count; block += kChecksumWarps) {
    const int64_t begin = block * 4096 + lane * kLaneBytes;
    state = end == 0 ? (begin == 0 ? 0xffffffff : 0) : multiply_mod(kToNext, state);
    const auto* words = reinterpret_cast<const uint4*>(page + begin);
    uint4 loaded[kLaneBytes / 16];
#pragma unroll
    for (int i = 0; i < kLaneBytes / 16; ++i) loaded[i] = __ldg(words + i);
#pragma unroll
    for (int i = 0; i < kLaneBytes / 16; ++i) {
      const uint32_t parts[4] = {loaded[i].x, loaded[i].y, loaded[i].z, loaded[i].w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        state ^= parts[j];
        state = table[3][state & 0xff] ^ table[2][state >> 8 & 0xff] ^ table[1][state >> 16 & 0xff] ^
                table[0][state >> 24];
      }
    }
    end = begin + kLaneBytes;
  }
  // Each to the end of the page.
  uint32_t sum = end == 0 ? 0 : multiply_mod(shift_bytes(page_bytes - end), state);
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) sum ^= __shfl_xor_sync(kAllLanes, sum, distance);
  if (lane == 0) warp_sums[warp] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int i = 1; i < kChecksumWarps; ++i) sum ^= warp_sums[i];
    checksums[blockIdx.x] = ~sum;
  }
}

}  // namespace csd
