// The CUDA runtime on a device like an H100, and the order in which a launch's threads run.
#include <csignal>
#include <algorithm>
#include <map>

#include "cuda_runtime.h"
#include "grid.h"
#include "runtime.h"

namespace emulator {

std::function<void()> another_host_thread;
size_t last_shared_bytes = 0;

namespace {

constexpr int kSharedPerBlock = 232448, kSharedPerMultiprocessor = 233472, kReserved = 1024;
std::map<const void*, size_t> limits;  // of each kernel's shared memory, as last set
std::string last_failure = "invalid argument";

void let_another_host_thread_run() {
  const auto once = std::move(another_host_thread);
  another_host_thread = nullptr;
  if (once) once();
}

std::unique_ptr<Cluster> make_cluster(unsigned number) {
  auto cluster = std::make_unique<Cluster>();
  const unsigned blocks = launch.blocks_per_cluster, threads = launch.threads_per_block;
  const unsigned late = static_cast<unsigned>(launch.random() % (2 * blocks));
  cluster->alive = blocks * threads;
  for (unsigned rank = 0; rank < blocks; ++rank) {
    auto block = std::make_unique<Block>();
    block->cluster = cluster.get();
    block->index = number * blocks + rank;
    block->rank = rank;
    block->threads = block->alive = threads;
    block->warps.resize((threads + kWarp - 1) / kWarp);
    map_shared_memory(*block);
    for (unsigned i = 0; i < threads; ++i) {
      auto thread = std::make_unique<Thread>();
      thread->block = block.get();
      thread->index = i;
      thread->number = block->index * threads + i + 1;
      (rank == late && blocks > 1 ? launch.late : launch.ready).push_back(thread.get());
      cluster->threads.push_back(std::move(thread));
    }
    cluster->blocks.push_back(std::move(block));
  }
  return cluster;
}

void finish(Thread& thread) {
  Block& block = *thread.block;
  if (--block.alive == 0) close_shared_memory(block);
  Cluster* cluster = block.cluster;
  if (--cluster->alive > 0) return;
  for (auto& other : cluster->blocks) unmap_shared_memory(*other);
  launch.resident.erase(std::find_if(launch.resident.begin(), launch.resident.end(),
                                     [=](const auto& held) { return held.get() == cluster; }));
}

void on_bad_access(int, siginfo_t* info, void*) {
  fail("an access to " + describe(info->si_addr));
}

// Accesses to memory that is not there end the launch, not the process.
class CaughtAccesses {
 public:
  CaughtAccesses() {
    struct sigaction action = {};
    action.sa_sigaction = on_bad_access;
    action.sa_flags = SA_SIGINFO | SA_NODEFER;
    sigaction(SIGSEGV, &action, &segv_);
    sigaction(SIGBUS, &action, &bus_);
  }
  ~CaughtAccesses() {
    sigaction(SIGSEGV, &segv_, nullptr);
    sigaction(SIGBUS, &bus_, nullptr);
  }

 private:
  struct sigaction segv_, bus_;
};

// Clusters in any order, and always some thread that can run.
void run(unsigned clusters) {
  std::vector<unsigned> order(clusters);
  for (unsigned i = 0; i < clusters; ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), launch.random);
  while (launch.failure.empty()) {
    while (launch.resident.size() < launch.settings.clusters && !order.empty()) {
      launch.resident.push_back(make_cluster(order.back()));
      order.pop_back();
    }
    if (launch.resident.empty()) return;
    if (launch.ready.empty()) launch.ready.swap(launch.late);
    if (launch.ready.empty()) {
      launch.failure = "a deadlock: threads wait for others that never come";
      return;
    }
    std::swap(launch.ready[launch.random() % launch.ready.size()], launch.ready.back());
    Thread& thread = *launch.ready.back();
    launch.ready.pop_back();
    open_shared_memory(*thread.block);
    resume(thread);
    if (launch.failure.empty() && thread.done) finish(thread);
  }
}

void clear() {
  for (auto& cluster : launch.resident) {
    for (auto& block : cluster->blocks) unmap_shared_memory(*block);
  }
  launch.resident.clear();
  launch.ready.clear();
  launch.late.clear();
}

}  // namespace
}  // namespace emulator

using namespace emulator;

cudaError_t cudaGetLastError() { return cudaSuccess; }

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorLaunchFailure ? last_failure.c_str() : "invalid argument";
}

cudaError_t cudaGetDevice(int* index) {
  *index = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr name, int) {
  *value = name == cudaDevAttrComputeCapabilityMajor             ? 9
           : name == cudaDevAttrMaxSharedMemoryPerMultiprocessor ? kSharedPerMultiprocessor
           : name == cudaDevAttrMaxSharedMemoryPerBlockOptin     ? kSharedPerBlock
                                                                 : kReserved;
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int bytes) {
  if (bytes > kSharedPerBlock) return cudaErrorInvalidValue;
  limits[kernel] = static_cast<size_t>(bytes);
  let_another_host_thread_run();
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void* kernel,
                                           const cudaLaunchConfig_t* config) {
  *clusters = config->dynamicSmemBytes <= limits[kernel] ? 16 : 0;
  return cudaSuccess;
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel,
                                void** parameters) {
  let_another_host_thread_run();
  const unsigned blocks = config->attrs[0].val.clusterDim.x;
  if (config->gridDim.x % blocks != 0 || config->dynamicSmemBytes > limits[kernel]) {
    return cudaErrorInvalidValue;
  }
  launch.random.seed(launch.settings.seed);
  launch.threads_per_block = config->blockDim.x;
  launch.blocks_per_cluster = blocks;
  launch.shared_bytes = last_shared_bytes = config->dynamicSmemBytes;
  launch.kernel = [=] { call_kernel(kernel, parameters); };
  launch.failure.clear();
  forget_accesses();
  const CaughtAccesses caught;
  run(config->gridDim.x / blocks);
  if (launch.failure.empty()) return cudaSuccess;
  last_failure = launch.failure;
  clear();
  return cudaErrorLaunchFailure;
}
