// GRPO loss of logits and its gradient from a single read: 4 bytes of traffic per bfloat16 logit
// for forward and backward together, where two passes need 6.
//
// A row of 152,064 bfloat16 logits is 304 kB, more than one multiprocessor holds: a cluster of
// blocks keeps it in its shared memories, exchanges the softmax statistics through distributed
// shared memory, and then knows the loss's slope and turns its copy into the gradient. Slices are
// a fifth of a multiprocessor's shared memory where a cluster of up to 8 allows it, so that one
// row's loads run under others' arithmetic, waiting and stores. Blocks are small, because every
// thread of a block goes through the exchange of statistics.
#include "device.h"
#include "grpo_row.h"
#include "logits_grpo_loss.h"

namespace r1v3 {
namespace {

using namespace grpo;

constexpr int kLargestCluster = 8;  // portable on every architecture with clusters
constexpr int kResident = 5;        // blocks of a multiprocessor, where rows allow it

struct Arguments {
  RowLayout logits, gradient;
  int64_t width, vocab;
  GrpoTokens tokens;
  float temperature;
  TokenOptions options;
  float *logprobs, *entropy;
};

// Before sm_90 the kernel is empty, and nobody launches it.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

template <typename T>
__device__ T* row_of(const RowLayout& layout, uint32_t row) {
  // A launch has less than 2^31 rows, and dividing 64 bits is a hundred instructions.
  const auto inner = static_cast<uint32_t>(layout.inner);
  return static_cast<T*>(layout.data) + row / inner * layout.stride_outer +
         row % inner * layout.stride_inner;
}

__device__ Token token_of(const GrpoTokens& tokens, int64_t row, float temperature) {
  Token token;
  token.temperature = temperature;
  token.label = tokens.labels[row];
  token.loss_scale = tokens.loss_scale[row];
  token.has_old = tokens.old_logprobs != nullptr;
  token.has_ref = tokens.ref_logprobs != nullptr;
  token.advantage = token.old_logprob = token.ref_logprob = 0.0f;
  token.weight = 1.0f;
  if (token.loss_scale != 0.0f) {  // what a masked token holds is never read
    if (tokens.temperatures != nullptr) {
      token.temperature = static_cast<float>(tokens.temperatures[row]);
    }
    token.advantage = tokens.advantages[row];
    if (token.has_old) token.old_logprob = tokens.old_logprobs[row];
    if (token.has_ref) token.ref_logprob = tokens.ref_logprobs[row];
    if (tokens.weights != nullptr) token.weight = tokens.weights[row];
  }
  return token;
}

template <typename T>
__device__ __forceinline__ void accumulate_group(State& state, const Vector* shared,
                                                 const Slice& slice, int group, float scale) {
  const int end = group_begin(slice.steps, group + 1);
  for (int step = group_begin(slice.steps, group); step < end; ++step) {
    const int v = step * kThreads + threadIdx.x;
    if (v >= slice.count) break;
    float x[kLanes<T>];
    unpack<T>(shared[v], x);
    accumulate(state, x, scale);
  }
}

__device__ State merge_lanes(State state, int width, float scale) {
  for (int offset = width / 2; offset > 0; offset /= 2) {
    const State other = {__shfl_down_sync(~0u, state.m, offset),
                         __shfl_down_sync(~0u, state.s, offset),
                         __shfl_down_sync(~0u, state.w, offset),
                         __shfl_down_sync(~0u, state.t, offset)};
    state = merge(state, other, scale);
  }
  return state;  // in lane 0
}

template <typename T>
__device__ void fill_zero(T* out, int64_t begin, int64_t end, int rank, int blocks) {
  for (int64_t i = begin + rank * kThreads + threadIdx.x; i < end; i += blocks * kThreads) {
    out[i] = from_float<T>(0.0f);
  }
}

template <typename T>
__device__ void write_gradient(T* out, const Vector* shared, const Slice& slice, float loose,
                               const Result& result, float scale) {
  if (slice.loose >= 0) {
    const float value =
        result.pull == 0.0f ? 0.0f : gradient(loose, result, scale, slice.loose_token);
    out[slice.loose] = from_float<T>(value);
  }
  T* to = out + slice.column;
  const bool aligned = reinterpret_cast<uintptr_t>(to) % kVectorBytes == 0;
  for (int v = threadIdx.x; v < slice.count; v += kThreads) {
    float x[kLanes<T>];
    unpack<T>(shared[v], x);
    gradient(x, result, scale, v == slice.token_vector ? slice.token_lane : -1);
    if (aligned) {
      const Vector packed = pack<T>(x);
      const uint32_t(&words)[4] = packed.words;
      __stcs(reinterpret_cast<uint4*>(to) + v, uint4{words[0], words[1], words[2], words[3]});
    } else {
#pragma unroll
      for (int i = 0; i < kLanes<T>; ++i) to[v * kLanes<T> + i] = from_float<T>(x[i]);
    }
  }
}

#endif

// Shared memory of a block: its vectors of the row follow.
struct Exchange {
  State warps[kWarps];
  State blocks[kLargestCluster];
};

template <typename T>
__global__ void __launch_bounds__(kThreads, kResident) logits_grpo_loss_kernel(const Arguments a) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  Exchange& exchange = *shared_memory<Exchange>();
  auto* shared = reinterpret_cast<Vector*>(&exchange + 1);
  const int blocks = cluster_blocks();
  const int rank = cluster_rank();
  const int thread = static_cast<int>(threadIdx.x);
  const uint32_t row = blockIdx.x / static_cast<uint32_t>(blocks);
  const T* in = row_of<T>(a.logits, row);
  T* out = row_of<T>(a.gradient, row);
  const bool writes = a.gradient.data != nullptr;
  const Token token = token_of(a.tokens, row, a.temperature);
  if (token.loss_scale == 0.0f || token.label == kIgnored) {
    // Every block of the cluster takes this way: nobody waits for it.
    if (rank == 0 && thread == 0) a.logprobs[row] = a.entropy[row] = 0.0f;
    if (!writes) return;
    const Split split = split_row<T>(reinterpret_cast<uintptr_t>(out), a.vocab, blocks);
    const Slice slice = slice_of<T>(split, -1, rank, blocks, thread);
    const Vector zero = {{0, 0, 0, 0}};
    if (slice.loose >= 0) out[slice.loose] = from_float<T>(0.0f);
    auto* to = reinterpret_cast<Vector*>(out + slice.column);
    for (int v = thread; v < slice.count; v += kThreads) to[v] = zero;
    fill_zero(out, a.vocab, a.width, rank, blocks);
    return;
  }
  announce_start();
  const Split split = split_row<T>(reinterpret_cast<uintptr_t>(in), a.vocab, blocks);
  const Slice slice = slice_of<T>(split, token.label, rank, blocks, thread);
  const uint64_t policy = evict_first();
  const T* from = in + slice.column;
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    const int end = group_begin(slice.steps, group + 1);
    for (int step = group_begin(slice.steps, group); step < end; ++step) {
      const int v = step * kThreads + thread;
      if (v < slice.count) copy_vector(shared + v, from + v * kLanes<T>, policy);
    }
    commit_copies();
  }
  const float scale = scale_of(token.temperature);
  State state = empty_state();
  float loose = 0.0f;
  if (slice.loose >= 0) {
    loose = to_float(in[slice.loose]);
    const float x[1] = {loose};
    accumulate(state, x, scale);
  }
  static_assert(kGroups == 4, "one wait per group");
  wait_for_copies<3>();
  accumulate_group<T>(state, shared, slice, 0, scale);
  wait_for_copies<2>();
  accumulate_group<T>(state, shared, slice, 1, scale);
  wait_for_copies<1>();
  accumulate_group<T>(state, shared, slice, 2, scale);
  wait_for_copies<0>();
  accumulate_group<T>(state, shared, slice, 3, scale);
  if (slice.loose_token) state.t = loose;
  if (slice.token_vector >= 0 && slice.token_vector % kThreads == thread) {
    state.t = to_float(reinterpret_cast<const T*>(shared + slice.token_vector)[slice.token_lane]);
  }
  state = merge_lanes(state, 32, scale);
  if (thread % 32 == 0) exchange.warps[thread / 32] = state;
  __syncthreads();
  if (thread < 32) {
    state = merge_lanes(thread < kWarps ? exchange.warps[thread] : empty_state(), kWarps, scale);
  }
  wait_for_start();
  if (thread < 32) {
    state = {__shfl_sync(~0u, state.m, 0), __shfl_sync(~0u, state.s, 0),
             __shfl_sync(~0u, state.w, 0), __shfl_sync(~0u, state.t, 0)};
    if (thread < blocks) *in_block(&exchange.blocks[rank], thread) = state;
  }
  // No block reads another's memory after this, so each may end when it likes.
  cluster_barrier();
  state = exchange.blocks[0];
  for (int other = 1; other < blocks; ++other) {
    state = merge(state, exchange.blocks[other], scale);
  }
  const Result result = finish(state, token, a.vocab, a.options);
  if (rank == 0 && thread == 0) {
    a.logprobs[row] = result.logprob;
    a.entropy[row] = result.entropy;
  }
  if (!writes) return;
  write_gradient(out, shared, slice, loose, result, scale);
  fill_zero(out, a.vocab, a.width, rank, blocks);
#endif
}

// Shared memory of a block of a cluster that holds a row.
int64_t block_bytes(int dtype, int64_t vocab, int blocks) {
  const int64_t vectors = vocab / (dtype == 0 ? kLanes<float> : kLanes<bf16>);
  return static_cast<int64_t>(sizeof(Exchange)) + (vectors + blocks - 1) / blocks * kVectorBytes;
}

const void* kernel_of(int dtype) {
  if (dtype == 0) return reinterpret_cast<const void*>(&logits_grpo_loss_kernel<float>);
  return reinterpret_cast<const void*>(&logits_grpo_loss_kernel<bf16>);
}

struct Launch {
  cudaLaunchAttribute cluster;
  cudaLaunchConfig_t config = {};

  Launch(int blocks, int64_t n_rows, size_t bytes, cudaStream_t stream) {
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {static_cast<unsigned>(blocks), 1, 1};
    config.gridDim = dim3(static_cast<unsigned>(blocks * n_rows));
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = bytes;
    config.stream = stream;
    config.attrs = &cluster;
    config.numAttrs = 1;
  }
};

// What decides how long a row a block can hold.
struct Device {
  int major = 0, shared_per_multiprocessor = 0, shared_per_block = 0, reserved_per_block = 0;

  bool read() {
    int index = 0;
    if (cudaGetDevice(&index) != cudaSuccess) return false;
    const auto get = [index](int& value, cudaDeviceAttr name) {
      return cudaDeviceGetAttribute(&value, name, index) == cudaSuccess;
    };
    return get(major, cudaDevAttrComputeCapabilityMajor) &&
           get(shared_per_multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor) &&
           get(shared_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin) &&
           get(reserved_per_block, cudaDevAttrReservedSharedMemoryPerBlock);
  }
};

// As much shared memory for the kernel as the device gives a block. Not as much as the next launch
// needs: another host thread's launch would find the limit changed.
bool allow_shared_memory(int dtype, const Device& device) {
  return cudaFuncSetAttribute(kernel_of(dtype), cudaFuncAttributeMaxDynamicSharedMemorySize,
                              device.shared_per_block) == cudaSuccess;
}

// Whether clusters of `blocks` can run with `resident` blocks on each multiprocessor.
bool fits(int dtype, int64_t vocab, int blocks, int resident, const Device& device) {
  const int64_t bytes = block_bytes(dtype, vocab, blocks);
  if (bytes > device.shared_per_block) return false;
  const int64_t all = (bytes + device.reserved_per_block) * resident;
  if (all > device.shared_per_multiprocessor) return false;
  int clusters = 0;
  const Launch launch(blocks, 1, static_cast<size_t>(bytes), nullptr);
  return cudaOccupancyMaxActiveClusters(&clusters, kernel_of(dtype), &launch.config) ==
             cudaSuccess &&
         clusters > 0;
}

}  // namespace

int logits_grpo_loss_cluster(int dtype, int64_t vocab) {
  Device device;
  int found = 0;
  if (device.read() && device.major >= 9 && allow_shared_memory(dtype, device)) {
    for (int resident = kResident; resident > 0; --resident) {
      for (int blocks = 1; blocks <= kLargestCluster && found == 0; blocks *= 2) {
        if (fits(dtype, vocab, blocks, resident, device)) found = blocks;
      }
    }
  }
  cudaGetLastError();  // a refusal is an answer, not an error of the next call
  return found;
}

const char* logits_grpo_loss_cuda(const RowLayout& logits, const RowLayout& gradient, int dtype,
                                  int64_t n_rows, int64_t width, int64_t vocab,
                                  const GrpoTokens& tokens, double temperature,
                                  const GrpoOptions& options, float* logprobs, float* entropy,
                                  int blocks, void* stream) {
  if (n_rows == 0) return nullptr;
  if (n_rows > INT32_MAX / blocks) return "too many rows for one launch";
  Arguments arguments = {logits, gradient, width, vocab, tokens, static_cast<float>(temperature),
                         single_precision(options), logprobs, entropy};
  const auto bytes = static_cast<size_t>(block_bytes(dtype, vocab, blocks));
  const void* kernel = kernel_of(dtype);
  const Launch launch(blocks, n_rows, bytes, static_cast<cudaStream_t>(stream));
  void* parameters[] = {&arguments};
  const cudaError_t status = cudaLaunchKernelExC(&launch.config, kernel, parameters);
  if (status == cudaSuccess) return nullptr;
  cudaGetLastError();
  return cudaGetErrorString(status);
}

}  // namespace r1v3
