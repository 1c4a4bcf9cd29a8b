// As much of CUDA as csrc/cuda/logits_grpo_loss.cu uses, for a host compiler: the language, the
// runtime's calls, and the functions of csrc/cuda/device.h. The other files here implement them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "csrc/cuda/numbers.h"

// ---- the language ----------------------------------------------------------------------------

#define __global__
#define __device__
#define __launch_bounds__(...)
#define __forceinline__ inline

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct uint4 {
  uint32_t x, y, z, w;
};
struct Index {
  unsigned x;
};

Index thread_index();
Index block_index();
#define threadIdx thread_index()
#define blockIdx block_index()

void __syncthreads();
void __stcs(uint4* to, uint4 value);

// The bits of another lane of the warp, all of whose threads must call.
uint32_t shuffle(unsigned mask, uint32_t bits, int lane);

template <typename T>
T __shfl_sync(unsigned mask, T value, int lane) {
  static_assert(sizeof(T) == 4);
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  bits = shuffle(mask, bits, lane);
  std::memcpy(&value, &bits, 4);
  return value;
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, int offset) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  return __shfl_sync(mask, value, lane + offset < 32 ? lane + offset : lane);
}

// ---- csrc/cuda/device.h ----------------------------------------------------------------------

namespace emulator {
void* shared_memory();
void wait_for_copies(int pending);
void* in_block(void* own, int rank);
}  // namespace emulator

namespace r1v3::grpo {

template <typename T>
T* shared_memory() {
  return static_cast<T*>(emulator::shared_memory());
}

void copy_vector(Vector* to, const void* from, uint64_t policy);
inline uint64_t evict_first() { return 0; }
void commit_copies();

template <int kPending>
void wait_for_copies() {
  emulator::wait_for_copies(kPending);
}

int cluster_blocks();
int cluster_rank();
void announce_start();
void wait_for_start();
void cluster_barrier();

template <typename T>
T* in_block(T* own, int rank) {
  return static_cast<T*>(emulator::in_block(own, rank));
}

}  // namespace r1v3::grpo

// ---- the runtime -----------------------------------------------------------------------------

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr {
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrReservedSharedMemoryPerBlock
};
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension };
struct cudaLaunchAttributeValue {
  dim3 clusterDim;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetDevice(int* index);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr name, int device);
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute name, int value);
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void* kernel,
                                           const cudaLaunchConfig_t* config);
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel,
                                void** parameters);
