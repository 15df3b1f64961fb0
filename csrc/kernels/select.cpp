#include <cstring>
#include <string>

#include "base/error.h"
#include "kernels/kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace csd {
namespace {

#if defined(__x86_64__)
// The builtin also asks the operating system whether it saves the wide registers. Not every compiler's
// builtin knows f16c, so that is read from cpuid; its registers are those of avx2.
bool has_avx2() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  const bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
  return f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

bool has_avx512_vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }
#endif

// The tables this processor runs, slowest first, and their names.
struct Supported {
  const Kernels* tables[4] = {&kSerialKernels};
  int count = 1;
  std::string names;

  Supported() {
#if defined(__x86_64__)
    if (has_avx2()) tables[count++] = &kAvx2Kernels;
    if (has_avx512()) tables[count++] = &kAvx512Kernels;
    if (has_avx512_vnni()) tables[count++] = &kAvx512VnniKernels;
#endif
    for (int i = 0; i < count; ++i) names += std::string(i > 0 ? "," : "") + tables[i]->name;
  }
};

const Supported& supported() {
  static const Supported instance;
  return instance;
}

bool known(const char* name) {
  for (const char* each : {"serial", "avx2", "avx512", "avx512vnni"}) {
    if (std::strcmp(name, each) == 0) return true;
  }
  return false;
}

}  // namespace

const Kernels& select_kernels(const char* name) {
  const Supported& available = supported();
  if (std::strcmp(name, "auto") == 0) return *available.tables[available.count - 1];
  for (int i = 0; i < available.count; ++i) {
    if (std::strcmp(name, available.tables[i]->name) == 0) return *available.tables[i];
  }
  if (!known(name)) {
    throw Error(ErrorKind::kValue,
                std::string("simd must be auto, serial, avx2, avx512 or avx512vnni, got \"") + name +
                    "\"; this processor has " + available.names);
  }
  throw Error(ErrorKind::kValue, std::string("simd \"") + name +
                                     "\" needs a processor that has it; this one has " + available.names +
                                     ", or use auto");
}

const char* supported_kernels() { return supported().names.c_str(); }

}  // namespace csd
