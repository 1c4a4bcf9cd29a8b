// What only a GPU has: the memory of a cluster of blocks, its barriers, and asynchronous copies.
//
// A host compiler gets the same functions from the cuda_runtime.h that it is given:
// tests/kernels/emulator has one that runs threads one by one.
#pragma once

#include <cuda_runtime.h>

#ifdef __CUDACC__
#include <cooperative_groups.h>

#include "numbers.h"

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900  // before, there are no clusters
namespace r1v3::grpo {

// All shared memory of the block, as much as its launch asked for.
template <typename T>
__device__ __forceinline__ T* shared_memory() {
  extern __shared__ Vector memory[];
  return reinterpret_cast<T*>(memory);
}

// ---- copies to shared memory that a thread waits for later -----------------------------------

// Past the first-level cache, and first to leave the second: no logit is read twice.
__device__ __forceinline__ void copy_vector(Vector* to, const void* from, uint64_t policy) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(address),
               "l"(from), "l"(policy)
               : "memory");
}

__device__ __forceinline__ uint64_t evict_first() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// The copies since the last call are one group.
__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Until at most the last kPending groups of this thread are under way.
template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---- the blocks of a cluster -----------------------------------------------------------------

__device__ __forceinline__ int cluster_blocks() {
  return static_cast<int>(cooperative_groups::this_cluster().num_blocks());
}

__device__ __forceinline__ int cluster_rank() {
  return static_cast<int>(cooperative_groups::this_cluster().block_rank());
}

// Shared memory of a block may be touched by another once it has started. Nothing is published by
// starting, so the arrival needs no fence.
__device__ __forceinline__ void announce_start() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;");
}

__device__ __forceinline__ void wait_for_start() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// After it every thread of the cluster sees what any of them wrote before it.
__device__ __forceinline__ void cluster_barrier() { cooperative_groups::this_cluster().sync(); }

// Where the block of this rank has what this block has at `own`.
template <typename T>
__device__ __forceinline__ T* in_block(T* own, int rank) {
  return cooperative_groups::this_cluster().map_shared_rank(own, rank);
}

}  // namespace r1v3::grpo
#endif
#endif
