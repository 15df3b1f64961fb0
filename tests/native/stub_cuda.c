// Stands for libcuda.so.1 where there is no GPU, as far as kvikio asks for it: memory of the device is memory
// of the host that stub_device_memory() made, and the only device's work is always done.
#define _GNU_SOURCE
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

typedef int Result;
typedef uint64_t Address;

enum { kSuccess = 0, kInvalidValue = 1, kHostMemory = 1, kDeviceMemory = 2 };
enum { kAttributeContext = 1, kAttributeMemoryType = 2, kAttributeDevicePointer = 3, kAttributeOrdinal = 9 };

#define MEMORIES_MAX 256
static struct {
  Address base;
  size_t bytes;
} memories[MEMORIES_MAX];
static int memory_count;
static int context;  // its address is the context's handle
static int stream;
static __thread void* current_context;
static int synchronisations;  // of the default stream

static int find(Address address) {
  for (int i = 0; i < memory_count; ++i) {
    if (address >= memories[i].base && address < memories[i].base + memories[i].bytes) return i;
  }
  return -1;
}

// ---- for the tests ----

// Never freed: a test's process ends soon.
void* stub_device_memory(size_t bytes) {
  void* memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED || memory_count == MEMORIES_MAX) return NULL;
  memories[memory_count].base = (Address)(uintptr_t)memory;
  memories[memory_count].bytes = bytes;
  memory_count++;
  return memory;
}

// The driver does not know it as an allocation any more.
void stub_forget(void* memory) {
  const int i = find((Address)(uintptr_t)memory);
  if (i >= 0) memories[i].bytes = 0;
}

int stub_synchronisations(void) { return synchronisations; }

// ---- what kvikio looks up by name ----

Result cuInit(unsigned flags) {
  (void)flags;
  return kSuccess;
}
Result cuDriverGetVersion(int* version) {
  *version = 13000;
  return kSuccess;
}
Result cuGetErrorName(Result error, const char** name) {
  *name = error == kSuccess ? "CUDA_SUCCESS" : "CUDA_ERROR_INVALID_VALUE";
  return kSuccess;
}
Result cuGetErrorString(Result error, const char** text) {
  *text = error == kSuccess ? "no error" : "invalid argument";
  return kSuccess;
}

Result cuDeviceGet(int* device, int ordinal) {
  *device = 0;
  return ordinal == 0 ? kSuccess : kInvalidValue;
}
Result cuDeviceGetCount(int* count) {
  *count = 1;
  return kSuccess;
}
Result cuDeviceGetAttribute(int* value, int attribute, int device) {
  (void)attribute, (void)device;
  *value = 0;
  return kSuccess;
}
Result cuDevicePrimaryCtxRetain(void** made, int device) {
  (void)device;
  *made = &context;
  return kSuccess;
}
Result cuDevicePrimaryCtxRelease_v2(int device) {
  (void)device;
  return kSuccess;
}

Result cuCtxCreate_v4(void** made, void* parameters, unsigned flags, int device) {
  (void)parameters, (void)flags, (void)device;
  *made = &context;
  return kSuccess;
}
Result cuCtxDestroy_v2(void* which) {
  (void)which;
  return kSuccess;
}
Result cuCtxPushCurrent_v2(void* which) {
  current_context = which;
  return kSuccess;
}
Result cuCtxPopCurrent_v2(void** which) {
  *which = current_context;
  current_context = NULL;
  return kSuccess;
}
Result cuCtxGetCurrent(void** which) {
  *which = current_context;
  return kSuccess;
}
Result cuCtxGetDevice(int* device) {
  *device = 0;
  return kSuccess;
}

Result cuMemHostAlloc(void** memory, size_t bytes, unsigned flags) {
  (void)flags;
  return posix_memalign(memory, 4096, bytes) == 0 ? kSuccess : kInvalidValue;
}
Result cuMemFreeHost(void* memory) {
  free(memory);
  return kSuccess;
}
Result cuMemHostRegister_v2(void* memory, size_t bytes, unsigned flags) {
  (void)memory, (void)bytes, (void)flags;
  return kSuccess;
}
Result cuMemHostUnregister(void* memory) {
  (void)memory;
  return kSuccess;
}
Result cuMemGetAddressRange_v2(Address* base, size_t* bytes, Address address) {
  const int i = find(address);
  if (i < 0) return kInvalidValue;
  *base = memories[i].base;
  *bytes = memories[i].bytes;
  return kSuccess;
}

Result cuPointerGetAttribute(void* value, int attribute, Address address) {
  const int i = find(address);
  switch (attribute) {
    case kAttributeContext:
      *(void**)value = i < 0 ? NULL : &context;
      return i < 0 ? kInvalidValue : kSuccess;
    case kAttributeMemoryType:
      *(int*)value = i < 0 ? 0 : kDeviceMemory;
      return kSuccess;
    case kAttributeDevicePointer:
      *(Address*)value = address;
      return i < 0 ? kInvalidValue : kSuccess;
    case kAttributeOrdinal:
      *(int*)value = 0;
      return i < 0 ? kInvalidValue : kSuccess;
    default:
      return kInvalidValue;
  }
}
Result cuPointerGetAttributes(unsigned count, int* attributes, void** values, Address address) {
  for (unsigned i = 0; i < count; ++i) cuPointerGetAttribute(values[i], attributes[i], address);
  return kSuccess;
}

static Result copy(Address to, Address from, size_t bytes) {
  memmove((void*)(uintptr_t)to, (const void*)(uintptr_t)from, bytes);
  return kSuccess;
}
Result cuMemcpyAsync(Address to, Address from, size_t bytes, void* on) {
  (void)on;
  return copy(to, from, bytes);
}
Result cuMemcpyHtoDAsync_v2(Address to, const void* from, size_t bytes, void* on) {
  (void)on;
  return copy(to, (Address)(uintptr_t)from, bytes);
}
Result cuMemcpyDtoHAsync_v2(void* to, Address from, size_t bytes, void* on) {
  (void)on;
  return copy((Address)(uintptr_t)to, from, bytes);
}
Result cuMemcpyBatchAsync_v2(Address* to, Address* from, size_t* bytes, size_t count, void* attributes,
                             size_t* indices, size_t attribute_count, void* on) {
  (void)attributes, (void)indices, (void)attribute_count, (void)on;
  for (size_t i = 0; i < count; ++i) copy(to[i], from[i], bytes[i]);
  return kSuccess;
}

Result cuStreamCreate(void** made, unsigned flags) {
  (void)flags;
  *made = &stream;
  return kSuccess;
}
Result cuStreamDestroy_v2(void* which) {
  (void)which;
  return kSuccess;
}
Result cuStreamSynchronize(void* which) {
  if (which == NULL) __atomic_add_fetch(&synchronisations, 1, __ATOMIC_RELAXED);
  return kSuccess;
}
Result cuEventCreate(void** made, unsigned flags) { return cuStreamCreate(made, flags); }
Result cuEventDestroy_v2(void* which) { return cuStreamDestroy_v2(which); }
Result cuEventRecord(void* which, void* on) {
  (void)which, (void)on;
  return kSuccess;
}
Result cuEventQuery(void* which) {
  (void)which;
  return kSuccess;
}
Result cuEventSynchronize(void* which) {
  (void)which;
  return kSuccess;
}
Result cuLaunchHostFunc(void* on, void (*function)(void*), void* argument) {
  (void)on;
  function(argument);
  return kSuccess;
}
