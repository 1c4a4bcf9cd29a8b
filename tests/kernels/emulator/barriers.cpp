// Where threads of a warp, a block or a cluster wait for each other.
#include "cuda_runtime.h"
#include "grid.h"

using namespace emulator;

namespace {

// Until `all` threads are here.
void meet(Barrier& barrier, unsigned all) {
  if (++barrier.arrived < all) {
    barrier.waiting.push_back(running);
    suspend();
  } else {
    barrier.arrived = 0;
    wake(barrier.waiting);
    let_others_run();
  }
}

}  // namespace

Index thread_index() { return {running->index}; }
Index block_index() { return {running->block->index}; }

void __syncthreads() {
  if (is_missing("__syncthreads")) return;
  meet(running->block->barrier, running->block->threads);
  ++running->block_barriers;
}

uint32_t shuffle(unsigned mask, uint32_t bits, int lane) {
  if (mask != ~0u) fail("a shuffle of a part of a warp, which is not emulated");
  Warp& warp = running->block->warps[running->index / kWarp];
  const uint64_t phase = warp.phase;
  warp.bits[phase % 2][running->index % kWarp] = bits;
  if (++warp.arrived < kWarp) {
    warp.waiting.push_back(running);
    suspend();
  } else {
    warp.arrived = 0;
    ++warp.phase;
    wake(warp.waiting);
  }
  return warp.bits[phase % 2][lane];
}

namespace r1v3::grpo {

int cluster_blocks() { return static_cast<int>(running->block->cluster->blocks.size()); }
int cluster_rank() { return static_cast<int>(running->block->rank); }

// Orders no accesses: nothing is published by starting.
void announce_start() {
  Cluster& cluster = *running->block->cluster;
  if (running->announced) fail("a thread announced its start twice");
  running->announced = true;
  if (++cluster.announced == cluster.threads.size()) wake(cluster.waiting_for_start);
}

void wait_for_start() {
  if (is_missing("wait_for_start")) return;
  Cluster& cluster = *running->block->cluster;
  if (!running->announced) fail("a thread waits for starts and has not announced its own");
  if (cluster.announced < cluster.threads.size()) {
    cluster.waiting_for_start.push_back(running);
    suspend();
  }
}

void cluster_barrier() {
  if (is_missing("cluster_barrier")) return;
  Cluster& cluster = *running->block->cluster;
  meet(cluster.barrier, static_cast<unsigned>(cluster.threads.size()));
  ++running->cluster_barriers;
}

}  // namespace r1v3::grpo
